"""The role `cron`: puts the rows of the trading day into the queue when they are due.

    each second   what should be in the queue by now? (`Plan.due`)  ─►  enqueue, by an id made of job and time

Nothing is remembered: RQ refuses a job whose id it has (and keeps finished ones for a day), so two crons, or
one that was away, put each run there once. Of runs that were missed the latest is made up for, if that is
still of use. Market time: in a rehearsal the day passes faster. RQ's workers, retries and registries do the
rest (docs/decisions/0017).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import redis
from rq import Queue

from pkbrokers_redis import logs
from pkbrokers_redis.clock import Clock, market_clock
from pkbrokers_redis.core.errors import PkbError
from pkbrokers_redis.core.sessions import Sessions, load_sessions
from pkbrokers_redis.jobs.role import RETRY_SECONDS, announce, live_in_india
from pkbrokers_redis.jobs.schedule import Plan, Planned, iso
from pkbrokers_redis.pipeline.heartbeat import Heartbeat
from pkbrokers_redis.pipeline.roles import now_ms, open_store, worker_id
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import lease
from pkbrokers_redis.store.connect import describe
from pkbrokers_redis.store.master import load_derivative_tokens
from pkbrokers_redis.store.queue import describe_queue, enqueue, open_queue
from pkbrokers_redis.store.watch import instrument_list, list_version

ROLE = "cron"
STEP_SECONDS = 1.0
STEP_SECONDS_MIN = 0.05  # in a rehearsal at high speed
STEPS_A_MINUTE = 4  # of market time
LIST_SECONDS = 30.0  # how often it is asked whether what is streamed has changed
NSE_TOKEN = 1  # any of the segment: the schedule while nothing is streamed yet

log = logs.get(ROLE)


class Cron:
    """Call `step()` again and again; it enqueues what is due."""

    def __init__(self, plan: Plan, queue: Queue, clock: Callable[[], float]) -> None:
        self.plan = plan
        self.enqueued = 0
        self.last: Planned | None = None
        self._queue, self._clock = queue, clock
        self._seen: dict[str, str] = {}  # row → the run we asked for last

    def step(self) -> list[str]:
        """The ids of the jobs that are new in the queue. Raises what redis-py raises: call it again."""
        new: list[str] = []
        for run in self.plan.due(self._clock()):
            if self._seen.get(run.row.name) == run.job_id:
                continue
            id_ = enqueue(self._queue, run.row.job, run.arguments)
            self._seen[run.row.name] = run.job_id
            if id_ is not None:
                log.info("enqueued", row=run.row.name, job=id_, planned=iso(run.at_ms))
                self.enqueued, self.last = self.enqueued + 1, run
                new.append(id_)
        return new


def cron(settings: Settings, stop: threading.Event) -> None:
    """Keep the trading day until `stop` is set. Two of them do no harm."""
    live_in_india()
    store, queue = open_store(settings), open_queue(settings)
    name, clock = worker_id(ROLE), market_clock(settings)
    sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
    listed = _Listed(settings, store, sessions)
    keeper = Cron(Plan(sessions, listed.schedules()), queue, clock)
    heart = Heartbeat(settings.keys, ROLE, name, now_ms())
    log.info("started", store=describe(settings), queue=describe_queue(settings) or describe(settings))
    away = False
    try:
        while not stop.wait(RETRY_SECONDS if away else step_seconds(clock)):
            try:
                if (schedules := listed.changed()) is not None:
                    keeper.plan = Plan(sessions, schedules)
                keeper.step()
                announce(store, settings.keys, ROLE, name)
                if heart.due(at := now_ms()):
                    heart.beat(store, at, 0, _figures(keeper))
                away = False
            except redis.RedisError as error:
                if not away:
                    log.warning("redis_away", why=type(error).__name__, retry_seconds=RETRY_SECONDS)
                away = True
    finally:
        try:
            lease.leave(store, settings.keys, ROLE, name)
            heart.end(store)
        except redis.RedisError:
            pass  # all of it runs out by itself
    log.info("stopped", enqueued=keeper.enqueued)


def step_seconds(clock: Clock) -> float:
    """A second, or less where a market minute passes faster."""
    return min(STEP_SECONDS, max(STEP_SECONDS_MIN, clock.real_seconds(60_000) / STEPS_A_MINUTE))


def schedules_of(store: redis.Redis, settings: Settings, sessions: Sessions) -> set[int]:
    """The trading hours of what is streamed; NSE's while that is nothing, or cannot be told yet."""
    try:
        tokens = [token for token, _ in instrument_list(store, settings)]
    except PkbError:
        tokens = []  # names that no master has explained yet
    if not tokens:
        return {sessions.schedule_of(NSE_TOKEN)}
    derivatives = load_derivative_tokens(store, settings.keys)
    return {sessions.schedule_of(token, token in derivatives) for token in tokens}


class _Listed:
    """What is streamed, looked at now and then."""

    def __init__(self, settings: Settings, store: redis.Redis, sessions: Sessions) -> None:
        self._settings, self._store, self._sessions = settings, store, sessions
        self._version = ""
        self._looked_at = 0.0

    def schedules(self) -> set[int]:
        self._version = list_version(self._store, self._settings)
        self._looked_at = time.monotonic()
        return schedules_of(self._store, self._settings, self._sessions)

    def changed(self) -> set[int] | None:
        """The schedules if the list is another one; None when it is the same, or it is too soon to ask."""
        if time.monotonic() - self._looked_at < LIST_SECONDS:
            return None
        self._looked_at = time.monotonic()
        if list_version(self._store, self._settings) == self._version:
            return None
        return self.schedules()


def _figures(keeper: Cron) -> dict[str, Any]:
    last = keeper.last
    return {"enqueued": keeper.enqueued, "job": f"{last.row.name} {iso(last.at_ms)}" if last else ""}
