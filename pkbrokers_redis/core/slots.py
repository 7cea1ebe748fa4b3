"""Which candle a tick belongs to: finding, opening and completing the slots of one instrument and interval.

Slot 0 holds the newest candle, forming or complete; the others are complete, newer before older.
"""

from __future__ import annotations

import numpy as np

from pkbrokers_redis.core.model import FLAG_PARTIAL
from pkbrokers_redis.core.tables import (
    BASE,
    CLOSE_TIME,
    COMPLETE,
    DAY,
    DIRTY,
    END,
    EVICTED_SIZE,
    FLAG,
    HIGH,
    LOW,
    NEXT_DUE,
    OPEN_TIME,
    REV,
    S_OI,
    SLOT_WIDTH,
    START,
    TOP,
    UNANNOUNCED,
    Floats,
    compiled,
)


@compiled
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


@compiled
def slot_for(
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


@compiled
def flag_of(start: int, end: int, first_at: float, first_time: float, first_volume: float) -> int:
    """Rule 8: partial, if we began to watch inside it or our baseline holds volume traded inside it."""
    if start * 1000 < first_at < end * 1000:
        return FLAG_PARTIAL
    if start * 1000 <= first_time < end * 1000 and first_volume != 0:
        return FLAG_PARTIAL
    return 0
