"""The tick streams: how an entry is written, and when it may go.

P:{S}:ticks   one entry a websocket frame and shard:
              src <source id>  seq <its counter>  at <epoch ms>  n <rows>  ticks <JSON rows>
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis

from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.core.model import TickArray
from pkbrokers_redis.core.text import tick_texts
from pkbrokers_redis.store.pipe import Pipe


def queue_ticks(pipe: Pipe, keys: Keys, source: str, seq: int, at_ms: int, ticks: TickArray) -> int:
    """Append one frame's ticks (float64[n, 10]) to a pipe, an entry a shard. Returns the entries."""
    texts = tick_texts(ticks, keys.shards)
    for shard, n, text in texts:
        pipe.add(
            "XADD", keys.ticks(shard), "*", "src", source, "seq", seq, "at", at_ms, "n", n, "ticks", text
        )  # fmt: skip
    return len(texts)


def id_order(entry_id: str) -> tuple[int, int]:
    """A stream id as numbers, to compare it."""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq or 0)


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
    """The hard cap: cut streams longer than it, applied or not. Returns the entries dropped."""
    pipeline = client.pipeline(transaction=False)
    for shard in range(keys.shards):
        pipeline.xlen(keys.ticks(shard))
    sizes = pipeline.execute(raise_on_error=False)
    dropped = 0
    for shard, size in enumerate(sizes):
        if isinstance(size, int) and size > entries_max:
            dropped += int(client.xtrim(keys.ticks(shard), maxlen=entries_max, approximate=True))
    return dropped


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
