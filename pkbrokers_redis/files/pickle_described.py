"""What a pickle may describe: stand-ins for pandas' and numpy's own classes, which are never built by it.

A pickle of a DataFrame names pandas' internals and fills them with whatever it likes; done for real, flags
of a dtype or buffers of an Arrow array that lie are enough to write into memory. So every name is answered
by one of these, which note what they are told, check it, and give arrays of their own making. It reads
frames of pandas 1.3 to 3 and numpy 1 and 2 alike, whichever are installed here.

    DataFrame(__setstate__: _mgr=BlockManager((block, …), [columns, index]))
    block     _unpickle_block(values, slice(first, end, step) or positions, 2)
    values    ndarray | DatetimeArray | IntegerArray | …
    index     _new_DatetimeIndex(DatetimeIndex, {data, name, freq}), _new_Index(Index | RangeIndex, {…})
    ndarray   _reconstruct(ndarray, (0,), b"b") + (1, shape, dtype, fortran, bytes) | _frombuffer(…)
"""

from __future__ import annotations

import datetime as dt
from math import prod
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import numpy.typing as npt
import pandas as pd

from pkbrokers_redis.errors import RefusedPickle

UNITS = ("s", "ms", "us", "ns")
RESOLUTIONS = {7: "s", 8: "ms", 9: "us", 10: "ns"}  # pandas' NPY_DATETIMEUNIT
DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "O8", "M8", "m8"}
ZONE_NAME_MAX = 64


class Sealed(type):
    """Classes that a pickle cannot write on (BUILD on a class is setattr): the next file finds them new."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise RefusedPickle(f"the pickle changes a class ({cls.__name__}.{name})", name)


class Plain(metaclass=Sealed):
    """Base of the stand-ins: no attribute but its own."""

    __slots__ = ()


def refuse(what: str) -> RefusedPickle:
    """For numbers and shapes that cannot be."""
    return RefusedPickle(f"the pickle is damaged ({what})")


def shown(value: Any, length: int) -> str:
    """For messages. A text's beginning, of others the type: their own text may be longer than memory."""
    return value[:length] if isinstance(value, str) else type(value).__name__


class Dtype(Plain):
    """`numpy.dtype("f8", False, True)`; of the state only the byte order and a datetime's unit are heard."""

    __slots__ = ("code", "order", "unit")
    code: str
    order: str
    unit: str

    def __new__(cls, code: Any, align: Any = False, copy: Any = False) -> Dtype:
        sized = isinstance(code, str) and code[:1] in "USV" and code[1:].isdecimal() and len(code) <= 9
        if not isinstance(code, str) or not (code in DTYPES or (sized and code[0] != "V")):
            raise RefusedPickle(
                f"the pickle holds an array of {shown(code, 20)!r}", f"numpy.dtype({shown(code, 20)!r})"
            )
        self = super().__new__(cls)
        self.code, self.order, self.unit = code, "<", "ns"
        return self

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise refuse("a dtype's state")
        self.order = "<" if state[1] == "=" else state[1]
        if self.code in ("M8", "m8"):
            _, told = state[-1]
            self.unit = told[0].decode() if isinstance(told[0], bytes) else shown(told[0], 9)
            if self.unit not in (*UNITS, "D") or told[1] != 1:
                raise refuse("a time unit")

    @property
    def is_object(self) -> bool:
        return self.code == "O8"

    def make(self) -> np.dtype[Any]:
        """The dtype, made from its description."""
        if self.is_object:
            return np.dtype(object)
        return np.dtype(self.order + self.code + (f"[{self.unit}]" if self.code in ("M8", "m8") else ""))


class Array(Plain):
    """A numpy array: `.values` is one of our own, sizes checked."""

    __slots__ = ("values",)
    values: npt.NDArray[Any]

    def __new__(cls) -> Array:
        self = super().__new__(cls)
        self.values = np.empty(0)
        return self

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise refuse("an array's state")
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> Array:
        """From bytes, or a list where the dtype is object."""
        if not isinstance(dtype, Dtype) or not isinstance(shape, tuple) or not 1 <= len(shape) <= 2:
            raise refuse("an array's shape")
        if not all(type(n) is int and 0 <= n <= 2**40 for n in shape) or order not in ("C", "F"):
            raise refuse("an array's shape")
        kind = dtype.make()
        if dtype.is_object:
            if not isinstance(content, list) or len(content) != prod(shape):
                raise refuse("an array's length")
            flat: npt.NDArray[Any] = np.empty(len(content), object)
            for i, each in enumerate(content):  # numpy would look into lists
                flat[i] = each
        else:
            if not isinstance(content, bytes | bytearray) or len(content) != prod(shape) * kind.itemsize:
                raise refuse("an array's length")
            flat = np.frombuffer(bytes(content), kind)
        self.values = flat.reshape(shape, order=order)
        return self


class Reconstruct(Plain):
    """numpy's `_reconstruct(ndarray, (0,), b"b")`: an array whose state follows."""

    def __new__(cls, kind: Any, shape: Any, code: Any) -> Any:
        if kind is not Array or shape != (0,):
            raise refuse("an array's beginning")
        return Array()


class FromBuffer(Plain):
    """numpy's `_frombuffer(bytes, dtype, shape, order)`, protocol 5."""

    def __new__(cls, content: Any, dtype: Any, shape: Any, order: Any, *axis_order: Any) -> Any:
        return Array().fill(content, dtype, shape, order)


class Scalar(Plain):
    """numpy's `scalar(dtype, bytes)`."""

    def __new__(cls, dtype: Any, content: Any) -> Any:
        if isinstance(dtype, Dtype) and dtype.is_object:
            raise refuse("a scalar")
        return Array().fill(content, dtype, (1,), "C").values[0]


class Latin(Plain):
    """`_codecs.encode(text, "latin1")`: how protocol 2 writes bytes."""

    def __new__(cls, text: Any = "", encoding: Any = "latin1") -> Any:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise RefusedPickle(f"the pickle asks for the codec {shown(encoding, 20)!r}", "_codecs.encode")
        return text.encode("latin1")


class Bytes(Plain):
    """`bytearray(b"…")`; a number would be a request for that much memory."""

    def __new__(cls, content: Any = b"", encoding: Any = "latin1") -> Any:
        if isinstance(content, str) and encoding in ("latin1", "latin-1"):
            content = content.encode("latin1")
        if not isinstance(content, bytes | bytearray):
            raise refuse("a buffer")
        return bytes(content)


class Dict(Plain):
    """`OrderedDict()`: filled by the opcodes that follow."""

    def __new__(cls, *pairs: Any) -> Any:
        return dict(*pairs[:1])


class Zone(Plain):
    """`ZoneInfo._unpickle(name, …)` and `pytz._p(name, …)`: the zone of that name, from here."""

    def __new__(cls, name: Any = "UTC", *rest: Any) -> Any:
        return made_zone(name)


class FixedZone(Plain):
    """`pytz.FixedOffset(330)`, in minutes."""

    def __new__(cls, minutes: Any) -> Any:
        return dt.timezone(dt.timedelta(minutes=minutes))


class GetAttr(Plain):
    """`getattr(ZoneInfo, "_unpickle")`, the one use pickles of frames make of it."""

    def __new__(cls, owner: Any, name: Any) -> Any:
        if owner is not Zone or name != "_unpickle":
            owned = getattr(owner, "__name__", type(owner).__name__)
            raise RefusedPickle(
                f"the pickle asks for getattr({owned}, {shown(name, 40)!r})", "builtins.getattr"
            )
        return Zone


class Stamp(Plain):
    """pandas' `_unpickle_timestamp(value, freq, tz, resolution)`."""

    def __new__(cls, value: Any, freq: Any, zone: Any, resolution: Any = 10) -> Any:
        if resolution not in RESOLUTIONS or type(value) is not int:
            raise refuse("a timestamp")
        return pd.Timestamp(value, unit=RESOLUTIONS[resolution], tz=zone_of(zone))


class Span(Plain):
    """pandas' `_timedelta_unpickle(value, resolution)`."""

    def __new__(cls, value: Any, resolution: Any = 10) -> Any:
        return pd.Timedelta(f"{int(value)} {RESOLUTIONS.get(resolution, 'ns')}")


class NotATime(Plain):
    """pandas' NaT; a stand-in too, for there is only one NaT and a pickle could write on it."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)


class Missing(Plain):
    """pandas.NA, named rather than called."""


class Ignored(Plain):
    """A frequency: an index does without."""

    def __new__(cls, *_: Any) -> Any:
        return None


class Noted(Plain):
    """Base of what a frame is made of: arguments and state as they came."""

    __slots__ = ("arguments", "state")
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Any:
        self = super().__new__(cls)
        self.arguments, self.state = arguments, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Frame(Noted):
    """pandas.DataFrame"""


class Series(Noted):
    """pandas.Series"""


class Manager(Noted):
    """BlockManager, SingleBlockManager"""


class Block(Noted):
    """`_unpickle_block(values, placement, ndim)`"""


class Labels(Noted):
    """`_new_Index(class, {data, name})` and `_new_DatetimeIndex`"""


class IndexKind(Plain):
    """pandas.Index and DatetimeIndex: only ever named."""


class RangeKind(Plain):
    """pandas.RangeIndex: only ever named."""


class Times(Noted):
    """DatetimeArray, TimedeltaArray: `(dtype, values, …)`"""


class Masked(Noted):
    """IntegerArray, FloatingArray, BooleanArray: `{_data, _mask}`"""


class Texts(Noted):
    """StringArray: `(dtype, values, …)`"""


class Codes(Noted):
    """Categorical: `(dtype, codes, …)`"""


class ArrowTexts(Noted):
    """ArrowStringArray: `{_pa_array}`"""


class ArrowArray(Noted):
    """`pyarrow.lib._restore_array((type, length, nulls, offset, buffers, …))`"""


class Kind(Noted):
    """DatetimeTZDtype, CategoricalDtype, StringDtype, Int64Dtype …"""


class Backed(Plain):
    """pandas' `__pyx_unpickle_NDArrayBacked(class, checksum, state)`."""

    def __new__(cls, kind: Any, checksum: Any, state: Any) -> Any:
        if kind not in (Times, Texts, Codes):
            raise refuse("an extension array")
        made = kind()
        made.state = state
        return made


def made_zone(name: Any) -> dt.tzinfo:
    """The zone of that name. Raises RefusedPickle."""
    try:
        if not isinstance(name, str) or len(name) > ZONE_NAME_MAX:
            raise ValueError
        return ZoneInfo(name)
    except (ValueError, ZoneInfoNotFoundError, OSError):
        raise refuse(f"a time zone {shown(name, 20)!r}") from None


def zone_of(zone: Any) -> dt.tzinfo | None:
    """A tzinfo, a name, or none."""
    if isinstance(zone, str):
        return made_zone(zone)
    if zone is None or isinstance(zone, dt.tzinfo):
        return zone
    raise refuse("a time zone")
