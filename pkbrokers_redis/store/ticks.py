"""The tick streams: how an entry is written, and when it may go.

P:{S}:ticks   one entry per websocket frame and shard:
              src <source id>  seq <its counter>  at <epoch ms>  n <rows>  ticks <JSON rows>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import redis

from pkbrokers_redis.core.keys import AGGREGATOR_GROUP, Keys
from pkbrokers_redis.core.model import TickArray
from pkbrokers_redis.core.text import tick_texts
from pkbrokers_redis.store.ids import id_order
from pkbrokers_redis.store.pipe import Pipe


def queue_frames(
    pipe: Pipe, keys: Keys, source: str, frames: Sequence[tuple[int, int, TickArray]]
) -> list[str]:
    """Append frames `(seq, at_ms, ticks)`, one entry per frame and shard. Returns the entries' keys in order.

    A shard's entries go in together or not at all: had Redis refused one (out of memory, say) and taken
    the next, that one's higher `seq` would make the first look like a repeat when it is sent again.
    """
    entries: dict[int, list[tuple[Any, ...]]] = {}
    for seq, at_ms, ticks in frames:
        for shard, n, text in tick_texts(ticks, keys.shards):
            fields = ("src", source, "seq", seq, "at", at_ms, "n", n, "ticks", text)
            entries.setdefault(shard, []).append(("XADD", keys.ticks(shard), "*", *fields))
    for commands in entries.values():
        if len(commands) > 1:
            commands = [("MULTI",), *commands, ("EXEC",)]
        for command in commands:
            pipe.add(*command)
    return [keys.ticks(shard) for shard, commands in entries.items() for _ in commands]


def trim(
    client: redis.Redis, keys: Keys, committed: Mapping[int, str], now_ms: float, retention_seconds: float
) -> None:
    """Drop tick entries that are older than the retention and that every registered reader is done with.

    Readers are the consumer groups of a stream; `committed` is the aggregator's own position, shard →
    id. An uncommitted entry is never dropped here.
    """
    pipeline = client.pipeline(transaction=False)
    shards = list(committed)
    for shard in shards:
        pipeline.xinfo_groups(keys.ticks(shard))
    replies = pipeline.execute(raise_on_error=False)
    old_ms = int(now_ms - retention_seconds * 1000)
    for shard, groups in zip(shards, replies, strict=True):
        if isinstance(groups, Exception):
            continue  # no stream yet, or a foreign hand's key
        slowest = committed[shard]
        for group in groups:
            name = group.get("last-delivered-id") or group.get(b"last-delivered-id") or b"0-0"
            slowest = min(slowest, _text(name), key=id_order)
        if old_ms > 0 and slowest != "0-0":
            least = min(slowest, f"{old_ms}-0", key=id_order)
            pipeline.xtrim(keys.ticks(shard), minid=least, approximate=True)
    pipeline.execute(raise_on_error=False)


def enforce_cap(client: redis.Redis, keys: Keys, entries_max: int) -> int:
    """The hard cap: cut streams longer than it, applied or not. Returns the entries dropped unapplied."""
    pipeline = client.pipeline(transaction=False)
    for shard in range(keys.shards):
        pipeline.xlen(keys.ticks(shard))
    sizes = pipeline.execute(raise_on_error=False)
    dropped = 0
    for shard, size in enumerate(sizes):
        if isinstance(size, int) and size > entries_max:
            applied = size - _lag(client, keys.ticks(shard), size)
            gone = int(client.xtrim(keys.ticks(shard), maxlen=entries_max, approximate=True))
            dropped += max(0, gone - applied)
    return dropped


def _lag(client: redis.Redis, key: str, size: int) -> int:
    """How many of a stream's `size` entries the aggregator has not applied; all, where nobody knows."""
    groups: Any = client.xinfo_groups(key)
    for group in groups:
        if _text(group.get("name") or group.get(b"name")) == AGGREGATOR_GROUP:
            lag = group.get("lag", group.get(b"lag"))
            return size if lag is None else min(int(lag), size)
    return size


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
