"""Rule 2 for what trades outside the windows (pre-open, breaks, post-close): it raises the baseline only.

It does so when a tick inside a window comes after it. Until then its statement waits beside the sums: a
straggler of the window before it is counted as if it had not been said, and a stale copy takes nothing back.
"""

from __future__ import annotations

from pkbrokers_redis.candles.arrays import BASELINE, DAY_S, OUTSIDE_TIME, OUTSIDE_VOLUME, SEEN, Floats
from pkbrokers_redis.candles.compiled import compiled


@compiled
def note_outside(inst: Floats, time: float, volume: float) -> bool:
    """Remember the latest statement made outside the windows. False: an older one, a repeat, or no volume."""
    if volume != volume or time < inst[OUTSIDE_TIME]:
        return False
    if time == inst[OUTSIDE_TIME] and volume <= inst[OUTSIDE_VOLUME]:
        return False
    inst[OUTSIDE_TIME], inst[OUTSIDE_VOLUME] = time, volume
    return True


@compiled
def settle_outside(inst: Floats, time: float, volume: float, said_before: bool) -> bool:
    """Raise the baseline by what was said outside the windows before `time`, when `volume` was told.

    A day's volume never falls: a statement above `volume` was another day's if it was `said_before` all of
    today's, else `volume` is a straggler's. False: nothing changed.
    """
    if not inst[DAY_S] * 1000 <= inst[OUTSIDE_TIME] < time:
        return False
    if volume < inst[OUTSIDE_VOLUME]:  # NaN, no volume, compares false
        if not said_before:
            return False
    elif inst[OUTSIDE_VOLUME] > inst[SEEN]:
        inst[BASELINE] += inst[OUTSIDE_VOLUME] - inst[SEEN]
        inst[SEEN] = inst[OUTSIDE_VOLUME]
    inst[OUTSIDE_TIME] = inst[OUTSIDE_VOLUME] = 0.0
    return True
