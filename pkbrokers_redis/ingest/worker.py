"""The ingest worker: Kite's websockets → tick streams and quote hashes.

A frame stays in the frame buffer, in memory or on disk, until Redis has it. What a process that died could
not send is sent by the next one, before its own frames.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.clock import ExchangeClock, market_clock
from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.ingest.buffer import FrameBuffer
from pkbrokers_redis.ingest.connections import STOP_SECONDS_MAX, Connections, FeedSession
from pkbrokers_redis.ingest.feeds import (
    Feed,
    FeedAssignments,
    FeedLeases,
    Instruments,
    InstrumentSource,
    feed_figures,
    sessions_of,
)
from pkbrokers_redis.ingest.market_watch import MarketWatch
from pkbrokers_redis.ingest.outages import JobOutbox, Outages
from pkbrokers_redis.ingest.watchdog import TickActivity, Watchdog
from pkbrokers_redis.ingest.writer import FrameWriter, forward, forward_all
from pkbrokers_redis.kite.instruments import KiteInstruments
from pkbrokers_redis.runtime.cluster_state import Heartbeat
from pkbrokers_redis.runtime.roles import RestartWatch, keep_store, open_store, worker_id
from pkbrokers_redis.runtime.roles import now_ms as machine_ms
from pkbrokers_redis.runtime.warmup import freeze_heap, warm_up_writer
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.instruments import read_hours
from pkbrokers_redis.store.queue import open_queue
from pkbrokers_redis.store.symbols import list_version, read_instrument_list
from pkbrokers_redis.store.tick_writer import QUOTE_INTERVAL_MS

log = logs.get("ingest")

HEARTBEAT_SECONDS = 0.5
DRAIN_SECONDS_MAX = 5.0  # of sending what is left after a stop; the rest waits on disk
WRITER_SECONDS_MAX = 5.0  # for a reply of Redis; then frames are kept


class Ingest:
    """One worker: it reads its share of the feeds and writes what they bring.

    thread       runs                                            waits for
    feed-<n>     a socket of `connections`: frames → `buffer`    the socket; a full buffer (its bounds)
    the caller   `buffer` → `writer` → Redis                     frames; Redis
    spool        `buffer.run`: memory → disk                     the disk
    feeds        `leases.run`, which calls `update_feeds`, `open_feed`, `close_feeds`    Redis
    watchdog     `watchdog.run`: judge feeds, resubscribe or reconnect                   nothing
    outages      `outages.run`: notices and progress             Redis
    market       `market.run`: hours, clock, previous closes     Redis
    jobs         `jobs.run`: outbox → RQ                         RQ's Redis
    heartbeat    what the caller of `run` gives                  Redis
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
        jobs: JobOutbox | None = None,
    ) -> None:
        """Put the parts together; nothing runs yet.

        `now_ms` is market time, which stamps frames; `connect_leases` returns a client that gives up sooner
        than the writer's. Without `list_source` the list stays, without `jobs` outages are only marked.
        """
        connect_leases = connect_leases or connect
        self.clock = now_ms = ExchangeClock(now_ms)
        keys = settings.keys
        self._keys = keys
        self._calendar = load_sessions(settings.sessions, settings.timezone, settings.calendar)
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self.sessions = sessions or [FeedSession(each, connect_leases) for each in sessions_of(settings)]
        self.assignments = FeedAssignments(keys, instruments, len(self.sessions), list_source)
        self._known_symbols = self.assignments.symbols  # the names that the writer knows
        self._known_feeds: list[Feed] = []  # the feeds that all parts know
        self.activity = TickActivity(self._calendar.schedule_of)
        self.activity.follow(self.feeds)
        self.writer = FrameWriter(
            connect, settings, self._known_symbols, source=source, only_known=True, activity=self.activity
        )
        self.buffer = FrameBuffer.open(settings, self.writer.source)
        self.connections = Connections(
            self.sessions, settings.kite_mode, self.buffer, now_ms=now_ms, on_failure=self._fail
        )
        self.jobs = jobs
        self.outages = Outages(
            connect_leases, keys, self._calendar, self.connections, self.buffer, jobs, now_ms=now_ms
        )
        self.outages.feeds = self.feeds
        self.watchdog = Watchdog(
            self._calendar, self.activity, self.connections, self.outages, now_ms=now_ms, speed=now_ms.speed
        )
        self.market = MarketWatch(
            self._calendar, self.writer.quotes.newest, self.outages, self.clock,
            connect_leases, keys, on_calendar=lambda: self.activity.follow(self.feeds),
        )  # fmt: skip
        self.market.symbols = self._known_symbols
        name = worker_id or self.writer.source
        self.leases = FeedLeases(connect_leases, keys, name, settings.lease_seconds, self)

    @property
    def feeds(self) -> list[Feed]:
        """All feeds, whichever workers read them."""
        return self.assignments.feeds

    # -- the leases' thread ------------------------------------------------------------------------------

    def update_feeds(self, client: redis.Redis, other_workers: Collection[str]) -> int:
        """Bring the list, the feeds and all parts up to date; return how many feeds there are."""
        self.assignments.update(client, other_workers)
        if self.assignments.added:  # before any worker subscribes: their quotes show when they were seen last
            self.outages.note_added(client, self.assignments.added)
            self.assignments.added = frozenset()
        if self.assignments.symbols is not self._known_symbols:  # maybe only a newer master's names
            self._known_symbols = self.market.symbols = self.assignments.symbols
            self.writer.add_symbols(self._known_symbols)
            if read_hours(client, self._keys, self._calendar):
                self.activity.follow(self.feeds)
        feeds = self.feeds
        if feeds is not self._known_feeds:
            read_hours(client, self._keys, self._calendar)
            self.activity.follow(feeds)
            self.outages.feeds = feeds
            streamed = {token: str(token) for feed in feeds for token in feed.tokens}
            self.writer.add_symbols(streamed | self.assignments.symbols)
            held = [feed for feed in feeds if feed.number in self.leases.held]
            known = {token for feed in self._known_feeds for token in feed.tokens}
            self.outages.note_subscribed(client, {token for feed in held for token in feed.tokens} - known)
            for feed in held:
                self.connections.change(feed)
            self._known_feeds = feeds
        return len(feeds)

    def open_feed(self, client: redis.Redis, number: int) -> None:
        """Start to read a feed."""
        feed = self.feeds[number]
        self.connections.open(feed, self.outages.open_feed(client, feed))

    def close_feeds(self, client: redis.Redis | None, numbers: Collection[int]) -> None:
        """Stop to read feeds; without a client another worker reads them already."""
        closed = self.connections.close(numbers)
        if client is None:
            return
        try:
            for connection in closed:
                self.outages.close_feed(client, connection)
        except redis.RedisError:
            pass  # the feed's progress is older then, and the next reader reports a longer outage

    # -- the whole ---------------------------------------------------------------------------------------

    def run(self, stop: threading.Event, heartbeat: Callable[[], None] = lambda: None) -> None:
        """Receive and write until `stop` is set; then write what was received, or leave it on disk.

        A failure in any thread sets `stop` and is raised here. `heartbeat` is called twice a second.
        """
        self._stop = stop
        threads = [
            self._start("feeds", self.leases.run),
            self._start("spool", self.buffer.run),
            self._start("watchdog", self.watchdog.run),
            self._start("outages", self.outages.run),
            self._start("market", self.market.run),
            self._start("heartbeat", lambda stop: _repeat(heartbeat, stop)),
        ]
        if self.jobs is not None:
            self._start("jobs", self.jobs.run)
        try:
            try:
                healthy = forward_all(self.buffer, self.writer, stop)
            finally:
                stop.set()
                self.buffer.close()
                threads[0].join(STOP_SECONDS_MAX)  # closes the sockets
                threads[-1].join(STOP_SECONDS_MAX)
            deadline = time.monotonic() + DRAIN_SECONDS_MAX
            while healthy and time.monotonic() < deadline:
                healthy = bool(forward(self.buffer, self.writer, stop, 0.0))
            self._write_last_quotes(deadline)
        finally:
            if size_bytes := self.buffer.finish():
                log.warning(
                    "frames_left_on_disk", size_bytes=size_bytes, reason="Redis did not take them",
                    hint="the next `pkb ingest` with this PKB_SPOOL_DIR sends them",
                )  # fmt: skip
        if self._failures:
            raise self._failures[0]

    def _start(self, name: str, run: Callable[[threading.Event], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                run(self._stop)
            except BaseException as error:
                self._fail(error)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _fail(self, error: BaseException) -> None:
        """Let `run` end with an error of one of its threads."""
        self._failures.append(error)
        self._stop.set()

    def _write_last_quotes(self, deadline: float) -> None:
        """Write the newest packets, which may still wait for their half second."""
        while len(self.writer.quotes) and time.monotonic() < deadline:
            if not self.writer.write([], int(machine_ms()) + QUOTE_INTERVAL_MS, self._stop):
                return

    def figures(self) -> dict[str, Any]:
        """Return the worker's counters for its heartbeat."""
        halted = self.watchdog.halted()
        return {
            **self.writer.counts,
            **self.connections.figures(),
            **feed_figures(self.feeds, self.leases.held),
            "list": self.assignments.own_id,
            "unknown_instruments": ",".join(self.assignments.unknown),
            **self.buffer.figures(),
            **self.watchdog.figures(),
            "halted": len(halted),
            "halted_names": ",".join(self._known_symbols.get(token, str(token)) for token in halted[:5]),
            **self.outages.counts,
            **self.market.figures(),
            **(self.jobs.counts if self.jobs is not None else {}),
        }


def _repeat(work: Callable[[], None], stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        work()


class WatchedList:
    """PKB_INSTRUMENTS with the live changes of `P:watch` and the master (`store/symbols.py`)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.unknown: tuple[str, ...] = ()  # names that the master lacks

    def version(self, client: redis.Redis) -> str:
        """Return a text that differs whenever `read` may return another list."""
        return list_version(client, self._settings)

    def read(self, client: redis.Redis) -> list[tuple[int, str]]:
        """Return `(token, symbol)` of each instrument; the rest is in `unknown`.

        Raises UnknownSymbol when no name is known, InputFileError.
        """
        instruments, unknown = read_instrument_list(client, self._settings)
        self.unknown = tuple(unknown)
        if unknown and not instruments:
            raise next(iter(unknown.values()))
        return instruments


def _first_list(settings: Settings, client: redis.Redis, watched: WatchedList) -> list[tuple[int, str]]:
    """Return the instruments to stream; fetch the instrument master before, where it is empty.

    That needs Kite: without credentials the error says what is missing.
    """
    has_account = settings.kite_api_key is not None or settings.kite_user_id is not None
    if has_account and not client.exists(settings.keys.symbols()):
        with contextlib.suppress(PkbError):
            instruments = watched.read(client)
            if not watched.unknown:
                return instruments
        log.info("master_missing", reason="it was never fetched", action="fetch it from Kite")
        clock = market_clock(settings)
        try:
            KiteInstruments(settings=settings, client=client, now=lambda: clock() / 1000).sync()
        except PkbError as error:
            log.warning("master_not_fetched", reason=error.message, hint=error.hint)
    return watched.read(client)


def make_ingest(settings: Settings, client: redis.Redis, worker_id: str, stop: threading.Event) -> Ingest:
    """Return a worker that is ready to `run`; log in where that is needed.

    Raises:
        PkbError: a person must act: there is no session, no instrument, or too many of them.
    """

    def connect_leases() -> redis.Redis:
        return connect(settings, socket_timeout_seconds=max(settings.lease_seconds, 1.0))

    watched = WatchedList(settings)
    instruments = _first_list(settings, client, watched)
    if not instruments:
        raise SettingsError(
            "there is nothing to stream", "set PKB_INSTRUMENTS, e.g. NSE:INFY,NSE:TCS, or a file of tokens"
        )
    sessions = [FeedSession(each, connect_leases) for each in sessions_of(settings)]
    for session in sessions:
        session.open(stop)
    # Kite's history needs a session: a local feed without one has no history to ask.
    has_history = any(session.session is not None for session in sessions)
    jobs = JobOutbox(connect_leases, lambda: open_queue(settings), settings.keys) if has_history else None
    return Ingest(
        lambda: connect(settings, socket_timeout_seconds=WRITER_SECONDS_MAX),  # hung counts as unavailable
        settings,
        instruments,
        now_ms=market_clock(settings),
        worker_id=worker_id,
        connect_leases=connect_leases,
        list_source=watched,
        sessions=sessions,
        jobs=jobs,
    )


def run_ingest(settings: Settings, stop: threading.Event, *, restartable: bool = True) -> None:
    """Stream PKB_INSTRUMENTS from Kite into Redis until `stop` is set.

    Raises RestartRequested when an operator requested one of a `restartable` worker, and PkbError where there
    is no Kite session, an instrument is unknown, or Redis is unavailable at the start.
    """
    client = open_store(settings)
    name = worker_id("ingest")
    restart = RestartWatch(client, settings.keys, "ingest")
    worker = make_ingest(settings, client, name, stop)
    warm_up_writer()
    heart = Heartbeat(settings.keys, "ingest", name, machine_ms())

    def beat() -> None:
        if heart.due(at := machine_ms()):
            keep_store(client, settings)
            heart.beat(client, at, worker.writer.counts["ticks"], worker.figures())
            if worker.writer.counts["ticks"]:  # every kernel has run by now
                freeze_heap()
            if restartable:
                restart.check(stop)

    log.info(
        "started", store=describe(settings), kite=worker.sessions[0].address, feeds=len(worker.feeds),
        instruments=len(worker.assignments.symbols), api_keys=len(worker.sessions),
        repairs=worker.jobs is not None,
    )  # fmt: skip
    try:
        worker.run(stop, beat)
    finally:
        heart.end(client)
    log.info("stopped", **worker.figures())
    restart.raise_if_requested()
