"""The candle rules, one after the other: ticks in, changed candles out. No I/O, no clock, no strings.

A tick is a *statement*: "at `time_ms` the last trade was at this price and the day's volume stood at
this". Candles are a merge of statements: taken twice, or in another order, they give the same rows.
The ring of an instrument's latest statements is what makes that exact: it tells a repeat from a straggler,
and finds a straggler's neighbours in time, between which a hidden extreme may lie.

The kernels stop, with a reason, whenever they need something of Python (`NEED_DAY`, `FULL`, …) and
are called again where they stopped. They run uncompiled too (NUMBA_DISABLE_JIT=1).
"""

from __future__ import annotations

import numpy as np

from pkbrokers_redis.candles.arrays import (
    ANSWERED_FROM,
    ANSWERED_TO,
    BASE,
    BASELINE,
    C_ANSWERED,
    C_BAD,
    C_CLAMPED,
    C_DEEP_LATE,
    C_EARLY,
    C_FIRST,
    C_LATE,
    C_NEWS,
    C_OUTSIDE,
    C_REPEAT,
    C_TICKS,
    CLOSE,
    CLOSE_TIME,
    CLOSE_VOLUME,
    COMPLETE,
    DAY,
    DAY_S,
    DIRTY,
    DIRTY_SIZE,
    DONE,
    END,
    EVICTED_SIZE,
    FIRST_AT,
    FIRST_TIME,
    FIRST_VOLUME,
    FULL,
    FUTURE_MAX_MS,
    HIGH,
    LATE_SIZE,
    LIMIT,
    LOG_FULL,
    LOW,
    NEED_DAY,
    NUMBER_MAX,
    OI_TIME,
    OI_VOLUME,
    OPEN,
    OPEN_TIME,
    OPEN_VOLUME,
    R_HIGH,
    R_LOW,
    R_TIME,
    R_VOLUME,
    REV,
    RING_MAX,
    RING_SIZE,
    S_OI,
    SEEN,
    START,
    TICKS,
    TIME_MAX_MS,
    TIME_MIN_MS,
    TOP,
    WATERMARK,
    Floats,
    Ints,
    Tables,
    add,
    find_day,
    touch,
)
from pkbrokers_redis.candles.compiled import compiled
from pkbrokers_redis.candles.model import (
    AT_MS,
    DAY_HIGH,
    DAY_LOW,
    DAY_OPEN,
    LAST_PRICE,
    OI,
    TIME_MS,
    TOKEN,
    TOKEN_MAX,
    VOLUME,
)
from pkbrokers_redis.candles.off_session import note_outside, settle_outside
from pkbrokers_redis.candles.open_candles import flag_of, mark_partial, raise_base, rebase, slot_for
from pkbrokers_redis.candles.recent_ticks import place_in_ring, put_in_ring


@compiled
def is_bad(tick: Floats) -> bool:
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


@compiled
def _merge(
    slots: Floats,
    i: int,
    k: int,
    s: int,
    tick: Floats,
    time: float,
    is_new: bool,
    is_day: bool,
    newest_oi: bool,
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
    elif s == 0 and newest_oi:  # what is newer came in a mode without open interest
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
            if s > 0 and not is_day and raise_base(slots, i, k, s - 1, slots[i, k, s, DAY], volume):
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


@compiled
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


@compiled
def _apply_tick(b: Tables, tick: Floats, i: int, d: int, time: float, grace_ms: float) -> None:
    """One good tick of a known instrument on a known day."""
    inst, ring = b.inst[i], b.ring[i]
    price, volume = tick[LAST_PRICE], tick[VOLUME]
    size = int(inst[RING_SIZE])
    day_s = b.day_ms[d, 0] // 1000

    if inst[FIRST_AT] == 0:  # rule 2: the first sight is the baseline and makes no candle
        inst[FIRST_AT], inst[FIRST_TIME], inst[FIRST_VOLUME] = max(tick[AT_MS], 1.0), time, volume
        if day_s > inst[DAY_S]:
            inst[SEEN], inst[BASELINE], inst[DAY_S] = volume, volume, day_s
        elif day_s == inst[DAY_S]:  # history told us of today before: its volume is in the candles
            inst[BASELINE] -= inst[SEEN]
            if volume == volume:
                inst[BASELINE] += volume
                rebase(b, i, day_s, volume)
            inst[SEEN] = volume
            mark_partial(b, i)
        # Without a trade time it has the receipt's: trades of its second, in whole seconds, come after it.
        known_at = time // 1000 * 1000 if volume == volume else time
        inst[RING_SIZE] = put_in_ring(ring, 0, 0, known_at, volume, price, tick[DAY_HIGH], tick[DAY_LOW])
        b.counts[C_FIRST] += 1
        touch(b, i, 1)
        return
    if day_s > inst[DAY_S]:  # rule 2: a new trade date starts from 0
        inst[DAY_S] = day_s
        inst[BASELINE] = 0.0 if inst[SEEN] == inst[SEEN] else np.nan
        if inst[SEEN] == inst[SEEN]:
            inst[SEEN] = 0.0
        touch(b, i, 1)
    today = day_s == inst[DAY_S]
    # A day's volume never falls. Where it does, all that was said before today's open was another day's: Kite
    # resends the last tick after a subscribe, in a mode without a trade time, and it looks as if of today.
    open_ms = b.anchor_s[d, b.schedule[i]] * 1000.0
    said_before = ring[0, R_TIME] < min(time, open_ms) and inst[ANSWERED_TO] <= open_ms
    if today and volume < inst[SEEN] and said_before:
        inst[SEEN] = inst[BASELINE] = inst[FIRST_VOLUME] = 0.0
        touch(b, i, 1)
    if today and volume == volume and inst[SEEN] != inst[SEEN]:  # from ltp to a mode with volume
        inst[BASELINE] = volume + (inst[BASELINE] if inst[BASELINE] == inst[BASELINE] else 0.0)
        inst[SEEN] = volume
        rebase(b, i, day_s, volume)

    c = b.schedule[i]
    inside = False
    for w in range(b.windows.shape[2]):
        if b.windows[d, c, w, 0] <= time < b.windows[d, c, w, 1]:
            inside = True
    if not inside:  # rule 9
        b.counts[C_OUTSIDE] += 1
        if today:
            if time >= open_ms:  # a straggler of the first window counts on from the pre-open
                settle_outside(inst, open_ms, volume, said_before)
            if note_outside(inst, time, volume):
                touch(b, i, 1)
        return
    if volume == 0 and (inst[SEEN] > 0 or ring[0, R_VOLUME] > 0):  # its day has no trade yet
        b.counts[C_REPEAT] += 1
        return
    if today and settle_outside(inst, time, volume, said_before):
        touch(b, i, 1)

    # Rule 1. No trade time (then it is the time received): only a risen volume is news. A source whose trade
    # times equal its receipts to the second may still bring a straggler.
    received = time == tick[AT_MS] and (time % 1000 != 0 or time >= ring[0, R_TIME])
    if received and volume <= inst[SEEN] and today:
        b.counts[C_REPEAT] += 1
        return
    # Rule 2: what had traded when we first looked is not ours to tell. A trade time is in whole seconds, the
    # first sight's may be a time of receipt.
    first_second = inst[FIRST_TIME] // 1000 * 1000
    if time < first_second or (b.day_ms[d, 0] <= first_second and volume <= inst[FIRST_VOLUME]):
        b.counts[C_EARLY] += 1
        return
    place = place_in_ring(ring, size, time, volume, price)
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
        inst[RING_SIZE] = put_in_ring(ring, size, place, time, volume, price, tick[DAY_HIGH], tick[DAY_LOW])
    b.counts[C_NEWS] += 1

    newest_oi = tick[OI] == tick[OI] and (
        place == 0 or time > inst[OI_TIME] or (time == inst[OI_TIME] and volume >= inst[OI_VOLUME])
    )
    if newest_oi:
        inst[OI_TIME], inst[OI_VOLUME] = time, volume

    # History has answered for its time: it is in the candles, with what we may have missed.
    answered = inst[ANSWERED_FROM] <= time < inst[ANSWERED_TO]
    if answered:
        b.counts[C_ANSWERED] += 1
    base = inst[SEEN] if today else np.nan
    slots, seconds, marks, evicted = b.slots, b.seconds, b.marks, b.evicted
    anchor, close = b.anchor_s[d, c], b.close_s[d, c]
    second = np.int64(time) // 1000
    level = 1
    for k in range(seconds.size):
        length = seconds[k]
        if answered and length != 0:
            continue
        start, end = anchor, close
        if length != 0:
            start = anchor + (second - anchor) // length * length
            end = min(start + length, close)
        newest = slots[i, k, 0, START]
        flag = 0
        if start != newest and (length != 0 or tick[DAY_HIGH] != tick[DAY_HIGH]):
            flag = flag_of(start, end, inst)
        due = end * 1000 + grace_ms
        s = slot_for(
            slots, i, k, length, start, end, day_s, base, volume, flag, due, marks, evicted
        )  # fmt: skip
        if s < 0:
            b.counts[C_DEEP_LATE] += 1
            n = int(marks[LATE_SIZE])
            b.late[n, 0], b.late[n, 1] = i, k
            b.late[n, 2:-2] = tick
            oldest = slots.shape[2] - 1
            same_day = slots[i, k, oldest, DAY] == day_s
            b.late[n, -2] = slots[i, k, oldest, START]
            b.late[n, -1] = slots[i, k, oldest, BASE] if same_day else np.nan
            marks[LATE_SIZE] = n + 1
            if length != 0 and raise_base(slots, i, k, oldest, day_s, volume):
                level = 2
            continue
        change = _merge(slots, i, k, s, tick, time, known, length == 0, newest_oi)
        if high_before == high_before or low_before == low_before:
            change = max(change, _take_hidden(slots, i, k, s, before_time, high_before, low_before))
        if high_after == high_after or low_after == low_after:
            change = max(change, _take_hidden(slots, i, k, s, after_time, high_after, low_after))
        if change == 2 or newest != slots[i, k, 0, START] or (change and slots[i, k, s, COMPLETE] != 0):
            level = 2
        if change and slots[i, k, s, REV] >= 0:
            b.counts[C_LATE] += 1
    touch(b, i, level)
    if today and volume > inst[SEEN]:
        if answered:
            inst[BASELINE] += volume - inst[SEEN]
            rebase(b, i, day_s, volume)
        inst[SEEN] = volume
    if time > b.marks[WATERMARK]:
        b.marks[WATERMARK] = time


@compiled
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
        if is_bad(tick):
            b.counts[C_TICKS] += 1
            b.counts[C_BAD] += 1
            continue
        time, at = tick[TIME_MS], tick[AT_MS]
        clamped = clamp and at >= TIME_MIN_MS and time > at + FUTURE_MAX_MS
        if clamped:
            time = at
        d = find_day(b, time)
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
