"""How far the aggregators are behind the tick streams, in entries and in milliseconds, shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import redis

from pkbrokers_redis.core.keys import AGGREGATOR_GROUP, Keys
from pkbrokers_redis.store.ids import id_order

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
