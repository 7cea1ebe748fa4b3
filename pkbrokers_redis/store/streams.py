"""Stream ids, `<ms>-<n>`, and counters, as Redis holds them: as text.

In a module of their own: what only compares them must not wait for a compiler.

Reading many streams at once, and waiting until there is something to read.

One server does both in an XREAD. A cluster refuses an XREAD whose streams lie in several slots, and a
connection that waits on one stream can do nothing else. There, a read is two things:

    look    XREAD without waiting, of every stream, one write a master: what counts is only this
    ring    one connection per stream with `XREAD COUNT 1 BLOCK` pending; a reply on any ends the wait. Its
            contents are dropped, the next look has them

So a bell that is late, or lost with its connection, costs the rest of a wait and never an entry.

The tick streams: how an entry is written, and when it may go.

P:{S}:ticks   one entry per websocket frame and shard:
              src <source id>  seq <its counter>  at <epoch ms>  n <rows>  ticks <JSON rows>
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
from pkbrokers_redis.store.cluster import Pipe, cluster_of, master_pool, refresh


def id_order(entry_id: str) -> tuple[int, int]:
    """A stream id as numbers, to compare it."""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq or 0)


def is_count(text: bytes) -> bool:
    """Whether a field, which a foreign hand may have written, holds a whole number of 18 digits at most."""
    return text.isdigit() and len(text) <= 18


BELLS_MAX = 256  # connections per reader; with more streams the others are looked at every LOOK_MS
LOOK_MS = 50
RING_MS_MAX = 10_000  # a bell's BLOCK: how long a server remembers a reader that vanished without a word

Fields = dict[bytes, bytes]
Batch = tuple[bytes, list[tuple[bytes, Fields]]]  # key, entries


class StreamReader:
    """Reads streams from given positions, on one server or a cluster. One thread's; `close` when done."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._cluster = cluster_of(client)
        self._bells: dict[str, _Bell] = {}
        # The bells' connections are in no pool: they end with the reader.
        self.close = weakref.finalize(self, _silence, self._bells)

    def read(self, positions: Mapping[str, str], count: int, block_ms: int) -> list[Batch]:
        """Up to `count` entries of each stream behind its position (key → id), as bytes.

        Streams with nothing new are left out; nothing at all after `block_ms` without any. A stream that is
        left out had nothing when the call began; after an empty answer none had when it returned. Raises
        redis.ConnectionError and TimeoutError, and ResponseError (WRONGTYPE) where a key is no stream.
        """
        if not positions:
            return []
        if self._cluster is None:
            found = self._xread(positions, count, block_ms)
            if block_ms and 0 < len(found) < len(positions):
                # A wait ends with the first stream that gets something, and a frame is for several.
                seen = {bytes(key) for key, _ in found}
                others = {key: after for key, after in positions.items() if key.encode() not in seen}
                found += self._xread(others, count, 0)
            return found
        batches = self._look(positions, count)
        if batches or not block_ms:
            return batches
        self._wait(self._cluster, positions, block_ms / 1000)
        return self._look(positions, count)

    def _xread(self, positions: Mapping[str, str], count: int, block_ms: int) -> list[Batch]:
        """One XREAD of one server; 0 does not wait."""
        streams: dict[Any, Any] = dict(positions)
        found: Any = self._client.xread(streams, count=count, block=block_ms or None)
        if isinstance(found, dict):  # RESP3
            found = [(key, [each for part in parts for each in part]) for key, parts in found.items()]
        return list(found or [])

    def _look(self, positions: Mapping[str, str], count: int) -> list[Batch]:
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
        """Until a stream has something behind its position, or the time is up."""
        deadline = time.monotonic() + seconds
        if len(positions) > BELLS_MAX:
            deadline = min(deadline, time.monotonic() + LOOK_MS / 1000)
        for key in self._bells.keys() - positions.keys():
            self._bells.pop(key).close()
        key = ""
        try:
            with selectors.DefaultSelector() as selector:
                for key, after in islice(positions.items(), BELLS_MAX):
                    bell = self._bells.get(key)
                    if bell is None or bell.is_useless(cluster, after):
                        if bell is not None:
                            bell.close()
                        bell = self._bells[key] = _Bell(cluster, key)
                    if bell.after is None:
                        bell.set(after)
                    selector.register(bell, selectors.EVENT_READ, key)
                while (left := deadline - time.monotonic()) > 0:
                    for ready, _ in selector.select(left):
                        key = ready.data
                        bell, after = self._bells[key], positions[key]
                        is_news = bell.after == after
                        if bell.take() and is_news:
                            return
                        bell.set(after)  # it rang for what we have read since, or its time was up
        except (redis.RedisError, RedisClusterException, OSError):
            # The next look meets the same trouble and says so, or goes where the stream is by now.
            if key in self._bells:
                self._bells.pop(key).close()
            refresh(cluster)
            time.sleep(max(0.0, min(deadline - time.monotonic(), LOOK_MS / 1000)))


class _Bell:
    """One connection that waits on one stream. `after` is the id it waits behind, None while it does not."""

    def __init__(self, cluster: redis.RedisCluster, key: str) -> None:
        self._key = key
        self._pool = master_pool(cluster, key)
        self._connection = self._pool.connection_class(**self._pool.connection_kwargs)
        self._set_at = 0.0
        self.after: str | None = None

    def is_useless(self, cluster: redis.RedisCluster, after: str) -> bool:
        """Whether it will not ring for what comes behind `after`."""
        if self.after is not None and id_order(self.after) > id_order(after):
            return True  # the position went back: a failover lost what it waits behind
        if self.after is not None and time.monotonic() - self._set_at > 2 * RING_MS_MAX / 1000:
            return True  # the server is gone, and nobody told us
        return master_pool(cluster, self._key) is not self._pool

    def set(self, after: str) -> None:
        """Wait for the first entry behind `after`."""
        self._connection.send_command(
            "XREAD", "COUNT", 1, "BLOCK", RING_MS_MAX, "STREAMS", self._key, after, check_health=False
        )
        self.after, self._set_at = after, time.monotonic()

    def take(self) -> bool:
        """Read the reply that is there: whether it rang, or its time was up. Raises what redis-py raises."""
        self.after = None
        return bool(self._connection.read_response())

    def fileno(self) -> int:
        """For `selectors`."""
        return int(self._connection._sock.fileno())

    def close(self) -> None:
        """End the connection, whatever it waits for."""
        self._connection.disconnect()


def _silence(bells: dict[str, _Bell]) -> None:
    for bell in bells.values():
        bell.close()
    bells.clear()


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
