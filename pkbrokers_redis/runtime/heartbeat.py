"""How far the aggregators are behind the tick streams, in entries and in milliseconds, shard by shard.

Heartbeats: each worker says every two seconds that it lives and how it fares.

P:worker:<id>   hash, TTL 10 s: role host pid started_at shards ticks_total ticks_per_second lag_ms …

That a worker is a member (`P:workers`) it says itself, with its leases and more often.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import redis

from pkbrokers_redis.keys import AGGREGATOR_GROUP, Keys
from pkbrokers_redis.store.streams import id_order

SHARDS_AT_ONCE = 256  # a pipeline's bound


@dataclass(frozen=True, slots=True)
class Shard:
    """One tick stream and how far its aggregator is."""

    number: int
    owner: str | None
    entries: int  # in the stream
    position: str  # the last id committed
    lag_entries: int  # not committed yet
    lag_ms: float  # how long the oldest of them has waited
    stream_bytes: int | None = None  # only where asked for


def read_shards(
    client: redis.Redis, keys: Keys, shards: Sequence[int], at_ms: float, *, stream_bytes: bool = False
) -> list[Shard]:
    """Stream, owner and lag of some shards."""
    found: list[Shard] = []
    for first in range(0, len(shards), SHARDS_AT_ONCE):
        found += _read_shards(client, keys, shards[first : first + SHARDS_AT_ONCE], at_ms, stream_bytes)
    return found


def _read_shards(
    client: redis.Redis, keys: Keys, shards: Sequence[int], at_ms: float, stream_bytes: bool
) -> list[Shard]:
    pipeline = client.pipeline(transaction=False)
    for shard in shards:
        pipeline.xlen(keys.ticks(shard))
        pipeline.xinfo_groups(keys.ticks(shard))
    sizes = pipeline.execute(raise_on_error=False)
    groups = [_group(reply) for reply in sizes[1::2]]
    # Then the oldest entry that waits: only now do we know behind which id.
    for shard, (position, _) in zip(shards, groups, strict=True):
        pipeline.xrange(keys.ticks(shard), f"({position}", "+", count=1)
    waiting = pipeline.execute(raise_on_error=False)
    usage: list[Any] = [None] * len(shards)
    if stream_bytes:
        for shard in shards:
            pipeline.memory_usage(keys.ticks(shard))
        usage = pipeline.execute(raise_on_error=False)
    owners = owners_of(client, [keys.lease(shard) for shard in shards])
    result: list[Shard] = []
    for n, shard in enumerate(shards):
        entries = sizes[2 * n] if isinstance(sizes[2 * n], int) else 0
        position, lag = groups[n]
        oldest = waiting[n][0][0].decode() if isinstance(waiting[n], list) and waiting[n] else None
        result.append(
            Shard(
                shard,
                owners[n],
                entries,
                position,
                0 if oldest is None else max(1, entries if lag is None else lag),
                0.0 if oldest is None else max(0.0, at_ms - id_order(oldest)[0]),
                usage[n] if isinstance(usage[n], int) else None,
            )
        )
    return result


def _group(reply: Any) -> tuple[str, int | None]:
    """Position and lag of our consumer group; Redis gives no lag after an entry was deleted by hand."""
    for group in reply if isinstance(reply, list) else ():
        if group["name"] == AGGREGATOR_GROUP.encode():
            return group["last-delivered-id"].decode(), group["lag"]
    return "0-0", None


def owners_of(client: redis.Redis, leases: Sequence[str]) -> list[str | None]:
    """Who holds some leases, of shards or of feeds; None where nobody does."""
    pipeline = client.pipeline(transaction=False)
    for key in leases:
        pipeline.get(key)
    replies = pipeline.execute(raise_on_error=False) if leases else []
    return [reply.decode(errors="replace") if isinstance(reply, bytes) else None for reply in replies]


def lag_figures(shards: Sequence[Shard]) -> dict[str, Any]:
    """For an aggregator's heartbeat: `lag_entries` in all, `lag_ms` of the worst, `lags` shard → both."""
    return {
        "lag_entries": sum(shard.lag_entries for shard in shards),
        "lag_ms": round(max((shard.lag_ms for shard in shards), default=0.0)),
        "lags": msgspec.json.encode(
            {str(shard.number): [shard.lag_entries, round(shard.lag_ms)] for shard in shards}
        ),
    }


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
