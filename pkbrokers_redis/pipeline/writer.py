"""The writer: numbered frames → tick streams and quote hashes, each exactly once in the end.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np
import redis
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.core.errors import RedisUnavailable
from pkbrokers_redis.core.model import TOKEN, TickArray
from pkbrokers_redis.kite.wire import ParsedFrame, parse_frame
from pkbrokers_redis.pipeline.gate import Gate
from pkbrokers_redis.pipeline.quotes import QuoteBoard
from pkbrokers_redis.pipeline.resend import Batch, Kept, missing
from pkbrokers_redis.pipeline.spool import Frame
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import describe, explain
from pkbrokers_redis.store.pipe import Pipe
from pkbrokers_redis.store.replies import is_not_now
from pkbrokers_redis.store.ticks import enforce_cap, queue_frames

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
                "redis_went_back_far", mend="some ticks it had acknowledged may be lost; see its replication"
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
                    mend="start `pkb aggregate`, or raise PKB_STREAM_MAX_ENTRIES",
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
                    mend = f"look at it, then `DEL {key}`"
                    log.warning("write_refused", key=key, why=str(outcome)[:200], mend=mend)
            else:
                taken += 1
        return taken
