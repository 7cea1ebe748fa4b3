"""Candles as rows, for repairs and late ticks: in memory, and as the texts of a candle list in Redis.

A row is `[start, open, high, low, close, volume, oi, ticks]`, with a ninth cell for a flag. This is rare
work, so it is plain Python.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping

import msgspec
import numpy as np

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.calendar import Day
from pkbrokers_redis.candles.model import FLAG_GAP, FLAG_NAMES, FLAG_PARTIAL
from pkbrokers_redis.candles.open_candles import flag_of
from pkbrokers_redis.candles.state import Floats, ShardState, touch

Row = list[float | int | str | None]
START, OPEN, HIGH, LOW, CLOSE, VOLUME, OI, TICKS, FLAG = range(9)
START_DIGITS_MAX = 18

_decoder = msgspec.json.Decoder(list[float | int | str | None])
_UNREPAIRED = tuple(b'"%s"]' % FLAG_NAMES[flag].encode() for flag in (FLAG_PARTIAL, FLAG_GAP))

# -- rows as text --------------------------------------------------------------------------------


def start_of(text: bytes) -> int | None:
    """Return the start of a row's text in epoch seconds; None if the text is no row."""
    start = text[1 : text.find(b",")]
    return int(start) if start.isdigit() and len(start) <= START_DIGITS_MAX else None


def parse_row(text: bytes) -> Row | None:
    """Return a row's cells; None if the text is not a candle row."""
    try:
        row = _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if len(row) < 8 or not isinstance(row[START], int):
        return None
    return row if all(isinstance(cell, int | float) for cell in (*row[OPEN:OI], row[TICKS])) else None


def row_text(row: Row) -> bytes:
    """Return a row as the kernels write it: whole numbers without a point."""
    return msgspec.json.encode(
        [int(cell) if isinstance(cell, float) and cell == int(cell) else cell for cell in row]
    )


def number(cell: float | int | str | None) -> float:
    """Return a cell as a number; 0.0 if it is none."""
    return float(cell) if isinstance(cell, int | float) else 0.0


def flag_name(row: Row) -> str:
    """Return `partial`, `gap`, `backfilled`, or "" for a whole candle."""
    return str(row[FLAG]) if len(row) > FLAG else ""


class CandleList:
    """The rows of one instrument and interval, oldest first, at most `keep`.

    Texts that are no candle rows (another program wrote them) stay where they are. Texts are parsed only
    when they are needed. `changed` holds the starts whose text differs from Redis, in order of change.
    """

    def __init__(self, texts: Iterable[bytes], keep: int) -> None:
        self.keep = keep
        self.changed: dict[int, None] = {}
        self._texts: dict[int, bytes] = {}
        self._parsed: dict[int, Row | None] = {}
        self._foreign: dict[int, list[bytes]] = {}  # texts after the row of that start; 0: before all rows
        last = 0
        for text in texts:
            start = start_of(text)
            if not start:
                self._foreign.setdefault(last, []).append(text)
            else:
                self._texts[start] = text
                last = start
        self._starts = sorted(self._texts)

    def __len__(self) -> int:
        return len(self._starts) + sum(map(len, self._foreign.values()))

    @property
    def dropped_before_s(self) -> int:
        """Rows that start earlier may have been dropped; 0 while the list is not full."""
        return self._starts[0] if self._starts and len(self) >= self.keep else 0

    def get(self, start: int) -> Row | None:
        """Return the row of that start if there is a readable one. Do not change it."""
        if start not in self._parsed:
            text = self._texts.get(start)
            self._parsed[start] = None if text is None else parse_row(text)
        return self._parsed[start]

    def text(self, start: int) -> bytes:
        """Return the text of the row of that start."""
        return self._texts[start]

    def between(self, from_s: int, to_s: int) -> dict[int, Row]:
        """Return the rows that start in [from_s, to_s), by start, ascending. Do not change them."""
        first, last = bisect_left(self._starts, from_s), bisect_left(self._starts, to_s)
        found = ((start, self.get(start)) for start in self._starts[first:last])
        return {start: row for start, row in found if row is not None}

    def unrepaired(self, from_s: int, to_s: int) -> list[int]:
        """Return the starts in [from_s, to_s) of the rows with the flag partial or gap."""
        first, last = bisect_left(self._starts, from_s), bisect_left(self._starts, to_s)
        return [start for start in self._starts[first:last] if self._texts[start].endswith(_UNREPAIRED)]

    def put(self, row: Row) -> bool:
        """Replace or insert a row by its start; return False if it is older than a full list reaches."""
        start = int(number(row[START]))
        if start not in self._texts:
            if start < self.dropped_before_s:
                return False
            insort(self._starts, start)
        self._texts[start], self._parsed[start] = row_text(row), row
        self.changed[start] = None
        while len(self) > self.keep and len(self._starts) > 1:
            oldest = self._starts.pop(0)
            del self._texts[oldest]
            self._parsed.pop(oldest, None)
            self._foreign.pop(oldest, None)
            self.changed.pop(oldest, None)
        return True

    def texts(self) -> list[bytes]:
        """Return all texts of the list, oldest first."""
        whole = list(self._foreign.get(0, ()))
        for start in self._starts:
            whole.append(self._texts[start])
            whole += self._foreign.get(start, ())
        return whole


CandleLists = Mapping[int, CandleList]  # interval index → list of one instrument

# -- rows of the candles in memory ---------------------------------------------------------------


def find_candle(state: ShardState, i: int, k: int, start: int) -> int:
    """Return the index of the recent candle that starts at `start`, or -1."""
    found = np.flatnonzero(state.arrays.candles[i, k, :, col.START] == start)
    return int(found[0]) if len(found) and start else -1


def row_of(candle: Floats) -> Row:
    """Return a candle in memory as a row."""
    volume = 0.0
    if not np.isnan(candle[col.VOL_END]):
        volume = max(round(float(candle[col.VOL_END] - candle[col.VOL_START]), 8), 0.0)
    oi = None if np.isnan(candle[col.OPEN_INTEREST]) else float(candle[col.OPEN_INTEREST])
    prices = candle[col.OPEN : col.CLOSE + 1].tolist()
    row: Row = [int(candle[col.START]), *prices, volume, oi, int(candle[col.TICKS])]
    name = FLAG_NAMES[int(candle[col.FLAG])]
    return [*row, name] if name else row


def recent_rows(state: ShardState, i: int, k: int, from_s: int, to_s: int) -> dict[int, Row]:
    """Return the rows of the recent candles that start in [from_s, to_s), by start."""
    recent = state.arrays.candles[i, k]
    starts = [(int(candle[col.START]), candle) for candle in recent]
    return {start: row_of(candle) for start, candle in starts if start and from_s <= start < to_s}


def flag_for(state: ShardState, i: int, start: int, end: int) -> int:
    """Return the flag of a candle that is opened now (rule 8)."""
    return int(flag_of(start, end, state.arrays.inst[i]))


def write_candle(
    state: ShardState, i: int, k: int, s: int, row: Row, *, unseen_volume: float | None = None
) -> None:
    """Overwrite a recent candle with a row, so that no late tick changes its open or its close again.

    A candle that is over is completed by it. With `unseen_volume` the candle stays open: that much of its
    volume was traded after all ticks we know, the rest before.
    """
    candle = state.arrays.candles[i, k, s]
    volume = number(row[VOLUME])
    if np.isnan(candle[col.VOL_END]):
        candle[col.VOL_START], candle[col.VOL_END] = 0.0, volume
    else:
        candle[col.VOL_END] += unseen_volume or 0.0
        candle[col.VOL_START] = candle[col.VOL_END] - volume
    if unseen_volume is None:
        candle[col.COMPLETE] = 1.0
        candle[col.CLOSE_TIME], candle[col.CLOSE_VOLUME] = candle[col.END] * 1000 - 1, candle[col.VOL_END]
    if unseen_volume is None or row[OPEN] != candle[col.OPEN]:
        candle[col.OPEN_TIME], candle[col.OPEN_VOLUME] = candle[col.START] * 1000, -1.0
    _fill(candle, row)
    touch(state.arrays, i, 2)


def _fill(candle: Floats, row: Row) -> None:
    candle[col.OPEN : col.CLOSE + 1] = row[OPEN : CLOSE + 1]
    candle[col.OPEN_INTEREST] = np.nan if row[OI] is None else row[OI]
    candle[col.TICKS] = row[TICKS]
    candle[col.FLAG] = FLAG_NAMES.index(flag_name(row))
    candle[col.DIRTY] = 1.0


def complete_newest(state: ShardState, i: int, k: int, start: int) -> None:
    """Rule 4: complete the open candle when a row of a later start enters the list."""
    candle = state.arrays.candles[i, k, 0]
    if candle[col.START] and candle[col.START] < start and candle[col.COMPLETE] == 0:
        candle[col.COMPLETE], candle[col.DIRTY] = 1.0, 1.0
        touch(state.arrays, i, 2)


def insert_open_candle(state: ShardState, i: int, k: int, row: Row, end: int, day: Day) -> None:
    """Insert an open candle of which no tick is known as the newest."""
    start = int(number(row[START]))
    complete_newest(state, i, k, start)
    state.shift_candles(i, k)
    arrays = state.arrays
    candle = arrays.candles[i, k, 0]
    cum_volume = arrays.inst[i, col.CUM_VOLUME]
    candle[col.START], candle[col.END], candle[col.DAY] = start, end, day.day_start_ms // 1000
    candle[col.VOL_END] = number(row[VOLUME]) if np.isnan(cum_volume) else cum_volume
    candle[col.VOL_START] = candle[col.VOL_END] - number(row[VOLUME])
    candle[col.OPEN_TIME], candle[col.OPEN_VOLUME] = start * 1000, -1.0
    candle[col.CLOSE_TIME], candle[col.CLOSE_VOLUME] = -np.inf, -1.0
    candle[col.REV] = col.UNANNOUNCED
    _fill(candle, row)
    arrays.scalars[col.NEXT_DUE] = min(arrays.scalars[col.NEXT_DUE], end * 1000 + state.grace_ms)
    touch(arrays, i, 2)
