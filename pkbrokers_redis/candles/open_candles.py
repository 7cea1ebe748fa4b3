"""Which candle a tick belongs to: finding, opening and completing the slots of one instrument and interval.

Slot 0 holds the newest candle, forming or complete; the others are complete, newer before older.
"""

from __future__ import annotations

import numpy as np

from pkbrokers_redis.candles.arrays import (
    ANSWERED_FROM,
    ANSWERED_TO,
    BASE,
    CLOSE_TIME,
    COMPLETE,
    DAY,
    DIRTY,
    END,
    EVICTED_SIZE,
    FIRST_AT,
    FIRST_TIME,
    FIRST_VOLUME,
    FLAG,
    GAP_FROM,
    GAP_TO,
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
    Tables,
    touch,
)
from pkbrokers_redis.candles.compiled import compiled
from pkbrokers_redis.candles.model import FLAG_GAP, FLAG_PARTIAL


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
    older_day, older_top = slots[i, k, s, DAY], slots[i, k, s, TOP]
    _evict(slots, i, k, s, marks, evicted)
    if length == 0:
        base = 0.0  # rule 7: the day's volume is the day's, watched or not
    elif s > 0 and slots[i, k, s - 1, DAY] == day_s:
        base = slots[i, k, s - 1, BASE]
    elif base != base:
        base = older_top if older_day == day_s else volume
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
def raise_base(slots: Floats, i: int, k: int, s: int, day_s: float, volume: float) -> bool:
    """Rule 1: the volume an older candle gains, slot s and newer ones lose: the sum stays. False: none."""
    changed = False
    for newer in range(s, -1, -1):
        if slots[i, k, newer, DAY] != day_s or not volume > slots[i, k, newer, BASE]:
            break
        slots[i, k, newer, BASE] = volume
        slots[i, k, newer, TOP] = max(slots[i, k, newer, TOP], volume)
        slots[i, k, newer, DIRTY] = 1.0
        changed = True
    return changed


@compiled
def flag_of(start: int, end: int, inst: Floats) -> int:
    """Rule 8: partial, if we began to watch inside it or our baseline holds volume traded inside it, unless
    history has told us of it from its start; gap, if the feed was down inside it."""
    start_ms, end_ms = start * 1000, end * 1000
    first_at, first_time = inst[FIRST_AT], inst[FIRST_TIME]
    if not (inst[ANSWERED_FROM] <= start_ms and first_at < inst[ANSWERED_TO]):
        if start_ms < first_at < end_ms:
            return FLAG_PARTIAL
        if start_ms <= first_time < end_ms and inst[FIRST_VOLUME] != 0:
            return FLAG_PARTIAL
    if inst[GAP_FROM] < end_ms and start_ms < inst[GAP_TO]:
        return FLAG_GAP
    return 0


@compiled
def mark_partial(b: Tables, i: int) -> None:
    """Rule 8 for the forming candles that history opened before we saw the first tick."""
    for k in range(b.seconds.size):
        slot = b.slots[i, k, 0]
        if slot[START] != 0 and slot[COMPLETE] == 0 and b.seconds[k] != 0:
            if flag_of(int(slot[START]), int(slot[END]), b.inst[i]) == FLAG_PARTIAL:
                slot[FLAG], slot[DIRTY] = FLAG_PARTIAL, 1.0
                touch(b, i, 2)


@compiled
def rebase(b: Tables, i: int, day_s: int, volume: float) -> None:
    """Let the forming candles count on from `volume`: what traded up to there is in them, or is not ours."""
    for k in range(b.seconds.size):
        slot = b.slots[i, k, 0]
        if b.seconds[k] == 0 or slot[START] == 0 or slot[COMPLETE] != 0 or slot[DAY] != day_s:
            continue
        if volume > slot[TOP]:
            slot[BASE] += volume - slot[TOP]
            slot[TOP] = volume
            slot[DIRTY] = 1.0
            touch(b, i, 2)
