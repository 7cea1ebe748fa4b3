"""Pickles for PKScreener and scripts, in both of upstream's shapes. `read_frames` reads every shape.

    published  {"INFY": DataFrame(Open High Low Close Volume, tz-aware IST index), …}
    split      {"INFY": {"data": [[o, h, l, c, v], …], "columns": ["open", …], "index": ["2026-…", …]}, …}

Names, upstream's: `stock_data_DDMMYYYY.pkl` and `daily_candles.pkl` hold days (251 at most, a trading year),
`intraday_stock_data_DDMMYYYY.pkl` and `intraday_1m_candles.pkl` minutes.
"""

from __future__ import annotations

import datetime as dt
import io
import pickle
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from pkbrokers_redis.files.frames import (
    COLUMNS,
    Floats,
    is_whole,
    iso_texts,
    kolkata,
    midnights,
)
from pkbrokers_redis.files.pickle_reader import ReadFrames, read_frames

__all__ = ["PickledDict", "ReadFrames", "Shape", "read_frames", "shaped"]

Shape = Literal["published", "split"]

DAILY_ROWS_MAX = 251
DAILY_LATEST = "daily_candles.pkl"
INTRADAY_LATEST = "intraday_1m_candles.pkl"
PUBLISHED_COLUMNS = ("Open", "High", "Low", "Close", "Volume")
PROTOCOL = 3  # numbers its memo explicitly, so that pieces may follow one another; all Pythons 3 read it
_PRICES = pd.Index(PUBLISHED_COLUMNS[:4], dtype=object)
SYMBOLS_A_BATCH = 500  # items on the reader's stack before they are added to the dict
INDEXES_SHARED_MAX = 64  # instruments that traded on the same days share one index object


def daily_name(day: dt.date) -> str:
    """Return `stock_data_20112026.pkl`."""
    return f"stock_data_{day:%d%m%Y}.pkl"


def intraday_name(day: dt.date) -> str:
    """Return `intraday_stock_data_20112026.pkl`."""
    return f"intraday_stock_data_{day:%d%m%Y}.pkl"


class BinaryFile(Protocol):
    """A file that a pickle is written to."""

    def write(self, data: bytes, /) -> int: ...


class PickledDict:
    """Write one pickled dict item by item, so that memory holds one item only.

    A pickle is a program for a stack; an item's is `key value`, and a dict's `{ ( key value … u`. Each value
    is pickled separately and loses its first two bytes (PROTO) and its last one (STOP). Objects that many
    items share (pandas' names, the index of the days) are written once and then read from the pickle's memo:
    a year of 9,000 instruments takes 88 MiB instead of 114 (docs/decisions/0019).

    Example:
        >>> with replacing(path) as file:
        ...     pickled = PickledDict(file)
        ...     pickled.add("INFY", shaped(rows, True, "published"))
        ...     pickled.finish()
    """

    def __init__(self, file: BinaryFile) -> None:
        self.items = 0
        self._file = file
        self._open = False
        self._piece = io.BytesIO()
        self._pickler = _PortablePickler(self._piece, PROTOCOL)
        self._common: dict[int, tuple[int, Any]] = {}  # id → its number in the memo, the object
        self._indexes: set[int] = set()
        self._has_names = False  # whether pandas' names, which every frame uses, are in the memo
        file.write(pickle.PROTO + bytes([PROTOCOL]) + pickle.EMPTY_DICT)

    def add(self, key: str, value: Any) -> None:
        """Write one more item; keys must differ."""
        if not self._open:
            self._file.write(pickle.MARK)
            self._open = True
        self._file.write(self._body(key) + self._body(value))
        self.items += 1
        if self.items % SYMBOLS_A_BATCH == 0:
            self._close_batch()

    def finish(self) -> None:
        """Write the end of the dict and of the pickle."""
        self._close_batch()
        self._file.write(pickle.STOP)

    def _body(self, value: Any) -> bytes:
        if not isinstance(value, pd.DataFrame):
            return self._pickled(value)
        before, index = b"", value.index
        if id(index) not in self._indexes and len(self._indexes) < INDEXES_SHARED_MAX:
            self._indexes.add(id(index))  # the memo keeps the index, so the id stays unique
            before = self._pickled(index, is_common=True) + pickle.POP
        return before + self._pickled(value, is_common=not self._has_names)

    def _pickled(self, value: Any, is_common: bool = False) -> bytes:
        self._piece.seek(0)
        self._piece.truncate()
        self._pickler.memo = (
            self._common
        )  # the next number is its length, so only common objects keep a number
        self._pickler.dump(value)
        if is_common:
            self._common = self._pickler.memo.copy()
            self._has_names = self._has_names or isinstance(value, pd.DataFrame)
        return self._piece.getvalue()[2:-1]

    def _close_batch(self) -> None:
        if self._open:
            self._file.write(pickle.SETITEMS)
            self._open = False


class _PortablePickler(pickle.Pickler):
    """Write arrays of times in the form of pandas 1.3 to 2, which pandas 3 reads too."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, pd.arrays.DatetimeArray):
            reduced: tuple[Any, ...] = tuple(obj.__reduce__())
            function, arguments, state = reduced
            return function, arguments, (*state[:2], {})
        return NotImplemented


@lru_cache(INDEXES_SHARED_MAX)
def _index_of(starts: bytes) -> pd.DatetimeIndex:
    """Return the index of these epoch seconds (int64), the same object for the same moments."""
    return kolkata(np.frombuffer(starts, np.int64), name=None)


def published(rows: Floats, daily: bool) -> pd.DataFrame:
    """Return float64[n, 8] in the published shape. Its labels are plain objects, which pandas 2 reads too."""
    starts = rows[:, 0].astype(np.int64)
    index = _index_of((midnights(starts) if daily else starts).tobytes())
    frame = pd.DataFrame(rows[:, 1:5], index=index, columns=_PRICES)
    volume = rows[:, 5].astype(np.int64) if is_whole(rows[:, 5]) else rows[:, 5]
    frame.insert(4, PUBLISHED_COLUMNS[4], volume)
    return frame


def split(rows: Floats, daily: bool) -> dict[str, list[Any]]:
    """Return float64[n, 8] as `{"data", "columns", "index"}`."""
    starts = rows[:, 0].astype(np.int64)
    data: list[list[Any]] = rows[:, 1:6].tolist()
    for row in data:
        row[4] = int(row[4]) if row[4] == int(row[4]) else row[4]
    return {
        "data": data,
        "columns": list(COLUMNS),
        "index": iso_texts(kolkata(midnights(starts) if daily else starts)),
    }


def split_frame(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Return a frame as `{"data", "columns", "index"}`."""
    columns = [frame[name].tolist() for name in COLUMNS]
    data = [list(row) for row in zip(*columns, strict=True)]
    return {"data": data, "columns": list(COLUMNS), "index": iso_texts(pd.DatetimeIndex(frame.index))}


def shaped(rows: Floats, daily: bool, shape: Shape) -> Any:
    """Return a symbol's value in a file of that shape; of days the newest 251."""
    rows = rows[-DAILY_ROWS_MAX:] if daily else rows
    return published(rows, daily) if shape == "published" else split(rows, daily)
