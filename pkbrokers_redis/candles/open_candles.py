"""The recent candles of one instrument and interval: finding, opening and completing them.

Row 0 is the newest candle, open or complete. The others are complete, newer before older.
"""

from __future__ import annotations

import numpy as np

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.arrays import Floats, ShardArrays, touch
from pkbrokers_redis.candles.compiled import compiled
from pkbrokers_redis.candles.model import FLAG_GAP, FLAG_PARTIAL


@compiled
def _evict(candles: Floats, i: int, k: int, s: int, scalars: Floats, evicted: Floats) -> None:
    """Make room at candle s by moving it and the older ones down; the oldest leaves to the log."""
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


@compiled
def open_candle(
    candles: Floats, i: int, k: int, length: int, start: int, end: int, day_s: int, base: float,
    volume: float, flag: int, due: float, scalars: Floats, evicted: Floats,
) -> int:  # fmt: skip
    """The candle of the candle that starts at `start`, opened if need be; -1: older than every candle.

    Rule 4: a newer candle completes the one before it. Rule 6: an older one that never was is put
    between its neighbours, and takes its volume out of the newer one's. `base` is the highest volume
    seen before the tick, NaN for a tick of an earlier day.
    """
    size = candles.shape[2]
    newest = candles[i, k, 0, col.START]
    if start == newest:
        return 0
    s = 0
    if newest != 0 and start < newest:
        s = 1
        while s < size and candles[i, k, s, col.START] > start:
            s += 1
        if s == size:
            return -1
        if candles[i, k, s, col.START] == start:
            return s
    elif newest != 0 and candles[i, k, 0, col.COMPLETE] == 0:
        candles[i, k, 0, col.COMPLETE], candles[i, k, 0, col.DIRTY] = 1.0, 1.0
    older_day, older_top = candles[i, k, s, col.DAY], candles[i, k, s, col.VOL_END]
    _evict(candles, i, k, s, scalars, evicted)
    if length == 0:
        base = 0.0  # rule 7: the day's volume is the day's, watched or not
    elif s > 0 and candles[i, k, s - 1, col.DAY] == day_s:
        base = candles[i, k, s - 1, col.VOL_START]
    elif base != base:
        base = older_top if older_day == day_s else volume
    for column in range(col.CANDLE_WIDTH):
        candles[i, k, s, column] = 0.0
    candles[i, k, s, col.START], candles[i, k, s, col.END], candles[i, k, s, col.DAY] = start, end, day_s
    candles[i, k, s, col.HIGH], candles[i, k, s, col.LOW] = -np.inf, np.inf
    candles[i, k, s, col.VOL_START], candles[i, k, s, col.VOL_END] = base, base
    candles[i, k, s, col.OPEN_INTEREST] = np.nan
    candles[i, k, s, col.OPEN_TIME], candles[i, k, s, col.CLOSE_TIME] = np.inf, -np.inf
    candles[i, k, s, col.REV] = col.UNANNOUNCED
    candles[i, k, s, col.COMPLETE] = 1.0 if s > 0 else 0.0
    candles[i, k, s, col.FLAG] = flag
    scalars[col.NEXT_DUE] = min(scalars[col.NEXT_DUE], due)
    return s


@compiled
def raise_base(candles: Floats, i: int, k: int, s: int, day_s: float, volume: float) -> bool:
    """Rule 1: the volume an older candle gains, candle s and newer ones lose: the sum stays. False: none."""
    changed = False
    for newer in range(s, -1, -1):
        if candles[i, k, newer, col.DAY] != day_s or not volume > candles[i, k, newer, col.VOL_START]:
            break
        candles[i, k, newer, col.VOL_START] = volume
        candles[i, k, newer, col.VOL_END] = max(candles[i, k, newer, col.VOL_END], volume)
        candles[i, k, newer, col.DIRTY] = 1.0
        changed = True
    return changed


@compiled
def flag_of(start: int, end: int, inst: Floats) -> int:
    """Rule 8: partial, if we began to watch inside it or our baseline holds volume traded inside it, unless
    history has told us of it from its start; gap, if the feed was down inside it."""
    start_ms, end_ms = start * 1000, end * 1000
    first_at, first_time = inst[col.FIRST_AT], inst[col.FIRST_TIME]
    if not (inst[col.BACKFILLED_FROM] <= start_ms and first_at < inst[col.BACKFILLED_TO]):
        if start_ms < first_at < end_ms:
            return FLAG_PARTIAL
        if start_ms <= first_time < end_ms and inst[col.FIRST_VOLUME] != 0:
            return FLAG_PARTIAL
    if inst[col.GAP_FROM] < end_ms and start_ms < inst[col.GAP_TO]:
        return FLAG_GAP
    return 0


@compiled
def mark_partial(shard: ShardArrays, i: int) -> None:
    """Rule 8 for the forming candles that history opened before we saw the first tick."""
    for k in range(shard.seconds.size):
        candle = shard.candles[i, k, 0]
        if candle[col.START] != 0 and candle[col.COMPLETE] == 0 and shard.seconds[k] != 0:
            if flag_of(int(candle[col.START]), int(candle[col.END]), shard.inst[i]) == FLAG_PARTIAL:
                candle[col.FLAG], candle[col.DIRTY] = FLAG_PARTIAL, 1.0
                touch(shard, i, 2)


@compiled
def rebase(shard: ShardArrays, i: int, day_s: int, volume: float) -> None:
    """Let the forming candles count on from `volume`: what traded up to there is in them, or is not ours."""
    for k in range(shard.seconds.size):
        candle = shard.candles[i, k, 0]
        if (
            shard.seconds[k] == 0
            or candle[col.START] == 0
            or candle[col.COMPLETE] != 0
            or candle[col.DAY] != day_s
        ):
            continue
        if volume > candle[col.VOL_END]:
            candle[col.VOL_START] += volume - candle[col.VOL_END]
            candle[col.VOL_END] = volume
            candle[col.DIRTY] = 1.0
            touch(shard, i, 2)
