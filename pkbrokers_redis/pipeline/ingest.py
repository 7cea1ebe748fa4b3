"""Ingest: Kite's websockets → tick streams and quote hashes.

    reader threads   one a connection: frames into the inbox, nothing else
    writer (caller)  inbox → parse → XADD a frame and shard in one write; then a slice of quotes

Ticks that Redis did not acknowledge is sent again, in order, until it is: the frames' `seq` lets
the aggregator skip what had arrived. Nothing is acknowledged that is not in Redis.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.core.errors import PkbError, RedisUnavailable, SettingsError
from pkbrokers_redis.core.model import TickArray
from pkbrokers_redis.kite.socket import ZerodhaWebSocketClient
from pkbrokers_redis.kite.text_frames import Invalid, ServerError, TextEvent
from pkbrokers_redis.kite.urls import url_for
from pkbrokers_redis.kite.wire import parse_frame
from pkbrokers_redis.pipeline.quotes import QuoteBoard
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.pipe import Pipe
from pkbrokers_redis.store.ticks import enforce_cap, queue_ticks

log = logs.get("ingest")

TOKENS_PER_CONNECTION = 3_000  # Kite's limit
CONNECTIONS_PER_KEY = 3  # Kite's limit
FRAMES_MAX = 20_000  # in the inbox, ~1 min at the open; then the reader waits and TCP holds Kite back
BYTES_MAX = 512 * 1024 * 1024  # in the inbox, whichever comes first
FRAMES_A_ROUND = 64
IDLE_SECONDS = 0.2
QUOTES_PENDING_SECONDS = 0.005  # pause between slices while quotes wait and no frame comes
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 5.0
CAP_EVERY_MS = 1_000
EVIDENCE_BYTES = 64

# Replies that mean "not now", not "never": the batch is sent again.
_NOT_NOW = ("OOM", "LOADING", "MISCONF", "READONLY", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "BUSY")


class Inbox:
    """Frames between the reader threads and the writer; bounded in frames and in bytes."""

    def __init__(self, frames_max: int = FRAMES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._frames: deque[tuple[bytes, int]] = deque()
        self._frames_max = frames_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: bytes, at_ms: int) -> None:
        """Add a frame; wait while the inbox is full."""
        with self._changed:
            while not self._closed and (
                len(self._frames) >= self._frames_max or self._bytes + len(frame) > self._bytes_max
            ):
                self._changed.wait()
            self._frames.append((frame, at_ms))
            self._bytes += len(frame)
            if len(self._frames) == 1:
                self._changed.notify_all()

    def take(self, most: int, wait_seconds: float) -> list[tuple[bytes, int]]:
        """Up to `most` frames, oldest first; none after waiting in vain."""
        with self._changed:
            if not self._frames and not self._closed:
                self._changed.wait(wait_seconds)
            full = len(self._frames) >= self._frames_max or self._bytes * 2 > self._bytes_max
            taken = [self._frames.popleft() for _ in range(min(most, len(self._frames)))]
            self._bytes -= sum(len(frame) for frame, _ in taken)
            if full:
                self._changed.notify_all()
            return taken

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class TickWriter:
    """Frames → Redis. One `seq` a frame, one pipeline a round; sends again until Redis has it."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        symbols: Mapping[int, str],
        *,
        source: str | None = None,
    ) -> None:
        self._connect = connect
        self._client: redis.Redis | None = None
        self._keys = settings.keys
        self._settings = settings
        self.source = source or f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() // 1_000_000:x}"
        self.seq = 0
        self.quotes = QuoteBoard(self._keys, symbols)
        self.counts = dict.fromkeys(
            ("frames", "ticks", "entries", "quotes", "unknown_packets", "truncated_frames", "trailing_bytes",
             "resent_batches", "refused_writes", "dropped_at_cap"), 0
        )  # fmt: skip
        self._once = logs.Once()
        self._cap_at_ms = 0

    def take_frames(self, frames: Sequence[tuple[bytes, int]]) -> list[tuple[int, int, TickArray]]:
        """Parse frames into numbered batches; hostile bytes are counted and give what can be saved."""
        batches: list[tuple[int, int, TickArray]] = []
        for frame, at_ms in frames:
            parsed = parse_frame(frame, at_ms)
            self.counts["frames"] += 1
            if parsed.unknown or parsed.truncated or parsed.trailing:
                self._note_odd(frame, parsed.unknown, parsed.truncated, parsed.trailing)
            if not len(parsed.ticks):
                continue
            self.seq += 1
            self.counts["ticks"] += len(parsed.ticks)
            batches.append((self.seq, at_ms, parsed.ticks))
            self.quotes.note(frame, parsed, at_ms)
        return batches

    def write(
        self, batches: Sequence[tuple[int, int, TickArray]], now_ms: int, stop: threading.Event | None = None
    ) -> None:
        """Put batches and a slice of quotes into Redis; waits out a Redis that is away or full.

        Returns early only when `stop` is set and Redis does not answer; raises PkbError for a store
        that can never take them.
        """
        pause_seconds = PAUSE_SECONDS_MIN
        while True:
            try:
                if self._client is None:
                    self._client = self._connect()
                self._send(self._client, batches, now_ms)
                return
            except (redis.ConnectionError, redis.TimeoutError, RedisUnavailable, _NotNow) as error:
                if not isinstance(error, _NotNow):
                    self._client = None
                self.counts["resent_batches"] += 1
                log.warning("redis_away", why=str(error).splitlines()[0][:200], retry_seconds=pause_seconds)
                if (stop or threading.Event()).wait(pause_seconds):
                    return
                pause_seconds = min(pause_seconds * 2, PAUSE_SECONDS_MAX)

    def _send(self, client: redis.Redis, batches: Sequence[tuple[int, int, TickArray]], now_ms: int) -> None:
        pipe = Pipe(client)
        for seq, at_ms, ticks in batches:
            queue_ticks(pipe, self._keys, self.source, seq, at_ms, ticks)
        self.counts["entries"] += self._execute(pipe, "ticks")
        self.quotes.queue(pipe, now_ms)  # behind the ticks: a candle must not wait for quotes
        self.counts["quotes"] += self._execute(pipe, "quote")
        if now_ms >= self._cap_at_ms:
            self._cap_at_ms = now_ms + CAP_EVERY_MS
            dropped = enforce_cap(client, self._keys, self._settings.stream_max_entries)
            if dropped:
                self.counts["dropped_at_cap"] += dropped
                log.error(
                    "stream_full", dropped_entries=dropped,
                    mend="start `pkb aggregate`, or raise PKB_STREAM_MAX_ENTRIES",
                )  # fmt: skip

    def _execute(self, pipe: Pipe, what: str) -> int:
        """Send a pipe; returns how many of its commands Redis took."""
        replies = pipe.execute()
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        for error in refused:
            self._refused(error, what)
        return len(replies) - len(refused)

    def _refused(self, error: Exception, what: str) -> None:
        if not isinstance(error, ResponseError):
            raise error
        text = str(error)
        if text.startswith(_NOT_NOW):
            raise _NotNow(text)
        self.counts["refused_writes"] += 1
        if self._once.first((what, text[:40])):
            mend = "look at the key's TYPE, then DEL it"
            log.warning("write_refused", what=what, why=text[:200], mend=mend)

    def _note_odd(self, frame: bytes, unknown: int, truncated: bool, trailing: int) -> None:
        self.counts["unknown_packets"] += unknown
        self.counts["truncated_frames"] += truncated
        self.counts["trailing_bytes"] += trailing
        if self._once.first(("odd frame", bool(unknown), truncated, bool(trailing))):
            log.warning(
                "odd_frame", size_bytes=len(frame), unknown_packets=unknown, truncated=truncated,
                trailing_bytes=trailing, starts_with=frame[:EVIDENCE_BYTES].hex(),
            )  # fmt: skip


class _NotNow(PkbError):
    """Raised when Redis answered that it cannot take a write at the moment."""


class Ingest:
    """All connections of one api key, and their writer."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        instruments: Sequence[tuple[int, str]],
        *,
        now_ms: Callable[[], float],
        source: str | None = None,
    ) -> None:
        most = TOKENS_PER_CONNECTION * CONNECTIONS_PER_KEY
        if len(instruments) > most:
            keys = -(-len(instruments) // most)
            raise SettingsError(
                f"{len(instruments):,} instruments are more than one Kite api key may stream ({most:,})",
                f"name fewer in PKB_INSTRUMENTS, or use {keys} api keys, each with its own `pkb ingest`",
            )
        self._now_ms = now_ms
        self._once = logs.Once()
        self.inbox = Inbox()
        self.writer = TickWriter(connect, settings, dict(instruments), source=source)
        self.text_counts: dict[str, int] = {}
        tokens = [token for token, _ in instruments]
        self.sockets = [
            ZerodhaWebSocketClient(
                lambda: url_for(settings),
                tokens[first : first + TOKENS_PER_CONNECTION],
                settings.kite_mode,
                on_frame=self.inbox.put,
                on_text=self._take_text,
            )
            for first in range(0, max(len(tokens), 1), TOKENS_PER_CONNECTION)
        ]

    def run(self, stop: threading.Event, on_round: Callable[[], None] = lambda: None) -> None:
        """Receive and write until told to stop; then write what was received, and return."""
        failures: list[BaseException] = []

        def read(client: ZerodhaWebSocketClient) -> None:
            try:
                client.run(stop)
            except BaseException as error:
                failures.append(error)
                stop.set()

        readers = [threading.Thread(target=read, args=(each,), daemon=True) for each in self.sockets]
        for reader in readers:
            reader.start()
        while not stop.is_set():
            pending = len(self.writer.quotes) > 0
            frames = self.inbox.take(FRAMES_A_ROUND, QUOTES_PENDING_SECONDS if pending else IDLE_SECONDS)
            self.writer.write(self.writer.take_frames(frames), int(self._now_ms()), stop)
            on_round()
        self.inbox.close()
        for reader in readers:
            reader.join(2.0)
        while frames := self.inbox.take(FRAMES_A_ROUND, 0.0):
            self.writer.write(self.writer.take_frames(frames), int(self._now_ms()), stop)
        if failures:
            raise failures[0]

    def _take_text(self, event: TextEvent) -> None:
        kind = type(event).__name__
        self.text_counts[kind] = self.text_counts.get(kind, 0) + 1
        if isinstance(event, ServerError | Invalid) and self._once.first((kind, str(event)[:80])):
            log.warning("kite_says", kind=kind, text=str(event)[:200])


def figures_of(ingest: Ingest) -> dict[str, Any]:
    """The counters of a running ingest, for its heartbeat."""
    totals: dict[str, Any] = dict(ingest.writer.counts)
    for each in ingest.sockets:
        for name, value in each.stats.as_dict().items():
            totals[f"socket_{name}"] = totals.get(f"socket_{name}", 0) + value
    totals["connected"] = sum(each.state == "connected" for each in ingest.sockets)
    totals["inbox_frames"] = len(ingest.inbox)
    return totals
