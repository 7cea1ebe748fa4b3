"""Market time: the wall clock, or, in a rehearsal, another day at another speed.

What the market decides (which minute is over, is the session open, is this candle due) asks this clock. What
machines agree on (TTLs, leases, retries, stream ids) asks the machine's: a lease of 3 s is 3 s at any speed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from pkbrokers_redis.settings import Settings


@dataclass(frozen=True, slots=True)
class Clock:
    """`clock()` is market time in epoch milliseconds: `virtual_s` when the machine's clock stood at `real_s`,
    and `speed` seconds on each second since."""

    virtual_s: float = 0.0
    real_s: float = 0.0
    speed: float = 1.0

    def __call__(self) -> float:
        return (self.virtual_s + (time.time() - self.real_s) * self.speed) * 1000

    def real_seconds(self, market_ms: float) -> float:
        """How long the machine waits while the market's time moves on by `market_ms`."""
        return market_ms / 1000 / self.speed

    @property
    def shift_text(self) -> str:
        """For PKB_TIME_SHIFT, so that other processes keep the same time."""
        return f"{self.virtual_s!r},{self.real_s!r},{self.speed!r}"


def market_clock(settings: Settings) -> Clock:
    """The clock of these settings: the wall clock unless PKB_TIME_SHIFT is set."""
    if settings.time_shift is None:
        return Clock()
    return Clock(*map(float, settings.time_shift.split(",")))
