"""The candle rules, one after the other: ticks in, changed candles out. No I/O, no clock, no strings.

A tick is a *statement*: "at `time_ms` the last trade was at this price and the day's volume stood at
this". Candles are a merge of statements: taken twice, or in another order, they give the same rows.
The window of an instrument's latest statements is what makes that exact: it tells a repeat from a straggler,
and finds a straggler's neighbours in time, between which a hidden extreme may lie.

The kernels stop, with a reason, whenever they need something of Python (`NEED_DAY`, `FULL`, …) and
are called again where they stopped. They run uncompiled too (NUMBA_DISABLE_JIT=1).
"""

from __future__ import annotations

import numpy as np

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.arrays import Floats, Ints, ShardArrays, add, find_day, touch
from pkbrokers_redis.candles.compiled import compiled
from pkbrokers_redis.candles.model import (
    AT_MS,
    DAY_HIGH,
    DAY_LOW,
    DAY_OPEN,
    FUTURE_MAX_MS,
    LAST_PRICE,
    NUMBER_MAX,
    OI,
    TIME_MAX_MS,
    TIME_MIN_MS,
    TIME_MS,
    TOKEN,
    TOKEN_MAX,
    VOLUME,
)
from pkbrokers_redis.candles.open_candles import flag_of, mark_partial, open_candle, raise_base, rebase


@compiled
def is_invalid(tick: Floats) -> bool:
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
def _note_off_session(inst: Floats, time: float, volume: float) -> bool:
    """Remember the latest statement made outside the windows. False: an older one, a repeat, or no volume."""
    if volume != volume or time < inst[col.OFF_SESSION_TIME]:
        return False
    if time == inst[col.OFF_SESSION_TIME] and volume <= inst[col.OFF_SESSION_VOLUME]:
        return False
    inst[col.OFF_SESSION_TIME], inst[col.OFF_SESSION_VOLUME] = time, volume
    return True


@compiled
def apply_off_session(inst: Floats, time: float, volume: float, said_before: bool) -> bool:
    """Raise the baseline by what was said outside the windows before `time`, when `volume` was told.

    A day's volume never falls: a statement above `volume` was another day's if it was `said_before` all of
    today's, else `volume` is a straggler's. False: nothing changed.
    """
    if not inst[col.DAY_S] * 1000 <= inst[col.OFF_SESSION_TIME] < time:
        return False
    if volume < inst[col.OFF_SESSION_VOLUME]:  # NaN, no volume, compares false
        if not said_before:
            return False
    elif inst[col.OFF_SESSION_VOLUME] > inst[col.CUM_VOLUME]:
        inst[col.BASELINE] += inst[col.OFF_SESSION_VOLUME] - inst[col.CUM_VOLUME]
        inst[col.CUM_VOLUME] = inst[col.OFF_SESSION_VOLUME]
    inst[col.OFF_SESSION_TIME] = inst[col.OFF_SESSION_VOLUME] = 0.0
    return True


@compiled
def _find_place(window: Floats, size: int, time: float, volume: float, price: float) -> int:
    """Where a statement belongs (0 newest); -1 it is there already; WINDOW_MAX older than all kept.

    Statements are ordered by trade time, then cumulative volume, then arrival. With a volume, time
    and volume identify one; without, time and price do.
    """
    for j in range(size):
        r_time = window[j, col.TICK_TIME]
        if time < r_time:
            continue
        if time > r_time:
            return j
        r_volume = window[j, col.TICK_VOLUME]
        if volume != volume or r_volume != r_volume:
            for same in range(j, size):  # same time, no volume to tell them apart: the price does
                if window[same, col.TICK_TIME] != time:
                    break
                if window[same, col.TICK_PRICE] == price:
                    return -1
            return j
        if volume == r_volume:
            return -1
        if volume > r_volume:
            return j
    return size if size < col.WINDOW_MAX else col.WINDOW_MAX


@compiled
def _insert_tick(
    window: Floats, size: int, place: int, time: float, volume: float, price: float, high: float, low: float
) -> int:
    """Insert a statement; the oldest of a full window goes. Returns the new size."""
    if size < col.WINDOW_MAX:
        size += 1
    for j in range(size - 1, place, -1):
        for column in range(window.shape[1]):
            window[j, column] = window[j - 1, column]
    window[place, col.TICK_TIME], window[place, col.TICK_VOLUME], window[place, col.TICK_PRICE] = (
        time,
        volume,
        price,
    )
    window[place, col.TICK_DAY_HIGH], window[place, col.TICK_DAY_LOW] = high, low
    return size


@compiled
def _merge(
    candles: Floats,
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
    open_time, close_time = candles[i, k, s, col.OPEN_TIME], candles[i, k, s, col.CLOSE_TIME]
    if price > candles[i, k, s, col.HIGH]:
        candles[i, k, s, col.HIGH] = price
        change = max(change, 1)
    if price < candles[i, k, s, col.LOW]:
        candles[i, k, s, col.LOW] = price
        change = max(change, 1)
    if time > close_time or (time == close_time and key >= candles[i, k, s, col.CLOSE_VOLUME]):
        if (
            price != candles[i, k, s, col.CLOSE]
            or time != close_time
            or key != candles[i, k, s, col.CLOSE_VOLUME]
        ):
            change = max(change, 1)
        candles[i, k, s, col.CLOSE], candles[i, k, s, col.CLOSE_TIME] = price, time
        candles[i, k, s, col.CLOSE_VOLUME] = key
        if tick[OI] == tick[OI]:
            candles[i, k, s, col.OPEN_INTEREST] = tick[OI]
    elif s == 0 and newest_oi:  # what is newer came in a mode without open interest
        candles[i, k, s, col.OPEN_INTEREST] = tick[OI]
    if time < open_time or (time == open_time and key < candles[i, k, s, col.OPEN_VOLUME]):
        candles[i, k, s, col.OPEN], candles[i, k, s, col.OPEN_TIME], candles[i, k, s, col.OPEN_VOLUME] = (
            price,
            time,
            key,
        )
        change = 2
    if volume == volume:
        top = candles[i, k, s, col.VOL_END]
        if top != top:
            candles[i, k, s, col.VOL_START] = volume
            candles[i, k, s, col.VOL_END] = volume
        elif volume > top:
            candles[i, k, s, col.VOL_END] = volume
            change = max(change, 1)
            if s > 0 and not is_day and raise_base(candles, i, k, s - 1, candles[i, k, s, col.DAY], volume):
                change = 2
    if is_day and tick[DAY_HIGH] == tick[DAY_HIGH] and tick[DAY_LOW] == tick[DAY_LOW]:
        if tick[DAY_OPEN] == tick[DAY_OPEN]:
            candles[i, k, s, col.OPEN] = tick[DAY_OPEN]
        if tick[DAY_HIGH] > candles[i, k, s, col.HIGH] or tick[DAY_LOW] < candles[i, k, s, col.LOW]:
            candles[i, k, s, col.HIGH] = max(candles[i, k, s, col.HIGH], tick[DAY_HIGH])
            candles[i, k, s, col.LOW] = min(candles[i, k, s, col.LOW], tick[DAY_LOW])
            change = max(change, 1)
    if change:
        candles[i, k, s, col.TICKS] += 1
        candles[i, k, s, col.DIRTY] = 1.0
    return change


@compiled
def _take_hidden(candles: Floats, i: int, k: int, s: int, other_time: float, high: float, low: float) -> int:
    """Rule 3: a day extreme that is new between two statements of one candle happened inside it."""
    if not (candles[i, k, s, col.START] * 1000 <= other_time < candles[i, k, s, col.END] * 1000):
        return 0
    change = 0
    if high > candles[i, k, s, col.HIGH]:  # NaN, nothing new, compares false
        candles[i, k, s, col.HIGH] = high
        change = 1
    if low < candles[i, k, s, col.LOW]:
        candles[i, k, s, col.LOW] = low
        change = 1
    if change:
        candles[i, k, s, col.DIRTY] = 1.0
    return change


@compiled
def _apply_tick(shard: ShardArrays, tick: Floats, i: int, d: int, time: float, grace_ms: float) -> None:
    """One good tick of a known instrument on a known day."""
    inst, window = shard.inst[i], shard.window[i]
    price, volume = tick[LAST_PRICE], tick[VOLUME]
    size = int(inst[col.WINDOW_SIZE])
    day_s = shard.day_ms[d, 0] // 1000

    if inst[col.FIRST_AT] == 0:  # rule 2: the first sight is the baseline and makes no candle
        inst[col.FIRST_AT], inst[col.FIRST_TIME], inst[col.FIRST_VOLUME] = max(tick[AT_MS], 1.0), time, volume
        if day_s > inst[col.DAY_S]:
            inst[col.CUM_VOLUME], inst[col.BASELINE], inst[col.DAY_S] = volume, volume, day_s
        elif day_s == inst[col.DAY_S]:  # history told us of today before: its volume is in the candles
            inst[col.BASELINE] -= inst[col.CUM_VOLUME]
            if volume == volume:
                inst[col.BASELINE] += volume
                rebase(shard, i, day_s, volume)
            inst[col.CUM_VOLUME] = volume
            mark_partial(shard, i)
        # Without a trade time it has the receipt's: trades of its second, in whole seconds, come after it.
        known_at = time // 1000 * 1000 if volume == volume else time
        inst[col.WINDOW_SIZE] = _insert_tick(
            window, 0, 0, known_at, volume, price, tick[DAY_HIGH], tick[DAY_LOW]
        )
        shard.counts[col.C_FIRST] += 1
        touch(shard, i, 1)
        return
    if day_s > inst[col.DAY_S]:  # rule 2: a new trade date starts from 0
        inst[col.DAY_S] = day_s
        inst[col.BASELINE] = 0.0 if inst[col.CUM_VOLUME] == inst[col.CUM_VOLUME] else np.nan
        if inst[col.CUM_VOLUME] == inst[col.CUM_VOLUME]:
            inst[col.CUM_VOLUME] = 0.0
        touch(shard, i, 1)
    today = day_s == inst[col.DAY_S]
    # A day's volume never falls. Where it does, all that was said before today's open was another day's: Kite
    # resends the last tick after a subscribe, in a mode without a trade time, and it looks as if of today.
    open_ms = shard.anchor_s[d, shard.schedule[i]] * 1000.0
    said_before = window[0, col.TICK_TIME] < min(time, open_ms) and inst[col.BACKFILLED_TO] <= open_ms
    if today and volume < inst[col.CUM_VOLUME] and said_before:
        inst[col.CUM_VOLUME] = inst[col.BASELINE] = inst[col.FIRST_VOLUME] = 0.0
        touch(shard, i, 1)
    if (
        today and volume == volume and inst[col.CUM_VOLUME] != inst[col.CUM_VOLUME]
    ):  # from ltp to a mode with volume
        inst[col.BASELINE] = volume + (
            inst[col.BASELINE] if inst[col.BASELINE] == inst[col.BASELINE] else 0.0
        )
        inst[col.CUM_VOLUME] = volume
        rebase(shard, i, day_s, volume)

    c = shard.schedule[i]
    inside = False
    for w in range(shard.windows.shape[2]):
        if shard.windows[d, c, w, 0] <= time < shard.windows[d, c, w, 1]:
            inside = True
    if not inside:  # rule 9
        shard.counts[col.C_OFF_SESSION] += 1
        if today:
            if time >= open_ms:  # a straggler of the first window counts on from the pre-open
                apply_off_session(inst, open_ms, volume, said_before)
            if _note_off_session(inst, time, volume):
                touch(shard, i, 1)
        return
    if volume == 0 and (
        inst[col.CUM_VOLUME] > 0 or window[0, col.TICK_VOLUME] > 0
    ):  # its day has no trade yet
        shard.counts[col.C_REPEAT] += 1
        return
    if today and apply_off_session(inst, time, volume, said_before):
        touch(shard, i, 1)

    # Rule 1. No trade time (then it is the time received): only a risen volume is news. A source whose trade
    # times equal its receipts to the second may still bring a straggler.
    received = time == tick[AT_MS] and (time % 1000 != 0 or time >= window[0, col.TICK_TIME])
    if received and volume <= inst[col.CUM_VOLUME] and today:
        shard.counts[col.C_REPEAT] += 1
        return
    # Rule 2: what had traded when we first looked is not ours to tell. A trade time is in whole seconds, the
    # first sight's may be a time of receipt.
    first_second = inst[col.FIRST_TIME] // 1000 * 1000
    if time < first_second or (shard.day_ms[d, 0] <= first_second and volume <= inst[col.FIRST_VOLUME]):
        shard.counts[col.C_EARLY] += 1
        return
    place = _find_place(window, size, time, volume, price)
    if place < 0:
        shard.counts[col.C_REPEAT] += 1
        return
    known = place < col.WINDOW_MAX
    before_time = after_time = np.nan
    high_before = low_before = high_after = low_after = np.nan
    if known:
        if place < size:  # the statement before this one
            before_time = window[place, col.TICK_TIME]
            if tick[DAY_HIGH] > window[place, col.TICK_DAY_HIGH]:
                high_before = tick[DAY_HIGH]
            if tick[DAY_LOW] < window[place, col.TICK_DAY_LOW]:
                low_before = tick[DAY_LOW]
        if place > 0:  # a straggler: the statement after it
            after_time = window[place - 1, col.TICK_TIME]
            if window[place - 1, col.TICK_DAY_HIGH] > tick[DAY_HIGH]:
                high_after = window[place - 1, col.TICK_DAY_HIGH]
            if window[place - 1, col.TICK_DAY_LOW] < tick[DAY_LOW]:
                low_after = window[place - 1, col.TICK_DAY_LOW]
        inst[col.WINDOW_SIZE] = _insert_tick(
            window, size, place, time, volume, price, tick[DAY_HIGH], tick[DAY_LOW]
        )
    shard.counts[col.C_NEWS] += 1

    newest_oi = tick[OI] == tick[OI] and (
        place == 0
        or time > inst[col.OI_TIME]
        or (time == inst[col.OI_TIME] and volume >= inst[col.OI_VOLUME])
    )
    if newest_oi:
        inst[col.OI_TIME], inst[col.OI_VOLUME] = time, volume

    # History has answered for its time: it is in the candles, with what we may have missed.
    answered = inst[col.BACKFILLED_FROM] <= time < inst[col.BACKFILLED_TO]
    if answered:
        shard.counts[col.C_BACKFILLED] += 1
    base = inst[col.CUM_VOLUME] if today else np.nan
    candles, seconds, scalars, evicted = shard.candles, shard.seconds, shard.scalars, shard.evicted
    anchor, close = shard.anchor_s[d, c], shard.close_s[d, c]
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
        newest = candles[i, k, 0, col.START]
        flag = 0
        if start != newest and (length != 0 or tick[DAY_HIGH] != tick[DAY_HIGH]):
            flag = flag_of(start, end, inst)
        due = end * 1000 + grace_ms
        s = open_candle(
            candles, i, k, length, start, end, day_s, base, volume, flag, due, scalars, evicted
        )  # fmt: skip
        if s < 0:
            shard.counts[col.C_BEYOND_WINDOW] += 1
            n = int(scalars[col.LATE_SIZE])
            shard.late[n, 0], shard.late[n, 1] = i, k
            shard.late[n, 2:-2] = tick
            oldest = candles.shape[2] - 1
            same_day = candles[i, k, oldest, col.DAY] == day_s
            shard.late[n, -2] = candles[i, k, oldest, col.START]
            shard.late[n, -1] = candles[i, k, oldest, col.VOL_START] if same_day else np.nan
            scalars[col.LATE_SIZE] = n + 1
            if length != 0 and raise_base(candles, i, k, oldest, day_s, volume):
                level = 2
            continue
        change = _merge(candles, i, k, s, tick, time, known, length == 0, newest_oi)
        if high_before == high_before or low_before == low_before:
            change = max(change, _take_hidden(candles, i, k, s, before_time, high_before, low_before))
        if high_after == high_after or low_after == low_after:
            change = max(change, _take_hidden(candles, i, k, s, after_time, high_after, low_after))
        if (
            change == 2
            or newest != candles[i, k, 0, col.START]
            or (change and candles[i, k, s, col.COMPLETE] != 0)
        ):
            level = 2
        if change and candles[i, k, s, col.REV] >= 0:
            shard.counts[col.C_LATE] += 1
    touch(shard, i, level)
    if today and volume > inst[col.CUM_VOLUME]:
        if answered:
            inst[col.BASELINE] += volume - inst[col.CUM_VOLUME]
            rebase(shard, i, day_s, volume)
        inst[col.CUM_VOLUME] = volume
    if time > shard.scalars[col.WATERMARK]:
        shard.scalars[col.WATERMARK] = time


@compiled
def apply(
    shard: ShardArrays, ticks: Floats, first: int, ends: Ints, dirty_max: int, grace_ms: float, clamp: bool
) -> tuple[int, int]:
    """Take in ticks[first:]. Returns (reason, index of the first tick not taken in).

    `ends` are the entry boundaries (row indices, ascending): with `dirty_max` instruments changed it
    stops (col.LIMIT) at the next boundary, so that a commit stays bounded and ends on a whole entry.
    """
    n = ticks.shape[0]
    entry = np.searchsorted(ends, first, side="right")
    room = shard.seconds.size
    for row in range(first, n):
        if entry < ends.size and row >= ends[entry]:
            while entry < ends.size and row >= ends[entry]:
                entry += 1
            if shard.scalars[col.DIRTY_SIZE] >= dirty_max:
                return col.LIMIT, row
        if (
            shard.evicted.shape[0] - shard.scalars[col.EVICTED_SIZE] < room
            or shard.late.shape[0] - shard.scalars[col.LATE_SIZE] < room
        ):
            return col.LOG_FULL, row
        tick = ticks[row]
        if is_invalid(tick):
            shard.counts[col.C_TICKS] += 1
            shard.counts[col.C_INVALID] += 1
            continue
        time, at = tick[TIME_MS], tick[AT_MS]
        clamped = clamp and at >= TIME_MIN_MS and time > at + FUTURE_MAX_MS
        if clamped:
            time = at
        d = find_day(shard, time)
        if d < 0:
            return col.NEED_DAY, row
        i = add(shard, int(tick[TOKEN]))
        if i < 0:
            return col.FULL, row
        shard.counts[col.C_TICKS] += 1
        if clamped:
            shard.counts[col.C_CLAMPED] += 1
        _apply_tick(shard, tick, i, d, time, grace_ms)
    return col.DONE, n


@compiled
def close_due(shard: ShardArrays, clock_ms: float, grace_ms: float, dirty_max: int) -> bool:
    """Rule 5: complete and announce every candle whose end + grace has passed. Return False if some are left.

    A pass over all instruments may take several calls: it stops when `dirty_max` instruments changed, and
    CLOSE_CURSOR says where the next call resumes. Each pass computes NEXT_DUE again.
    """
    scalars, candles = shard.scalars, shard.candles
    first = int(scalars[col.CLOSE_CURSOR])
    if first == 0:
        if clock_ms < scalars[col.NEXT_DUE]:
            return True
        scalars[col.NEXT_DUE] = np.inf
    for i in range(first, int(scalars[col.INSTRUMENTS])):
        for k in range(shard.seconds.size):
            for s in range(candles.shape[2] - 1, -1, -1):
                if candles[i, k, s, col.START] == 0 or candles[i, k, s, col.REV] >= 0:
                    continue
                due = candles[i, k, s, col.END] * 1000 + grace_ms
                if due > clock_ms:
                    scalars[col.NEXT_DUE] = min(scalars[col.NEXT_DUE], due)
                    continue
                if shard.is_dirty[i] == 0 and scalars[col.DIRTY_SIZE] >= dirty_max:
                    if i == 0:  # CLOSE_CURSOR 0 means that no pass is under way
                        scalars[col.NEXT_DUE] = due
                    scalars[col.CLOSE_CURSOR] = i
                    return False
                candles[i, k, s, col.REV] = 0.0
                candles[i, k, s, col.ANNOUNCE] = 1.0
                candles[i, k, s, col.COMPLETE] = 1.0
                touch(shard, i, 2)
    scalars[col.CLOSE_CURSOR] = 0
    return True
