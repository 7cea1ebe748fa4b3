"""Market time: the wall clock, or, in a rehearsal, another day at another speed.

Decisions about the market (which minute is over, is the session open, is a candle due) use this clock. TTLs,
leases, retries and stream ids use the machine's: a lease of 3 s is 3 s at any speed.
`ExchangeClock` corrects a host's clock that is wrong. `Backoff` is the pause between attempts, for everything
that retries.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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


STEP_MS = 1_000.0  # a host clock that moves so far against the monotonic one was set
WRONG_MS, RIGHT_MS = 5_000.0, 2_500.0  # host clock and exchange: from here on, and below it again
WRONG_MS_MAX = 3_600_000.0  # farther away is no clock that is off, but another day's data


class ExchangeClock:
    """Market time that follows the exchange's timestamps where the host's clock is wrong. Thread-safe.

    Args:
        clock: The host's market time, epoch milliseconds.
        monotonic: The machine's monotonic seconds, which tell when the host's clock is set.
    """

    def __init__(self, clock: Callable[[], float], monotonic: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self.speed = float(getattr(clock, "speed", 1.0))
        self.offset_ms = 0.0  # host clock minus exchange, as corrected now
        self._lock = threading.Lock()
        self._base_ms = self._difference(clock())

    def _difference(self, host_ms: float) -> float:
        return host_ms - self._monotonic() * 1000 * self.speed

    def __call__(self) -> float:
        host_ms = self._clock()
        if abs(self._difference(host_ms) - self._base_ms) > STEP_MS * self.speed:
            with self._lock:  # the host's clock was set: a correction moves with it
                step_ms = self._difference(self._clock()) - self._base_ms
                if abs(step_ms) > STEP_MS * self.speed:
                    self._base_ms += step_ms
                    self.offset_ms += step_ms if self.offset_ms else 0.0
        return host_ms - self.offset_ms

    def follow(self, measured_ms: float) -> bool:
        """Correct the clock by a measured offset (host minus exchange) of more than five seconds.

        Return whether the correction changed by a second or more.
        """
        wanted = measured_ms if abs(measured_ms) > WRONG_MS * self.speed else self.offset_ms
        if abs(measured_ms) < RIGHT_MS * self.speed or abs(measured_ms) > WRONG_MS_MAX * self.speed:
            wanted = 0.0
        with self._lock:
            if abs(wanted - self.offset_ms) < STEP_MS * self.speed:
                return False
            self.offset_ms = wanted
        return True


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
