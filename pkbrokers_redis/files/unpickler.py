"""Reading pickles that strangers send: an allow-list of names, none of which runs code of the file's choice.

`pickle.load` of a stranger's file is running their program. Here every name a pickle asks for is looked up
in `ALLOWED`, letter by letter; anything else is refused by name, and what is allowed are descriptions
(`described`), so that even a frame that lies about itself meets checks instead of pandas' internals.
"""

from __future__ import annotations

import datetime as dt
import io
import pickle
from pathlib import Path
from typing import Any

from pkbrokers_redis.errors import InputFileError, RefusedPickle
from pkbrokers_redis.files import pickle_described as d
from pkbrokers_redis.files.pickle_preflight import check_opcodes, nodes_max
from pkbrokers_redis.files.pickle_rebuilt import rebuild

PICKLE_BYTES_MAX = 1 << 30  # a year of days of 9,000 instruments is 0.11 GB


def _names(modules: str, names: str, answer: Any) -> dict[tuple[str, str], Any]:
    return {(module, name): answer for module in modules.split() for name in names.split()}


_ARRAYS = "pandas.core.arrays"
ALLOWED: dict[tuple[str, str], Any] = {
    # Python
    **_names("builtins __builtin__", "bytearray", d.Bytes),
    **_names("builtins __builtin__", "slice", slice),
    **_names("builtins __builtin__", "getattr", d.GetAttr),
    **_names("collections", "OrderedDict", d.Dict),
    **_names("_codecs", "encode", d.Latin),
    **{
        ("datetime", kind.__name__): kind
        for kind in (dt.datetime, dt.date, dt.time, dt.timedelta, dt.timezone)
    },
    **_names("zoneinfo", "ZoneInfo", d.Zone),
    **_names("pytz", "_p _UTC", d.Zone),
    **_names("pytz", "FixedOffset", d.FixedZone),
    # numpy 1 and 2
    **_names("numpy", "dtype", d.Dtype),
    **_names("numpy", "ndarray", d.Array),
    **_names("numpy.core.multiarray numpy._core.multiarray", "_reconstruct", d.Reconstruct),
    **_names("numpy.core.multiarray numpy._core.multiarray", "scalar", d.Scalar),
    **_names("numpy.core.numeric numpy._core.numeric", "_frombuffer", d.FromBuffer),
    # pandas 1.3 to 3: frames, their blocks and axes
    **_names("pandas pandas.core.frame", "DataFrame", d.Frame),
    **_names("pandas pandas.core.series", "Series", d.Series),
    **_names("pandas.core.internals.managers", "BlockManager SingleBlockManager", d.Manager),
    **_names("pandas._libs.internals", "_unpickle_block", d.Block),
    **_names("pandas.core.indexes.base", "_new_Index", d.Labels),
    **_names("pandas.core.indexes.datetimes", "_new_DatetimeIndex", d.Labels),
    **_names("pandas pandas.core.indexes.base", "Index", d.IndexKind),
    **_names("pandas pandas.core.indexes.datetimes", "DatetimeIndex", d.IndexKind),
    **_names("pandas.core.indexes.numeric", "Int64Index Float64Index", d.IndexKind),
    **_names("pandas pandas.core.indexes.range", "RangeIndex", d.RangeKind),
    # arrays and types of columns
    **_names("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked", d.Backed),
    **_names(f"pandas.arrays {_ARRAYS}.datetimes", "DatetimeArray", d.Times),
    **_names(f"pandas.arrays {_ARRAYS}.timedeltas", "TimedeltaArray", d.Times),
    **_names(f"pandas.arrays {_ARRAYS}.string_", "StringArray", d.Texts),
    **_names(f"pandas.arrays {_ARRAYS}.string_arrow", "ArrowStringArray", d.ArrowTexts),
    **_names(f"pandas.arrays {_ARRAYS}.integer", "IntegerArray", d.Masked),
    **_names(f"pandas.arrays {_ARRAYS}.floating", "FloatingArray", d.Masked),
    **_names(f"pandas.arrays {_ARRAYS}.boolean", "BooleanArray", d.Masked),
    **_names(f"pandas {_ARRAYS}.categorical", "Categorical", d.Codes),
    **_names("pandas pandas.core.dtypes.dtypes", "DatetimeTZDtype CategoricalDtype", d.Kind),
    **_names(f"pandas {_ARRAYS}.string_", "StringDtype", d.Kind),
    **_names(f"pandas {_ARRAYS}.integer", "Int8Dtype Int16Dtype Int32Dtype Int64Dtype", d.Kind),
    **_names(f"pandas {_ARRAYS}.integer", "UInt8Dtype UInt16Dtype UInt32Dtype UInt64Dtype", d.Kind),
    **_names(f"pandas {_ARRAYS}.floating", "Float32Dtype Float64Dtype", d.Kind),
    **_names(f"pandas {_ARRAYS}.boolean", "BooleanDtype", d.Kind),
    **_names("pyarrow.lib", "_restore_array", d.ArrowArray),
    **_names("pyarrow.lib", "py_buffer", d.Bytes),
    # moments
    **_names("pandas._libs.tslibs.timestamps", "_unpickle_timestamp", d.Stamp),
    **_names("pandas._libs.tslibs.timedeltas", "_timedelta_unpickle", d.Span),
    **_names("pandas._libs.tslibs.nattype", "_nat_unpickle __nat_unpickle", d.NotATime),
    **_names("pandas pandas._libs.missing", "NA", d.Missing),
    **_names("pandas._libs.tslibs.offsets", "Minute Hour Second Day BusinessDay MonthEnd", d.Ignored),
}


class _TypeName(d.Plain):
    """`pyarrow.lib.type_for_alias("large_string")` → the alias."""

    def __new__(cls, alias: Any) -> Any:
        return d.shown(alias, 20)


ALLOWED["pyarrow.lib", "type_for_alias"] = _TypeName


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        answer = ALLOWED.get((module, name))
        if answer is None:
            asked = f"{module}.{name}"[:120]
            raise RefusedPickle(f"the pickle asks for {asked!r}", asked)
        return answer


def load_pickle(source: Path | bytes, bytes_max: int = PICKLE_BYTES_MAX) -> Any:
    """The pickled dicts, lists, numbers, times, arrays and DataFrames; frames and arrays are new ones.

    Protocols 2 to 5 (and 0, 1 as far as they hold nothing else). Raises RefusedPickle, a subclass of
    InputFileError, for any name that is not in `ALLOWED`, a damaged file, or one larger than `bytes_max`;
    FileNotFoundError and other OSErrors for a path that cannot be read.
    """
    data = source if isinstance(source, bytes) else _read(source, bytes_max)
    if len(data) > bytes_max:
        raise InputFileError(
            f"the pickle has {len(data):,} bytes, more than {bytes_max:,}",
            "read it in parts, or raise the limit",
        )
    check_opcodes(data)
    try:
        return rebuild(_AllowList(io.BytesIO(data), encoding="latin1").load(), nodes_max(len(data)))
    except InputFileError:
        raise
    except (RecursionError, MemoryError) as error:
        raise d.refuse(type(error).__name__) from error
    except Exception as error:
        # What a file that lies brings about: opcodes on an empty stack, missing keys, values of another type.
        raise d.refuse(f"{type(error).__name__}: {str(error)[:80]}") from error


def _read(path: Path, bytes_max: int) -> bytes:
    with path.open("rb") as file:
        return file.read(bytes_max + 1)
