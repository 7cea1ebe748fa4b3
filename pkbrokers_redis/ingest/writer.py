"""A gate on a client's connections: none is opened, once it is shut, without our noticing.

redis-py replaces a lost connection silently, and Sentinel, a cluster or a moved address may put another
server behind the new one: a replica that lags, say. What we sent next would then follow a gap, and the
aggregator would take what fills the gap later for repeats. So the writer opens its connections, shuts the
gate, asks what that Redis has, and only then sends; whatever needs a new connection fails, and starts over.

After a lost connection: what has this Redis got of ours, and what must it be sent again?

A failover to a replica that lagged, or a restart from an older file, takes back the end of what Redis had
acknowledged, and of each shard's stream on its own: never something from the middle. So per source and
shard one number tells all, the highest seq that is there, and what follows it is sent again in order before
anything newer. An entry that is there all the same is a repeat, which the aggregator skips by its seq; one
that is left out in front of a newer one would be taken for a repeat and be lost. When in doubt, resend.

The writer: numbered frames → tick streams and quote hashes, each exactly once in the end.

    connect   open the connections, shut the gate (`gate`), ask what Redis has lost (`resend`), send that
    write     parse → one XADD per frame and shard, one pipeline per round; then a slice of quotes
    fail      for whatever reason: connect again, and send the round again from its beginning

Nothing newer is sent before what is older is there, because the aggregator takes a seq that is not above a
source's last one for a repeat. Nothing is acknowledged that is not in Redis.
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
from pkbrokers_redis.candles.model import TOKEN, TickArray
from pkbrokers_redis.errors import RedisUnavailable
from pkbrokers_redis.ingest.quotes import QuoteBoard
from pkbrokers_redis.ingest.spool import Frame
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.protocol import ParsedFrame, parse_frame
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.connect import describe, explain
from pkbrokers_redis.store.errors import is_not_now
from pkbrokers_redis.store.streams import enforce_cap, queue_frames


class Gate:
    """Installed on a client that has just been made; its first connections are dropped for gated ones.

    `socket_timeout_seconds` bounds how long a reply is waited for: a writer never blocks on purpose.
    """

    def __init__(self, client: redis.Redis, socket_timeout_seconds: float) -> None:
        self._shut = False
        nodes = getattr(client, "nodes_manager", None)  # of a RedisCluster
        if nodes is None:
            self._install(client.connection_pool.connection_kwargs, socket_timeout_seconds)
            self._restart(client)
            return
        self._install(nodes.connection_kwargs, socket_timeout_seconds)  # of connections to nodes to come
        for node in nodes.nodes_cache.values():
            if node.redis_connection is not None:
                pool = node.redis_connection.connection_pool
                self._install(pool.connection_kwargs, socket_timeout_seconds)
                self._restart(node.redis_connection)

    def _install(self, options: dict[str, Any], socket_timeout_seconds: float) -> None:
        on_connect = options.get("redis_connect_func")

        def connected(connection: Any) -> None:
            if self._shut:
                raise redis.ConnectionError("the connection was lost")
            if on_connect is None:
                connection.on_connect()
            else:
                on_connect(connection)

        options.update(redis_connect_func=connected, socket_timeout=socket_timeout_seconds)

    @staticmethod
    def _restart(client: redis.Redis) -> None:
        client.connection_pool.disconnect()
        client.connection_pool.reset()

    def shut(self) -> None:
        """From now on every attempt to connect raises redis.ConnectionError."""
        self._shut = True


KEPT_SECONDS = 30.0  # of acknowledged frames: a replica that lags more is no replica
KEPT_BYTES_MAX = 64 * 2**20  # whichever is reached first; 38 s of 9,000 full ticks a second
FIRST_LOOK = 4  # entries from the end of a stream: with one source the last one is ours
NEXT_LOOKS = 200
ENTRIES_LOOKED_AT_MAX = 5_000  # then only the cursor counts, and more than needed is sent again


class Batch(NamedTuple):
    """One frame, numbered and parsed. `ticks` is float64[n, 10]; `frame` is empty where there was none."""

    source: str
    seq: int
    at_ms: int
    ticks: TickArray
    frame: bytes = b""


class _Kept(NamedTuple):
    source: str
    seq: int
    at_ms: int
    data: bytes | TickArray
    size: int
    kept_at: float


class Kept:
    """The newest frames that Redis has acknowledged, by reference, bounded by bytes and age."""

    def __init__(
        self,
        bytes_max: int = KEPT_BYTES_MAX,
        seconds: float = KEPT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._frames: deque[_Kept] = deque()
        self._bytes_max = bytes_max
        self._seconds = seconds
        self._clock = clock
        self.size_bytes = 0
        self.gone: dict[str, int] = {}  # source → the newest seq that was let go

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, batches: Iterable[Batch]) -> None:
        """Keep batches that Redis acknowledged just now.

        Age is measured against the newest, not against the clock: what was acknowledged right before
        Redis went away is what may be missing when it is back.
        """
        now = self._clock()
        for source, seq, at_ms, ticks, frame in batches:
            size = len(frame) or ticks.nbytes
            self._frames.append(_Kept(source, seq, at_ms, frame or ticks, size, now))
            self.size_bytes += size
        while self._frames and (
            self.size_bytes > self._bytes_max or self._frames[0].kept_at < now - self._seconds
        ):
            oldest = self._frames.popleft()
            self.size_bytes -= oldest.size
            self.gone[oldest.source] = oldest.seq

    def sources(self) -> list[str]:
        """Whose frames are here, oldest first."""
        return list(dict.fromkeys(each.source for each in self._frames))

    def last_seqs(self, source: str, keys: Keys) -> dict[int, int]:
        """Shard → the highest seq that was acknowledged there, as far as we remember."""
        last: dict[int, int] = {}
        for kept in reversed(self._frames):
            if kept.source == source:
                for shard in set(_shards(_ticks(kept), keys).tolist()):
                    last.setdefault(shard, kept.seq)
                if len(last) == keys.shards:
                    break
        return last

    def after(self, source: str, least: Mapping[int, int], keys: Keys) -> Iterator[Batch]:
        """Our frames' ticks of the shards in `least` with a higher seq than it says, in order."""
        first = min(least.values())
        for kept in self._frames:
            if kept.source != source or kept.seq <= first:
                continue
            ticks = _ticks(kept)
            wanted = [shard for shard, seq in least.items() if kept.seq > seq]
            ticks = ticks[np.isin(_shards(ticks, keys), wanted)]
            if len(ticks):
                frame = kept.data if isinstance(kept.data, bytes) else b""
                yield Batch(source, kept.seq, kept.at_ms, ticks, frame)


def _ticks(kept: _Kept) -> TickArray:
    return parse_frame(kept.data, kept.at_ms).ticks if isinstance(kept.data, bytes) else kept.data


def _shards(ticks: TickArray, keys: Keys) -> Any:
    return (ticks[:, TOKEN].astype(np.int64) >> 8) % keys.shards


def missing(client: redis.Redis, keys: Keys, kept: Kept) -> dict[str, dict[int, int]]:
    """What Redis has lost of what it acknowledged: source → shard → the highest seq that is there."""
    found: dict[str, dict[int, int]] = {}
    for source in kept.sources():
        for shard, last in kept.last_seqs(source, keys).items():
            there = highest_seq(client, keys, shard, source, enough=last)
            if there is not None and there < last:
                found.setdefault(source, {})[shard] = there
    return found


def highest_seq(client: redis.Redis, keys: Keys, shard: int, source: str, enough: int) -> int | None:
    """The highest seq of a source that a shard holds, applied or still in its stream; 0 for none.

    Never too high. None: a foreign hand has put something else there, which takes no entries at all. The
    stream is looked at from its end, back to the cursor (what lies before it counts in the cursor's
    `src:` field), and no further than `ENTRIES_LOOKED_AT_MAX`.
    """
    try:
        fields: Any = client.hmget(keys.cursor(shard), f"src:{source}", "id")
        applied, position = fields
        there = int(applied or 0)
        least, newest = (position or b"0-0").decode(), "+"
        looked, most = 0, FIRST_LOOK
        while there < enough and looked < ENTRIES_LOOKED_AT_MAX:
            entries: Any = client.xrevrange(keys.ticks(shard), max=newest, min=least, count=most)
            for _, cells in entries:
                # A source's entries ascend, apart from repeats: the last one is (as good as) the highest.
                if cells.get(b"src") == source.encode() and cells.get(b"seq", b"").isdigit():
                    return max(there, int(cells[b"seq"]))
            if len(entries) < most:
                break
            looked, most = looked + len(entries), NEXT_LOOKS
            newest = f"({entries[-1][0].decode()}"
    except ResponseError as error:
        if "WRONGTYPE" in str(error):
            return None
        raise
    except ValueError:  # somebody wrote into the cursor
        return 0
    return there


log = logs.get("ingest")

PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 1.0  # between tries while Redis is away
REPLY_SECONDS_MAX = (
    5.0  # no reply for so long: the connection is given up, and everything asked and sent again
)
RESENT_A_ROUND = 64  # frames
CAP_EVERY_MS = 1_000
EVIDENCE_BYTES = 64
EVIDENCE_TOKENS = 5


class TickWriter:
    """Frames → Redis. One `seq` per frame, one pipeline per round; sends again until Redis has it."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        symbols: Mapping[int, str],
        *,
        source: str | None = None,
        only_known: bool = False,
        on_ticks: Callable[[TickArray, int], None] | None = None,
    ) -> None:
        """`symbols`: token → name. `only_known`: a token that is not among them is a stranger, not a tick.

        `on_ticks(ticks, at_ms)` sees what is parsed of our own frames.
        """
        self._connect = connect
        self._client: redis.Redis | None = None
        self._keys = settings.keys
        self._settings = settings
        self.source = source or f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() // 1_000_000:x}"
        self.seq = 0  # of frames that are numbered here, not in an inbox
        self.quotes = QuoteBoard(self._keys, symbols)
        self.kept = Kept(settings.buffer_max_bytes // 4)
        self._known = frozenset(symbols) if only_known else None
        self._on_ticks = on_ticks
        self.counts = dict.fromkeys(
            ("frames", "ticks", "entries", "quotes", "unknown_packets", "truncated_frames", "trailing_bytes",
             "unknown_tokens", "resent_batches", "restored_entries", "refused_writes", "dropped_at_cap"), 0
        )  # fmt: skip
        self._once = logs.Once()
        self._capped_ms = 0

    def learn(self, symbols: Mapping[int, str]) -> None:
        """More instruments are streamed now. Those that left stay known: frames of theirs may be on the way.

        Any thread may call it.
        """
        if self._known is not None:
            self._known = self._known.union(symbols)
        self.quotes.learn(symbols)

    # -- frames → batches ------------------------------------------------------------------------

    def take_frames(self, frames: Sequence[tuple[bytes, int]]) -> list[Batch]:
        """Number frames `(bytes, at_ms)` that come from no inbox, and parse them."""
        first = self.seq + 1
        self.seq += len(frames)
        return self.parse(
            Frame(self.source, first + n, at_ms, data) for n, (data, at_ms) in enumerate(frames)
        )

    def take_ticks(self, ticks: TickArray, at_ms: int) -> list[Batch]:
        """Number ticks that came in no frame."""
        self.seq += 1
        return [Batch(self.source, self.seq, at_ms, ticks)]

    def parse(self, frames: Iterable[Frame]) -> list[Batch]:
        """Numbered frames → batches; hostile bytes are counted and give what can be saved."""
        batches: list[Batch] = []
        for source, seq, at_ms, frame in frames:
            parsed = parse_frame(frame, at_ms)
            raw = frame
            self.counts["frames"] += 1
            if parsed.unknown or parsed.truncated or parsed.trailing:
                self._note_odd(frame, parsed.unknown, parsed.truncated, parsed.trailing)
            if source == self.source:  # a dead process's instruments may be another's by now
                if self._known is not None and not self._known.issuperset(parsed.ticks[:, TOKEN].tolist()):
                    parsed, raw = self._without_strangers(parsed), b""
                self.quotes.note(frame, parsed, at_ms)
                if self._on_ticks is not None:
                    self._on_ticks(parsed.ticks, at_ms)
            if len(parsed.ticks):
                self.counts["ticks"] += len(parsed.ticks)
                batches.append(Batch(source, seq, at_ms, parsed.ticks, raw))
        return batches

    def _without_strangers(self, parsed: ParsedFrame) -> ParsedFrame:
        known = [token in (self._known or ()) for token in parsed.ticks[:, TOKEN].tolist()]
        strangers = [int(token) for token in parsed.ticks[np.logical_not(known), TOKEN]]
        self.counts["unknown_tokens"] += len(strangers)
        if self._once.first("unknown tokens"):
            log.warning("unknown_tokens", tokens=str(strangers[:EVIDENCE_TOKENS]), packets=len(strangers))
        return parsed._replace(
            ticks=parsed.ticks[known],
            offsets=[each for each, ours in zip(parsed.offsets, known, strict=True) if ours],
            lengths=[each for each, ours in zip(parsed.lengths, known, strict=True) if ours],
        )

    def _note_odd(self, frame: bytes, unknown: int, truncated: bool, trailing: int) -> None:
        self.counts["unknown_packets"] += unknown
        self.counts["truncated_frames"] += truncated
        self.counts["trailing_bytes"] += trailing
        if self._once.first(("odd frame", bool(unknown), truncated, bool(trailing))):
            log.warning(
                "odd_frame", size_bytes=len(frame), unknown_packets=unknown, truncated=truncated,
                trailing_bytes=trailing, starts_with=frame[:EVIDENCE_BYTES].hex(),
            )  # fmt: skip

    # -- batches → Redis -------------------------------------------------------------------------

    def write(self, batches: Sequence[Batch], now_ms: int, stop: threading.Event | None = None) -> bool:
        """Put batches and a slice of quotes into Redis; waits out a Redis that is away or full.

        True: Redis has them all. False: `stop` is set and Redis cannot take them, so they are still the
        caller's. Raises PkbError for a store that can never take them.
        """
        pause_seconds = PAUSE_SECONDS_MIN
        while True:
            try:
                if self._client is None:
                    self._client = self._open()
                self._send(self._client, batches, now_ms)
                self.kept.add(batches)
                return True
            except (redis.RedisError, RedisUnavailable) as error:
                if isinstance(error, ResponseError) and not is_not_now(error):
                    raise explain(error, describe(self._settings)) from error
                # Also after a mere refusal: a server that was read-only or loading may come back older.
                self._client = None
                self.quotes.put_back()
                self.counts["resent_batches"] += 1
                why = str(error).partition("\n")[0][:200]
                log.warning("redis_away", why=why, retry_seconds=pause_seconds)
                if (stop or threading.Event()).wait(pause_seconds):
                    return False
                pause_seconds = min(pause_seconds * 2, PAUSE_SECONDS_MAX)

    def _open(self) -> redis.Redis:
        """Connect, and bring that Redis up to what another, or this one, had acknowledged."""
        client = self._connect()
        gate = Gate(client, REPLY_SECONDS_MAX)
        for shard in range(self._keys.shards):  # open every connection that will be needed
            client.exists(self._keys.ticks(shard))
        gate.shut()
        for source, there in missing(client, self._keys, self.kept).items():
            self._restore(client, source, there)
        return client

    def _restore(self, client: redis.Redis, source: str, there: Mapping[int, int]) -> None:
        log.warning("redis_went_back", source=source, shards=",".join(map(str, sorted(there))))
        if min(there.values()) < self.kept.gone.get(source, 0) and self._once.first(("short", source)):
            log.error(
                "redis_went_back_far", hint="some ticks it had acknowledged may be lost; see its replication"
            )
        batches = self.kept.after(source, there, self._keys)
        while round_ := list(islice(batches, RESENT_A_ROUND)):
            pipe = Pipe(client)
            self.counts["restored_entries"] += self._execute(pipe, self._queue(pipe, round_))
            if source == self.source:
                self.quotes.note_again([(each.frame, each.at_ms) for each in round_ if each.frame])

    def _queue(self, pipe: Pipe, batches: Sequence[Batch]) -> list[str]:
        tick_keys: list[str] = []
        for source, group in groupby(batches, key=lambda batch: batch.source):
            frames = [(seq, at_ms, ticks) for _, seq, at_ms, ticks, _ in group]
            tick_keys += queue_frames(pipe, self._keys, source, frames)
        return tick_keys

    def _send(self, client: redis.Redis, batches: Sequence[Batch], now_ms: int) -> None:
        pipe = Pipe(client)
        self.counts["entries"] += self._execute(pipe, self._queue(pipe, batches))
        quote_keys = self.quotes.queue(pipe, now_ms)  # behind the ticks: a candle must not wait for quotes
        self.counts["quotes"] += self._execute(pipe, quote_keys)
        self.quotes.settle()
        if not 0 <= now_ms - self._capped_ms < CAP_EVERY_MS:
            self._capped_ms = now_ms
            dropped = enforce_cap(client, self._keys, self._settings.stream_max_entries)
            if dropped:
                self.counts["dropped_at_cap"] += dropped
                log.error(
                    "stream_full", dropped_entries=dropped,
                    hint="start `pkb aggregate`, or raise PKB_STREAM_MAX_ENTRIES",
                )  # fmt: skip

    def _execute(self, pipe: Pipe, keys: Sequence[str]) -> int:
        """Send a pipe whose writes go to these keys; returns how many Redis took.

        One that met a key of another type is counted and passed over; any other refusal is raised.
        """
        outcomes: list[Any] = []
        for reply in pipe.execute():
            outcomes += reply if isinstance(reply, list) else [reply]
        for outcome in outcomes:
            if isinstance(outcome, Exception) and "WRONGTYPE" not in str(outcome):
                raise outcome
        taken = 0
        writes = (each for each in outcomes if each not in (b"OK", b"QUEUED"))  # of MULTI
        for key, outcome in zip(keys, writes, strict=True):
            if isinstance(outcome, Exception):
                self.counts["refused_writes"] += 1
                if self._once.first(("refused", key)):
                    hint = f"look at it, then `DEL {key}`"
                    log.warning("write_refused", key=key, why=str(outcome)[:200], hint=hint)
            else:
                taken += 1
        return taken
