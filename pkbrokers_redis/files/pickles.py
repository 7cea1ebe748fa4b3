"""Pickles as PKScreener and scripts know them: written in both of upstream's shapes, read in all of them.

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
SYMBOLS_A_BATCH = 500  # what the reader's stack holds before it puts them into the dict
INDEXES_SHARED_MAX = 64  # what trades every day has one index in all; each other set of days has its own


def daily_name(day: dt.date) -> str:
    """`stock_data_20112026.pkl`."""
    return f"stock_data_{day:%d%m%Y}.pkl"


def intraday_name(day: dt.date) -> str:
    """`intraday_stock_data_20112026.pkl`."""
    return f"intraday_stock_data_{day:%d%m%Y}.pkl"


class BinaryFile(Protocol):
    """What a pickle is written to."""

    def write(self, data: bytes, /) -> int: ...


class PickledDict:
    """Writes one pickled dict, item by item: nothing but the item at hand is in memory.

    A pickle is a program for a stack; an item's is `key value`, and a dict's `{ ( key value … u`. Each value
    is pickled by itself and loses its first two bytes (PROTO) and its last (STOP). What it has in common with
    earlier ones (pandas' names, the index of the days) is written once, then looked up in the pickle's memo:
    a year of 9,000 instruments takes 88 MiB instead of 114 (docs/decisions/0019).
    """

    def __init__(self, file: BinaryFile) -> None:
        self.items = 0
        self._file = file
        self._open = False
        self._piece = io.BytesIO()
        self._pickler = _PortablePickler(self._piece, PROTOCOL)
        self._common: dict[int, tuple[int, Any]] = {}  # id → its number in the memo, and the object itself
        self._indexes: set[int] = set()
        self._has_names = False  # pandas' own, which every frame asks for
        file.write(pickle.PROTO + bytes([PROTOCOL]) + pickle.EMPTY_DICT)

    def add(self, key: str, value: Any) -> None:
        """One more item; keys must differ."""
        if not self._open:
            self._file.write(pickle.MARK)
            self._open = True
        self._file.write(self._body(key) + self._body(value))
        self.items += 1
        if self.items % SYMBOLS_A_BATCH == 0:
            self._close_batch()

    def finish(self) -> None:
        """The end of the dict and of the pickle."""
        self._close_batch()
        self._file.write(pickle.STOP)

    def _body(self, value: Any) -> bytes:
        if not isinstance(value, pd.DataFrame):
            return self._pickled(value)
        before, index = b"", value.index
        if id(index) not in self._indexes and len(self._indexes) < INDEXES_SHARED_MAX:
            self._indexes.add(id(index))  # no other object gets this id: the memo keeps the index
            before = self._pickled(index, is_common=True) + pickle.POP
        return before + self._pickled(value, is_common=not self._has_names)

    def _pickled(self, value: Any, is_common: bool = False) -> bytes:
        self._piece.seek(0)
        self._piece.truncate()
        self._pickler.memo = self._common  # the next number is its length: what is not common is overwritten
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
    """Writes arrays of times as pandas 1.3 to 2 expect them; pandas 3 reads that too, but writes less."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, pd.arrays.DatetimeArray):
            reduced: tuple[Any, ...] = tuple(obj.__reduce__())
            maker, arguments, state = reduced
            return maker, arguments, (*state[:2], {})
        return NotImplemented


@lru_cache(INDEXES_SHARED_MAX)
def _index_of(starts: bytes) -> pd.DatetimeIndex:
    """The index of these epoch seconds (int64), the same object for the same moments."""
    return kolkata(np.frombuffer(starts, np.int64), name=None)


def published(rows: Floats, daily: bool) -> pd.DataFrame:
    """float64[n, 8] → the published form. Column labels are plain objects: pandas 2 reads them too."""
    starts = rows[:, 0].astype(np.int64)
    index = _index_of((midnights(starts) if daily else starts).tobytes())
    frame = pd.DataFrame(rows[:, 1:5], index=index, columns=_PRICES)
    volume = rows[:, 5].astype(np.int64) if is_whole(rows[:, 5]) else rows[:, 5]
    frame.insert(4, PUBLISHED_COLUMNS[4], volume)
    return frame


def split(rows: Floats, daily: bool) -> dict[str, list[Any]]:
    """float64[n, 8] → `{"data", "columns", "index"}`."""
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
    """A frame → `{"data", "columns", "index"}`."""
    columns = [frame[name].tolist() for name in COLUMNS]
    data = [list(row) for row in zip(*columns, strict=True)]
    return {"data": data, "columns": list(COLUMNS), "index": iso_texts(pd.DatetimeIndex(frame.index))}


def shaped(rows: Floats, daily: bool, shape: Shape) -> Any:
    """A symbol's value in a file of that shape; days are cut to the newest 251."""
    rows = rows[-DAILY_ROWS_MAX:] if daily else rows
    return published(rows, daily) if shape == "published" else split(rows, daily)
