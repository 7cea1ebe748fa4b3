"""A rate limit that all processes share: `N requests a second` at Kite, whoever makes them.

P:limit:<name>   hash, TTL
    next         when the next free slot is, epoch µs of Redis's clock
    blocked      nobody before this time: Kite said 429

A caller takes the next free slot and sleeps until it comes. Slots are evenly spaced, so that no second holds
more than the limit, and first come is first served. A process that dies has taken the one slot it waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import redis

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys

# Requests a second: https://kite.trade/docs/connect/v3/exceptions/ (historical 3, quote 1, the rest 10).
LIMITS_PER_SECOND = {"history": 3.0, "quote": 1.0, "api": 10.0}

# The slots are this much further apart than the limit asks for: a request may leave a little late, the next
# one on time, and Kite still must not see four in a second.
SPACING = 1.1
WAIT_SECONDS_MAX = 600.0  # a queue that long has no business behind one api key

# ARGV: µs between slots, longest wait in µs. Returns [µs to wait, the slot]; [-µs, 0] where it is too long.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local set = redis.call('HMGET', KEYS[1], 'next', 'blocked')
local slot = math.max(now, tonumber(set[1] or '0') or 0, tonumber(set[2] or '0') or 0)
local wait = slot - now
if wait > tonumber(ARGV[2]) then return {-wait, '0'} end
redis.call('HSET', KEYS[1], 'next', string.format('%.0f', slot + ARGV[1]))
redis.call('PEXPIRE', KEYS[1], math.ceil((wait + ARGV[1]) / 1000) + 60000)
return {wait, string.format('%.0f', slot)}
"""

# ARGV: µs during which nobody may ask.
_BLOCK = """
local time = redis.call('TIME')
local until_ = time[1] * 1000000 + time[2] + ARGV[1]
local blocked = math.max(until_, tonumber(redis.call('HGET', KEYS[1], 'blocked') or '0') or 0)
redis.call('HSET', KEYS[1], 'blocked', string.format('%.0f', blocked))
redis.call('PEXPIRE', KEYS[1], math.max(redis.call('PTTL', KEYS[1]), math.ceil(ARGV[1] / 1000) + 60000))
"""

_IS_BLOCKED = """
local time = redis.call('TIME')
local blocked = tonumber(redis.call('HGET', KEYS[1], 'blocked') or '0') or 0
return blocked > time[1] * 1000000 + time[2] and 1 or 0
"""


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
        """Sleep until it is our turn. Returns the slot, epoch µs of Redis's clock.

        Raises PkbError where the wait would be longer than ten minutes or `stop` was set meanwhile, and what
        redis-py raises.
        """
        while True:
            wait_us, slot = self._call(_TAKE, self._gap_us, round(WAIT_SECONDS_MAX * 1e6))
            if wait_us < 0:
                raise PkbError(
                    f"Kite's {self._name} requests are taken for the next {-wait_us / 1e6:,.0f} s",
                    "wait, or run fewer jobs at once",
                )
            if wait_us == 0:
                return int(slot)
            if stop is None:
                self._sleep(wait_us / 1e6)
            elif stop.wait(wait_us / 1e6):
                raise PkbError(f"stopped while waiting for a turn at Kite's {self._name}")
            if not self._call(_IS_BLOCKED):  # a 429 while we slept is meant for us too
                return int(slot)

    def back_off(self, seconds: float) -> None:
        """Kite said 429: nobody asks for so long."""
        self._call(_BLOCK, round(seconds * 1e6))

    def _call(self, script: str, *arguments: int) -> Any:
        return self._client.eval(script, 1, self._key, *map(str, arguments))
