"""Reading streams, waiting for their next entry, and trimming them.

P:{S}:ticks   one entry per websocket frame and shard:
              src <source id>  seq <its counter>  at <epoch ms>  n <rows>  ticks <JSON rows>

On one server, one XREAD reads many streams and waits for the first entry. A cluster refuses an XREAD whose
streams lie in several slots, and a connection that waits on one stream can do nothing else. `StreamReader`
therefore splits the two there:

    poll    XREAD without waiting, of every stream, one write per master. Only this returns entries
    wait    one connection per stream with `XREAD COUNT 1 BLOCK` pending. A reply on any of them ends the
            wait; its contents are dropped, because the next poll returns them

So a blocking read that is late or lost costs the rest of a wait, and never an entry.
"""

from __future__ import annotations

import selectors
import time
import weakref
from collections.abc import Mapping
from itertools import islice
from typing import Any

import redis
from redis.exceptions import RedisClusterException

from pkbrokers_redis.keys import AGGREGATOR_GROUP, Keys
from pkbrokers_redis.store.cluster import (
    Pipe,
    cluster_of,
    master_pool,
    new_connection,
    refresh_topology,
    socket_of,
)

BLOCKING_READS_MAX = 256  # connections per reader; further streams are polled every POLL_MS
POLL_MS = 50
BLOCK_MS_MAX = 10_000  # how long a server keeps the connection of a reader that vanished

Fields = dict[bytes, bytes]
Batch = tuple[bytes, list[tuple[bytes, Fields]]]  # key, entries


def id_order(entry_id: str) -> tuple[int, int]:
    """Return a stream id `<ms>-<n>` as numbers, to compare it."""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq or 0)


def is_count(text: bytes) -> bool:
    """Return whether an unchecked field holds a whole number of at most 18 digits."""
    return text.isdigit() and len(text) <= 18


class StreamReader:
    """Reads streams from given positions, on one server or a cluster.

    Belongs to one thread. Call `close` at the end.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._cluster = cluster_of(client)
        self._waiting: dict[str, _BlockingRead] = {}
        # Their connections belong to no pool: they are closed together with the reader.
        self.close = weakref.finalize(self, _close_all, self._waiting)

    def read(self, positions: Mapping[str, str], count: int, block_ms: int) -> list[Batch]:
        """Return the entries after each position."""
        if not positions:
            return []
        if self._cluster is None:
            found = self._xread(positions, count, block_ms)
            if block_ms and 0 < len(found) < len(positions):
                # A wait ends with the first stream that gets an entry, and a frame is for several streams.
                seen = {bytes(key) for key, _ in found}
                others = {key: after for key, after in positions.items() if key.encode() not in seen}
                found += self._xread(others, count, 0)
            return found
        batches = self._poll(positions, count)
        if batches or not block_ms:
            return batches
        self._wait(self._cluster, positions, block_ms / 1000)
        return self._poll(positions, count)

    def _xread(self, positions: Mapping[str, str], count: int, block_ms: int) -> list[Batch]:
        """Send one XREAD to one server."""
        streams: dict[Any, Any] = dict(positions)
        found: Any = self._client.xread(streams, count=count, block=block_ms or None)
        if isinstance(found, dict):  # RESP3
            found = [(key, [entry for part in parts for entry in part]) for key, parts in found.items()]
        return list(found or [])

    def _poll(self, positions: Mapping[str, str], count: int) -> list[Batch]:
        pipe = Pipe(self._client)
        for key, entry_id in positions.items():
            pipe.add("XREAD", "COUNT", count, "STREAMS", key, entry_id)
        batches: list[Batch] = []
        for reply in pipe.execute():
            if isinstance(reply, Exception):
                raise reply
            for key, entries in reply or ():
                pairs = [
                    (entry_id, dict(zip(cells[::2], cells[1::2], strict=True))) for entry_id, cells in entries
                ]
                batches.append((key, pairs))
        return batches

    def _wait(self, cluster: redis.RedisCluster, positions: Mapping[str, str], seconds: float) -> None:
        """Wait until a stream has an entry after its position, at most so long."""
        deadline = time.monotonic() + seconds
        if len(positions) > BLOCKING_READS_MAX:
            deadline = min(deadline, time.monotonic() + POLL_MS / 1000)
        for key in self._waiting.keys() - positions.keys():
            self._waiting.pop(key).close()
        key = ""
        try:
            with selectors.DefaultSelector() as selector:
                for key, after in islice(positions.items(), BLOCKING_READS_MAX):
                    selector.register(self._blocking_read(cluster, key, after), selectors.EVENT_READ, key)
                while (remaining := deadline - time.monotonic()) > 0:
                    for ready, _ in selector.select(remaining):
                        key = ready.data
                        pending, after = self._waiting[key], positions[key]
                        is_current = pending.after == after
                        if pending.receive() and is_current:
                            return
                        pending.send(after)  # its reply was for entries read meanwhile, or its time was up
        except (redis.RedisError, RedisClusterException, OSError):
            # The next poll meets the same error and raises it, or finds where the stream is now.
            if key in self._waiting:
                self._waiting.pop(key).close()
            refresh_topology(cluster)
            time.sleep(max(0.0, min(deadline - time.monotonic(), POLL_MS / 1000)))

    def _blocking_read(self, cluster: redis.RedisCluster, key: str, after: str) -> _BlockingRead:
        """Return the pending read of a stream, made or sent again where necessary."""
        pending = self._waiting.get(key)
        if pending is None or pending.is_stale(cluster, after):
            if pending is not None:
                pending.close()
            pending = self._waiting[key] = _BlockingRead(cluster, key)
        if pending.after is None:
            pending.send(after)
        return pending


class _BlockingRead:
    """One connection with a blocking XREAD of one stream. `after` is its id, None while none is pending."""

    def __init__(self, cluster: redis.RedisCluster, key: str) -> None:
        self._key = key
        self._pool = master_pool(cluster, key)
        self._connection = new_connection(self._pool)
        self._sent_at = 0.0
        self.after: str | None = None

    def is_stale(self, cluster: redis.RedisCluster, after: str) -> bool:
        """Return whether it will not report the next entry after `after`."""
        if self.after is not None and id_order(self.after) > id_order(after):
            return True  # the position moved back: a failover lost the entry that it waits behind
        if self.after is not None and time.monotonic() - self._sent_at > 2 * BLOCK_MS_MAX / 1000:
            return True  # the server vanished without closing the connection
        return master_pool(cluster, self._key) is not self._pool

    def send(self, after: str) -> None:
        """Send the XREAD for the first entry after `after`."""
        self._connection.send_command(
            "XREAD", "COUNT", 1, "BLOCK", BLOCK_MS_MAX, "STREAMS", self._key, after, check_health=False
        )
        self.after, self._sent_at = after, time.monotonic()

    def receive(self) -> bool:
        """Read the reply that has arrived. Return whether it holds an entry. Raise what redis-py raises."""
        self.after = None
        return bool(self._connection.read_response())

    def fileno(self) -> int:
        """Return the socket's descriptor, for `selectors`."""
        return int(socket_of(self._connection).fileno())

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()


def _close_all(waiting: dict[str, _BlockingRead]) -> None:
    for pending in waiting.values():
        pending.close()
    waiting.clear()


def trim(
    client: redis.Redis, keys: Keys, committed: Mapping[int, str], now_ms: float, retention_seconds: float
) -> None:
    """Remove tick entries that are older than the retention and that every reader has processed.

    Readers are the consumer groups of a stream. An uncommitted entry is never removed here.
    """
    pipeline = client.pipeline(transaction=False)
    shards = list(committed)
    for shard in shards:
        pipeline.xinfo_groups(keys.ticks(shard))
    replies = pipeline.execute(raise_on_error=False)
    old_ms = int(now_ms - retention_seconds * 1000)
    for shard, groups in zip(shards, replies, strict=True):
        if isinstance(groups, Exception):
            continue  # no stream yet, or a key of another type
        slowest = committed[shard]
        for group in groups:
            name = group.get("last-delivered-id") or group.get(b"last-delivered-id") or b"0-0"
            slowest = min(slowest, _text(name), key=id_order)
        if old_ms > 0 and slowest != "0-0":
            least = min(slowest, f"{old_ms}-0", key=id_order)
            pipeline.xtrim(keys.ticks(shard), minid=least, approximate=True)
    pipeline.execute(raise_on_error=False)


def enforce_cap(client: redis.Redis, keys: Keys, entries_max: int) -> int:
    """Cut tick streams to the hard cap, applied or not. Return the number of unapplied entries removed."""
    pipeline = client.pipeline(transaction=False)
    for shard in range(keys.shards):
        pipeline.xlen(keys.ticks(shard))
    sizes = pipeline.execute(raise_on_error=False)
    dropped = 0
    for shard, size in enumerate(sizes):
        if isinstance(size, int) and size > entries_max:
            applied = size - _lag(client, keys.ticks(shard), size)
            removed = int(client.xtrim(keys.ticks(shard), maxlen=entries_max, approximate=True))
            dropped += max(0, removed - applied)
    return dropped


def _lag(client: redis.Redis, key: str, size: int) -> int:
    """Return how many of a stream's `size` entries are unapplied; all of them when Redis does not know."""
    groups: Any = client.xinfo_groups(key)
    for group in groups:
        if _text(group.get("name") or group.get(b"name")) == AGGREGATOR_GROUP:
            lag = group.get("lag", group.get(b"lag"))
            return size if lag is None else min(int(lag), size)
    return size


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
