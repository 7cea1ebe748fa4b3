"""Ingest: Kite's websockets → tick streams and quote hashes.

    reader threads   one per connection: frames into the inbox, and when its feed was heard
    writer (caller)  inbox → parse → one XADD per frame and shard, in one write; then a slice of quotes

A frame stays in the inbox, in memory or on disk, until Redis has it. What a process that died could not
send is sent by the next one, before its own.

An ingest worker put together from settings: its session, its list, its queue of jobs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.ingest.buffer import Inbox
from pkbrokers_redis.ingest.connections import STOP_SECONDS_MAX, FeedSession, Readers
from pkbrokers_redis.ingest.feeds import (
    Feed,
    FeedLeases,
    Instruments,
    InstrumentSource,
    Roster,
    feed_figures,
    sessions_of,
)
from pkbrokers_redis.ingest.job_outbox import WantedJobs
from pkbrokers_redis.ingest.liveness import Outage
from pkbrokers_redis.ingest.outages import Outages
from pkbrokers_redis.ingest.spool import Spool
from pkbrokers_redis.ingest.watchdog import FeedMonitor, TickActivity
from pkbrokers_redis.ingest.writer import FrameWriter
from pkbrokers_redis.kite.quotes import INTERVAL_MS
from pkbrokers_redis.runtime.heartbeat import Heartbeat
from pkbrokers_redis.runtime.roles import RestartWatch, now_ms, open_store, worker_id
from pkbrokers_redis.runtime.warmup import settle_heap, warm_up_writer
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.instrument_list import instrument_list, list_version
from pkbrokers_redis.store.instruments import load_derivative_tokens
from pkbrokers_redis.store.queue import open_queue

__all__ = ["FrameWriter", "Inbox", "Ingest", "figures_of", "forward", "open_inbox", "pump", "run_ingest"]

log = logs.get("ingest")

FRAMES_A_ROUND = 64
IDLE_SECONDS = 0.2
QUOTES_PENDING_SECONDS = 0.005  # pause between slices while quotes wait and no frame comes
SAVE_SECONDS = 3.0  # of trying, once told to stop; then what is left is on disk, whatever Redis does
DRAIN_SECONDS_MAX = 5.0  # of sending what is left, once told to stop; the rest waits on disk


def wall_ms() -> float:
    """The machine's clock, epoch ms: for writing, whatever the market's time is."""
    return time.time() * 1000


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
    inbox: Inbox, writer: FrameWriter, now_ms: Callable[[], float], stop: threading.Event, wait_seconds: float
) -> int | None:
    """One round: inbox → Redis. Returns the frames; None when told to stop and Redis does not take them."""
    frames = inbox.peek(FRAMES_A_ROUND, wait_seconds)
    if not writer.write(writer.parse(frames), int(now_ms()), stop):
        return None
    inbox.acknowledge(frames)
    return len(frames)


def pump(
    inbox: Inbox,
    writer: FrameWriter,
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
    """One worker: it reads its share of the feeds (`assign.py`), and writes what they bring.

    Beside the readers and the writer: the leases' thread, which also follows the instrument list
    (`roster.py`); the feed monitor, which asks the feed doctor; outages (`outages.py`) and the jobs they ask
    for.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        settings: Settings,
        instruments: Instruments,
        *,
        now_ms: Callable[[], float],
        source: str | None = None,
        worker_id: str | None = None,
        connect_leases: Callable[[], redis.Redis] | None = None,
        list_source: InstrumentSource | None = None,
        sessions: Sequence[FeedSession] | None = None,
        jobs: WantedJobs | None = None,
    ) -> None:
        """`now_ms` is market time: it stamps frames. `connect_leases`: a client that gives up sooner than the
        writer's. `list_source`: where the list comes from while we run; none: it stays. `sessions`: one an
        api key. `jobs`: who has gaps repaired; none: they are only marked."""
        connect_leases = connect_leases or connect
        self._now_ms = now_ms
        self._keys = settings.keys
        self._failures: list[BaseException] = []
        self._stop = threading.Event()
        self.sessions = sessions or [FeedSession(each, connect_leases) for each in sessions_of(settings)]
        self.roster = Roster(settings.keys, instruments, len(self.sessions), list_source)
        self._calendar = load_sessions(settings.sessions, settings.timezone, settings.calendar)
        self._with_derivatives: frozenset[int] = frozenset()
        self._named = self.roster.symbols  # the names that the writer knows
        self._applied: list[Feed] = []  # the feeds that everything here knows of
        self.activity = TickActivity(self._schedule_of)
        self.activity.follow(self.roster.feeds)
        self.writer = FrameWriter(
            connect,
            settings,
            self.roster.symbols,
            source=source,
            only_known=True,
            on_ticks=self.activity.note,
        )
        self.inbox = open_inbox(settings, self.writer.source)
        self.readers = Readers(
            self.sessions, settings.kite_mode, now_ms=now_ms, on_frame=self.inbox.put, on_failure=self._fail
        )
        self.jobs = jobs
        self.outages = Outages(
            connect_leases,
            settings.keys,
            self._calendar,
            self._schedule_of,
            now_ms=now_ms,
            readings=self.readers.all,
            feeds=lambda: len(self.roster.feeds),
            unsent_ms=lambda: self.inbox.oldest_ms,
            jobs=jobs,
        )
        # Whose instruments a damaged spool held is not known: it may be another process's.
        self.inbox.on_loss = lambda from_ms, to_ms: self.outages.add(
            "spool damaged",
            tuple(token for feed in self.roster.feeds for token in feed.tokens),
            Outage(from_ms, to_ms),
        )
        self.monitor = FeedMonitor(
            self._calendar,
            self.activity,
            now_ms=now_ms,
            speed=float(getattr(now_ms, "speed", 1.0)),
            readings=self.readers.all,
            on_silence_over=lambda tokens, outage: self.outages.add("silent", tokens, outage),
        )
        self.leases = FeedLeases(
            connect_leases,
            settings.keys,
            worker_id or self.writer.source,
            settings.lease_seconds,
            count=self._count_feeds,
            now_ms=wall_ms,
            on_take=self._take,
            on_drop=self._drop,
        )

    @property
    def feeds(self) -> list[Feed]:
        """All feeds, whoever reads them."""
        return self.roster.feeds

    def _schedule_of(self, token: int) -> int:
        return self._calendar.schedule_of(token, token in self._with_derivatives)

    # -- in the leases' thread -------------------------------------------------------------------

    def _count_feeds(self, client: redis.Redis, others: Collection[str]) -> int:
        """Bring list and feeds up to date, and what hangs on them; how many feeds there are."""
        self.roster.look(client, others)
        if self.roster.added:  # before anybody subscribes to them: their quotes say when they were seen last
            self.outages.join(client, self.roster.added)
            self.roster.added = frozenset()
        if self.roster.symbols is not self._named:  # also the same instruments, by a newer master's names
            self._named = self.roster.symbols
            self.writer.add_symbols(self._named)
        feeds = self.roster.feeds
        if feeds is not self._applied:
            self._with_derivatives = frozenset(load_derivative_tokens(client, self._keys))
            self.activity.follow(feeds)
            streamed = {token: str(token) for feed in feeds for token in feed.tokens}
            self.writer.add_symbols(streamed | self.roster.symbols)
            ours = [feed for feed in feeds if feed.number in self.leases.held]
            known = {token for feed in self._applied for token in feed.tokens}
            self.outages.welcome(client, {token for feed in ours for token in feed.tokens} - known)
            for feed in ours:
                self.readers.change(feed)
            self._applied = feeds
        return len(feeds)

    def _take(self, client: redis.Redis, number: int) -> None:
        feed = self.roster.feeds[number]
        self.readers.read(feed, self.outages.open_feed(client, feed))

    def _drop(self, client: redis.Redis | None, numbers: Collection[int]) -> None:
        readings = self.readers.drop(numbers)
        if client is None:
            return
        try:
            for reading in readings:
                self.outages.close_feed(client, reading)
        except redis.RedisError:
            pass  # P:feed_progress is older then, and the outage that the next reader tells longer

    def run(self, stop: threading.Event, on_round: Callable[[], None] = lambda: None) -> None:
        """Receive and write until told to stop; then write what was received, or leave it on disk."""
        self._stop = stop
        finished = threading.Event()
        beside: list[tuple[str, Callable[[threading.Event], None]]] = [
            ("feeds", self.leases.run), ("doctor", self.monitor.run), ("outages", self.outages.run)
        ]  # fmt: skip
        if self.jobs is not None:
            beside.append(("jobs", self.jobs.run))
        threads = [
            threading.Thread(target=self._guarded, args=(each,), name=name, daemon=True)
            for name, each in beside
        ]
        threads.append(threading.Thread(target=self._save, args=(finished,), name="save", daemon=True))
        for thread in threads:
            thread.start()
        try:
            try:
                healthy = pump(self.inbox, self.writer, wall_ms, stop, on_round)
            finally:
                stop.set()
                self.inbox.close()
                threads[0].join(STOP_SECONDS_MAX)
            deadline = time.monotonic() + DRAIN_SECONDS_MAX
            while healthy and time.monotonic() < deadline:
                healthy = bool(forward(self.inbox, self.writer, wall_ms, stop, 0.0))
            self._write_last_quotes(deadline)
        finally:
            if waiting := self.inbox.finish():
                log.warning(
                    "left_on_disk", size_bytes=waiting, why="Redis did not take it",
                    hint="the next `pkb ingest` with this PKB_SPOOL_DIR sends it",
                )  # fmt: skip
            finished.set()
        if self._failures:
            raise self._failures[0]

    def _write_last_quotes(self, deadline: float) -> None:
        """The newest packet of each instrument may still wait for its half second."""
        while len(self.writer.quotes) and time.monotonic() < deadline:
            if not self.writer.write([], int(wall_ms()) + INTERVAL_MS, self._stop):
                return

    def _save(self, finished: threading.Event) -> None:
        """Told to stop while the writer waits for Redis: a SIGKILL may follow, so put all on disk."""
        self._stop.wait()
        if not finished.wait(SAVE_SECONDS):
            self.inbox.save()

    def _guarded(self, run: Callable[[threading.Event], None]) -> None:
        try:
            run(self._stop)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """From a thread of ours: `run` must end with it."""
        self._failures.append(error)
        self._stop.set()


def figures_of(ingest: Ingest) -> dict[str, Any]:
    """The counters of a running ingest, for its heartbeat."""
    return {
        **ingest.writer.counts,
        **ingest.readers.figures(),
        **feed_figures(ingest.feeds, ingest.leases.held),
        "list": ingest.roster.own_id,
        **ingest.inbox.figures(),
        **ingest.monitor.figures(),
        **ingest.outages.counts,
        **(ingest.jobs.counts if ingest.jobs is not None else {}),
    }


WRITER_SECONDS_MAX = 5.0  # what ingest waits for an answer of Redis before it keeps frames itself


class WatchedList:
    """PKB_INSTRUMENTS with the live changes of `P:watch` and the master (`store/instrument_list.py`)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def version(self, client: redis.Redis) -> str:
        """Another one whenever `read` may say something else."""
        return list_version(client, self._settings)

    def read(self, client: redis.Redis) -> list[tuple[int, str]]:
        """`(token, symbol)` of each instrument. Raises UnknownSymbol, InputFileError."""
        return instrument_list(client, self._settings)


def make_ingest(settings: Settings, client: redis.Redis, worker_id: str, stop: threading.Event) -> Ingest:
    """A worker that is ready to `run`. Logs in where that is needed. Raises PkbError for what a person must
    mend: no session, no instruments, too many of them."""

    def connect_beside() -> redis.Redis:
        return connect(settings, socket_timeout_seconds=max(settings.lease_seconds, 1.0))

    instruments = instrument_list(client, settings)
    if not instruments:
        raise SettingsError(
            "there is nothing to stream", "set PKB_INSTRUMENTS, e.g. NSE:INFY,NSE:TCS, or a file of tokens"
        )
    sessions = [FeedSession(each, connect_beside) for each in sessions_of(settings)]
    for session in sessions:
        session.open(stop)
    # History is asked with the session: a local feed that needs none has none to ask.
    has_history = any(session.session is not None for session in sessions)
    jobs = WantedJobs(connect_beside, lambda: open_queue(settings), settings.keys) if has_history else None
    return Ingest(
        lambda: connect(settings, socket_timeout_seconds=WRITER_SECONDS_MAX),  # hung is as good as away
        settings,
        instruments,
        now_ms=market_clock(settings),
        worker_id=worker_id,
        connect_leases=connect_beside,
        list_source=WatchedList(settings),
        sessions=sessions,
        jobs=jobs,
    )


def run_ingest(settings: Settings, stop: threading.Event, *, restartable: bool = True) -> None:
    """Stream PKB_INSTRUMENTS from Kite into Redis until `stop` is set.

    Args:
        settings: The worker's settings.
        stop: Ends the worker when it is set.
        restartable: Whether an operator's request for a restart ends the worker.

    Raises:
        RestartRequested: An operator requested a restart; the worker has stopped cleanly.
        PkbError: There is no Kite session, an instrument is unknown, or Redis is unavailable at the start.
    """
    client = open_store(settings)
    name = worker_id("ingest")
    restart = RestartWatch(client, settings.keys, "ingest")
    worker = make_ingest(settings, client, name, stop)
    warm_up_writer()
    heart = Heartbeat(settings.keys, "ingest", name, now_ms())

    def beat() -> None:
        if heart.due(at := now_ms()):
            heart.beat(client, at, worker.writer.counts["ticks"], figures_of(worker))
            if worker.writer.counts["ticks"]:  # every kernel has run by now
                settle_heap()
            if restartable:
                restart.check(stop)

    log.info(
        "started", store=describe(settings), kite=worker.sessions[0].address, feeds=len(worker.feeds),
        instruments=len(worker.roster.symbols), api_keys=len(worker.sessions),
        repairs=worker.jobs is not None,
    )  # fmt: skip
    try:
        worker.run(stop, beat)
    finally:
        heart.end(client)
    log.info("stopped", **figures_of(worker))
    restart.raise_if_requested()
