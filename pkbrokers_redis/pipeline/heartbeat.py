"""Heartbeats: each worker says every two seconds that it lives and how it fares.

P:worker:<id>   hash, TTL 10 s: role host pid started_at shards ticks_total ticks_per_second lag_ms …

That a worker is a member (`P:workers`) it says itself, with its leases and more often.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import redis

from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.pipeline.lag import lag_figures, read_shards

EVERY_MS = 2_000
TTL_SECONDS = 10


class Heartbeat:
    """Writes one worker's hash when it is time; silent while Redis is away."""

    def __init__(self, keys: Keys, role: str, worker_id: str, now_ms: float) -> None:
        self._keys = keys
        self.key = keys.worker(worker_id)
        self._fixed = {
            "role": role,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="seconds"),
        }
        self._last_ms = now_ms
        self._next_ms = now_ms
        self._last_ticks = 0

    def due(self, now_ms: float) -> bool:
        """Whether two seconds have passed, or the clock was set back."""
        return not self._last_ms <= now_ms < self._next_ms

    def beat(
        self,
        client: redis.Redis,
        now_ms: float,
        ticks_total: int,
        figures: Mapping[str, Any],
        shards: Sequence[int] = (),
    ) -> None:
        """Write the hash. `figures` are further fields; the rate is over the time since the last beat.

        The lag of `shards`, those whose candles this worker makes, is read from Redis and told with it.
        """
        passed_ms = now_ms - self._last_ms if now_ms >= self._last_ms else EVERY_MS
        seconds = max(passed_ms / 1000, 0.001)
        rate = (ticks_total - self._last_ticks) / seconds
        self._last_ms, self._next_ms, self._last_ticks = now_ms, now_ms + EVERY_MS, ticks_total
        fields: dict[Any, Any] = {
            **self._fixed,
            **figures,
            "ticks_total": ticks_total,
            "ticks_per_second": round(rate, 1),
            "at": int(now_ms),
        }
        try:
            if shards:
                fields |= lag_figures(read_shards(client, self._keys, shards, now_ms))
            pipeline = client.pipeline(transaction=True)
            pipeline.hset(self.key, mapping=fields)
            pipeline.expire(self.key, TTL_SECONDS)
            pipeline.execute()
        except redis.RedisError:
            pass  # whoever misses the heartbeat learns what we know: Redis is away

    def end(self, client: redis.Redis) -> None:
        """Remove the hash: this worker left in good order."""
        try:
            client.delete(self.key)
        except redis.RedisError:
            pass  # it expires by itself
