"""The candle rules, one after the other: ticks in, changed candles out. No I/O, no clock, no strings.

State of one shard, as arrays (`Tables`), so that one compiled pass over a batch does it all:

    inst[i]            what we know of instrument i: baseline, highest volume of the day, …
    ring[i, 0..R-1]    its latest statements, newest first: (time, volume, price, day high, day low)
    slots[i, k, 0..]   its newest candles of interval k, newest first; slot 0 may still be forming

A tick is a *statement*: "at `time_ms` the last trade was at this price and the day's volume stood at
this". Candles are a merge of statements: taken twice, or in another order, they give the same rows.
The ring is what makes that exact: it tells a repeat from a straggler, and finds a straggler's
neighbours in time, between which a hidden extreme may lie.

The kernels stop, with a reason, whenever they need something of Python (`NEED_DAY`, `FULL`, …) and
are called again where they stopped. They run uncompiled too (NUMBA_DISABLE_JIT=1).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from pkbrokers_redis.core.model import (
    AT_MS,
    DAY_HIGH,
    DAY_LOW,
    DAY_OPEN,
    FLAG_PARTIAL,
    LAST_PRICE,
    OI,
    TIME_MS,
    TOKEN,
    TOKEN_MAX,
    VOLUME,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# columns of `inst`
FIRST_AT, FIRST_TIME, FIRST_VOLUME, DAY_S, SEEN, BASELINE, RING_SIZE = range(7)
INST_WIDTH = 7
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
# `marks`: the tables' own scalars
WATERMARK, NEXT_DUE, INSTRUMENTS, DIRTY_SIZE, EVICTED_SIZE, LATE_SIZE, DAYS, LAST_DAY = range(8)
# `counts`: what became of the ticks
(C_TICKS, C_FIRST, C_NEWS, C_REPEAT, C_OUTSIDE, C_BAD, C_CLAMPED, C_LATE, C_DEEP_LATE, C_EARLY) = range(10)
COUNT_NAMES = (
    "ticks", "first_sight", "news", "repeats", "outside_session", "bad", "future_clamped", "late", "very_late",
    "before_baseline",
)  # fmt: skip

DONE, NEED_DAY, FULL, LOG_FULL, LIMIT = range(5)

TIME_MIN_MS = 631_152_000_000  # 1990: a smaller trade time is no time
TIME_MAX_MS = 4_102_444_800_000  # 2100
NUMBER_MAX = 1e12  # beyond any price, quantity or volume Kite's 32 bits can say
FUTURE_MAX_MS = 60_000  # a trade later than its receipt by more is a clock jump: use the receipt
UNANNOUNCED = -1.0


_compiled = njit(cache=True, error_model="numpy")


class Tables(NamedTuple):
    """All arrays of one shard; grown and filled by `core.book`."""

    tokens: Ints  # [N]
    table: Ints  # [M] open-addressed hash: instrument index + 1, 0 is free
    inst: Floats  # [N, INST_WIDTH]
    ring: Floats  # [N, RING_MAX, RING_WIDTH]
    slots: Floats  # [N, I, S, SLOT_WIDTH]
    in_current: Ints  # [N, I] 1 where Redis holds the interval in `current`
    schedule: Ints  # [N] index into the calendar's schedules
    schedule_of_segment: Ints  # [256]
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
    late: Floats  # [L, 12] instrument, interval, tick: older than every slot


@_compiled
def _touch(b: Tables, i: int, level: int) -> None:
    """Mark an instrument as changed."""
    if b.is_dirty[i] == 0:
        n = int(b.marks[DIRTY_SIZE])
        b.dirty[n] = i
        b.marks[DIRTY_SIZE] = n + 1
    if b.is_dirty[i] < level:
        b.is_dirty[i] = level


@_compiled
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


@_compiled
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
    b.schedule[i] = b.schedule_of_segment[token & 0xFF]
    return i


@_compiled
def _find_day(b: Tables, time_ms: float) -> int:
    """Index of the calendar day that holds the time, or -1. Neighbouring ticks share a day."""
    d = int(b.marks[LAST_DAY])
    if b.day_ms[d, 0] <= time_ms < b.day_ms[d, 1]:
        return d
    for d in range(int(b.marks[DAYS])):
        if b.day_ms[d, 0] <= time_ms < b.day_ms[d, 1]:
            b.marks[LAST_DAY] = d
            return d
    return -1


@_compiled
def _is_bad(tick: Floats) -> bool:
    """No token, no price, a price of 0, a time outside 1990–2100, or a number beyond all bounds."""
    token = tick[TOKEN]
    if not (1 <= token <= TOKEN_MAX) or token != np.floor(token):
        return True
    if not (TIME_MIN_MS <= tick[TIME_MS] < TIME_MAX_MS):
        return True
    price = tick[LAST_PRICE]
    if price == 0 or not (-NUMBER_MAX < price < NUMBER_MAX):
        return True
    if tick[VOLUME] < 0:
        return True
    for column in range(LAST_PRICE, TIME_MS):
        if abs(tick[column]) > NUMBER_MAX:  # NaN, an absent field, compares false
            return True
    return False


@_compiled
def _place_in_ring(ring: Floats, size: int, time: float, volume: float, price: float) -> int:
    """Where a statement belongs (0 newest); -1 it is there already; RING_MAX older than all kept.

    Statements are ordered by trade time, then cumulative volume, then arrival. With a volume, time
    and volume identify one; without, time and price do.
    """
    for j in range(size):
        r_time = ring[j, R_TIME]
        if time < r_time:
            continue
        if time > r_time:
            return j
        r_volume = ring[j, R_VOLUME]
        if volume != volume or r_volume != r_volume:
            for same in range(j, size):  # same time, no volume to tell them apart: the price does
                if ring[same, R_TIME] != time:
                    break
                if ring[same, R_PRICE] == price:
                    return -1
            return j
        if volume == r_volume:
            return -1
        if volume > r_volume:
            return j
    return size if size < RING_MAX else RING_MAX


@_compiled
def _evict(slots: Floats, i: int, k: int, s: int, marks: Floats, evicted: Floats) -> None:
    """Make room at slot s by moving it and the older ones down; the oldest leaves to the log."""
    last = slots.shape[2] - 1
    if slots[i, k, last, START] != 0:
        n = int(marks[EVICTED_SIZE])
        evicted[n, 0], evicted[n, 1] = i, k
        for column in range(SLOT_WIDTH):
            evicted[n, 2 + column] = slots[i, k, last, column]
        marks[EVICTED_SIZE] = n + 1
    for older in range(last, s, -1):
        for column in range(SLOT_WIDTH):
            slots[i, k, older, column] = slots[i, k, older - 1, column]


@_compiled
def _slot_for(
    slots: Floats, i: int, k: int, length: int, start: int, end: int, day_s: int, base: float, volume: float,
    flag: int, due: float, marks: Floats, evicted: Floats,
) -> int:  # fmt: skip
    """The slot of the candle that starts at `start`, opened if need be; -1: older than every slot.

    Rule 4: a newer candle completes the one before it. Rule 6: an older one that never was is put
    between its neighbours, and takes its volume out of the newer one's. `base` is the highest volume
    seen before the tick, NaN for a tick of an earlier day.
    """
    size = slots.shape[2]
    newest = slots[i, k, 0, START]
    if start == newest:
        return 0
    s = 0
    if newest != 0 and start < newest:
        s = 1
        while s < size and slots[i, k, s, START] > start:
            s += 1
        if s == size:
            return -1
        if slots[i, k, s, START] == start:
            return s
    elif newest != 0 and slots[i, k, 0, COMPLETE] == 0:
        slots[i, k, 0, COMPLETE], slots[i, k, 0, DIRTY] = 1.0, 1.0
    _evict(slots, i, k, s, marks, evicted)
    if length == 0:
        base = 0.0  # rule 7: the day's volume is the day's, watched or not
    elif s > 0 and slots[i, k, s - 1, DAY] == day_s:
        base = slots[i, k, s - 1, BASE]
    elif base != base:
        same_day = s + 1 < size and slots[i, k, s + 1, DAY] == day_s
        base = slots[i, k, s + 1, TOP] if same_day else volume
    for column in range(SLOT_WIDTH):
        slots[i, k, s, column] = 0.0
    slots[i, k, s, START], slots[i, k, s, END], slots[i, k, s, DAY] = start, end, day_s
    slots[i, k, s, HIGH], slots[i, k, s, LOW] = -np.inf, np.inf
    slots[i, k, s, BASE], slots[i, k, s, TOP] = base, base
    slots[i, k, s, S_OI] = np.nan
    slots[i, k, s, OPEN_TIME], slots[i, k, s, CLOSE_TIME] = np.inf, -np.inf
    slots[i, k, s, REV] = UNANNOUNCED
    slots[i, k, s, COMPLETE] = 1.0 if s > 0 else 0.0
    slots[i, k, s, FLAG] = flag
    marks[NEXT_DUE] = min(marks[NEXT_DUE], due)
    return s


@_compiled
def _flag_of(start: int, end: int, first_at: float, first_time: float, first_volume: float) -> int:
    """Rule 8: partial, if we began to watch inside it or our baseline holds volume traded inside it."""
    if start * 1000 < first_at < end * 1000:
        return FLAG_PARTIAL
    if start * 1000 <= first_time < end * 1000 and first_volume != 0:
        return FLAG_PARTIAL
    return 0


@_compiled
def _merge(
    slots: Floats, i: int, k: int, s: int, tick: Floats, time: float, is_new: bool, is_day: bool
) -> int:
    """Rules 1 and 7: take one statement into one candle. 0 no change, 1 changed, 2 its open too."""
    price, volume = tick[LAST_PRICE], tick[VOLUME]
    key = -1.0 if volume != volume else volume
    change = 1 if is_new else 0
    open_time, close_time = slots[i, k, s, OPEN_TIME], slots[i, k, s, CLOSE_TIME]
    if price > slots[i, k, s, HIGH]:
        slots[i, k, s, HIGH] = price
        change = max(change, 1)
    if price < slots[i, k, s, LOW]:
        slots[i, k, s, LOW] = price
        change = max(change, 1)
    if time > close_time or (time == close_time and key >= slots[i, k, s, CLOSE_VOLUME]):
        if price != slots[i, k, s, CLOSE] or time != close_time or key != slots[i, k, s, CLOSE_VOLUME]:
            change = max(change, 1)
        slots[i, k, s, CLOSE], slots[i, k, s, CLOSE_TIME] = price, time
        slots[i, k, s, CLOSE_VOLUME] = key
        if tick[OI] == tick[OI]:
            slots[i, k, s, S_OI] = tick[OI]
    if time < open_time or (time == open_time and key < slots[i, k, s, OPEN_VOLUME]):
        slots[i, k, s, OPEN], slots[i, k, s, OPEN_TIME], slots[i, k, s, OPEN_VOLUME] = price, time, key
        change = 2
    if volume == volume:
        top = slots[i, k, s, TOP]
        if top != top:
            slots[i, k, s, BASE] = volume
            slots[i, k, s, TOP] = volume
        elif volume > top:
            slots[i, k, s, TOP] = volume
            change = max(change, 1)
            newer = s - 1
            if s > 0 and not is_day and slots[i, k, newer, DAY] == slots[i, k, s, DAY]:
                if volume > slots[i, k, newer, BASE]:  # what it gains the next one loses: the sum stays
                    slots[i, k, newer, BASE] = volume
                    slots[i, k, newer, TOP] = max(slots[i, k, newer, TOP], volume)
                    slots[i, k, newer, DIRTY] = 1.0
                    change = 2
    if is_day and tick[DAY_HIGH] == tick[DAY_HIGH] and tick[DAY_LOW] == tick[DAY_LOW]:
        if tick[DAY_OPEN] == tick[DAY_OPEN]:
            slots[i, k, s, OPEN] = tick[DAY_OPEN]
        if tick[DAY_HIGH] > slots[i, k, s, HIGH] or tick[DAY_LOW] < slots[i, k, s, LOW]:
            slots[i, k, s, HIGH] = max(slots[i, k, s, HIGH], tick[DAY_HIGH])
            slots[i, k, s, LOW] = min(slots[i, k, s, LOW], tick[DAY_LOW])
            change = max(change, 1)
    if change:
        slots[i, k, s, TICKS] += 1
        slots[i, k, s, DIRTY] = 1.0
    return change


@_compiled
def _take_hidden(slots: Floats, i: int, k: int, s: int, other_time: float, high: float, low: float) -> int:
    """Rule 3: a day extreme that is new between two statements of one candle happened inside it."""
    if not (slots[i, k, s, START] * 1000 <= other_time < slots[i, k, s, END] * 1000):
        return 0
    change = 0
    if high > slots[i, k, s, HIGH]:  # NaN, nothing new, compares false
        slots[i, k, s, HIGH] = high
        change = 1
    if low < slots[i, k, s, LOW]:
        slots[i, k, s, LOW] = low
        change = 1
    if change:
        slots[i, k, s, DIRTY] = 1.0
    return change


@_compiled
def _apply_tick(b: Tables, tick: Floats, i: int, d: int, time: float, grace_ms: float) -> None:
    """One good tick of a known instrument on a known day."""
    inst, ring = b.inst[i], b.ring[i]
    price, volume = tick[LAST_PRICE], tick[VOLUME]
    size = int(inst[RING_SIZE])
    day_s = b.day_ms[d, 0] // 1000

    if inst[FIRST_AT] == 0:  # rule 2: the first sight is the baseline and makes no candle
        inst[FIRST_AT], inst[FIRST_TIME] = max(tick[AT_MS], 1.0), time
        inst[FIRST_VOLUME], inst[SEEN], inst[BASELINE], inst[DAY_S] = volume, volume, volume, day_s
        inst[RING_SIZE] = 1
        ring[0, R_TIME], ring[0, R_VOLUME], ring[0, R_PRICE] = time, volume, price
        ring[0, R_HIGH], ring[0, R_LOW] = tick[DAY_HIGH], tick[DAY_LOW]
        b.counts[C_FIRST] += 1
        _touch(b, i, 1)
        return
    if day_s > inst[DAY_S]:  # rule 2: a new trade date starts from 0
        inst[DAY_S] = day_s
        if inst[SEEN] == inst[SEEN]:
            inst[SEEN] = inst[BASELINE] = 0.0
        _touch(b, i, 1)
    today = day_s == inst[DAY_S]
    if today and volume == volume and inst[SEEN] != inst[SEEN]:  # from ltp to a mode with volume
        inst[SEEN] = inst[BASELINE] = volume

    c = b.schedule[i]
    inside = False
    for w in range(b.windows.shape[2]):
        if b.windows[d, c, w, 0] <= time < b.windows[d, c, w, 1]:
            inside = True
    if not inside:  # rule 9; rule 2: what trades outside raises the baseline only
        b.counts[C_OUTSIDE] += 1
        if today and volume > inst[SEEN]:
            inst[BASELINE] += volume - inst[SEEN]
            inst[SEEN] = volume
            _touch(b, i, 1)
        return

    # Rule 1. No trade time (then it is the time received): only a risen volume is news.
    if time == tick[AT_MS] and volume <= inst[SEEN] and today and time >= ring[0, R_TIME]:
        b.counts[C_REPEAT] += 1
        return
    # Rule 2: what had traded when we first looked is not ours to tell. A trade time is in whole seconds, the
    # first sight's may be a time of receipt.
    first_second = inst[FIRST_TIME] // 1000 * 1000
    if time < first_second or (b.day_ms[d, 0] <= first_second and volume <= inst[FIRST_VOLUME]):
        b.counts[C_EARLY] += 1
        return
    place = _place_in_ring(ring, size, time, volume, price)
    if place < 0:
        b.counts[C_REPEAT] += 1
        return
    known = place < RING_MAX
    before_time = after_time = np.nan
    high_before = low_before = high_after = low_after = np.nan
    if known:
        if place < size:  # the statement before this one
            before_time = ring[place, R_TIME]
            if tick[DAY_HIGH] > ring[place, R_HIGH]:
                high_before = tick[DAY_HIGH]
            if tick[DAY_LOW] < ring[place, R_LOW]:
                low_before = tick[DAY_LOW]
        if place > 0:  # a straggler: the statement after it
            after_time = ring[place - 1, R_TIME]
            if ring[place - 1, R_HIGH] > tick[DAY_HIGH]:
                high_after = ring[place - 1, R_HIGH]
            if ring[place - 1, R_LOW] < tick[DAY_LOW]:
                low_after = ring[place - 1, R_LOW]
        if size < RING_MAX:
            size += 1
            inst[RING_SIZE] = size
        for j in range(size - 1, place, -1):
            ring[j] = ring[j - 1]
        ring[place, R_TIME], ring[place, R_VOLUME], ring[place, R_PRICE] = time, volume, price
        ring[place, R_HIGH], ring[place, R_LOW] = tick[DAY_HIGH], tick[DAY_LOW]
    b.counts[C_NEWS] += 1

    base = inst[SEEN] if today else np.nan
    slots, seconds, marks, evicted = b.slots, b.seconds, b.marks, b.evicted
    anchor, close = b.anchor_s[d, c], b.close_s[d, c]
    second = np.int64(time) // 1000
    level = 1
    for k in range(seconds.size):
        length = seconds[k]
        start, end = anchor, close
        if length != 0:
            start = anchor + (second - anchor) // length * length
            end = min(start + length, close)
        flag = 0
        if length != 0 or tick[DAY_HIGH] != tick[DAY_HIGH]:
            flag = _flag_of(start, end, inst[FIRST_AT], inst[FIRST_TIME], inst[FIRST_VOLUME])
        newest = slots[i, k, 0, START]
        due = end * 1000 + grace_ms
        s = _slot_for(
            slots, i, k, length, start, end, day_s, base, volume, flag, due, marks, evicted
        )  # fmt: skip
        if s < 0:
            b.counts[C_DEEP_LATE] += 1
            n = int(marks[LATE_SIZE])
            b.late[n, 0], b.late[n, 1] = i, k
            b.late[n, 2:] = tick
            marks[LATE_SIZE] = n + 1
            continue
        change = _merge(slots, i, k, s, tick, time, known, length == 0)
        if high_before == high_before or low_before == low_before:
            change = max(change, _take_hidden(slots, i, k, s, before_time, high_before, low_before))
        if high_after == high_after or low_after == low_after:
            change = max(change, _take_hidden(slots, i, k, s, after_time, high_after, low_after))
        if change == 2 or newest != slots[i, k, 0, START] or (change and slots[i, k, s, COMPLETE] != 0):
            level = 2
        if change and slots[i, k, s, REV] >= 0:
            b.counts[C_LATE] += 1
    _touch(b, i, level)
    if today and volume > inst[SEEN]:
        inst[SEEN] = volume
    if time > b.marks[WATERMARK]:
        b.marks[WATERMARK] = time


@_compiled
def apply(
    b: Tables, ticks: Floats, first: int, ends: Ints, dirty_max: int, grace_ms: float, clamp: bool
) -> tuple[int, int]:
    """Take in ticks[first:]. Returns (reason, index of the first tick not taken in).

    `ends` are the entry boundaries (row indices, ascending): with `dirty_max` instruments changed it
    stops (LIMIT) at the next boundary, so that a commit stays bounded and ends on a whole entry.
    """
    n = ticks.shape[0]
    entry = np.searchsorted(ends, first, side="right")
    room = b.seconds.size
    for row in range(first, n):
        if entry < ends.size and row >= ends[entry]:
            while entry < ends.size and row >= ends[entry]:
                entry += 1
            if b.marks[DIRTY_SIZE] >= dirty_max:
                return LIMIT, row
        if b.evicted.shape[0] - b.marks[EVICTED_SIZE] < room or b.late.shape[0] - b.marks[LATE_SIZE] < room:
            return LOG_FULL, row
        tick = ticks[row]
        if _is_bad(tick):
            b.counts[C_TICKS] += 1
            b.counts[C_BAD] += 1
            continue
        time, at = tick[TIME_MS], tick[AT_MS]
        clamped = clamp and at >= TIME_MIN_MS and time > at + FUTURE_MAX_MS
        if clamped:
            time = at
        d = _find_day(b, time)
        if d < 0:
            return NEED_DAY, row
        i = add(b, int(tick[TOKEN]))
        if i < 0:
            return FULL, row
        b.counts[C_TICKS] += 1
        if clamped:
            b.counts[C_CLAMPED] += 1
        _apply_tick(b, tick, i, d, time, grace_ms)
    return DONE, n


@_compiled
def close_due(b: Tables, clock_ms: float, grace_ms: float, dirty_max: int) -> bool:
    """Rule 5: complete and announce every candle whose end + grace has passed. False: more are due."""
    if clock_ms < b.marks[NEXT_DUE]:
        return True
    next_due = np.inf
    for i in range(int(b.marks[INSTRUMENTS])):
        for k in range(b.seconds.size):
            for s in range(b.slots.shape[2] - 1, -1, -1):
                slot = b.slots[i, k, s]
                if slot[START] == 0 or slot[REV] >= 0:
                    continue
                due = slot[END] * 1000 + grace_ms
                if due > clock_ms:
                    next_due = min(next_due, due)
                    continue
                if b.is_dirty[i] == 0 and b.marks[DIRTY_SIZE] >= dirty_max:
                    return False
                slot[REV] = 0.0
                slot[ANNOUNCE] = 1.0
                slot[COMPLETE] = 1.0
                _touch(b, i, 2)
    b.marks[NEXT_DUE] = next_due
    return True
