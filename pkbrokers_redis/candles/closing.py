"""Rule 5: which candles close, and when. The rules of a tick are in `core.candles`."""

from __future__ import annotations

import numpy as np

from pkbrokers_redis.candles.arrays import (
    ANNOUNCE,
    COMPLETE,
    DIRTY_SIZE,
    END,
    INSTRUMENTS,
    NEXT_DUE,
    REV,
    START,
    Tables,
    touch,
)
from pkbrokers_redis.candles.compiled import compiled


@compiled
def close_due(b: Tables, clock_ms: float, grace_ms: float, dirty_max: int) -> bool:
    """Rule 5: complete and announce every candle whose end + grace has passed. False: more are due."""
    if clock_ms < b.marks[NEXT_DUE]:
        return True
    next_due = np.inf
    for i in range(int(b.marks[INSTRUMENTS])):
        for k in range(b.seconds.size):
            for s in range(b.slots.shape[2] - 1, -1, -1):
                slot = b.slots[i, k, s]
                if slot[START] == 0 or slot[REV] >= 0:
                    continue
                due = slot[END] * 1000 + grace_ms
                if due > clock_ms:
                    next_due = min(next_due, due)
                    continue
                if b.is_dirty[i] == 0 and b.marks[DIRTY_SIZE] >= dirty_max:
                    return False
                slot[REV] = 0.0
                slot[ANNOUNCE] = 1.0
                slot[COMPLETE] = 1.0
                touch(b, i, 2)
    b.marks[NEXT_DUE] = next_due
    return True
