"""Rule 2 when the exchange takes volume back: an annulled trade, a packet with a wrong volume.

The day's volume only rises. A packet with a lower one is late, a repeat, or the higher one was wrong. Three
packets after it that agree on a lower volume are believed. A lagging copy on another connection, whose
packets carry no trade time, is no evidence.
"""

from __future__ import annotations

import numpy as np

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.compiled import internal
from pkbrokers_redis.candles.model import AT_MS, LAST_PRICE, VOLUME
from pkbrokers_redis.candles.state import Floats, ShardArrays, ShardState, touch

AGREEING_MIN = 3  # packets
NAMED = -1.0


@internal
def note_lower_volume(inst: Floats, window: Floats, tick: Floats, time: float, source: int) -> bool:
    """Count a packet with a lower volume than the day's; return True if it may be right, and says more.

    It is newer than the highest one, by the trade time, or, where it has none, from the same producer.
    """
    volume, at = tick[VOLUME], tick[AT_MS]
    is_same = inst[col.RAISED_SOURCE] == source or inst[col.RAISED_SOURCE] == 0  # 0: not known
    if time <= inst[col.RAISED_TIME] or (time == at and not is_same) or at <= inst[col.LOWER_AT]:
        return False
    is_first = inst[col.LOWER_COUNT] == 0 or volume < inst[col.LOWER_VOLUME]
    is_news = is_first or volume > inst[col.LOWER_VOLUME] or tick[LAST_PRICE] != window[0, col.TICK_PRICE]
    if is_first:
        # What the day's volume was before the wrong packet: the highest that is not above this one.
        inst[col.LOWER_COUNT], inst[col.LOWER_BASE] = 0.0, -1.0
        for j in range(int(inst[col.WINDOW_SIZE])):
            if inst[col.LOWER_BASE] < window[j, col.TICK_VOLUME] <= volume:
                inst[col.LOWER_BASE] = window[j, col.TICK_VOLUME]
        if inst[col.LOWER_BASE] < 0:
            inst[col.LOWER_BASE] = volume
    inst[col.LOWER_COUNT] += 1
    inst[col.LOWER_VOLUME], inst[col.LOWER_AT] = volume, at
    return bool(is_news)


@internal
def take_back_volume(shard: ShardArrays, i: int, day_s: int) -> None:
    """Lower the day's volume to what it was before the wrong packet, so that the sums still add up.

    The candles that hold the surplus lose it. Where one of them has left memory, its row keeps it, and the
    baseline falls by the surplus: the sum of the rows is still the volume minus the baseline.
    """
    inst, window, volume = shard.inst[i], shard.window[i], shard.inst[i, col.LOWER_BASE]
    surplus = inst[col.CUM_VOLUME] - volume
    is_held = _holds_surplus(shard, i, day_s, volume, surplus)
    if not is_held:
        inst[col.BASELINE] -= surplus
    for k in range(shard.seconds.size):
        for s in range(shard.candles.shape[2]):
            candle = shard.candles[i, k, s]
            if candle[col.START] == 0 or candle[col.DAY] != day_s:
                continue
            if is_held or shard.seconds[k] == 0:
                is_changed = candle[col.VOL_END] > volume
                for column in (col.VOL_START, col.VOL_END, col.OPEN_VOLUME, col.CLOSE_VOLUME):
                    candle[column] = min(candle[column], volume)
                if is_changed:
                    candle[col.DIRTY] = 1.0
            else:
                candle[col.VOL_START] -= surplus
                candle[col.VOL_END] -= surplus
    for j in range(int(inst[col.WINDOW_SIZE])):
        window[j, col.TICK_VOLUME] = min(window[j, col.TICK_VOLUME], volume)
    for column in (col.CUM_VOLUME, col.FIRST_VOLUME, col.OI_VOLUME):
        inst[column] = min(inst[column], volume)
    inst[col.LOWER_COUNT], inst[col.LOWER_VOLUME] = 0.0, NAMED  # until `taken_back` returned it
    shard.counts[col.C_TAKEN_BACK] += 1
    touch(shard, i, 2)


def taken_back(state: ShardState) -> list[int]:
    """Return, once each, the instruments whose volume was taken back."""
    lower = state.arrays.inst[: len(state), col.LOWER_VOLUME]
    found = np.flatnonzero(lower == NAMED)
    lower[found] = 0.0
    return [int(token) for token in state.tokens[found]]


@internal
def _holds_surplus(shard: ShardArrays, i: int, day_s: int, volume: float, surplus: float) -> bool:
    """Return True if the candles in memory of every interval hold all of the surplus."""
    is_any = False
    for k in range(shard.seconds.size):
        if shard.seconds[k] == 0:
            continue
        held = 0.0
        for s in range(shard.candles.shape[2]):
            candle = shard.candles[i, k, s]
            if candle[col.START] != 0 and candle[col.DAY] == day_s:
                before = candle[col.VOL_END] - candle[col.VOL_START]
                held += before - (min(candle[col.VOL_END], volume) - min(candle[col.VOL_START], volume))
        if abs(held - surplus) > 1e-6:
            return False
        is_any = True
    return is_any
