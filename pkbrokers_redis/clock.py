"""Market time: the wall clock, or, in a rehearsal, another day at another speed.

What the market decides (which minute is over, is the session open, is this candle due) asks this clock. What
machines agree on (TTLs, leases, retries, stream ids) asks the machine's: a lease of 3 s is 3 s at any speed.
`Backoff` is the pause between attempts, for everything that retries.
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


class Backoff:
    """The pause before the next attempt: it doubles up to a maximum, and starts again after a success.

    Example:
        backoff = Backoff(0.1, 5.0)
        while not stop.wait(backoff.next()):
            if attempt():
                backoff.reset()
    """

    def __init__(self, first_seconds: float, seconds_max: float) -> None:
        self._first_seconds = first_seconds
        self._seconds_max = seconds_max
        self._seconds = first_seconds

    def next(self) -> float:
        """Return the pause before the next attempt, in seconds, and double the one after it."""
        seconds = self._seconds
        self._seconds = min(seconds * 2, self._seconds_max)
        return seconds

    def reset(self) -> None:
        """Start again with the first pause."""
        self._seconds = self._first_seconds
