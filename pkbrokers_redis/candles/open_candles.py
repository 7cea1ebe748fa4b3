"""The recent candles of one instrument and interval: finding, opening and closing them.

Row 0 is the newest candle, open or complete. The others are complete, newer before older.
"""

from __future__ import annotations

import numpy as np

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.compiled import compiled, internal
from pkbrokers_redis.candles.model import DAY_HIGH, FLAG_GAP, FLAG_PARTIAL, FLAG_WHOLE, VOLUME
from pkbrokers_redis.candles.state import Floats, ShardArrays, ShardState, touch


@internal
def find_candle(candles: Floats, i: int, k: int, start: int) -> int:
    """Return the row of the candle that starts at `start`, or where it has to be opened.

    -1 if it is older than every candle in memory.
    """
    for s in range(candles.shape[2]):
        if candles[i, k, s, col.START] <= start:
            return s
    return -1


@internal
def open_candle(
    candles: Floats, scalars: Floats, evicted: Floats, inst: Floats, i: int, k: int, s: int, day_s: int,
    start: int, end: int, length: int, tick: Floats, base: float,
) -> None:  # fmt: skip
    """Open the candle that starts at `start` at row s.

    Rule 4: a newer candle completes the one before it. Rule 6: an older one is inserted between its
    neighbours as complete, and takes its volume out of the newer one's. `base` is the day's volume before
    the tick, NaN for a tick of an earlier day.
    """
    is_day = length == 0
    if s == 0 and candles[i, k, 0, col.START] != 0 and candles[i, k, 0, col.COMPLETE] == 0:
        candles[i, k, 0, col.COMPLETE], candles[i, k, 0, col.DIRTY] = 1.0, 1.0
    older_day, older_end = candles[i, k, s, col.DAY], candles[i, k, s, col.VOL_END]
    _shift(candles, i, k, s, scalars, evicted)
    if is_day:
        base = 0.0  # rule 7: all of the day's volume, also what traded before the first tick
    elif s > 0 and candles[i, k, s - 1, col.DAY] == day_s:
        base = candles[i, k, s - 1, col.VOL_START]
    elif base != base:
        base = older_end if older_day == day_s else tick[VOLUME]
    for column in range(col.CANDLE_WIDTH):
        candles[i, k, s, column] = 0.0
    candles[i, k, s, col.START], candles[i, k, s, col.END], candles[i, k, s, col.DAY] = start, end, day_s
    candles[i, k, s, col.HIGH], candles[i, k, s, col.LOW] = -np.inf, np.inf
    candles[i, k, s, col.VOL_START], candles[i, k, s, col.VOL_END] = base, base
    candles[i, k, s, col.OPEN_INTEREST] = np.nan
    candles[i, k, s, col.OPEN_TIME], candles[i, k, s, col.CLOSE_TIME] = np.inf, -np.inf
    candles[i, k, s, col.REV] = col.UNANNOUNCED
    candles[i, k, s, col.COMPLETE] = 1.0 if s > 0 else 0.0
    if not is_day or tick[DAY_HIGH] != tick[DAY_HIGH]:  # rule 7: day fields make the day candle whole
        candles[i, k, s, col.FLAG] = flag_of(start, end, inst)


@internal
def _shift(candles: Floats, i: int, k: int, s: int, scalars: Floats, evicted: Floats) -> None:
    """Move the candles from row s one row down; the oldest one leaves to `evicted`."""
    last = candles.shape[2] - 1
    if candles[i, k, last, col.START] != 0:
        n = int(scalars[col.EVICTED_SIZE])
        evicted[n, 0], evicted[n, 1] = i, k
        for column in range(col.CANDLE_WIDTH):
            evicted[n, 2 + column] = candles[i, k, last, column]
        scalars[col.EVICTED_SIZE] = n + 1
    for older in range(last, s, -1):
        for column in range(col.CANDLE_WIDTH):
            candles[i, k, older, column] = candles[i, k, older - 1, column]


@internal
def raise_vol_start(candles: Floats, i: int, k: int, s: int, day_s: float, volume: float) -> bool:
    """Rule 1: the volume an older candle gains, candle s and the newer ones lose, so that the sum stays.

    Return True if any of them changed.
    """
    changed = False
    for newer in range(s, -1, -1):
        if candles[i, k, newer, col.DAY] != day_s or not volume > candles[i, k, newer, col.VOL_START]:
            break
        candles[i, k, newer, col.VOL_START] = volume
        candles[i, k, newer, col.VOL_END] = max(candles[i, k, newer, col.VOL_END], volume)
        candles[i, k, newer, col.DIRTY] = 1.0
        changed = True
    return changed


@internal
def log_late_tick(
    candles: Floats, scalars: Floats, late: Floats, i: int, k: int, day_s: int, length: int, tick: Floats
) -> int:
    """Rule 6: log a tick older than every candle in memory; the commit amends its row in the list."""
    n, oldest = int(scalars[col.LATE_SIZE]), candles.shape[2] - 1
    scalars[col.LATE_SIZE] = n + 1
    same_day = candles[i, k, oldest, col.DAY] == day_s
    late[n, 0], late[n, 1] = i, k
    late[n, 2:-2] = tick
    late[n, -2] = candles[i, k, oldest, col.START]
    late[n, -1] = candles[i, k, oldest, col.VOL_START] if same_day else np.nan
    if length != 0 and raise_vol_start(candles, i, k, oldest, day_s, tick[VOLUME]):
        return 2
    return 1


@compiled
def flag_of(start: int, end: int, inst: Floats) -> int:
    """Rule 8: return the flag of a candle that is opened now.

    `partial` if the first tick lies inside it or the baseline holds volume traded inside it, unless nothing
    had traded before that tick or Kite's history covered the candle from its start; `gap` if the feed was
    down inside it.
    """
    start_ms, end_ms = start * 1000, end * 1000
    first_at, first_time = inst[col.FIRST_AT], inst[col.FIRST_TIME]
    if not (inst[col.BACKFILLED_FROM] <= start_ms and first_at < inst[col.BACKFILLED_TO]):
        is_inside = start_ms < first_at < end_ms or start_ms <= first_time < end_ms
        if is_inside and inst[col.FIRST_VOLUME] != 0:  # NaN, an unknown volume, is not 0
            return FLAG_PARTIAL
    if inst[col.GAP_FROM] < end_ms and start_ms < inst[col.GAP_TO]:
        return FLAG_GAP
    return FLAG_WHOLE


@internal
def flag_partial(shard: ShardArrays, i: int) -> None:
    """Rule 8 for the open candles that Kite's history filled before the first tick."""
    for k in range(shard.seconds.size):
        candle = shard.candles[i, k, 0]
        if candle[col.START] == 0 or candle[col.COMPLETE] != 0 or shard.seconds[k] == 0:
            continue
        if flag_of(int(candle[col.START]), int(candle[col.END]), shard.inst[i]) == FLAG_PARTIAL:
            candle[col.FLAG], candle[col.DIRTY] = FLAG_PARTIAL, 1.0
            touch(shard, i, 2)


@internal
def count_on_from(shard: ShardArrays, i: int, day_s: int, volume: float) -> None:
    """Let the open candles count from `volume`: what traded before is in them, or belongs to no candle."""
    for k in range(shard.seconds.size):
        candle = shard.candles[i, k, 0]
        if shard.seconds[k] == 0 or candle[col.START] == 0 or candle[col.COMPLETE] != 0:
            continue
        if candle[col.DAY] == day_s and volume > candle[col.VOL_END]:
            candle[col.VOL_START] += volume - candle[col.VOL_END]
            candle[col.VOL_END] = volume
            candle[col.DIRTY] = 1.0
            touch(shard, i, 2)


# -- rule 5: closing -----------------------------------------------------------------------------


UNHEARD_WAIT_MS = 3_000.0  # machine time that a due candle waits for its feed's progress
RECHECKS = 32  # of a waiting candle


@internal
def _is_unheard(candles: Floats, i: int, k: int, s: int, heard_ms: float, wait_ms: float) -> bool:
    """Return True if the feed was not received up to the candle's end.

    A trade far beyond what the feed was received to came from another source: nothing is known of that.
    """
    end_ms, traded_ms = candles[i, k, s, col.END] * 1000, candles[i, k, s, col.CLOSE_TIME]
    return bool(0 < heard_ms < end_ms and traded_ms <= heard_ms + wait_ms)


@compiled
def close_due(shard: ShardArrays, clock_ms: float, grace_ms: float, wait_ms: float, dirty_max: int) -> bool:
    """Rule 5: complete and announce every candle whose end + grace has passed. Return False if some are left.

    A candle whose feed was not heard to its end waits for `wait_ms` more and is then flagged `gap`; with 0
    feeds do not matter. The day candle takes its fields from the packets (rule 7), whatever was missed.

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
                heard = shard.inst[i, col.HEARD]
                is_unheard = (
                    wait_ms > 0 and shard.seconds[k] != 0 and _is_unheard(candles, i, k, s, heard, wait_ms)
                )
                if is_unheard and due <= clock_ms < due + wait_ms:
                    due = min(clock_ms + wait_ms / RECHECKS, due + wait_ms)
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
                if is_unheard and candles[i, k, s, col.FLAG] == FLAG_WHOLE:
                    candles[i, k, s, col.FLAG], candles[i, k, s, col.UNHEARD] = FLAG_GAP, 1.0
                    scalars[col.UNHEARD_SIZE] += 1
                    shard.counts[col.C_UNHEARD] += 1
                touch(shard, i, 2)
    scalars[col.CLOSE_CURSOR] = 0
    return True


def close_candles(state: ShardState, now_ms: float, dirty_max: int, speed: float = 1.0) -> bool:
    """Complete and announce the candles that are due at wall clock `now_ms`. Return False if some are left.

    Stops once `dirty_max` instruments changed; the next call resumes there. `speed` is the pace of market
    time per machine time (of a rehearsal).
    """
    wait_ms = 0.0 if state.event_clock else UNHEARD_WAIT_MS * speed
    return bool(close_due(state.arrays, state.clock_ms(now_ms), state.grace_ms, wait_ms, dirty_max))


def clear_heard(state: ShardState) -> None:
    """Rule 5: take the flag `gap` from candles whose feed was received to their end after all.

    Its ticks came late, or it only was silent for long. An outage in the candle has its own flag by now.
    """
    shard, left = state.arrays, 0
    for i, k, s in np.argwhere(shard.candles[: len(state), :, :, col.UNHEARD] != 0).tolist():
        candle, inst = shard.candles[i, k, s], shard.inst[i]
        if inst[col.HEARD] < candle[col.END] * 1000:
            left += 1
            continue
        candle[col.UNHEARD] = 0.0
        flag = flag_of(int(candle[col.START]), int(candle[col.END]), inst)
        if candle[col.FLAG] == FLAG_GAP and flag != FLAG_GAP:
            candle[col.FLAG], candle[col.DIRTY] = flag, 1.0
            touch(shard, i, 2)
    shard.scalars[col.UNHEARD_SIZE] = left
