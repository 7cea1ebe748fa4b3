"""Write numbered tick batches to the shards' streams, each exactly once in the end.

    connect   open every connection, pin them, ask Redis which acknowledged entries it lost, send those again
    write     one XADD per batch and shard, one pipeline a call; then a slice of quotes
    failure   reconnect, and send the whole call again from its beginning

Entries of a source leave in the order of `seq`: the aggregator takes a `seq` that is not above the source's
last one for a repeat and skips it. So nothing newer is sent before what is older is in Redis.

A failover to a replica that lagged, or a restart from an older file, removes the end of each stream, never
its middle. One number per source and shard therefore tells what is missing: the highest `seq` that Redis
holds. The batches behind it are sent again, in order, before anything new. In doubt a batch is sent twice: a
repeat costs nothing, a missing one would be skipped forever.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import redis
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.candles.codec import tick_texts
from pkbrokers_redis.candles.model import TOKEN, TickArray
from pkbrokers_redis.clock import Backoff
from pkbrokers_redis.errors import RedisUnavailable
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import PinnedConnections, Pipe
from pkbrokers_redis.store.connect import describe, explain
from pkbrokers_redis.store.errors import is_transient, is_wrong_type
from pkbrokers_redis.store.streams import enforce_cap

log = logs.get("ingest")

RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.1, 1.0  # pause between attempts while Redis is unavailable
REPLY_SECONDS_MAX = 5.0  # without a reply for so long the connection is replaced and the call repeated
CAP_CHECK_MS = 1_000  # how often the streams' hard cap is enforced
ACKED_SECONDS = 30.0  # acknowledged batches are kept this long: a replica that lags more is no replica
ACKED_BYTES_MAX = 64 * 2**20  # … or until they need so much; 90 s of 9,000 ticks a second
RESENT_BATCHES_MAX = 64  # in one pipeline after a rollback
FIRST_LOOK_ENTRIES = 4  # read from the end of a stream: with one source the last entry is its own
NEXT_LOOK_ENTRIES = 200
QUOTES_PER_CALL = 64
QUOTE_INTERVAL_MS = 500  # between two writes of an instrument's quote
LOOK_ENTRIES_MAX = 5_000  # beyond it only the cursor counts, and more than needed is sent again


class TickBatch(NamedTuple):
    """Ticks with the number of their source: `seq` counts from 1, `at_ms` is the receive time (epoch ms).

    `ticks` is float64[n, 10], columns as in `candles.model`.
    """

    source: str
    seq: int
    at_ms: int
    ticks: TickArray


Packet = tuple[bytes, int, int, int]  # frame, offset, length, receive time (epoch ms)
QuoteFields = Callable[[bytes, str, int], Mapping[str, Any]]


class PendingQuotes:
    """The newest packet of each instrument, which waits to be written into its quote hash.

    Writing every changed quote at once stalls the loop that also carries the ticks (a p99 of 250 ms was
    measured); QUOTES_PER_CALL take a millisecond or two. An instrument is written at most every
    QUOTE_INTERVAL_MS: a newer packet replaces the waiting one, so at most one per instrument waits.

    One thread adds packets and queues writes; `confirm` or `retry` follows each `queue`. `add_symbols` may be
    called by any thread. `fields_of(packet, symbol, at_ms)` returns the hash's fields.
    """

    def __init__(self, keys: Keys, symbols: Mapping[int, str], fields_of: QuoteFields) -> None:
        """Prepare; `symbols` maps tokens to the names that the hashes show."""
        self._keys = keys
        self._symbols = dict(symbols)
        self._fields_of = fields_of
        self._newest: dict[int, Packet] = {}  # arrived since the current slice was made
        self._slice: list[int] = []  # tokens to write, call by call
        self._sent: dict[int, Packet] = {}  # queued, not yet confirmed
        self._written: dict[int, Packet] = {}  # what Redis has; copies of single packets
        self._sliced_ms = 0

    def __len__(self) -> int:
        return len(self._newest) + len(self._slice)

    def newest(self) -> dict[int, Packet]:
        """Return the newest packet of each instrument, written or not. Any thread may call it."""
        return {**self._written, **self._sent, **self._newest}

    def add_symbols(self, symbols: Mapping[int, str]) -> None:
        """Learn the names of more instruments."""
        self._symbols = {**self._symbols, **symbols}

    def add(
        self, frame: bytes, tokens: list[int], offsets: list[int], lengths: list[int], at_ms: int
    ) -> None:
        """Keep a frame's packets, received at `at_ms` (epoch ms), as the newest of their instruments."""
        n = len(tokens)
        packets = zip([frame] * n, offsets, lengths, [at_ms] * n, strict=True)
        self._newest.update(zip(tokens, packets, strict=True))

    def queue(self, pipe: Pipe, now_ms: int) -> list[str]:
        """Append the HSETs of the next slice to a pipe; return their keys."""
        if not self._slice and self._newest and not 0 <= now_ms - self._sliced_ms < QUOTE_INTERVAL_MS:
            self._slice = list(self._newest)
            self._sliced_ms = now_ms
        while self._slice and len(self._sent) < QUOTES_PER_CALL:
            token = self._slice.pop()
            packet = self._newest.pop(token, None)
            if packet is None:
                continue
            frame, offset, length, at_ms = packet
            data = frame[offset : offset + length]
            self._sent[token] = (data, 0, length, at_ms)
            symbol = self._symbols.get(token) or str(token)
            cells: list[Any] = []
            for name, value in self._fields_of(data, symbol, at_ms).items():
                cells += (name, value)
            pipe.add("HSET", self._keys.quote(token), *cells)
        return [self._keys.quote(token) for token in self._sent]

    def confirm(self) -> None:
        """Record that Redis has what was queued."""
        self._written.update(self._sent)
        self._sent.clear()

    def retry(self) -> None:
        """Let what was queued wait again, unless a newer packet does already."""
        for token, packet in self._sent.items():
            self._newest.setdefault(token, packet)
        self._slice += self._sent
        self._sent.clear()

    def rewrite(self) -> None:
        """Let everything written so far wait again: Redis lost some of it. Newer packets stay."""
        self._newest = self._written | self._newest
        self._written = {}


class AckedBuffer:
    """The newest batches that Redis acknowledged, by reference, bounded in bytes and age."""

    def __init__(
        self,
        bytes_max: int = ACKED_BYTES_MAX,
        seconds: float = ACKED_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batches: deque[tuple[TickBatch, float]] = deque()  # with the time of the acknowledgement
        self._bytes_max = bytes_max
        self._seconds = seconds
        self._clock = clock
        self.size_bytes = 0
        self.dropped: dict[str, int] = {}  # source → the highest seq that was dropped

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batches: Iterable[TickBatch]) -> None:
        """Keep batches that Redis acknowledged just now.

        Age counts from the newest batch, not from the clock: what was acknowledged right before Redis failed
        is what may be missing after it recovered.
        """
        now = self._clock()
        for batch in batches:
            self._batches.append((batch, now))
            self.size_bytes += batch.ticks.nbytes
        while self._batches and (
            self.size_bytes > self._bytes_max or self._batches[0][1] < now - self._seconds
        ):
            oldest, _ = self._batches.popleft()
            self.size_bytes -= oldest.ticks.nbytes
            self.dropped[oldest.source] = oldest.seq

    def sources(self) -> list[str]:
        """Return the sources of the kept batches, oldest first."""
        return list(dict.fromkeys(batch.source for batch, _ in self._batches))

    def last_seqs(self, source: str, keys: Keys) -> dict[int, int]:
        """Return shard → the highest kept `seq` of a source."""
        last: dict[int, int] = {}
        for batch, _ in reversed(self._batches):
            if batch.source == source:
                for shard in set(_shards(batch.ticks, keys).tolist()):
                    last.setdefault(shard, batch.seq)
                if len(last) == keys.shards:
                    break
        return last

    def after(self, source: str, seqs: Mapping[int, int], keys: Keys) -> Iterator[TickBatch]:
        """Yield a source's kept ticks behind `seqs` (shard → seq), in order; only of those shards."""
        first = min(seqs.values())
        for batch, _ in self._batches:
            if batch.source != source or batch.seq <= first:
                continue
            shards = [shard for shard, seq in seqs.items() if batch.seq > seq]
            ticks = batch.ticks[np.isin(_shards(batch.ticks, keys), shards)]
            if len(ticks):
                yield batch._replace(ticks=ticks)


def _shards(ticks: TickArray, keys: Keys) -> Any:
    return (ticks[:, TOKEN].astype(np.int64) >> 8) % keys.shards


def find_missing(client: redis.Redis, keys: Keys, acked: AckedBuffer) -> dict[str, dict[int, int]]:
    """Return what Redis lost of what it acknowledged: source → shard → the highest `seq` it still holds."""
    missing: dict[str, dict[int, int]] = {}
    for source in acked.sources():
        for shard, last in acked.last_seqs(source, keys).items():
            held = highest_seq(client, keys, shard, source, enough=last)
            if held is not None and held < last:
                missing.setdefault(source, {})[shard] = held
    return missing


def highest_seq(client: redis.Redis, keys: Keys, shard: int, source: str, enough: int) -> int | None:
    """Return the highest `seq` of a source that a shard holds, applied or not; never one too high.

    The stream is read backwards to the cursor (older entries count in the cursor's field `src:`), at most
    `LOOK_ENTRIES_MAX` entries, and no further once `enough` is found. 0 is none; None: the key is no stream.
    """
    try:
        fields: Any = client.hmget(keys.cursor(shard), f"src:{source}", "id")
        applied, position = fields
        held = int(applied or 0)
        end, newest = (position or b"0-0").decode(), "+"
        looked, most = 0, FIRST_LOOK_ENTRIES
        while held < enough and looked < LOOK_ENTRIES_MAX:
            entries: Any = client.xrevrange(keys.ticks(shard), max=newest, min=end, count=most)
            for _, cells in entries:
                # A source's entries ascend, apart from repeats: the last one is (as good as) the highest.
                if cells.get(b"src") == source.encode() and cells.get(b"seq", b"").isdigit():
                    return max(held, int(cells[b"seq"]))
            if len(entries) < most:
                break
            looked, most = looked + len(entries), NEXT_LOOK_ENTRIES
            newest = f"({entries[-1][0].decode()}"
    except ResponseError as error:
        if is_wrong_type(error):
            return None
        raise
    except ValueError:  # another program wrote into the cursor
        return 0
    return held


def queue_batches(
    pipe: Pipe, keys: Keys, source: str, batches: Iterable[tuple[int, int, TickArray]]
) -> list[str]:
    """Append batches `(seq, at_ms, ticks)` of a source to a pipe; return the entries' keys in reply order.

    A shard's entries are one transaction: had Redis refused one (out of memory, say) and taken the next, that
    one's higher `seq` would make the first look like a repeat when it is sent again.
    """
    entries: dict[int, list[tuple[Any, ...]]] = {}
    for seq, at_ms, ticks in batches:
        for shard, n, text in tick_texts(ticks, keys.shards):
            fields = ("src", source, "seq", seq, "at", at_ms, "n", n, "ticks", text)
            entries.setdefault(shard, []).append(("XADD", keys.ticks(shard), "*", *fields))
    for commands in entries.values():
        if len(commands) > 1:
            commands = [("MULTI",), *commands, ("EXEC",)]
        for command in commands:
            pipe.add(*command)
    return [keys.ticks(shard) for shard, commands in entries.items() for _ in commands]


class TickWriter:
    """Writes batches to the tick streams and repeats a call until Redis has it. Used by one thread.

    Attributes:
        source: the id under which this writer numbers its batches.
        seq: the number of the last batch that `number` made.
        counts: counters for heartbeats, by name.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        *,
        source: str | None = None,
        quotes: PendingQuotes | None = None,
    ) -> None:
        """Prepare a writer; it connects with its first `write`."""
        self._connect = connect
        self._client: redis.Redis | None = None
        self._keys = settings.keys
        self._settings = settings
        self.source = source or f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() // 1_000_000:x}"
        self.seq = 0
        self.acked = AckedBuffer(settings.buffer_max_bytes // 4)
        self._quotes = quotes
        self.counts = dict.fromkeys(
            ("ticks", "entries", "quotes", "resent_batches", "restored_entries", "refused_writes",
             "dropped_at_cap"), 0
        )  # fmt: skip
        self._once = logs.Once()
        self._cap_checked_ms = 0

    def number(self, ticks: TickArray, at_ms: int) -> TickBatch:
        """Return the ticks received at `at_ms` (epoch ms) as the next batch of this source."""
        self.seq += 1
        self.counts["ticks"] += len(ticks)
        return TickBatch(self.source, self.seq, at_ms, ticks)

    def write(self, batches: Sequence[TickBatch], now_ms: int, stop: threading.Event | None = None) -> bool:
        """Write batches in the order of `seq` and a slice of quotes; wait while Redis is unavailable or full.

        Return False when `stop` was set first. Raise PkbError when the store can never take them.
        """
        backoff = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        while True:
            try:
                if self._client is None:
                    self._client = self._open()
                self._send(self._client, batches, now_ms)
                self.acked.add(batches)
                return True
            except (redis.RedisError, RedisUnavailable) as error:
                if isinstance(error, ResponseError) and not is_transient(error):
                    raise explain(error, describe(self._settings)) from error
                # Reconnect after a mere refusal too: a read-only or loading server may come back older.
                self._client = None
                if self._quotes is not None:
                    self._quotes.retry()
                self.counts["resent_batches"] += 1
                reason = str(error).partition("\n")[0][:200]
                pause_seconds = backoff.next()
                log.warning("redis_unavailable", reason=reason, retry_seconds=pause_seconds)
                if (stop or threading.Event()).wait(pause_seconds):
                    return False

    def _open(self) -> redis.Redis:
        """Connect, and bring that Redis up to what it, or another before it, had acknowledged."""
        client = self._connect()
        pinned = PinnedConnections(client, REPLY_SECONDS_MAX)
        for shard in range(self._keys.shards):  # opens every connection that will be needed
            client.exists(self._keys.ticks(shard))
        pinned.pin()
        for source, held in find_missing(client, self._keys, self.acked).items():
            self._restore(client, source, held)
        return client

    def _restore(self, client: redis.Redis, source: str, held: Mapping[int, int]) -> None:
        log.warning("redis_rolled_back", source=source, shards=",".join(map(str, sorted(held))))
        if min(held.values()) < self.acked.dropped.get(source, 0) and self._once.first(("short", source)):
            log.error(
                "redis_rolled_back_far", reason="some acknowledged ticks may be lost",
                hint="check the replication of Redis, then `pkb backfill`",
            )  # fmt: skip
        batches = self.acked.after(source, held, self._keys)
        while part := list(islice(batches, RESENT_BATCHES_MAX)):
            pipe = Pipe(client)
            self.counts["restored_entries"] += self._execute(pipe, self._queue(pipe, part))
        if self._quotes is not None:
            self._quotes.rewrite()

    def _queue(self, pipe: Pipe, batches: Sequence[TickBatch]) -> list[str]:
        keys: list[str] = []
        for source, group in groupby(batches, key=lambda batch: batch.source):
            keys += queue_batches(
                pipe, self._keys, source, [(seq, at_ms, ticks) for _, seq, at_ms, ticks in group]
            )
        return keys

    def _send(self, client: redis.Redis, batches: Sequence[TickBatch], now_ms: int) -> None:
        pipe = Pipe(client)
        self.counts["entries"] += self._execute(pipe, self._queue(pipe, batches))
        if self._quotes is not None:
            # After the ticks' replies: a candle must not wait for quotes.
            self.counts["quotes"] += self._execute(pipe, self._quotes.queue(pipe, now_ms))
            self._quotes.confirm()
        if not 0 <= now_ms - self._cap_checked_ms < CAP_CHECK_MS:
            self._cap_checked_ms = now_ms
            self._enforce_cap(client)

    def _enforce_cap(self, client: redis.Redis) -> None:
        if dropped := enforce_cap(client, self._keys, self._settings.stream_max_entries):
            self.counts["dropped_at_cap"] += dropped
            log.error(
                "stream_full", dropped_entries=dropped,
                hint="start `pkb aggregate`, or raise PKB_STREAM_MAX_ENTRIES",
            )  # fmt: skip

    def _execute(self, pipe: Pipe, keys: Sequence[str]) -> int:
        """Send a pipe that writes these keys; return how many writes Redis took.

        A write that met a key of another type is counted and skipped; any other refusal is raised.
        """
        replies: list[Any] = []
        for reply in pipe.execute():
            replies += reply if isinstance(reply, list) else [reply]
        for reply in replies:
            if isinstance(reply, Exception) and not is_wrong_type(reply):
                raise reply
        written = 0
        results = (reply for reply in replies if reply not in (b"OK", b"QUEUED"))  # those of MULTI
        for key, result in zip(keys, results, strict=True):
            if not isinstance(result, Exception):
                written += 1
                continue
            self.counts["refused_writes"] += 1
            if self._once.first(("refused", key)):
                reason, hint = str(result)[:200], f"look at it, then `DEL {key}`"
                log.warning("write_refused", key=key, reason=reason, hint=hint)
        return written
