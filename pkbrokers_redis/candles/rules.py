"""The candle rules, in the order in which a tick meets them. No I/O, no clock, no strings.

A tick states a fact: at `time_ms` the last trade had this price, and the day's cumulative volume was this.
Candles are a merge of such facts: a tick applied twice, or two ticks in another order, give the same rows.
The window of an instrument's recent ticks makes that exact. It tells a repeat from a late tick, and it finds
the neighbours in time of a late tick, between which a hidden extreme may lie.

    invalid ticks                `is_invalid`
    baseline, new trade date     `_set_baseline`, `_start_day`, `_correct_baseline`
    volume taken back            `note_lower_volume`, `take_back_volume`
    outside the windows          `_apply_off_session`, `absorb_off_session`
    repeats                      `_find_news`, `_find_place`
    each interval's candle       `_apply_to_candles`: `open_candle`, `_merge`, `_include_extreme`
    closing                      `open_candles.close_due`

The rules that comments cite by number: 1 merge and repeats, 2 baseline and trade date, 3 hidden extremes, 4 a
newer candle completes the older one, 5 closing, 6 late ticks, 7 the day candle, 8 flags, 9 off-session.

The kernels return a reason when they need something of Python (`NEED_DAY`, `FULL`, …). Python then calls
them again where they stopped. They run uncompiled, too (NUMBA_DISABLE_JIT=1). NaN is unequal to itself:
`volume == volume` reads "the volume is known".
"""

from __future__ import annotations

import numpy as np

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.compiled import compiled, compiled_inlined, inlined, internal
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
    TickArray,
)
from pkbrokers_redis.candles.open_candles import (
    count_on_from,
    find_candle,
    flag_partial,
    log_late_tick,
    open_candle,
    raise_vol_start,
)
from pkbrokers_redis.candles.state import Floats, Ints, ShardArrays, ShardState, add, find_day, touch
from pkbrokers_redis.candles.taken_back import AGREEING_MIN, note_lower_volume, take_back_volume

Extremes = tuple[float, float, float, float, float, float]
NO_SOURCES = np.empty(0, np.int64)  # of ticks whose producer is not known

# -- invalid ticks -------------------------------------------------------------------------------


@compiled_inlined
def is_invalid(tick: Floats) -> bool:
    """Return True for no token, no price, or a number out of bounds (times: 1990 to 2100).

    A price of 0 is valid with a volume of 0 only: Kite sends it until the day's first trade.
    """
    token = tick[TOKEN]
    if not (1 <= token <= TOKEN_MAX) or token != np.floor(token):
        return True
    if not (TIME_MIN_MS <= tick[TIME_MS] < TIME_MAX_MS):
        return True
    price = tick[LAST_PRICE]
    if not (-NUMBER_MAX < price < NUMBER_MAX) or (price == 0 and tick[VOLUME] != 0):
        return True
    if tick[VOLUME] < 0:
        return True
    for column in range(LAST_PRICE, TIME_MS):
        if abs(tick[column]) > NUMBER_MAX:  # NaN, an absent field, compares false
            return True
    return False


# -- rule 2: baseline and trade date -------------------------------------------------------------


@internal
def _set_baseline(shard: ShardArrays, i: int, tick: Floats, time: float, day_s: int) -> None:
    """Rule 2: the first tick of an instrument is its baseline and makes no candle."""
    inst, volume = shard.inst[i], tick[VOLUME]
    inst[col.FIRST_AT], inst[col.FIRST_TIME], inst[col.FIRST_VOLUME] = max(tick[AT_MS], 1.0), time, volume
    if day_s > inst[col.DAY_S]:
        inst[col.CUM_VOLUME], inst[col.BASELINE], inst[col.DAY_S] = volume, volume, day_s
    elif day_s == inst[col.DAY_S]:
        # Kite's history filled candles of today before the first tick. They hold the volume so far.
        inst[col.BASELINE] -= inst[col.CUM_VOLUME]
        if volume == volume:
            inst[col.BASELINE] += volume
            count_on_from(shard, i, day_s, volume)
        inst[col.CUM_VOLUME] = volume
        flag_partial(shard, i)
    # Trade times are whole seconds. If the first tick has a receive time instead, truncate it, so that
    # trades of that second sort after it.
    known_at = time // 1000 * 1000 if volume == volume else time
    inst[col.WINDOW_SIZE] = _insert_tick(shard.window[i], 0, 0, tick, known_at)
    shard.counts[col.C_FIRST] += 1
    touch(shard, i, 1)


@internal
def _start_day(inst: Floats, day_s: int) -> None:
    """Rule 2: a new trade date starts from a volume of 0; an unknown volume stays unknown."""
    inst[col.DAY_S] = day_s
    is_known = inst[col.CUM_VOLUME] == inst[col.CUM_VOLUME]
    inst[col.CUM_VOLUME] = inst[col.BASELINE] = 0.0 if is_known else np.nan


@inlined
def _correct_baseline(
    shard: ShardArrays, inst: Floats, i: int, volume: float, day_s: int, is_day_new: bool
) -> None:
    """Rule 2: drop the volume of the previous day; start from the first volume after ticks without one."""
    if volume < inst[col.CUM_VOLUME] and is_day_new:
        inst[col.CUM_VOLUME] = inst[col.BASELINE] = inst[col.FIRST_VOLUME] = 0.0
        touch(shard, i, 1)
    if volume == volume and inst[col.CUM_VOLUME] != inst[col.CUM_VOLUME]:  # from ltp to a mode with volume
        had_baseline = inst[col.BASELINE] == inst[col.BASELINE]
        inst[col.BASELINE] = volume + (inst[col.BASELINE] if had_baseline else 0.0)
        inst[col.CUM_VOLUME] = volume
        count_on_from(shard, i, day_s, volume)


# -- rule 9: outside the windows -----------------------------------------------------------------


@inlined
def _is_in_session(windows: Ints, d: int, c: int, time: float) -> bool:
    """Rule 9: return True if the schedule trades at that time."""
    for w in range(windows.shape[2]):
        if windows[d, c, w, 0] <= time < windows[d, c, w, 1]:
            return True
    return False


@internal
def _apply_off_session(
    shard: ShardArrays, i: int, volume: float, time: float, open_ms: float, is_day_new: bool
) -> None:
    """Rule 9: a trade outside the windows (pre-open, break, post-close) is in no candle.

    Its volume raises the baseline when a tick inside a window follows. Until then the tick is only
    remembered: a late tick of the window before must not count its volume, and a stale copy changes nothing.
    """
    inst = shard.inst[i]
    if time >= open_ms:  # a late tick of the first window counts from the pre-open
        absorb_off_session(inst, open_ms, volume, is_day_new)
    if volume != volume or time < inst[col.OFF_SESSION_TIME]:
        return
    if time == inst[col.OFF_SESSION_TIME] and volume <= inst[col.OFF_SESSION_VOLUME]:
        return
    inst[col.OFF_SESSION_TIME], inst[col.OFF_SESSION_VOLUME] = time, volume
    touch(shard, i, 1)


@compiled
def absorb_off_session(inst: Floats, time: float, volume: float, is_day_new: bool) -> bool:
    """Rule 2: raise the baseline by the volume traded outside the windows before `time`.

    `volume` is that of the tick which follows. Daily volume is monotonic: if it is lower than the one
    outside the windows, either that one belongs to the previous day (`is_day_new`), or the tick is late.
    Return True if anything changed.
    """
    if not inst[col.DAY_S] * 1000 <= inst[col.OFF_SESSION_TIME] < time:
        return False
    if volume < inst[col.OFF_SESSION_VOLUME]:  # NaN, no volume, compares false
        if not is_day_new:
            return False
    elif inst[col.OFF_SESSION_VOLUME] > inst[col.CUM_VOLUME]:
        inst[col.BASELINE] += inst[col.OFF_SESSION_VOLUME] - inst[col.CUM_VOLUME]
        inst[col.CUM_VOLUME] = inst[col.OFF_SESSION_VOLUME]
    inst[col.OFF_SESSION_TIME] = inst[col.OFF_SESSION_VOLUME] = 0.0
    return True


# -- rule 1: repeats -----------------------------------------------------------------------------


@inlined
def _find_news(
    inst: Floats, window: Floats, tick: Floats, time: float, midnight_ms: float, is_today: bool,
    is_corrected: bool,
) -> tuple[int, int]:  # fmt: skip
    """Return whether a tick is news, a repeat or older than the baseline, and its place in the window."""
    volume = tick[VOLUME]
    # Without a trade time, the time is the one received, and only a risen volume is news. A source whose
    # trade times equal its receive times to the second may still bring a late tick. Of a volume that the
    # exchange corrects downwards (`is_corrected`), the price is news.
    has_receive_time = time == tick[AT_MS] and (time % 1000 != 0 or time >= window[0, col.TICK_TIME])
    if has_receive_time and volume <= inst[col.CUM_VOLUME] and is_today and not is_corrected:
        return col.C_REPEAT, -1
    # Rule 2: what traded before the first tick is in no candle. That tick's time may be a receive time,
    # a trade time is in whole seconds.
    first_second = inst[col.FIRST_TIME] // 1000 * 1000
    if time < first_second or (midnight_ms <= first_second and volume <= inst[col.FIRST_VOLUME]):
        return col.C_EARLY, -1
    place = _find_place(window, int(inst[col.WINDOW_SIZE]), time, volume, tick[LAST_PRICE])
    return (col.C_NEWS if place >= 0 else col.C_REPEAT), place


@internal
def _find_place(window: Floats, size: int, time: float, volume: float, price: float) -> int:
    """Return a tick's place in the window: 0 newest, -1 it is a repeat, WINDOW_MAX older than all.

    Ticks are ordered by trade time, then cumulative volume, then arrival. With a volume, time and volume
    identify a tick; without one, time and price do.
    """
    for j in range(size):
        if time < window[j, col.TICK_TIME]:
            continue
        if time > window[j, col.TICK_TIME]:
            return j
        known_volume = window[j, col.TICK_VOLUME]
        if volume != volume or known_volume != known_volume:
            for same in range(j, size):  # all ticks of that time: the price tells them apart
                if window[same, col.TICK_TIME] != time:
                    break
                if window[same, col.TICK_PRICE] == price:
                    return -1
            return j
        if volume == known_volume:
            return -1
        if volume > known_volume:
            return j
    return size if size < col.WINDOW_MAX else col.WINDOW_MAX


@internal
def _insert_tick(window: Floats, size: int, place: int, tick: Floats, time: float) -> int:
    """Insert a tick into the window; a full window drops its oldest. Return the new size."""
    if size < col.WINDOW_MAX:
        size += 1
    for j in range(size - 1, place, -1):
        for column in range(col.TICK_STATE_WIDTH):
            window[j, column] = window[j - 1, column]
    window[place, col.TICK_TIME], window[place, col.TICK_VOLUME] = time, tick[VOLUME]
    window[place, col.TICK_PRICE] = tick[LAST_PRICE]
    window[place, col.TICK_DAY_HIGH], window[place, col.TICK_DAY_LOW] = tick[DAY_HIGH], tick[DAY_LOW]
    return size


# -- rule 3: hidden extremes ---------------------------------------------------------------------


@inlined
def _hidden_extremes(window: Floats, size: int, place: int, tick: Floats) -> Extremes:
    """Rule 3: compare the day's high and low with those of the ticks before and after this one.

    Return, for the tick before and then for the tick after: its time, and the day high and day low that
    are new between the two ticks. NaN where nothing is new.
    """
    before_time = after_time = np.nan
    high_before = low_before = high_after = low_after = np.nan
    if place < size:
        before_time = window[place, col.TICK_TIME]
        if tick[DAY_HIGH] > window[place, col.TICK_DAY_HIGH]:
            high_before = tick[DAY_HIGH]
        if tick[DAY_LOW] < window[place, col.TICK_DAY_LOW]:
            low_before = tick[DAY_LOW]
    if 0 < place < col.WINDOW_MAX:
        after_time = window[place - 1, col.TICK_TIME]
        if window[place - 1, col.TICK_DAY_HIGH] > tick[DAY_HIGH]:
            high_after = window[place - 1, col.TICK_DAY_HIGH]
        if window[place - 1, col.TICK_DAY_LOW] < tick[DAY_LOW]:
            low_after = window[place - 1, col.TICK_DAY_LOW]
    return before_time, high_before, low_before, after_time, high_after, low_after


@internal
def _include_extreme(
    candles: Floats, i: int, k: int, s: int, other_time: float, high: float, low: float
) -> int:
    """Rule 3: an extreme that is new between two ticks of a candle lies inside it. Return 1 if new."""
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


# -- rules 1 and 7: merge ------------------------------------------------------------------------


@internal
def _merge(
    candles: Floats, i: int, k: int, s: int, tick: Floats, time: float, is_new: bool, is_day: bool,
    has_oi: bool,
) -> int:  # fmt: skip
    """Rule 1: merge a tick into a candle. Return 0 for no change, 2 if the stored state changed, else 1.

    Open is the earliest trade, close the latest, high and low are the extremes. Volume is the highest
    cumulative volume inside the candle minus the highest before it.
    """
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
        is_same = time == close_time and key == candles[i, k, s, col.CLOSE_VOLUME]
        if not is_same or price != candles[i, k, s, col.CLOSE]:
            change = max(change, 1)
        candles[i, k, s, col.CLOSE], candles[i, k, s, col.CLOSE_TIME] = price, time
        candles[i, k, s, col.CLOSE_VOLUME] = key
        if tick[OI] == tick[OI]:
            candles[i, k, s, col.OPEN_INTEREST] = tick[OI]
    elif s == 0 and has_oi:  # the newer ticks had no open interest
        candles[i, k, s, col.OPEN_INTEREST] = tick[OI]
    if time < open_time or (time == open_time and key < candles[i, k, s, col.OPEN_VOLUME]):
        candles[i, k, s, col.OPEN], candles[i, k, s, col.OPEN_TIME] = price, time
        candles[i, k, s, col.OPEN_VOLUME] = key
        change = 2
    vol_end = candles[i, k, s, col.VOL_END]
    if volume > vol_end:
        candles[i, k, s, col.VOL_END] = volume
        change = max(change, 1)
        if s > 0 and not is_day and raise_vol_start(candles, i, k, s - 1, candles[i, k, s, col.DAY], volume):
            change = 2
    elif vol_end != vol_end and volume == volume:  # the first volume
        candles[i, k, s, col.VOL_START] = candles[i, k, s, col.VOL_END] = volume
    if is_day and tick[DAY_HIGH] == tick[DAY_HIGH] and tick[DAY_LOW] == tick[DAY_LOW]:
        change = max(change, _merge_day_fields(candles, i, k, s, tick))
    if change:
        candles[i, k, s, col.TICKS] += 1
        candles[i, k, s, col.DIRTY] = 1.0
    return change


@internal
def _merge_day_fields(candles: Floats, i: int, k: int, s: int, tick: Floats) -> int:
    """Rule 7: the day candle takes open, high and low from the packet's own day fields."""
    if tick[DAY_OPEN] == tick[DAY_OPEN]:
        candles[i, k, s, col.OPEN] = tick[DAY_OPEN]
    if tick[DAY_HIGH] > candles[i, k, s, col.HIGH] or tick[DAY_LOW] < candles[i, k, s, col.LOW]:
        candles[i, k, s, col.HIGH] = max(candles[i, k, s, col.HIGH], tick[DAY_HIGH])
        candles[i, k, s, col.LOW] = min(candles[i, k, s, col.LOW], tick[DAY_LOW])
        return 1
    return 0


# -- one tick ------------------------------------------------------------------------------------


@inlined
def _apply_to_candles(
    candles: Floats, seconds: Ints, scalars: Floats, evicted: Floats, late: Floats, counts: Ints,
    inst: Floats, tick: Floats, i: int, time: float, day_s: int, anchor: int, close: int, grace_ms: float,
    base: float, extremes: Extremes, is_new: bool, has_oi: bool, is_backfilled: bool,
) -> int:  # fmt: skip
    """Apply a tick to the candle of each interval. Return how much of the state changed, for `touch`.

    `base` is the day's volume before the tick, NaN for a tick of an earlier day.
    """
    before_time, high_before, low_before, after_time, high_after, low_after = extremes
    second = np.int64(time) // 1000
    level = 1
    for k in range(seconds.size):
        length = seconds[k]
        if is_backfilled and length != 0:  # it is in the candle, with what we may have missed
            continue
        start, end = anchor, close
        if length != 0:
            start = anchor + (second - anchor) // length * length
            end = min(start + length, close)
        s = 0 if candles[i, k, 0, col.START] == start else find_candle(candles, i, k, start)
        if s < 0:
            counts[col.C_BEYOND_WINDOW] += 1
            level = max(level, log_late_tick(candles, scalars, late, i, k, day_s, length, tick))
            continue
        if candles[i, k, s, col.START] != start:
            open_candle(candles, scalars, evicted, inst, i, k, s, day_s, start, end, length, tick, base)
            scalars[col.NEXT_DUE] = min(scalars[col.NEXT_DUE], end * 1000 + grace_ms)
            level = 2
        change = _merge(candles, i, k, s, tick, time, is_new, length == 0, has_oi)
        if high_before == high_before or low_before == low_before:
            change = max(change, _include_extreme(candles, i, k, s, before_time, high_before, low_before))
        if high_after == high_after or low_after == low_after:
            change = max(change, _include_extreme(candles, i, k, s, after_time, high_after, low_after))
        if change == 2 or (change and candles[i, k, s, col.COMPLETE] != 0):
            level = 2
        if change and candles[i, k, s, col.REV] >= 0:
            counts[col.C_LATE] += 1
    return level


@inlined
def _note_news(inst: Floats, window: Floats, tick: Floats, time: float, place: int) -> tuple[Extremes, bool]:
    """Insert a tick into the window. Return the hidden extremes, and whether its open interest is newest."""
    size, volume = int(inst[col.WINDOW_SIZE]), tick[VOLUME]
    extremes = _hidden_extremes(window, size, place, tick)
    if place < col.WINDOW_MAX:
        inst[col.WINDOW_SIZE] = _insert_tick(window, size, place, tick, time)
    is_newer = time == inst[col.OI_TIME] and volume >= inst[col.OI_VOLUME]
    has_oi = tick[OI] == tick[OI] and (place == 0 or time > inst[col.OI_TIME] or is_newer)
    if has_oi:
        inst[col.OI_TIME], inst[col.OI_VOLUME] = time, volume
    return extremes, has_oi


@inlined
def _apply_news(
    shard: ShardArrays, inst: Floats, window: Floats, tick: Floats, i: int, d: int, time: float,
    grace_ms: float, place: int, is_today: bool, source: int,
) -> None:  # fmt: skip
    """Apply a tick that is neither a repeat nor older than the baseline."""
    volume, c, day_s = tick[VOLUME], shard.schedule[i], shard.day_ms[d, 0] // 1000
    extremes, has_oi = _note_news(inst, window, tick, time, place)
    is_backfilled = inst[col.BACKFILLED_FROM] <= time < inst[col.BACKFILLED_TO]
    if is_backfilled:
        shard.counts[col.C_BACKFILLED] += 1
    base = inst[col.CUM_VOLUME] if is_today else np.nan
    level = _apply_to_candles(
        shard.candles, shard.seconds, shard.scalars, shard.evicted, shard.late, shard.counts, inst,
        tick, i, time, day_s, shard.anchor_s[d, c], shard.close_s[d, c], grace_ms, base,
        extremes, place < col.WINDOW_MAX, has_oi, is_backfilled,
    )  # fmt: skip
    touch(shard, i, level)
    if is_today and volume > inst[col.CUM_VOLUME]:
        if is_backfilled:
            inst[col.BASELINE] += volume - inst[col.CUM_VOLUME]
            count_on_from(shard, i, day_s, volume)
        inst[col.CUM_VOLUME] = volume
        inst[col.RAISED_TIME], inst[col.RAISED_SOURCE], inst[col.LOWER_COUNT] = time, source, 0.0
    if time > shard.scalars[col.WATERMARK]:
        shard.scalars[col.WATERMARK] = time


@inlined
def _apply_tick(
    shard: ShardArrays, tick: Floats, i: int, d: int, time: float, grace_ms: float, source: int
) -> None:
    """Apply one valid tick of a known instrument on a known day."""
    inst, window, volume = shard.inst[i], shard.window[i], tick[VOLUME]
    day_s = shard.day_ms[d, 0] // 1000
    if inst[col.FIRST_AT] == 0:
        _set_baseline(shard, i, tick, time, day_s)
        inst[col.RAISED_TIME], inst[col.RAISED_SOURCE] = time, source
        return
    if tick[LAST_PRICE] == 0:  # no trade yet today: after the baseline it says nothing new
        shard.counts[col.C_REPEAT] += 1
        return
    if day_s > inst[col.DAY_S]:
        _start_day(inst, day_s)
        touch(shard, i, 1)
    is_today = day_s == inst[col.DAY_S]
    c = shard.schedule[i]
    open_ms = shard.anchor_s[d, c] * 1000.0
    # Daily volume is monotonic. A drop means that the ticks before today's open belong to the previous day:
    # Kite replays the last tick after a subscribe, and without a trade time it looks like today's.
    is_day_new = window[0, col.TICK_TIME] < min(time, open_ms) and inst[col.BACKFILLED_TO] <= open_ms
    if is_today:
        _correct_baseline(shard, inst, i, volume, day_s, is_day_new)
    if not _is_in_session(shard.windows, d, c, time):
        shard.counts[col.C_OFF_SESSION] += 1
        if is_today:
            _apply_off_session(shard, i, volume, time, open_ms, is_day_new)
        return
    if volume == 0 and (inst[col.CUM_VOLUME] > 0 or window[0, col.TICK_VOLUME] > 0):  # no trade yet today
        shard.counts[col.C_REPEAT] += 1
        return
    if is_today and absorb_off_session(inst, time, volume, is_day_new):
        touch(shard, i, 1)
    is_corrected = False
    if is_today and volume < inst[col.CUM_VOLUME]:  # NaN, no volume, compares false
        is_corrected = note_lower_volume(inst, window, tick, time, source)
        if inst[col.LOWER_COUNT] >= AGREEING_MIN:
            take_back_volume(shard, i, day_s)
    kind, place = _find_news(inst, window, tick, time, shard.day_ms[d, 0], is_today, is_corrected)
    shard.counts[kind] += 1
    if kind == col.C_NEWS:
        _apply_news(shard, inst, window, tick, i, d, time, grace_ms, place, is_today, source)


@compiled
def apply(
    shard: ShardArrays, ticks: Floats, first: int, ends: Ints, sources: Ints, dirty_max: int,
    grace_ms: float, clamp: bool,
) -> tuple[int, int]:  # fmt: skip
    """Apply ticks[first:]. Return (reason, index of the first tick that was not applied).

    `ends` are the entry boundaries (row indices, ascending), `sources` the entries' producers: with
    `dirty_max` instruments changed it stops (LIMIT) at the next boundary, so that a commit stays bounded and
    ends on a whole entry.
    """
    n = ticks.shape[0]
    entry = np.searchsorted(ends, first, side="right")
    scalars, room = shard.scalars, shard.seconds.size
    for row in range(first, n):
        if entry < ends.size and row >= ends[entry]:
            while entry < ends.size and row >= ends[entry]:
                entry += 1
            if scalars[col.DIRTY_SIZE] >= dirty_max:
                return col.LIMIT, row
        if shard.evicted.shape[0] - scalars[col.EVICTED_SIZE] < room:
            return col.LOG_FULL, row
        if shard.late.shape[0] - scalars[col.LATE_SIZE] < room:
            return col.LOG_FULL, row
        tick = ticks[row]
        if is_invalid(tick):
            shard.counts[col.C_TICKS] += 1
            shard.counts[col.C_INVALID] += 1
            continue
        time, at = tick[TIME_MS], tick[AT_MS]
        is_clamped = clamp and at >= TIME_MIN_MS and time > at + FUTURE_MAX_MS
        if is_clamped:
            time = at
        d = find_day(shard, time)
        if d < 0:
            return col.NEED_DAY, row
        i = add(shard, int(tick[TOKEN]))
        if i < 0:
            return col.FULL, row
        shard.counts[col.C_TICKS] += 1
        if is_clamped:
            shard.counts[col.C_CLAMPED] += 1
        source = sources[entry] if entry < sources.size else 0
        _apply_tick(shard, tick, i, d, time, grace_ms, source)
    return col.DONE, n


# -- a batch of ticks ----------------------------------------------------------------------------


def apply_ticks(
    state: ShardState, ticks: TickArray, first: int, ends: Ints, dirty_max: int, sources: Ints = NO_SOURCES
) -> int:
    """Apply the rules to `ticks[first:]` (float64[n, 10]), as far as one commit may go.

    `ends` are the row indices at which stream entries end, `sources` numbers of their producers. The batch
    stops at the next one once `dirty_max` instruments changed. Return the index of the first tick that was
    not applied.
    """
    while True:
        reason, first = apply(
            state.arrays, ticks, first, ends, sources, dirty_max, state.grace_ms, not state.event_clock
        )
        if reason == col.NEED_DAY:
            state.add_day(int(_time_of(state, ticks[first])))
        elif reason == col.FULL:
            state.grow(2 * len(state.arrays.tokens))
        elif reason == col.LOG_FULL:
            state.grow_logs()
        else:
            return first


def _time_of(state: ShardState, tick: Floats) -> float:
    """Return the time a tick counts for: its own, or the receive time where the rules clamp it."""
    at = tick[AT_MS]
    if not state.event_clock and at >= TIME_MIN_MS and tick[TIME_MS] > at + FUTURE_MAX_MS:
        return float(at)
    return float(tick[TIME_MS])


def invalid_ticks(state: ShardState, ticks: TickArray) -> dict[str, list[float]]:
    """Return the first tick of each irregular kind, by the name of its count: evidence for a log."""
    found: dict[str, list[float]] = {}
    for tick in ticks:
        if is_invalid(tick):
            found.setdefault("invalid", tick.tolist())
        elif _time_of(state, tick) != tick[TIME_MS]:
            found.setdefault("future_clamped", tick.tolist())
    return found
