"""A rate limit that all processes share: N requests a second at Kite.

P:limit:<name>   hash, TTL
    next         the next free slot, epoch µs of Redis's clock
    blocked      no request before this time: Kite answered 429

A caller reserves the next free slot and sleeps until then. Slots are evenly spaced, so that no second holds
more than the limit, and callers are served in order. A process that dies loses the one slot it waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import redis

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.functions import Function, fcall

# Requests a second: https://kite.trade/docs/connect/v3/exceptions/ (historical 3, quote 1, the rest 10).
LIMITS_PER_SECOND = {"history": 3.0, "quote": 1.0, "api": 10.0}

# Slots are this much further apart than the limit requires: a request may leave a little late and the next
# one on time, and Kite must still not count four in a second.
SPACING = 1.1
WAIT_SECONDS_MAX = 600.0  # a longer queue has no use behind one api key


class Limiter:
    """One named limit of `LIMITS_PER_SECOND`. Threads may share it."""

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        name: str = "history",
        *,
        per_second: float | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._client = client
        self._key = keys.limit(name)
        self._name = name
        self._gap_us = round(1e6 * SPACING / (per_second or LIMITS_PER_SECOND[name]))
        self._sleep = sleep

    def wait(self, stop: threading.Event | None = None) -> int:
        """Sleep until this caller's slot (epoch µs). Raise PkbError beyond ten minutes, or at `stop`."""
        while True:
            wait_us, slot = self._call("limit_take", self._gap_us, round(WAIT_SECONDS_MAX * 1e6))
            if wait_us < 0:
                raise PkbError(
                    f"Kite's {self._name} requests are reserved for the next {-wait_us / 1e6:,.0f} s",
                    "wait, or run fewer jobs at once",
                )
            if wait_us == 0:
                return int(slot)
            if stop is None:
                self._sleep(wait_us / 1e6)
            elif stop.wait(wait_us / 1e6):
                raise PkbError(f"stopped while waiting for a request slot of Kite's {self._name} limit")
            if not self._call("limit_closed"):  # a 429 during the sleep applies to this caller too
                return int(slot)

    def back_off(self, seconds: float) -> None:
        """Close the limit for all processes after a 429."""
        self._call("limit_block", round(seconds * 1e6))

    def _call(self, function: Function, *arguments: int) -> Any:
        return fcall(self._client, function, [self._key], *arguments)
