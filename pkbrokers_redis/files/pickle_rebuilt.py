"""Described frames → real ones: arrays and labels go through pandas' public constructors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pkbrokers_redis.files import pickle_described as d
from pkbrokers_redis.files.pickle_described import refuse

DEPTH_MAX = 50
COLUMNS_MAX = 10_000
CELL_NODES_MAX = 1_000_000  # values in all lists and dicts that are cells of one column


def rebuild(tree: Any, nodes_max: int) -> Any:
    """A loaded pickle with every stand-in replaced by what it describes.

    Objects that occur twice are built once, so that a file of references to references stays small. Who reads
    it visits them each time, so they count each time: RefusedPickle beyond `nodes_max`, and for descriptions
    that do not fit together.
    """
    return _Builder(nodes_max).build(tree, 0)


class _Builder:
    def __init__(self, nodes_max: int) -> None:
        self._nodes, self._nodes_max = 0, nodes_max
        # id → (the object, kept alive; what became of it; how many nodes it has)
        self._built: dict[int, tuple[Any, Any, int]] = {}

    def build(self, node: Any, depth: int) -> Any:
        if depth > DEPTH_MAX:
            raise refuse("nested too deeply")
        if node is d.Missing:
            return pd.NA
        if not isinstance(node, dict | list | tuple | d.Plain):
            if isinstance(node, d.Sealed):
                raise refuse("a class where a value should be")
            return node
        known = self._built.get(id(node))
        if known is not None:
            self._count(known[2])
            return known[1]
        before = self._nodes
        self._count(len(node) + 1 if isinstance(node, dict | list | tuple) else 1)
        made = self._make(node, depth)
        self._built[id(node)] = (node, made, self._nodes - before)
        return made

    def _count(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > self._nodes_max:
            raise refuse("references to references without end")

    def _make(self, node: Any, depth: int) -> Any:
        if isinstance(node, dict):
            return {self.build(key, depth + 1): self.build(value, depth + 1) for key, value in node.items()}
        if isinstance(node, list | tuple):
            if all(type(each) in (float, int, str) for each in node):  # rows of numbers: most of a split file
                return node
            return type(node)(self.build(each, depth + 1) for each in node)
        if isinstance(node, d.Frame):
            return frame_of(node)
        if isinstance(node, d.Series):
            return series_of(node)
        if isinstance(node, d.Labels):
            return index_of(node)
        if isinstance(node, d.NotATime):
            return pd.NaT
        if isinstance(node, d.Kind | d.Dtype | d.Block | d.Manager | d.ArrowArray):
            return None  # means nothing outside an array or a frame
        return column_of(node)


def frame_of(frame: d.Frame) -> pd.DataFrame:
    """The frame; its attributes (`attrs`, flags) are left behind."""
    blocks, axes = _manager(frame)
    if len(axes) != 2:
        raise refuse("a frame's axes")
    labels, index = index_of(axes[0]), index_of(axes[1])
    if len(labels) > COLUMNS_MAX:
        raise refuse("a frame's columns")
    columns: dict[int, Any] = {}
    for values, placement in blocks:
        places = _places(placement, len(labels))
        table = column_of(values)
        lines = [table] if getattr(table, "ndim", 1) == 1 else list(table)
        if len(lines) != len(places):
            raise refuse("a frame's columns")
        columns.update(zip(places, lines, strict=True))
    if len(columns) != len(labels) or any(len(column) != len(index) for column in columns.values()):
        raise refuse("a frame's shape")
    made = pd.DataFrame({place: columns[place] for place in sorted(columns)}, index=index)
    made.columns = labels
    return made


def series_of(series: d.Series) -> pd.Series[Any]:
    """The series, with its name where the pickle holds one."""
    blocks, axes = _manager(series)
    state: Any = series.state
    if len(axes) != 1 or len(blocks) != 1:
        raise refuse("a series")
    index, values = index_of(axes[0]), column_of(blocks[0][0])
    if len(index) != len(values):
        raise refuse("a series")
    name = state.get("_name", state.get("name"))
    return pd.Series(values, index=index, name=name if isinstance(name, str | int) else None)


def _manager(owner: d.Frame | d.Series) -> tuple[list[tuple[Any, Any]], list[Any]]:
    """(values and placement of each block, axes) of pandas' block manager, in any of its spellings."""
    state: Any = owner.state
    manager = state.get("_mgr", state.get("_data")) if isinstance(state, dict) else None
    if not isinstance(manager, d.Manager):
        raise refuse("a frame without blocks")
    told: Any = manager.state
    if isinstance(told, tuple) and len(told) == 4 and isinstance(told[3], dict):
        told = told[3].get("0.14.1")
        if not isinstance(told, dict):
            raise refuse("a block manager")
        found = [(block["values"], block["mgr_locs"]) for block in told["blocks"]]
        return found, list(told["axes"])
    if len(manager.arguments) < 2:
        raise refuse("a block manager")
    blocks, axes = manager.arguments[:2]
    if isinstance(blocks, d.Block):
        blocks = (blocks,)
    if not isinstance(blocks, tuple | list) or not all(isinstance(block, d.Block) for block in blocks):
        raise refuse("a block manager")
    return [(block.arguments[0], block.arguments[1]) for block in blocks], list(axes)


def _places(placement: Any, width: int) -> list[int]:
    if isinstance(placement, slice):
        numbers = (placement.start, placement.stop, placement.step)
        if not all(n is None or (type(n) is int and abs(n) <= COLUMNS_MAX) for n in numbers):
            raise refuse("a block's place")
        places = list(range(*placement.indices(width)))
    elif isinstance(placement, d.Array):
        places = [int(place) for place in placement.values.ravel()]
    else:
        raise refuse("a block's place")
    if not all(0 <= place < width for place in places):
        raise refuse("a block's place")
    return places


def index_of(labels: Any) -> pd.Index[Any]:
    """An index, tz-aware where it was."""
    if not isinstance(labels, d.Labels) or len(labels.arguments) != 2:
        raise refuse("an index")
    kind, told = labels.arguments
    if not isinstance(told, dict):
        raise refuse("an index")
    name = told.get("name") if isinstance(told.get("name"), str) else None
    if kind is d.RangeKind:
        bounds = [told.get("start", 0), told.get("stop", 0), told.get("step", 1)]
        if not all(type(bound) is int and abs(bound) < 2**40 for bound in bounds) or bounds[2] == 0:
            raise refuse("a range")
        return pd.RangeIndex(bounds[0], bounds[1], bounds[2], name=name)
    if kind is not d.IndexKind:
        raise refuse("an index")
    made: pd.Index[Any] = pd.Index(column_of(told.get("data")), name=name)
    zone = d.zone_of(told.get("tz"))
    if zone is not None and isinstance(made, pd.DatetimeIndex) and made.tz is None:
        made = made.tz_localize("UTC").tz_convert(zone)  # pandas before 1.0 kept the zone beside the times
    return made


def column_of(values: Any) -> Any:
    """An array or an extension array, one dimension or (columns, rows)."""
    if isinstance(values, d.Array):
        return _texts(values.values) if values.values.dtype == object else values.values.copy()
    state: Any = getattr(values, "state", None)
    if isinstance(values, d.Masked) and isinstance(state, dict):
        return _masked(_array(state.get("_data")), _array(state.get("_mask")))
    if isinstance(values, d.ArrowTexts) and isinstance(state, dict):
        return _arrow_texts(state.get("_pa_array", state.get("_data")))
    if isinstance(values, d.Times | d.Texts | d.Codes) and isinstance(state, tuple):
        array = next((_array(each) for each in state if isinstance(each, d.Array)), None)
        dtype = next((each for each in state if isinstance(each, d.Kind)), None)
        if array is not None:
            return _backed(values, array, dtype)
    raise refuse("an array")


def _backed(values: Any, array: npt.NDArray[Any], dtype: d.Kind | None) -> Any:
    told: Any = dtype.state if dtype is not None else None
    if isinstance(values, d.Texts):
        return _texts(array)
    if isinstance(values, d.Codes):
        if not isinstance(told, dict):
            raise refuse("a categorical")
        categories = index_of(told.get("categories"))
        if array.ndim != 1 or (len(array) and not -1 <= array.min() <= array.max() < len(categories)):
            raise refuse("a categorical")
        return pd.Categorical.from_codes(array, categories=categories)
    if array.dtype.kind not in "mM":
        raise refuse("an array of times")
    zone = d.zone_of(told.get("tz")) if isinstance(told, dict) else None
    if zone is None:
        return array.copy()
    lines = [
        pd.DatetimeIndex(line.copy()).tz_localize("UTC").tz_convert(zone) for line in np.atleast_2d(array)
    ]
    return lines[0] if len(lines) == 1 else _Lines(lines)


class _Lines(list[Any]):
    """Columns of one block that are no plain table."""

    ndim = 2


def _masked(data: npt.NDArray[Any], mask: npt.NDArray[Any]) -> Any:
    if data.shape != mask.shape or data.ndim != 1 or mask.dtype != bool:
        raise refuse("a masked array")
    if data.dtype == bool:
        return pd.arrays.BooleanArray(data.copy(), mask.copy())
    if data.dtype.kind == "f":
        return pd.arrays.FloatingArray(data.copy(), mask.copy())
    if data.dtype.kind in "iu":
        return pd.arrays.IntegerArray(data.copy(), mask.copy())
    raise refuse("a masked array")


def _arrow_texts(told: Any) -> npt.NDArray[Any]:
    """Arrow's strings: offsets into one run of UTF-8, checked here rather than trusted there."""
    parts = told.arguments[0] if isinstance(told, d.ArrowArray) and len(told.arguments) == 1 else None
    if not isinstance(parts, tuple) or len(parts) < 5 or not isinstance(parts[4], list) or len(parts[4]) != 3:
        raise refuse("an Arrow array")
    kind, length, _, first, (validity, offsets, content) = parts[:5]
    width = {"string": 4, "large_string": 8}.get(kind if isinstance(kind, str) else "")
    if width is None or type(length) is not int or first != 0 or not isinstance(offsets, bytes):
        raise refuse("an Arrow array")
    if not 0 <= length < len(offsets) // width:
        raise refuse("an Arrow array")
    ends = np.frombuffer(offsets, f"<i{width}", length + 1).tolist()
    if any(not 0 <= a <= b <= len(content or b"") for a, b in pairwise(ends)):
        raise refuse("an Arrow array")
    valid = None if validity is None else np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")
    if valid is not None and len(valid) < length:
        raise refuse("an Arrow array")
    texts = np.empty(length, object)
    for i, (start, end) in enumerate(pairwise(ends)):
        present = valid is None or valid[i]
        texts[i] = bytes(content[start:end]).decode("utf-8", "replace") if present else None
    return texts


def _array(array: Any) -> npt.NDArray[Any]:
    if not isinstance(array, d.Array):
        raise refuse("an array")
    return array.values


def _texts(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An object array: what is missing in it as None; other descriptions are no values of a table."""
    _Builder(CELL_NODES_MAX).build([each for each in values.flat if isinstance(each, dict | list | tuple)], 0)
    odd = [i for i, each in enumerate(values.ravel()) if isinstance(each, d.Plain | d.Sealed)]
    if not odd:
        return values
    flat = values.ravel().copy()
    for i in odd:
        if flat[i] is not d.Missing and not isinstance(flat[i], d.NotATime):
            raise refuse("an array of objects")
        flat[i] = None
    return flat.reshape(values.shape)
