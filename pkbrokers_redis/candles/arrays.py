"""The arrays of one shard, and how to find something in them. The rules over them are in `core.candles`.

    inst[i]            what we know of instrument i: baseline, highest volume of the day, last outage, …
    ring[i, 0..]       its latest statements, newest first: (time, volume, price, day high, day low)
    slots[i, k, 0..]   its newest candles of interval k, newest first; slot 0 may still be forming

The constants name the columns. All is float64 or int64, so that one compiled pass over a batch does it all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.compiled import compiled
from pkbrokers_redis.candles.model import BATCH_WIDTH

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# columns of `inst`
(
    FIRST_AT, FIRST_TIME, FIRST_VOLUME, DAY_S, SEEN, BASELINE, OI_TIME, OI_VOLUME,
    GAP_FROM, GAP_TO,  # ms, half-open: the last outage of the feed that history has not answered for; 0 none
    ANSWERED_FROM, ANSWERED_TO,  # ms, half-open: what history answered for last; 0 none
    OUTSIDE_TIME, OUTSIDE_VOLUME,  # ms; what was said outside the windows last, see `core.outside`; 0 none
    RING_SIZE,
) = range(15)  # fmt: skip
INST_WIDTH = 15
# columns of `ring`
R_TIME, R_VOLUME, R_PRICE, R_HIGH, R_LOW = range(5)
RING_WIDTH = 5
RING_MAX = 16  # statements; Kite sends about one a second, the grace is 2 s
# columns of `slots`; START 0 marks an empty slot, times are epoch seconds but for the keys (ms)
(
    START, END, DAY, OPEN, HIGH, LOW, CLOSE, BASE, TOP, S_OI, TICKS, FLAG,
    OPEN_TIME, OPEN_VOLUME, CLOSE_TIME, CLOSE_VOLUME, REV, COMPLETE, LISTED, DIRTY, ANNOUNCE,
) = range(21)  # fmt: skip
SLOT_WIDTH = 21
LATE_WIDTH = 2 + BATCH_WIDTH + 2
# `marks`: the tables' own scalars
WATERMARK, NEXT_DUE, INSTRUMENTS, DIRTY_SIZE, EVICTED_SIZE, LATE_SIZE, DAYS, LAST_DAY = range(8)
# `counts`: what became of the ticks
(
    C_TICKS, C_FIRST, C_NEWS, C_REPEAT, C_OUTSIDE, C_BAD, C_CLAMPED, C_LATE, C_DEEP_LATE, C_EARLY, C_ANSWERED,
) = range(11)  # fmt: skip
COUNT_NAMES = (
    "ticks", "first_sight", "news", "repeats", "outside_session", "bad", "future_clamped", "late",
    "very_late", "before_baseline", "after_history",
)  # fmt: skip

DONE, NEED_DAY, FULL, LOG_FULL, LIMIT = range(5)

TIME_MIN_MS = 631_152_000_000  # 1990: a smaller trade time is no time
TIME_MAX_MS = 4_102_444_800_000  # 2100
NUMBER_MAX = 1e12  # beyond any price, quantity or volume Kite's 32 bits can say
FUTURE_MAX_MS = 60_000  # a trade later than its receipt by more is a clock jump: use the receipt
UNANNOUNCED = -1.0


class Tables(NamedTuple):
    """All arrays of one shard; grown and filled by `core.book`."""

    tokens: Ints  # [N]
    table: Ints  # [M] open-addressed hash: instrument index + 1, 0 is free
    inst: Floats  # [N, INST_WIDTH]
    ring: Floats  # [N, RING_MAX, RING_WIDTH]
    slots: Floats  # [N, I, S, SLOT_WIDTH]
    in_current: Ints  # [N, I] 1 where Redis holds the interval in `current`
    schedule: Ints  # [N] index into the calendar's schedules
    schedule_of_segment: Ints  # [2, 256] without and with derivatives
    derivatives: Ints  # tokens of stocks that have futures or options, ascending
    seconds: Ints  # [I] 0 for the day
    day_ms: Ints  # [D, 2] local midnight to midnight
    anchor_s: Ints  # [D, C]
    close_s: Ints  # [D, C]
    windows: Ints  # [D, C, W, 2] open and close, ms; 0 0 where there is none
    marks: Floats  # scalars, see WATERMARK …
    counts: Ints  # see C_TICKS …
    dirty: Ints  # [N] instruments changed since the last collect, in order
    is_dirty: Ints  # [N] 1 changed, 2 its interval marks too
    evicted: Floats  # [E, 2 + SLOT_WIDTH] instrument, interval, slot: candles that left the slots
    late: Floats  # [L, LATE_WIDTH] instrument, interval, tick older than all slots; oldest slot's START, BASE


@compiled
def touch(b: Tables, i: int, level: int) -> None:
    """Mark an instrument as changed."""
    if b.is_dirty[i] == 0:
        n = int(b.marks[DIRTY_SIZE])
        b.dirty[n] = i
        b.marks[DIRTY_SIZE] = n + 1
    if b.is_dirty[i] < level:
        b.is_dirty[i] = level


@compiled
def find(b: Tables, token: int) -> int:
    """The instrument's index, or -1 - (its free place in the hash table)."""
    mask = b.table.size - 1
    place = (token ^ (token >> 8)) & mask
    while True:
        i = int(b.table[place]) - 1
        if i < 0:
            return -1 - place
        if b.tokens[i] == token:
            return i
        place = (place + 1) & mask


@compiled
def add(b: Tables, token: int) -> int:
    """The instrument's index, new or known; -1 when the tables are full."""
    i = find(b, token)
    if i >= 0:
        return i
    place = -1 - i
    i = int(b.marks[INSTRUMENTS])
    if i >= b.tokens.size:
        return -1
    b.marks[INSTRUMENTS] = i + 1
    b.table[place] = i + 1
    b.tokens[i] = token
    nearest = np.searchsorted(b.derivatives, token)
    has_derivatives = nearest < b.derivatives.size and b.derivatives[nearest] == token
    b.schedule[i] = b.schedule_of_segment[1 if has_derivatives else 0, token & 0xFF]
    return i


@compiled
def find_day(b: Tables, time_ms: float) -> int:
    """Index of the calendar day that holds the time, or -1. Neighbouring ticks share a day."""
    d = int(b.marks[LAST_DAY])
    if b.day_ms[d, 0] <= time_ms < b.day_ms[d, 1]:
        return d
    for d in range(int(b.marks[DAYS])):
        if b.day_ms[d, 0] <= time_ms < b.day_ms[d, 1]:
            b.marks[LAST_DAY] = d
            return d
    return -1
