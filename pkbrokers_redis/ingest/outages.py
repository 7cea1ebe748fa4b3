"""Report outages to the aggregators, ask for their repair, and remember them beyond the life of a process.

    P:{S}:repairs     a notice for each outage that is over (`store.repairs`)
    P:job_outbox      its backfill, and the warm start of instruments never seen; a thread moves them into RQ
    P:feed_progress   feed → until when its frames are in Redis, written four times a second;
                      clock:<host> → how far that host's clock is ahead of the exchange's, where it is wrong

The order makes it safe: first the notice, then its job, then the progress. If the process dies in between,
the next reader of the feed reports a longer outage, which marks nothing twice. RQ may live on another Redis
and be unavailable for hours: neither ticks nor notices wait for it. A job's id is made of name and arguments,
so sending it twice runs it once.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import redis
from redis.exceptions import ResponseError
from rq import Queue

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import MARKET_TIMEZONE, TIME_MS_MAX, Sessions
from pkbrokers_redis.clock import Backoff
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.ingest.buffer import FrameBuffer
from pkbrokers_redis.ingest.connections import Connections, FeedConnection, FeedLiveness, Outage
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.errors import is_wrong_type
from pkbrokers_redis.store.queue import JOBS, enqueue, job_id
from pkbrokers_redis.store.repairs import send_gap

log = logs.get("ingest")

REPORT_SECONDS = 0.25  # candles that close wait for the progress
# Kite sends a picture a second: an outage below two of them hides at most one, whose volume and day's
# extremes the next one carries.
GAP_MS_MIN = 2_000
GAP_MS_MAX = 7 * 86_400_000  # older rows have left the lists of all but the day's candles
ADDED_MS = 5_000  # an added instrument ticks within so long, whichever worker reads it
PENDING_MAX = 1_000  # outages of instruments that wait to be reported; then the oldest is dropped
READ_AT_ONCE = 1_000
MARKET_ZONE = ZoneInfo(MARKET_TIMEZONE)


class Notice(NamedTuple):
    """Instruments of which nothing was received in [from_ms, to_ms), which begins and ends in session
    hours."""

    tokens: tuple[int, ...]
    from_ms: int
    to_ms: int


def notices(calendar: Sessions, tokens: Iterable[int], outage: Outage) -> list[Notice]:
    """Return the session hours of an outage: one notice for all instruments of the same hours.

    A night, a holiday, or less than GAP_MS_MIN of open market gives none.
    """
    by_schedule: dict[int, list[int]] = defaultdict(list)
    for token in tokens:
        by_schedule[calendar.schedule_of(token)].append(token)
    by_span: dict[tuple[int, int], list[int]] = defaultdict(list)
    for schedule, members in by_schedule.items():
        span = open_span(calendar, schedule, outage)
        if span is not None:
            by_span[span] += members
    return [Notice(tuple(sorted(members)), *span) for span, members in sorted(by_span.items())]


def open_span(calendar: Sessions, schedule: int, outage: Outage) -> tuple[int, int] | None:
    """Return the outage without the closed hours at its ends; None where too little is left."""
    day_ms = from_ms = max(outage.from_ms, outage.to_ms - GAP_MS_MAX)
    windows: list[tuple[int, int]] = []
    while day_ms < outage.to_ms:
        day = calendar.day(schedule, day_ms)
        windows += [(max(opened, from_ms), min(closed, outage.to_ms)) for opened, closed in day.windows]
        day_ms = day.day_end_ms
    windows = [(begin, end) for begin, end in windows if begin < end]
    if sum(end - begin for begin, end in windows) < GAP_MS_MIN:
        return None
    return windows[0][0], windows[-1][1]


class Outages:
    """The outages of one worker's feeds. Times are market time.

    Threads: `open_feed`, `close_feed`, `note_subscribed` and `note_added` in the leases' thread, `add` in
    any, `run` in its own. At most PENDING_MAX outages of single instruments wait; dropped ones are counted.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        keys: Keys,
        calendar: Sessions,
        connections: Connections,
        buffer: FrameBuffer,
        jobs: JobOutbox | None,
        *,
        now_ms: Callable[[], float],
    ) -> None:
        """Prepare; without `jobs` outages are only marked, as nothing can be asked of Kite's history."""
        self._connect = connect
        self._client: redis.Redis | None = None
        self._keys = keys
        self._calendar = calendar
        self._connections = connections
        self._buffer = buffer
        self._jobs = jobs
        self._now_ms = now_ms
        self._host = socket.gethostname()
        self._told_offset_ms: int | None = (
            None  # of the host's clock; None: another process may have told one
        )
        self._report_lock = threading.Lock()  # each outage is reported once
        self._pending: deque[tuple[str, tuple[int, ...], Outage]] = deque()  # reason, instruments, span
        self._once = logs.Once()
        self.feeds: list[Feed] = []  # all feeds, also those of other workers; set by the leases' thread
        self.counts = dict.fromkeys(("outages", "outages_dropped", "gap_notices", "new_instruments"), 0)

    # -- the leases' thread; all raise what redis-py raises ------------------------------------------------

    def open_feed(self, client: redis.Redis, feed: Feed) -> FeedLiveness:
        """Return what is known of a feed that is about to be read; warm instruments never seen."""
        seen = self.note_subscribed(client, feed.tokens)
        progress: Any = None
        try:
            progress = client.hget(self._keys.feed_progress(), str(feed.number))
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
        return FeedLiveness(_parse_progress(progress) or max(seen.values(), default=None))

    def close_feed(self, client: redis.Redis, connection: FeedConnection) -> None:
        """Report the last outages and the progress of a feed that this worker is about to release."""
        with self._report_lock:
            self._report(client, connection)
            self._save_progress(client, [connection])

    def note_added(self, client: redis.Redis, tokens: Collection[int]) -> None:
        """Report the outage of instruments that are added: those seen earlier were not streamed meanwhile."""
        now_ms = int(self._now_ms()) + ADDED_MS
        for token, seen_ms in self._last_seen(client, tokens).items():
            self.add("not streamed", (token,), Outage(int(seen_ms), now_ms))

    def note_subscribed(self, client: redis.Redis, tokens: Collection[int]) -> dict[int, float]:
        """Return when instruments were last seen, by their quotes; ask for a warm start of the others."""
        seen = self._last_seen(client, tokens)
        if fresh := sorted(set(tokens) - seen.keys()):
            self.counts["new_instruments"] += len(fresh)
            log.info("instruments_added", instruments=len(fresh), warm_start=self._jobs is not None)
            if self._jobs is not None:
                # The date makes it another job than yesterday's, which RQ still remembers.
                day = datetime.fromtimestamp(self._now_ms() / 1000, MARKET_ZONE).date()
                self._jobs.add(client, "warm_start", {"tokens": fresh, "why": f"warm {day}"})
        return seen

    def _last_seen(self, client: redis.Redis, tokens: Collection[int]) -> dict[int, float]:
        seen: dict[int, float] = {}
        ordered = sorted(tokens)
        for first in range(0, len(ordered), READ_AT_ONCE):
            chunk = ordered[first : first + READ_AT_ONCE]
            pipeline = client.pipeline(transaction=False)
            for token in chunk:
                pipeline.hget(self._keys.quote(token), "received_at")
            for token, reply in zip(chunk, pipeline.execute(raise_on_error=False), strict=True):
                if isinstance(reply, Exception) and not is_wrong_type(reply):
                    raise reply
                if reply is not None:  # a quote without a readable time counts as seen just now
                    moment_ms = _parse_moment(reply) if isinstance(reply, bytes) else 0.0
                    seen[token] = moment_ms or self._now_ms()
        return seen

    # -- any thread --------------------------------------------------------------------------------------

    def add(self, reason: str, tokens: tuple[int, ...], outage: Outage) -> None:
        """Let an outage of single instruments be reported, while their feed was well."""
        if len(self._pending) >= PENDING_MAX:
            self._pending.popleft()
            self.counts["outages_dropped"] += 1
        self._pending.append((reason, tokens, outage))

    def run(self, stop: threading.Event) -> None:
        """Report until `stop` is set."""
        while not stop.wait(REPORT_SECONDS):
            self.report()

    def report(self) -> None:
        """Report what is over, and save the feeds' progress. While Redis is unavailable all of it waits."""
        while self._buffer.lost_spans:
            # Which instruments a damaged spool held is unknown: it may be another process's.
            tokens = tuple(token for feed in self.feeds for token in feed.tokens)
            self.add("spool damaged", tokens, Outage(*self._buffer.lost_spans.popleft()))
        with self._report_lock:
            try:
                client = self._client = self._client or self._connect()
                connections = self._connections.all()
                for connection in connections:
                    self._report(client, connection)
                while self._pending:
                    waiting = self._pending.popleft()
                    try:
                        self._send(client, *waiting)
                    except BaseException:
                        self._pending.appendleft(waiting)
                        raise
                self._save_progress(client, connections)
            except (redis.RedisError, PkbError) as error:
                self._client = None
                if is_wrong_type(error) and self._once.first(str(error)):
                    hint = f"look at {self._keys.feed_progress()} and {self._keys.repairs(0)}, …"
                    log.error("outages_not_reported", reason=str(error)[:200], hint=hint)

    def _report(self, client: redis.Redis, connection: FeedConnection) -> None:
        while outage := connection.liveness.first_outage:
            self._send(client, "no data", connection.feed.tokens, outage)
            connection.liveness.drop_outage()

    def _send(self, client: redis.Redis, reason: str, tokens: tuple[int, ...], outage: Outage) -> None:
        self.counts["outages"] += 1
        for notice in notices(self._calendar, tokens, outage):
            span = {"from_ms": notice.from_ms, "to_ms": notice.to_ms}
            self.counts["gap_notices"] += send_gap(client, self._keys, notice.tokens, **span, why=reason)
            if self._jobs is not None:
                self._jobs.add(client, "repair_gap", {"tokens": list(notice.tokens), **span})
            seconds = round((notice.to_ms - notice.from_ms) / 1000, 1)
            log.warning(
                "outage_reported", reason=reason, instruments=len(notice.tokens), **span, seconds=seconds,
                backfill=self._jobs is not None,
            )  # fmt: skip

    def _save_progress(self, client: redis.Redis, connections: Sequence[FeedConnection]) -> None:
        unsent_ms = self._buffer.oldest_ms
        progress: dict[Any, Any] = {}
        for connection in connections:
            times = [connection.liveness.received_to_ms]
            if (outage := connection.liveness.first_outage) is not None:
                times.append(outage.from_ms)
            if unsent_ms is not None:
                times.append(unsent_ms)
            if min(times) > 0:
                progress[connection.feed.number] = int(min(times))
        clock, offset_ms = f"clock:{self._host}", round(getattr(self._now_ms, "offset_ms", 0.0))
        if offset_ms:
            progress[clock] = offset_ms
        elif self._told_offset_ms != 0:
            client.hdel(self._keys.feed_progress(), clock)
        self._told_offset_ms = offset_ms
        if progress:
            client.hset(self._keys.feed_progress(), mapping=progress)
            # A number that is used again some day must not be taken for the same feed.
            numbers: Any = client.hkeys(self._keys.feed_progress())
            if stale := [n for n in numbers if n.isdigit() and int(n[:9]) >= len(self.feeds)]:
                client.hdel(self._keys.feed_progress(), *stale)


def _parse_progress(reply: bytes | None) -> float | None:
    """Return a feed's progress (epoch ms); None where there is none, or it is no time."""
    text = (reply or b"").decode(errors="replace")
    return float(text) if text.isascii() and text.isdigit() and 0 < int(text[:15]) < TIME_MS_MAX else None


def _parse_moment(reply: bytes) -> float:
    """Return an ISO time as epoch ms; 0 for anything else."""
    try:
        return datetime.fromisoformat(reply.decode()).timestamp() * 1000
    except (ValueError, OverflowError):
        return 0.0


JOBS_MAX = 1_000  # in the outbox; beyond it new ones are refused, counted and logged
SEND_SECONDS = 1.0
ORPHAN_MS = 30_000  # a request of another worker that waits so long is sent by any
RETRY_SECONDS_MAX = 30.0  # between attempts while RQ is unavailable


# -- jobs ---------------------------------------------------------------------------------------------------


class _Job(msgspec.Struct):
    name: str
    arguments: dict[str, Any]
    at: int  # epoch ms, the machine's


class JobOutbox:
    """`add` in any thread, with its own client of the store; `run` in a thread of its own."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        open_queue: Callable[[], Queue],
        keys: Keys,
        *,
        now_ms: Callable[[], float] = lambda: time.time() * 1000,
    ) -> None:
        """Prepare; `connect` returns a client of the store, `open_queue` RQ's queue."""
        self._connect = connect
        self._open_queue = open_queue
        self._key = keys.job_outbox()
        self._now_ms = now_ms
        self._client: redis.Redis | None = None
        self._queue: Queue | None = None
        self._own: set[str] = set()  # ids of this worker's requests
        self._all_checked_ms = 0.0
        self._last_error = ""  # logged once
        self.counts = dict.fromkeys(("jobs_requested", "jobs_queued", "jobs_refused"), 0)

    def add(self, client: redis.Redis, name: str, arguments: dict[str, Any]) -> None:
        """Request a job of the table (`store/queue.py`). Raises what redis-py raises."""
        id_ = job_id(name, arguments)
        job = msgspec.json.encode(_Job(name, arguments, int(self._now_ms())))
        try:
            if client.hlen(self._key) >= JOBS_MAX:
                self._refuse(name, f"{JOBS_MAX} jobs wait", "start the Redis of PKB_RQ_REDIS_URL")
                return
            client.hset(self._key, id_, job)
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            self._refuse(name, f"{self._key} is no hash", f"look at it, then `DEL {self._key}`")
            return
        self._own.add(id_)
        self.counts["jobs_requested"] += 1

    def _refuse(self, name: str, reason: str, hint: str) -> None:
        self.counts["jobs_refused"] += 1
        log.error("job_refused", job=name, reason=reason, hint=hint)

    def run(self, stop: threading.Event) -> None:
        """Send what was requested until `stop` is set."""
        backoff = Backoff(SEND_SECONDS, RETRY_SECONDS_MAX)
        while not stop.wait(backoff.next()):
            try:
                self.send()
                self._last_error = ""
                backoff.reset()
            except (redis.RedisError, PkbError) as error:
                self._client = self._queue = None
                reason = str(error).partition("\n")[0][:200]
                if reason != self._last_error:
                    self._last_error = reason
                    log.warning("job_queue_unavailable", reason=reason)

    def send(self) -> None:
        """Queue this worker's requests, and old ones of others. Raises what redis-py raises, and PkbError."""
        client = self._client = self._client or self._connect()
        ids: Any = client.hkeys(self._key)
        checks_all = not 0 <= self._now_ms() - self._all_checked_ms < ORPHAN_MS / 2
        for id_ in ids:
            name = id_.decode(errors="replace")
            if name not in self._own and not checks_all:
                continue
            text: Any = client.hget(self._key, id_)
            job = _decode(text)
            if job is not None and name not in self._own and abs(self._now_ms() - job.at) < ORPHAN_MS:
                continue
            if job is not None:
                self._queue = self._queue or self._open_queue()
                if enqueue(self._queue, job.name, job.arguments) is not None:
                    self.counts["jobs_queued"] += 1
            elif text is not None:
                log.warning("job_malformed", key=self._key, starts_with=text[:64].hex())
            client.hdel(self._key, id_)
            self._own.discard(name)
        if checks_all:
            self._all_checked_ms = self._now_ms()


def _decode(text: bytes | None) -> _Job | None:
    """Return the job; None for one that was deleted, or is no job of the table."""
    try:
        job = msgspec.json.decode(text or b"", type=_Job)
    except msgspec.DecodeError:
        return None
    return job if job.name in JOBS else None
