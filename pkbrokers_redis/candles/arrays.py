"""The arrays of one shard, and how to find an instrument or a day in them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.compiled import compiled

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class ShardArrays(NamedTuple):
    """All arrays of one shard; allocated and grown by `state.ShardState`.

    N instruments, I intervals, S recent candles of each, D calendar days, C schedules, W windows a day.
    """

    tokens: Ints  # [N]
    table: Ints  # [M] open-addressed hash table of tokens: instrument index + 1, 0 is free
    inst: Floats  # [N, INST_WIDTH] what is known of each instrument
    window: Floats  # [N, WINDOW_MAX, TICK_STATE_WIDTH] its recent ticks, newest first
    candles: Floats  # [N, I, S, CANDLE_WIDTH] its recent candles, newest first; the first may be open
    in_current: Ints  # [N, I] 1 where Redis holds the interval in `P:{S}:current:<token>`
    schedule: Ints  # [N] index into the calendar's schedules
    schedule_of_segment: Ints  # [2, 256] without and with derivatives
    derivatives: Ints  # tokens of stocks that have futures or options, ascending
    seconds: Ints  # [I] length of each interval, 0 for the day
    day_ms: Ints  # [D, 2] local midnight to the next one
    anchor_s: Ints  # [D, C] first open: where the buckets begin
    close_s: Ints  # [D, C] last close
    windows: Ints  # [D, C, W, 2] open and close in ms; 0 0 where there is none
    scalars: Floats  # see col.WATERMARK …
    counts: Ints  # see col.C_TICKS …
    dirty: Ints  # [N] instruments changed since the last collect, in order
    is_dirty: Ints  # [N] 1 the instrument changed, 2 also the stored state of its candles
    evicted: Floats  # [E, EVICTED_WIDTH] candles that left `candles` since the last collect
    late: Floats  # [L, LATE_TICK_WIDTH] ticks older than all candles; START and VOL_START of the oldest then


@compiled
def touch(shard: ShardArrays, i: int, level: int) -> None:
    """Mark an instrument as changed."""
    if shard.is_dirty[i] == 0:
        n = int(shard.scalars[col.DIRTY_SIZE])
        shard.dirty[n] = i
        shard.scalars[col.DIRTY_SIZE] = n + 1
    if shard.is_dirty[i] < level:
        shard.is_dirty[i] = level


@compiled
def find(shard: ShardArrays, token: int) -> int:
    """The instrument's index, or -1 - (its free place in the hash table)."""
    mask = shard.table.size - 1
    place = (token ^ (token >> 8)) & mask
    while True:
        i = int(shard.table[place]) - 1
        if i < 0:
            return -1 - place
        if shard.tokens[i] == token:
            return i
        place = (place + 1) & mask


@compiled
def add(shard: ShardArrays, token: int) -> int:
    """The instrument's index, new or known; -1 when the tables are full."""
    i = find(shard, token)
    if i >= 0:
        return i
    place = -1 - i
    i = int(shard.scalars[col.INSTRUMENTS])
    if i >= shard.tokens.size:
        return -1
    shard.scalars[col.INSTRUMENTS] = i + 1
    shard.table[place] = i + 1
    shard.tokens[i] = token
    nearest = np.searchsorted(shard.derivatives, token)
    has_derivatives = nearest < shard.derivatives.size and shard.derivatives[nearest] == token
    shard.schedule[i] = shard.schedule_of_segment[1 if has_derivatives else 0, token & 0xFF]
    return i


@compiled
def find_day(shard: ShardArrays, time_ms: float) -> int:
    """Index of the calendar day that holds the time, or -1. Neighbouring ticks share a day."""
    d = int(shard.scalars[col.LAST_DAY])
    if shard.day_ms[d, 0] <= time_ms < shard.day_ms[d, 1]:
        return d
    for d in range(int(shard.scalars[col.DAYS])):
        if shard.day_ms[d, 0] <= time_ms < shard.day_ms[d, 1]:
            shard.scalars[col.LAST_DAY] = d
            return d
    return -1
