"""The timetable of the trading day, and the role `cron` that enqueues its rows when they are due.

Times are relative to the day's session: a holiday has no runs, a muhurat evening has all of them. The session
reaches from the first open to the last close of the streamed segments: NSE alone 09:15–15:30, with MCX
09:00–23:30. `Plan` is pure: market time is an argument, epoch ms.

    each second   which runs are due? (`Plan.due`)  ─►  enqueue with an id made of job and time

Cron keeps no state. RQ refuses a job id that it has, and keeps finished ones for a day, so two crons, or one
that was down, enqueue each run once. Only the latest missed run is executed, within its grace time. In a
rehearsal market time passes faster (docs/decisions/0017).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from math import inf
from typing import Any, Literal

import redis
from rq import Queue

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import IST, Sessions, load_sessions
from pkbrokers_redis.clock import Clock, market_clock
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.jobs.worker import RETRY_SECONDS, announce, use_market_timezone
from pkbrokers_redis.runtime.cluster_state import Heartbeat
from pkbrokers_redis.runtime.roles import follow_calendar, now_ms, open_store, worker_id
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import leases
from pkbrokers_redis.store.connect import describe
from pkbrokers_redis.store.instruments import read_hours
from pkbrokers_redis.store.queue import describe_queue, enqueue, job_id, open_queue
from pkbrokers_redis.store.symbols import instrument_list, list_version

Anchor = Literal["open", "close", "minute"]

MINUTE_MS = 60_000
LOOK_BACK_DAYS = 1  # MCX closes at 23:30 or 23:55: its last rows run after midnight
LOOK_INTO_DAYS = 1  # a feed that never closes opens at midnight: its first rows run before
LOOK_AHEAD_DAYS = 30  # no exchange closes longer


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the timetable.

    Attributes:
        name: unique name of the row.
        anchor: "open" or "close" of the session, or "minute" for the end of each minute in it.
        offset_seconds: time of the run, relative to the anchor.
        job: a name in `store.queue.JOBS`.
        does: what it does, for people.
        late_seconds_max: how long a missed run is still executed; only the latest one is.
        arguments: further keyword arguments of the job.
        needs: rows of the same day that must have ended.
    """

    name: str
    anchor: Anchor
    offset_seconds: int
    job: str
    does: str
    late_seconds_max: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def when(self) -> str:
        """Return the time for people: `open - 45 min`, `every minute + 5 s`."""
        minutes, seconds = divmod(abs(self.offset_seconds), 60)
        amount = " ".join(f"{n} {unit}" for n, unit in ((minutes, "min"), (seconds, "s")) if n)
        sign = f" {'-' if self.offset_seconds < 0 else '+'} {amount}" if amount else ""
        text = f"{'every minute' if self.anchor == 'minute' else self.anchor}{sign}"
        return text + (f", after {' '.join(self.needs)}" if self.needs else "")


MORNING, EVENING = 2 * 3600, 12 * 3600  # how long a missed run is still useful
FINAL, WRITTEN = ("final_candles",), ("pickle", "sqlite", "parquet")

DAY: tuple[Row, ...] = (
    # before the open
    Row("login", "open", -45 * 60, "login", "a Kite session that works, shared by all", MORNING),
    Row("instruments", "open", -40 * 60, "instruments", "the day's instrument master", MORNING),
    Row("calendar", "open", -30 * 60, "calendar", "the calendar knows the coming sessions", MORNING),
    Row("capacity", "open", -25 * 60, "capacity", "connections, memory and disk suffice", MORNING),
    # in the session
    Row("open", "open", 60, "feed", "the pipeline is healthy and ticks flow", 600),
    Row("ticks", "minute", 5, "day_snapshot", "ticks.json", 300, {"kind": "ticks"}),
    # the close
    Row("close", "close", 60, "day_snapshot", "the session's last ticks.json", EVENING, {"kind": "ticks"}),
    # after the close
    Row("final_candles", "close", 600, "final_candles", "Kite's final day candles", EVENING),
    Row("pickle", "close", 660, "day_snapshot", "the day's pickles", EVENING, {"kind": "pickle"}, FINAL),
    Row("sqlite", "close", 660, "day_snapshot", "candles.db, its copy", EVENING, {"kind": "sqlite"}, FINAL),
    Row("parquet", "close", 660, "day_snapshot", "Parquet of the day", EVENING, {"kind": "parquet"}, FINAL),
    Row("sync", "close", 720, "sync_push", "files to the data branch", EVENING, {}, WRITTEN),
    Row("trim", "close", 780, "trim", "old dated files are deleted", EVENING, {}, ("sync",)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of a row. `day` is the session's date, `at_ms` its market time."""

    row: Row
    day: date
    at_ms: int
    arguments: dict[str, Any]

    @property
    def job_id(self) -> str:
        """Return the job id, equal for every cron that plans this run."""
        return job_id(self.row.job, self.arguments)


class Plan:
    """The timetable on a calendar. `schedules` are those of the streamed instruments."""

    def __init__(self, sessions: Sessions, schedules: Iterable[int], table: Sequence[Row] = DAY) -> None:
        self.sessions = sessions
        self.schedules = tuple(sorted(set(schedules)))
        self.table = tuple(table)
        self._rows = {row.name: row for row in self.table}

    def windows(self, day: date) -> list[tuple[int, int]]:
        """Return the merged trading windows of a day, (open, close) in epoch ms; [] on a holiday."""
        found: list[tuple[int, int]] = []
        for opened, closed in sorted(
            window for each in self.schedules for window in self.sessions.on_date(each, day).windows
        ):
            if found and opened <= found[-1][1]:
                found[-1] = found[-1][0], max(closed, found[-1][1])
            else:
                found.append((opened, closed))
        return found

    def times(self, row: Row, day: date) -> list[int]:
        """Return the times of a row on a day, ascending, epoch ms."""
        windows = self.windows(day)
        if not windows:
            return []
        offset_ms = row.offset_seconds * 1000
        if row.anchor == "open":
            return [windows[0][0] + offset_ms]
        if row.anchor == "close":
            return [windows[-1][1] + offset_ms]
        return [
            minute + offset_ms
            for opened, closed in windows
            for minute in range(opened + MINUTE_MS, closed + 1, MINUTE_MS)
        ]

    def last(self, row: Row, now_ms: float) -> Planned | None:
        """Return the latest due run of a row, None if its grace time is over."""
        today = self.sessions.date_of(int(now_ms))
        for days in range(-LOOK_INTO_DAYS, LOOK_BACK_DAYS + 1):
            day = date.fromordinal(today.toordinal() - days)
            due = [at for at in self.times(row, day) if at <= now_ms]
            if due:
                return (
                    self.run(row, day, due[-1]) if now_ms - due[-1] <= row.late_seconds_max * 1000 else None
                )
        return None

    def next(self, row: Row, now_ms: float) -> Planned | None:
        """Return the next run of a row after `now_ms`, None without one in thirty days."""
        today = self.sessions.date_of(int(now_ms))
        for days in range(LOOK_AHEAD_DAYS + 1):
            day = date.fromordinal(today.toordinal() + days)
            for at in self.times(row, day):
                if at > now_ms:
                    return self.run(row, day, at)
        return None

    def due(self, now_ms: float) -> list[Planned]:
        """Return the runs that are due, in the order of the table."""
        return [run for row in self.table if (run := self.last(row, now_ms)) is not None]

    def day_of(self, day: date) -> Iterator[Planned]:
        """Return every run of a day in time order."""
        runs = [self.run(row, day, at) for row in self.table for at in self.times(row, day)]
        return iter(sorted(runs, key=lambda run: run.at_ms))

    def run(self, row: Row, day: date, at_ms: int) -> Planned:
        """Return the run of a row at a time, with the ids of the runs that it waits for."""
        needed = [
            self.run(self._rows[name], day, at).job_id
            for name in row.needs
            for at in self.times(self._rows[name], day)[-1:]
        ]
        arguments = {"at": iso(at_ms), "day": str(day), **row.arguments}
        return Planned(row, day, at_ms, {**arguments, "after": needed} if needed else arguments)


def iso(at_ms: float) -> str:
    """Format epoch ms as `2026-11-20T09:15:00+05:30`."""
    return datetime.fromtimestamp(at_ms / 1000, IST).isoformat(timespec="seconds")


def next_runs(plan: Plan, now_ms: float) -> list[dict[str, Any]]:
    """Return the timetable for people: `row when job next does`, in its order."""
    rows = []
    for row in plan.table:
        run = plan.next(row, now_ms)
        shown = {"row": row.name, "when": row.when, "job": row.job}
        rows.append({**shown, "next": iso(run.at_ms) if run else None, "does": row.does})
    return rows


ROLE = "cron"
STEP_SECONDS = 1.0
STEP_SECONDS_MIN = 0.05  # in a rehearsal at high speed
STEPS_A_MINUTE = 4  # of market time
LIST_SECONDS = 30.0  # how often the list of streamed instruments is checked
NSE_TOKEN = 1  # any token of the segment: the schedule while nothing is streamed

log = logs.get(ROLE)


class Cron:
    """Enqueues due runs at each `step()`."""

    def __init__(self, plan: Plan, queue: Queue, clock: Callable[[], float]) -> None:
        self.plan = plan
        self.enqueued = 0
        self.last: Planned | None = None
        self._queue, self._clock = queue, clock
        self._last_ids: dict[str, str] = {}  # row → its last enqueued run

    def step(self) -> list[str]:
        """Enqueue what is due and return the new job ids. After an error of redis-py, call it again."""
        new: list[str] = []
        for run in self.plan.due(self._clock()):
            if self._last_ids.get(run.row.name) == run.job_id:
                continue
            id_ = enqueue(self._queue, run.row.job, run.arguments)
            self._last_ids[run.row.name] = run.job_id
            if id_ is not None:
                log.info("job_enqueued", row=run.row.name, job=id_, planned=iso(run.at_ms))
                self.enqueued, self.last = self.enqueued + 1, run
                new.append(id_)
        return new


def cron(settings: Settings, stop: threading.Event) -> None:
    """Run the timetable until `stop` is set. A second cron is harmless."""
    use_market_timezone()
    store, queue = open_store(settings), open_queue(settings)
    name, clock = worker_id(ROLE), market_clock(settings)
    sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
    listed = _StreamedSchedules(settings, store, sessions)
    scheduler = Cron(Plan(sessions, listed.schedules()), queue, clock)
    heart = Heartbeat(settings.keys, ROLE, name, now_ms())
    log.info("started", store=describe(settings), queue=describe_queue(settings) or describe(settings))
    unavailable = False
    try:
        while not stop.wait(RETRY_SECONDS if unavailable else step_seconds(clock)):
            try:
                is_other = follow_calendar(sessions)
                if (schedules := listed.schedules() if is_other else listed.changed()) is not None:
                    scheduler.plan = Plan(sessions, schedules)
                scheduler.step()
                announce(store, settings.keys, ROLE, name)
                if heart.due(at := now_ms()):
                    heart.beat(store, at, 0, _figures(scheduler))
                unavailable = False
            except redis.RedisError as error:
                if not unavailable:
                    log.warning("redis_unavailable", reason=type(error).__name__, retry_seconds=RETRY_SECONDS)
                unavailable = True
    finally:
        try:
            leases.leave(store, settings.keys, ROLE, name)
            heart.end(store)
        except redis.RedisError:
            pass  # all of it expires by itself
    log.info("stopped", enqueued=scheduler.enqueued)


def step_seconds(clock: Clock) -> float:
    """Return a second, or less if market time is accelerated."""
    return min(STEP_SECONDS, max(STEP_SECONDS_MIN, clock.real_seconds(60_000) / STEPS_A_MINUTE))


def schedules_of(store: redis.Redis, settings: Settings, sessions: Sessions) -> set[int]:
    """Return the schedules of the streamed instruments, NSE's while the list is empty or unresolved."""
    try:
        tokens = [token for token, _ in instrument_list(store, settings)]
    except PkbError:
        tokens = []  # the names are not in a master yet
    if not tokens:
        return {sessions.schedule_of(NSE_TOKEN)}
    read_hours(store, settings.keys, sessions)
    return sessions.schedules_of(tokens)


class _StreamedSchedules:
    """The schedules of the streamed instruments, checked every LIST_SECONDS."""

    def __init__(self, settings: Settings, store: redis.Redis, sessions: Sessions) -> None:
        self._settings, self._store, self._sessions = settings, store, sessions
        self._version = ""
        self._checked_at = -inf

    def schedules(self) -> set[int]:
        self._version = list_version(self._store, self._settings)
        self._checked_at = time.monotonic()
        return schedules_of(self._store, self._settings, self._sessions)

    def changed(self) -> set[int] | None:
        """Return the schedules if the list has changed, else None."""
        if time.monotonic() - self._checked_at < LIST_SECONDS:
            return None
        self._checked_at = time.monotonic()
        if list_version(self._store, self._settings) == self._version:
            return None
        return self.schedules()


def _figures(scheduler: Cron) -> dict[str, Any]:
    last = scheduler.last
    return {"enqueued": scheduler.enqueued, "job": f"{last.row.name} {iso(last.at_ms)}" if last else ""}
