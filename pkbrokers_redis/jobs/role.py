"""The role `jobs`: waits for jobs, forks a child for each, until told to stop.

    main thread    RQ's worker loop
    a thread       RQ's scheduler, and our heartbeat, so that `pkb status` shows the role as any other

India's time is set for all that asks the host's clock: RQ's cron, Python's local time.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from typing import Any

import redis
from redis.exceptions import ResponseError
from rq import Queue

from pkbrokers_redis import logs
from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.core.sessions import MARKET_TIMEZONE
from pkbrokers_redis.jobs.worker import JobWorker, Scheduler
from pkbrokers_redis.pipeline.heartbeat import Heartbeat
from pkbrokers_redis.pipeline.roles import now_ms, open_store, worker_id
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import lease
from pkbrokers_redis.store.commit import load_functions
from pkbrokers_redis.store.connect import describe, explain
from pkbrokers_redis.store.queue import connect_queue, describe_queue, queue_of

ROLE = "jobs"
STEP_SECONDS = 1.0
RETRY_SECONDS = 2.0  # between two lives of RQ's loop, which ends when Redis hangs

log = logs.get(ROLE)


def jobs(settings: Settings, stop: threading.Event) -> None:
    """Run jobs until `stop` is set or a signal comes; the job at hand is finished first."""
    live_in_india()
    store = open_store(settings)
    connection = connect_queue(settings)
    place = describe_queue(settings) or describe(settings)
    queue, name = queue_of(connection), worker_id(ROLE)
    beside = _Beside(settings, store, queue, name)
    log.info("started", store=describe(settings), queue=place)
    beside.start()
    try:
        for life in itertools.count(1):
            # A new name each time: RQ takes no worker whose last life it has not seen end.
            try:
                with JobWorker(queue, f"{name}-{life}", stop, place) as beside.worker:
                    beside.worker.work(logging_level="WARNING")
            except redis.RedisError as error:
                if life == 1 or beside.worker is not None:  # once an outage
                    log.warning("redis_away", why=explain(error, place).message)
            beside.worker = None
            # RQ's handlers belong to its loop, which has ended.
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, lambda *_: stop.set())
            if stop.wait(0.0 if stop.is_set() else RETRY_SECONDS):
                break
    finally:
        beside.end()
    log.info("stopped", done=beside.done)


def live_in_india() -> None:
    """Local time is India's from now on, whatever the host's zone, in our children too."""
    os.environ["TZ"] = MARKET_TIMEZONE
    time.tzset()


def announce(store: redis.Redis, keys: Keys, role: str, name: str) -> None:
    """Say that this worker lives; the store may be one that no aggregator has been at yet."""
    try:
        lease.announce(store, keys, role, name)
    except ResponseError as error:
        if "Function not found" not in str(error):
            raise
        load_functions(store)


class _Beside(threading.Thread):
    """The scheduler and the heartbeat. A Redis that is away is the worker's to tell; we try again."""

    def __init__(self, settings: Settings, store: redis.Redis, queue: Queue, name: str) -> None:
        super().__init__(name="jobs-beside", daemon=True)
        self._settings, self._store, self._queue, self._name = settings, store, queue, name
        self._heart = Heartbeat(settings.keys, ROLE, name, now_ms())
        self._scheduler = Scheduler(queue)
        self._over = threading.Event()
        self.worker: JobWorker | None = None
        self.done = 0

    def run(self) -> None:
        while not self._over.wait(STEP_SECONDS):
            try:
                self._scheduler.step()
                announce(self._store, self._settings.keys, ROLE, self._name)
                if self._heart.due(at := now_ms()):
                    self._heart.beat(self._store, at, 0, self._figures())
            except redis.RedisError:
                pass  # the worker's loop says so, and waits
            except Exception:
                log.exception("scheduler_failed")  # a bug; what is due later must not wait for a restart

    def end(self) -> None:
        """Let go of everything that names us."""
        self._over.set()
        self.join()
        try:
            self._scheduler.leave()
            lease.leave(self._store, self._settings.keys, ROLE, self._name)
            self._heart.end(self._store)
        except redis.RedisError:
            pass  # all of it runs out by itself

    def _figures(self) -> dict[str, Any]:
        queue = self._queue
        worker = self.worker
        if worker is not None:
            count: Any = queue.connection.hget(worker.key, "successful_job_count")
            self.done = int(count or 0)
        return {
            "queued": queue.count,
            "running": queue.started_job_registry.count,
            "scheduled": queue.scheduled_job_registry.count,
            "failed": queue.failed_job_registry.count,
            "jobs_done": self.done,
            "job": (worker.get_current_job_id() if worker is not None else None) or "",
        }
