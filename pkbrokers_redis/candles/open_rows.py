"""A book's slots as rows, for repairs, which change candles without ticks."""

from __future__ import annotations

import numpy as np

from pkbrokers_redis.candles import arrays as t
from pkbrokers_redis.candles.calendar import Day
from pkbrokers_redis.candles.candle_list import (
    CLOSE,
    OI,
    OPEN,
    START,
    TICKS,
    VOLUME,
    Row,
    flag_name,
    number,
)
from pkbrokers_redis.candles.model import FLAG_NAMES
from pkbrokers_redis.candles.open_candles import flag_of
from pkbrokers_redis.candles.state import Book


def find_slot(book: Book, i: int, k: int, start: int) -> int:
    """The slot of the candle that starts at `start`, or -1."""
    found = np.flatnonzero(book.tables.slots[i, k, :, t.START] == start)
    return int(found[0]) if len(found) and start else -1


def volume_of(slot: t.Floats) -> float:
    """A candle's volume, as the kernels write it."""
    if np.isnan(slot[t.TOP]):
        return 0.0
    return max(round(float(slot[t.TOP] - slot[t.BASE]), 8), 0.0)


def row_of(slot: t.Floats) -> Row:
    """`[start, open, high, low, close, volume, oi, ticks]`, and the flag if there is one."""
    oi = None if np.isnan(slot[t.S_OI]) else float(slot[t.S_OI])
    row: Row = [int(slot[t.START]), *map(float, slot[t.OPEN : t.CLOSE + 1]), volume_of(slot), oi]
    row.append(int(slot[t.TICKS]))
    name = FLAG_NAMES[int(slot[t.FLAG])]
    return [*row, name] if name else row


def slot_rows(book: Book, i: int, k: int, from_s: int, to_s: int) -> dict[int, Row]:
    """The rows of the slots that begin in [from_s, to_s), by start."""
    slots = book.tables.slots[i, k]
    return {
        int(slot[t.START]): row_of(slot) for slot in slots if slot[t.START] and from_s <= slot[t.START] < to_s
    }


def flag_for(book: Book, i: int, start: int, end: int) -> int:
    """The flag that a candle opened now would get (rule 8)."""
    return int(flag_of(start, end, book.tables.inst[i]))


def write_slot(book: Book, i: int, k: int, s: int, row: Row, *, forming_volume: float | None = None) -> None:
    """Make a slot say what `row` says, so that no straggler changes its open or its close again.

    A candle that is over is completed by it. One that forms goes on: `forming_volume` of its new volume was
    traded after all that we had seen, the rest before.
    """
    slot = book.tables.slots[i, k, s]
    volume = number(row[VOLUME])
    if np.isnan(slot[t.TOP]):
        slot[t.BASE], slot[t.TOP] = 0.0, volume
    else:
        slot[t.TOP] += forming_volume or 0.0
        slot[t.BASE] = slot[t.TOP] - volume
    if forming_volume is None:
        slot[t.COMPLETE] = 1.0
        slot[t.CLOSE_TIME], slot[t.CLOSE_VOLUME] = slot[t.END] * 1000 - 1, slot[t.TOP]
    if forming_volume is None or row[OPEN] != slot[t.OPEN]:
        slot[t.OPEN_TIME], slot[t.OPEN_VOLUME] = slot[t.START] * 1000, -1.0
    _fill(slot, row)
    t.touch(book.tables, i, 2)


def _fill(slot: t.Floats, row: Row) -> None:
    slot[t.OPEN : t.CLOSE + 1] = row[OPEN : CLOSE + 1]
    slot[t.S_OI] = np.nan if row[OI] is None else row[OI]
    slot[t.TICKS] = row[TICKS]
    slot[t.FLAG] = FLAG_NAMES.index(flag_name(row))
    slot[t.DIRTY] = 1.0


def close_newest(book: Book, i: int, k: int, start: int) -> None:
    """Rule 4: what forms is complete when a row of a later start goes into the list."""
    slot = book.tables.slots[i, k, 0]
    if slot[t.START] and slot[t.START] < start and slot[t.COMPLETE] == 0:
        slot[t.COMPLETE], slot[t.DIRTY] = 1.0, 1.0
        t.touch(book.tables, i, 2)


def open_slot(book: Book, i: int, k: int, row: Row, end: int, day: Day) -> None:
    """Put a candle that still forms, and of which we have seen no tick, ahead of the slots."""
    start = int(number(row[START]))
    close_newest(book, i, k, start)
    book.shift_slots(i, k)
    b = book.tables
    slot = b.slots[i, k, 0]
    seen = b.inst[i, t.SEEN]
    slot[t.START], slot[t.END], slot[t.DAY] = start, end, day.day_start_ms // 1000
    slot[t.TOP] = number(row[VOLUME]) if np.isnan(seen) else seen
    slot[t.BASE] = slot[t.TOP] - number(row[VOLUME])
    slot[t.OPEN_TIME], slot[t.OPEN_VOLUME] = start * 1000, -1.0
    slot[t.CLOSE_TIME], slot[t.CLOSE_VOLUME] = -np.inf, -1.0
    slot[t.REV] = t.UNANNOUNCED
    _fill(slot, row)
    b.marks[t.NEXT_DUE] = min(b.marks[t.NEXT_DUE], end * 1000 + book.grace_ms)
    t.touch(b, i, 2)
