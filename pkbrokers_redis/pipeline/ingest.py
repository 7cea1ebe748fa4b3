"""Ingest: Kite's websockets → tick streams and quote hashes.

    reader threads   one a connection: frames into the inbox, nothing else
    writer (caller)  inbox → parse → XADD a frame and shard in one write; then a slice of quotes

A frame stays in the inbox, in memory or on disk, until Redis has it. What a process that died could not
send is sent by the next one, before its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.pipeline.assign import FeedLeases, cut_feeds, feed_figures, list_id, sessions_of
from pkbrokers_redis.pipeline.inbox import Inbox
from pkbrokers_redis.pipeline.quotes import EVERY_MS
from pkbrokers_redis.pipeline.readers import STOP_SECONDS_MAX, Readers
from pkbrokers_redis.pipeline.spool import Spool
from pkbrokers_redis.pipeline.writer import TickWriter
from pkbrokers_redis.settings import Settings

__all__ = ["Inbox", "Ingest", "TickWriter", "figures_of", "forward", "open_inbox", "pump"]

log = logs.get("ingest")

FRAMES_A_ROUND = 64
IDLE_SECONDS = 0.2
QUOTES_PENDING_SECONDS = 0.005  # pause between slices while quotes wait and no frame comes
SAVE_SECONDS = 3.0  # of trying, once told to stop; then what is left is on disk, whatever Redis does
DRAIN_SECONDS_MAX = 5.0  # of sending what is left, once told to stop; the rest waits on disk


def open_inbox(settings: Settings, source: str) -> Inbox:
    """The inbox of a source, with its spool, and with what dead processes left in theirs."""
    root = settings.spool_dir or settings.data_dir / "spool"
    inbox = Inbox(
        source,
        Spool(root, source),
        spool_bytes_max=settings.spool_max_bytes,
        bytes_max=settings.buffer_max_bytes,
    )
    inherited = Spool.of_the_dead(root)
    if size := sum(spool.size_bytes for spool in inherited):
        log.warning("spool_found", folder=str(root), size_bytes=size)
    inbox.inherit(inherited)
    return inbox


def forward(
    inbox: Inbox, writer: TickWriter, now_ms: Callable[[], float], stop: threading.Event, wait_seconds: float
) -> int | None:
    """One round: inbox → Redis. Returns the frames; None when told to stop and Redis does not take them."""
    frames = inbox.peek(FRAMES_A_ROUND, wait_seconds)
    if not writer.write(writer.parse(frames), int(now_ms()), stop):
        return None
    inbox.acknowledge(frames)
    return len(frames)


def pump(
    inbox: Inbox,
    writer: TickWriter,
    now_ms: Callable[[], float],
    stop: threading.Event,
    on_round: Callable[[], None] = lambda: None,
) -> bool:
    """`forward` until told to stop. Returns whether Redis took the last round."""
    taken: int | None = 0
    while not stop.is_set():
        wait_seconds = QUOTES_PENDING_SECONDS if len(writer.quotes) else IDLE_SECONDS
        taken = forward(inbox, writer, now_ms, stop, wait_seconds)
        on_round()
    return taken is not None


class Ingest:
    """One worker: it reads its share of the feeds (`assign.py`), and writes what they bring."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        instruments: Sequence[tuple[int, str]],
        *,
        now_ms: Callable[[], float],
        source: str | None = None,
        worker_id: str | None = None,
        connect_leases: Callable[[], redis.Redis] | None = None,
    ) -> None:
        """`connect_leases`: a client that gives up sooner than the writer's, for the leases' thread."""
        self._now_ms = now_ms
        self._failures: list[BaseException] = []
        self._stop = threading.Event()
        self.writer = TickWriter(connect, settings, dict(instruments), source=source, only_known=True)
        self.inbox = open_inbox(settings, self.writer.source)
        sessions = sessions_of(settings)
        tokens = [token for token, _ in instruments]
        self.feeds = cut_feeds(tokens, len(sessions))
        self.list_id = list_id(tokens)
        self.readers = Readers(self.feeds, sessions, on_frame=self.inbox.put, on_failure=self._fail)
        self.leases = FeedLeases(
            connect_leases or connect,
            settings.keys,
            worker_id or self.writer.source,
            len(self.feeds),
            settings.lease_seconds,
            now_ms=now_ms,
            on_take=self.readers.read,
            on_drop=self.readers.drop,
        )

    def run(self, stop: threading.Event, on_round: Callable[[], None] = lambda: None) -> None:
        """Receive and write until told to stop; then write what was received, or leave it on disk."""
        self._stop = stop
        finished = threading.Event()
        threads = [
            threading.Thread(target=self._assign, name="feeds", daemon=True),
            threading.Thread(target=self._save, args=(finished,), name="save", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            try:
                healthy = pump(self.inbox, self.writer, self._now_ms, stop, on_round)
            finally:
                stop.set()
                self.inbox.close()
                threads[0].join(STOP_SECONDS_MAX)
            deadline = time.monotonic() + DRAIN_SECONDS_MAX
            while healthy and time.monotonic() < deadline:
                healthy = bool(forward(self.inbox, self.writer, self._now_ms, stop, 0.0))
            self._write_last_quotes(deadline)
        finally:
            if waiting := self.inbox.finish():
                log.warning(
                    "left_on_disk", size_bytes=waiting, why="Redis did not take it",
                    mend="the next `pkb ingest` with this PKB_SPOOL_DIR sends it",
                )  # fmt: skip
            finished.set()
        if self._failures:
            raise self._failures[0]

    def _write_last_quotes(self, deadline: float) -> None:
        """The newest packet of each instrument may still wait for its half second."""
        while len(self.writer.quotes) and time.monotonic() < deadline:
            if not self.writer.write([], int(self._now_ms()) + EVERY_MS, self._stop):
                return

    def _save(self, finished: threading.Event) -> None:
        """Told to stop while the writer waits for Redis: a SIGKILL may follow, so put all on disk."""
        self._stop.wait()
        if not finished.wait(SAVE_SECONDS):
            self.inbox.save()

    def _assign(self) -> None:
        try:
            self.leases.run(self._stop)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """From a thread of ours: `run` shall end with it."""
        self._failures.append(error)
        self._stop.set()


def figures_of(ingest: Ingest) -> dict[str, Any]:
    """The counters of a running ingest, for its heartbeat."""
    return {
        **ingest.writer.counts,
        **ingest.readers.figures(),
        **feed_figures(ingest.feeds, ingest.leases.held),
        "list": ingest.list_id,
        **ingest.inbox.figures(),
    }
