"""Market time: the wall clock, or, in a rehearsal, another day at another speed.

Decisions about the market (which minute is over, is the session open, is a candle due) use this clock. TTLs,
leases, retries and stream ids use the machine's: a lease of 3 s is 3 s at any speed.
`Backoff` is the pause between attempts, for everything that retries.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from pkbrokers_redis.settings import Settings


@dataclass(frozen=True, slots=True)
class Clock:
    """Market time: `clock()` returns it in epoch milliseconds.

    Args:
        virtual_s: Market time, epoch seconds, at the moment `real_s`.
        real_s: The machine's clock at that moment, epoch seconds.
        speed: Market seconds that pass each machine second.
    """

    virtual_s: float = 0.0
    real_s: float = 0.0
    speed: float = 1.0

    def __call__(self) -> float:
        return (self.virtual_s + (time.time() - self.real_s) * self.speed) * 1000

    def real_seconds(self, market_ms: float) -> float:
        """Return how many machine seconds pass while market time advances by `market_ms`."""
        return market_ms / 1000 / self.speed

    @property
    def shift_text(self) -> str:
        """The value of PKB_TIME_SHIFT with which other processes keep the same time."""
        return f"{self.virtual_s!r},{self.real_s!r},{self.speed!r}"


def market_clock(settings: Settings) -> Clock:
    """Return the clock of these settings: the wall clock unless PKB_TIME_SHIFT is set."""
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
