"""Read candle pickles of unknown origin in a child process with limits.

`pickle.load` runs whatever program the file holds. This reader has three lines of defence:

    allow-list   `find_class` answers only the names that pickled tables need, and answers with the passive
                 stand-ins below. No class of pandas and no function of the file's choice is called.
    child        A fresh interpreter with limits on memory, CPU time, wall clock and output reads the file,
                 so a memory bomb, a hash-collision bomb or endless references cost one line.
    Arrow        The child returns one Arrow table of numbers. The parent never unpickles anything.

The stand-ins describe what pandas 1.3 to 3.1 and numpy 1 and 2 write:

    DataFrame   __setstate__({"_mgr": BlockManager((block, …), [columns, index])})
    block       _unpickle_block(values, slice or positions, ndim)
    values      ndarray | DatetimeArray | IntegerArray | …
    index       _new_DatetimeIndex(class, {data, name, tz}), _new_Index(class, {…})
    ndarray     _reconstruct(ndarray, (0,), b"b") + (1, shape, dtype, fortran, content) | _frombuffer(…)
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import mmap
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from pkbrokers_redis.errors import InputFileError, RefusedPickle
from pkbrokers_redis.files.frames import COLUMNS, Frames, frame_of, is_symbol, kolkata_ns, tidy_rows

PICKLE_BYTES_MAX = 1 << 30  # a year of days of 9,000 instruments is 0.11 GB
MEMORY_BYTES_MIN = 512 << 20  # what the child may use on top of its libraries, whatever the file's size
MEMORY_FACTOR = 16  # and for each byte of the file: lists of floats take up to 5 times their pickled size
CPU_SECONDS_MIN = 20.0  # of the child, whatever the file's size
CPU_BYTES_A_SECOND = 1 << 20  # and a second for each of these; 5 to 20 MB/s are normal
WALL_FACTOR = 5  # wall clock for a second of CPU time, on a busy machine
RESULT_BYTES_MAX = 1 << 30  # 9,000 instruments × 251 days are 0.11 GB
MESSAGE_LENGTH_MAX = 100
# The child needs to find Python, its libraries and their locale. It gets no secret and no PKB_ setting.
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")


class ReadFrames(NamedTuple):
    """The frames of a file.

    Attributes:
        frames: Symbol → frame (`files.frames`).
        refused: How many entries were no table of candles.
        why: The reason for the first refused entry, one line.
    """

    frames: Frames
    refused: int
    why: str


# --- parent


def read_frames(source: Path | bytes, bytes_max: int = PICKLE_BYTES_MAX) -> ReadFrames:
    """Return the frames of a pickle in any of upstream's shapes, from any source.

    Entries that are no table of candles are counted and left out.

    Args:
        source: The file, or its content.
        bytes_max: Largest accepted size of the file.

    Returns:
        Symbol → frame: float64 `open high low close`, int64 (or float64) `volume`, index in Asia/Kolkata.

    Raises:
        RefusedPickle: The file asks for a name that tables do not need, is damaged, or exceeded a limit.
        InputFileError: It is larger than `bytes_max`, or holds no dict of symbols.
        OSError: The path cannot be read.
    """
    with _opened(source) as file, tempfile.TemporaryFile() as result:
        size = os.fstat(file.fileno()).st_size
        if size > bytes_max:
            raise InputFileError(
                f"the pickle has {size:,} bytes, more than {bytes_max:,}",
                "read it in parts, or raise the limit",
            )
        cpu_seconds = CPU_SECONDS_MIN + size / CPU_BYTES_A_SECOND
        memory_bytes = MEMORY_BYTES_MIN + MEMORY_FACTOR * size
        limits = {"cpu_seconds": cpu_seconds, "memory_bytes": memory_bytes, "result_bytes": RESULT_BYTES_MAX}
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        try:
            child = subprocess.run(
                [sys.executable, "-P", "-m", "pkbrokers_redis.files.pickle_reader", json.dumps(limits)],
                stdin=file,
                stdout=result,
                stderr=subprocess.DEVNULL,
                env={**environment, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                timeout=cpu_seconds * WALL_FACTOR,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _refused(f"reading took longer than {cpu_seconds * WALL_FACTOR:.0f} s", "time") from None
        if child.returncode < 0:
            raise _refused(f"reading was ended by signal {-child.returncode} (time or memory)", "limits")
        if child.returncode:
            result.seek(0)
            raise _error_of(result.read(4096))
        return _frames_of(result)


def _opened(source: Path | bytes) -> IO[bytes]:
    if isinstance(source, Path):
        return source.open("rb")
    file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    file.write(source)
    file.seek(0)
    return file


def _error_of(reply: bytes) -> InputFileError:
    try:
        fields = json.loads(reply)
        message, name, is_refusal = fields["message"], fields["name"], fields["refused"]
    except (ValueError, KeyError, TypeError):
        return _refused("the reader failed without a reason")
    return RefusedPickle(message, name) if is_refusal else InputFileError(message, name)


def _frames_of(file: IO[bytes]) -> ReadFrames:
    """Return the frames of the child's Arrow stream."""
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # ends with the table's buffers
    table = pa.ipc.open_stream(pa.py_buffer(content)).read_all()
    counts = json.loads(table.schema.metadata[b"counts"])
    moments = table.column("moment").to_numpy().copy()
    columns = np.column_stack([table.column(name).to_numpy() for name in COLUMNS])
    ends = list(itertools.accumulate(counts["rows"]))
    frames = {}
    for symbol, start, end in zip(counts["symbols"], [0, *ends], ends, strict=False):
        index = kolkata_ns(moments[start:end])
        frames[symbol] = frame_of(index, columns[start:end])
    return ReadFrames(frames, counts["refused"], counts["why"])


def _refused(what: str, name: str = "") -> RefusedPickle:
    return RefusedPickle(f"the pickle is damaged or hostile ({what})", name)


# --- child: stand-ins for the classes and functions that a pickled table names


def _shown(value: Any) -> str:
    """Return a text's beginning, else the type's name: the text of a value can be longer than memory."""
    return repr(value[:20]) if isinstance(value, str) else type(value).__name__


class _Described:
    """Any object of the file that carries no cells itself: its arguments and its state, unread."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Frame(_Described):
    """pandas.DataFrame."""


class _Zoned(_Described):
    """DatetimeTZDtype: its array holds UTC."""


class _Backed(_Described):
    """DatetimeArray, StringArray: state (dtype, ndarray, …) in any order."""


class _Masked(_Described):
    """IntegerArray, FloatingArray: {"_data", "_mask"}."""


class _ArrowText(_Described):
    """ArrowStringArray: {"_pa_array": _restore_array((type, length, nulls, offset, buffers, …))}."""


class _Dtype:
    """`numpy.dtype("f8", False, True)`. Only the byte order and a datetime's unit of its state are used."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|[Mm]8|O8|[US]\d{1,7}", code):
            raise RefusedPickle(
                f"the pickle holds an array of {_shown(code)}", f"numpy.dtype({_shown(code)})"
            )
        self.code, self.order, self.unit = code, "<", ""

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">", "|") else "<"
        if self.code in ("M8", "m8"):
            unit = state[-1][1][0]
            unit = unit.decode() if isinstance(unit, bytes) else unit
            if unit not in ("s", "ms", "us", "ns", "D") or state[-1][1][1] != 1:
                raise _refused("a time unit")
            self.unit = f"[{unit}]"

    def array(self, content: Any, shape: Any = -1, order: str = "C") -> npt.NDArray[Any]:
        """Return an array of the content; numpy checks the sizes."""
        if self.code == "O8":
            if not isinstance(content, list):
                raise _refused("an array of objects")
            flat: npt.NDArray[Any] = np.empty(len(content), object)
            for i, cell in enumerate(content):  # an assignment of the whole list would unroll lists in it
                flat[i] = cell
        else:
            flat = np.frombuffer(content, np.dtype(self.order + self.code + self.unit))
        return flat.reshape(shape, order="F" if order == "F" else "C")


class _Array:
    """numpy.ndarray: `values` is made from the described content."""

    values: npt.NDArray[Any] = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        self.values = dtype.array(content, shape, "F" if is_fortran else "C")


def _frombuffer(content: Any, dtype: _Dtype, shape: Any, order: Any, *_: Any) -> _Array:
    made = _Array()
    made.values = dtype.array(content, shape, order)
    return made


def _backed(kind: Any, checksum: Any, state: Any) -> _Described:
    made = _Backed() if kind is _Backed else _Described()
    made.state = state
    return made


def _latin(text: Any = "", encoding: Any = "latin1") -> bytes:
    """`_codecs.encode(text, "latin1")` is how protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedPickle(f"the pickle asks for the codec {_shown(encoding)}", "_codecs.encode")
    return text.encode("latin1")


def _buffer(content: Any = b"", encoding: Any = "latin1") -> bytes:
    """`bytearray(content)`; a number in its place would be a request for that much memory."""
    if isinstance(content, str):
        return _latin(content, encoding)
    if not isinstance(content, bytes | bytearray):
        raise _refused("a buffer")
    return bytes(content)


def _zone(name: Any = "UTC", *_: Any) -> dt.tzinfo:
    """`ZoneInfo._unpickle(name, …)`, `pytz._p(name, …)`. ZoneInfo itself refuses paths."""
    if not isinstance(name, str) or len(name) > 64:
        raise _refused(f"a time zone {_shown(name)}")
    return ZoneInfo(name)


def _getattr(owner: Any, name: Any) -> Any:
    """`getattr(ZoneInfo, "_unpickle")` is the only use that pickled tables make of it."""
    if owner is not _zone or name != "_unpickle":
        raise RefusedPickle(
            f"the pickle asks for getattr({_shown(owner)}, {_shown(name)})", "builtins.getattr"
        )
    return _zone


def _stamp(value: Any, frequency: Any, zone: Any, resolution: Any = 10) -> Any:
    """pandas' `_unpickle_timestamp`; the resolution is pandas' NPY_DATETIMEUNIT."""
    unit = {7: "s", 8: "ms", 9: "us", 10: "ns"}[resolution]
    return pd.Timestamp(value, unit=unit, tz=None if zone is None else "UTC")


def _names(modules: str, names: str, answer: Any) -> dict[tuple[str, str], Any]:
    return {(module, name): answer for module in modules.split() for name in names.split()}


_ARRAYS = "pandas.core.arrays"
_MULTIARRAY = "numpy.core.multiarray numpy._core.multiarray"
ALLOWED: dict[tuple[str, str], Any] = {
    # Python
    **_names("builtins __builtin__", "bytearray", _buffer),
    **_names("builtins __builtin__", "slice", slice),
    **_names("builtins __builtin__", "getattr", _getattr),
    **_names("collections", "OrderedDict", dict),
    **_names("_codecs", "encode", _latin),
    **{("datetime", kind.__name__): kind for kind in (dt.datetime, dt.date, dt.time, dt.timedelta)},
    **_names("datetime", "timezone", dt.timezone),
    **_names("zoneinfo", "ZoneInfo", _zone),
    **_names("pytz", "_p _UTC", _zone),
    **_names("pytz", "FixedOffset", lambda minutes: dt.timezone(dt.timedelta(minutes=minutes))),
    # numpy 1 and 2
    **_names("numpy", "dtype", _Dtype),
    **_names("numpy", "ndarray", _Array),
    **_names(_MULTIARRAY, "_reconstruct", lambda *_: _Array()),
    **_names(_MULTIARRAY, "scalar", lambda dtype, content: dtype.array(content)[0]),
    **_names("numpy.core.numeric numpy._core.numeric", "_frombuffer", _frombuffer),
    # pandas 1.3 to 3.1; its other classes and constructors: PASSIVE
    **_names("pandas pandas.core.frame", "DataFrame", _Frame),
    **_names("pandas.core.dtypes.dtypes pandas", "DatetimeTZDtype", _Zoned),
    **_names("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked", _backed),
    **_names(f"pandas.arrays {_ARRAYS}.datetimes", "DatetimeArray", _Backed),
    **_names(f"pandas.arrays {_ARRAYS}.string_", "StringArray", _Backed),
    **_names(f"pandas.arrays {_ARRAYS}.string_arrow", "ArrowStringArray", _ArrowText),
    **_names(f"pandas.arrays {_ARRAYS}.integer", "IntegerArray", _Masked),
    **_names(f"pandas.arrays {_ARRAYS}.floating", "FloatingArray", _Masked),
    **_names("pandas._libs.tslibs.timestamps", "_unpickle_timestamp", _stamp),
    **_names("pandas._libs.tslibs.nattype", "_nat_unpickle __nat_unpickle", lambda *_: pd.NaT),
    **_names("pandas pandas._libs.missing", "NA", None),
    # Arrow
    **_names("pyarrow.lib", "_restore_array", _Described),
    **_names("pyarrow.lib", "py_buffer", _buffer),
    **_names("pyarrow.lib", "type_for_alias", lambda alias: alias),
}
# Indexes, dtypes, blocks, offsets …: a stand-in that does nothing, whatever the name.
PASSIVE = re.compile(r"pandas(\.\w+)* ([A-Z]\w*|_new_\w+|_unpickle_block|_timedelta_unpickle)")


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if not PASSIVE.fullmatch(f"{module} {name}"):
            full_name = f"{module}.{name}"[:120]
            raise RefusedPickle(f"the pickle asks for {full_name!r}", full_name)
        return _Described

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickle("the pickle holds a persistent id", "persistent id")


def load_tree(file: IO[bytes]) -> Any:
    """Return the tree of dicts, lists, values and stand-ins of one pickle. Only the child calls this.

    Raises:
        RefusedPickle: For a name that is not allowed, and for a damaged file.
    """
    try:
        tree = _AllowList(file, encoding="latin1").load()
    except RefusedPickle:
        raise
    except MemoryError:
        raise _refused("it needs far more memory than its size", "memory") from None
    except Exception as error:  # what a hostile file causes: an empty stack, missing keys, other types
        raise _refused(f"{type(error).__name__}: {str(error)[:MESSAGE_LENGTH_MAX]}") from None
    if file.read(1):
        raise _refused("the file goes on after the pickle's end")
    return tree


# --- child: described tables → rows


def _columns_of(frame: _Frame) -> tuple[dict[str, Any], Any]:
    """Return (column in lower case → its cells, moments) of a described frame."""
    manager = frame.state.get("_mgr", frame.state.get("_data"))
    if isinstance(manager.state, tuple):
        fields = manager.state[3]["0.14.1"]
        blocks = [(block["values"], block["mgr_locs"]) for block in fields["blocks"]]
        axes = fields["axes"]
    else:
        blocks = [block.arguments[:2] for block in manager.arguments[0]]
        axes = manager.arguments[1]
    labels = [str(label).strip().lower() for label in _index_values(axes[0])]
    places: dict[int, tuple[Any, int]] = {}  # position of the column → its block's values, row in there
    for values, placement in blocks:
        if isinstance(placement, slice):
            found = range(*placement.indices(len(labels)))
        else:
            found = placement.values.tolist()
        places.update((place, (values, line)) for line, place in enumerate(found))
    columns: dict[str, Any] = {}
    for place, label in enumerate(labels):
        if label in COLUMNS and label not in columns:
            values, line = places[place]
            cells = _values_of(values)
            columns[label] = cells if cells.ndim == 1 else cells[line]
    return columns, _index_values(axes[1])


def _index_values(index: _Described) -> Any:
    """Return the labels of a described index; of moments with a zone, an index in UTC."""
    fields = index.arguments[1]
    values = fields.get("data")
    if values is None:
        raise ValueError("an index of numbers instead of moments")
    cells = _values_of(values)
    if fields.get("tz") is not None and isinstance(cells, np.ndarray):  # pandas before 1.0
        cells = pd.DatetimeIndex(cells).tz_localize("UTC")
    return cells


def _values_of(values: Any) -> Any:
    """Return the cells of a described array: one dimension, or (columns, rows)."""
    if isinstance(values, _Array):
        return values.values
    if isinstance(values, _Masked):
        data, mask = values.state["_data"].values, values.state["_mask"].values
        return np.where(mask, np.nan, data)
    if isinstance(values, _ArrowText):
        return _arrow_texts(values.state.get("_pa_array", values.state.get("_data")))
    if isinstance(values, _Backed) and isinstance(values.state, tuple):
        cells = next(part.values for part in values.state if isinstance(part, _Array))
        if not any(isinstance(part, _Zoned) for part in values.state):
            return cells
        return pd.DatetimeIndex(cells.ravel()).tz_localize("UTC")
    raise ValueError("a column of another type")


def _arrow_texts(array: _Described) -> npt.NDArray[Any]:
    kind, length, _, first, buffers = array.arguments[0][:5]
    types = {"string": pa.string(), "large_string": pa.large_string()}
    given = [None if buffer is None else pa.py_buffer(buffer) for buffer in buffers]
    made = pa.Array.from_buffers(types[kind], length, given, offset=first)
    made.validate(full=True)  # the offsets are the file's
    return np.array(made.to_pylist(), object)


class Rows(NamedTuple):
    """Candles of all symbols, one after another: moments (epoch ns), float64[n, 5], and who has how many."""

    symbols: list[str]
    rows: list[int]
    moments: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.float64]
    refused: int
    why: str


def rows_of(tree: Any) -> Rows:
    """Return the candles of a loaded pickle.

    Raises:
        InputFileError: It is no dict of symbols.
    """
    if isinstance(tree, Mapping) and isinstance(tree.get("symbol_data"), Mapping):
        tree = tree["symbol_data"]  # upstream's "hybrid" files
    if not isinstance(tree, Mapping):
        kind = "frame" if isinstance(tree, _Frame) else type(tree).__name__.strip("_").lower()
        raise InputFileError(f"the pickle holds a {kind}", "it should hold a dict of symbols")
    symbols: list[str] = []
    moments, numbers = [np.empty(0, np.int64)], [np.empty((0, len(COLUMNS)))]
    refused, why = 0, ""
    for symbol, table in tree.items():
        try:
            if not is_symbol(symbol):
                raise ValueError("no symbol")
            index, rows = tidy_rows(_columns_of(table) if isinstance(table, _Frame) else table)
        except Exception as error:  # a described frame can be wrong in any way; it costs its entry
            if isinstance(error, MemoryError):
                raise
            refused += 1
            why = why or f"{_shown(symbol)}: {type(error).__name__}: {str(error)[:80]}"
            continue
        symbols.append(symbol)
        moments.append(index.asi8)
        numbers.append(rows)
    sizes = [len(rows) for rows in numbers[1:]]
    return Rows(symbols, sizes, np.concatenate(moments), np.concatenate(numbers), refused, why)


def _main(limits: Mapping[str, float]) -> int:
    """Read a pickle from stdin, write Arrow (or why not, as JSON) to stdout."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = int(used.ru_utime + used.ru_stime + limits["cpu_seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    result_bytes = int(limits["result_bytes"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (result_bytes, result_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform.startswith("linux"):  # elsewhere the size of the libraries is unknown
        libraries = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        memory = libraries + int(limits["memory_bytes"])
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        rows = rows_of(load_tree(sys.stdin.buffer))
        arrays = [pa.array(rows.moments), *(pa.array(column) for column in rows.numbers.T)]
        counts = {"symbols": rows.symbols, "rows": rows.rows, "refused": rows.refused, "why": rows.why}
        table = pa.table(arrays, names=["moment", *COLUMNS], metadata={"counts": json.dumps(counts)})
        with pa.ipc.new_stream(sys.stdout.buffer, table.schema) as stream:
            stream.write_table(table)
        return 0
    except MemoryError:
        error: InputFileError = _refused("it needs far more memory than its size", "memory")
    except InputFileError as raised:
        error = raised
    except Exception as raised:
        error = _refused(f"{type(raised).__name__}: {str(raised)[:MESSAGE_LENGTH_MAX]}")
    is_refusal = isinstance(error, RefusedPickle)
    name = error.name if isinstance(error, RefusedPickle) else error.hint
    message = " ".join(error.message.split())
    sys.stdout.write(json.dumps({"message": message, "name": name, "refused": is_refusal}))
    return 1


if __name__ == "__main__":
    status = _main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(status)  # freeing a hostile tree can take longer than making it
