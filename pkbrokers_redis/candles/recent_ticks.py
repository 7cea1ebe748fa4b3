"""An instrument's latest statements, newest first: what tells a repeat from a straggler."""

from __future__ import annotations

from pkbrokers_redis.candles.arrays import R_HIGH, R_LOW, R_PRICE, R_TIME, R_VOLUME, RING_MAX, Floats
from pkbrokers_redis.candles.compiled import compiled


@compiled
def place_in_ring(ring: Floats, size: int, time: float, volume: float, price: float) -> int:
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


@compiled
def put_in_ring(
    ring: Floats, size: int, place: int, time: float, volume: float, price: float, high: float, low: float
) -> int:
    """Insert a statement; the oldest of a full ring goes. Returns the new size."""
    if size < RING_MAX:
        size += 1
    for j in range(size - 1, place, -1):
        for column in range(ring.shape[1]):
            ring[j, column] = ring[j - 1, column]
    ring[place, R_TIME], ring[place, R_VOLUME], ring[place, R_PRICE] = time, volume, price
    ring[place, R_HIGH], ring[place, R_LOW] = high, low
    return size
