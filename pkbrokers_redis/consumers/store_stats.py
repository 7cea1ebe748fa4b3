"""Upstream's `get_stats()` over a shared store: read from Redis, not counted in one process."""

from __future__ import annotations

import time
from typing import Any

import redis

from pkbrokers_redis.consumers.store import CandleStore

STATS_SECONDS = 1.0  # PKDevTools asks before each of thousands of reads


class StoreStats:
    """Reads at most once in STATS_SECONDS. `sent` is what this process has sent into the streams."""

    def __init__(self, store: CandleStore) -> None:
        self.sent = 0
        self._store = store
        self._began = time.time()
        self._read: tuple[float, dict[str, Any]] | None = None

    def read(self) -> dict[str, Any]:
        """`ticks_processed candles_created candles_completed last_tick_time start_time instrument_count
        instruments_with_ticks registered_symbols uptime_seconds memory_mb`.

        Ticks are what living aggregators have processed, at least what this process sent; `candles_completed`
        counts announcements; `start_time` is when this object was made; memory is the Redis server's.
        """
        now = time.monotonic()
        if self._read is None or now - self._read[0] > STATS_SECONDS:
            self._read = now, self._ask()
        return {**self._read[1], "uptime_seconds": time.time() - self._began}

    def last_tick_time(self) -> float:
        """When the last tick came into Redis, epoch seconds; 0 for never."""
        return float(self.read()["last_tick_time"])

    def _ask(self) -> dict[str, Any]:
        store, keys = self._store, self._store.keys
        seen = store.tokens_seen()
        pipe = store.client.pipeline(transaction=False)
        for shard in range(keys.shards):
            pipe.xinfo_stream(keys.closed(shard))
            pipe.xinfo_stream(keys.ticks(shard))
        infos: list[Any] = pipe.execute(raise_on_error=False)
        closed = [each for each in infos[::2] if isinstance(each, dict)]
        ticks = [each for each in infos[1::2] if isinstance(each, dict)]
        completed = sum(int(each["entries-added"]) for each in closed)
        last_ms = max((int(_text(each["last-generated-id"]).partition("-")[0]) for each in ticks), default=0)
        registered: Any = store.client.hlen(keys.symbols())
        return {
            "ticks_processed": max(self._ticks_total(), self.sent),
            "candles_created": completed + len(seen) * len(store.intervals),
            "candles_completed": completed,
            "last_tick_time": last_ms / 1000,
            "start_time": self._began,
            "instrument_count": max(len(seen), int(registered)),
            "instruments_with_ticks": len(seen),
            "registered_symbols": int(registered),
            "uptime_seconds": 0.0,
            "memory_mb": self._memory_mb(),
        }

    def _ticks_total(self) -> int:
        keys = self._store.keys
        names: Any = self._store.client.zrange(keys.workers(), 0, -1)
        ids = [name.decode().partition(" ")[2] for name in names if name.startswith(b"aggregate ")]
        pipe = self._store.client.pipeline(transaction=False)
        for worker_id in ids:
            pipe.hget(keys.worker(worker_id), "ticks_total")
        counts = pipe.execute(raise_on_error=False) if ids else []
        return sum(int(count) for count in counts if isinstance(count, bytes) and count.isdigit())

    def _memory_mb(self) -> float:
        try:
            info: Any = self._store.client.info("memory")
        except redis.RedisError:
            return 0.0  # a reader's user may have no right to ask
        if "used_memory" in info:
            return float(info["used_memory"]) / 2**20
        nodes = [each for each in info.values() if isinstance(each, dict)]  # a cluster's, node by node
        return float(sum(each.get("used_memory", 0) for each in nodes)) / 2**20


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
