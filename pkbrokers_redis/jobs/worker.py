"""RQ's worker on the queue `pkb`, with our limits and one line a failure.

a run's silence      20 s: then another worker takes the job, as one of its retries
a worker's death     its child dies with it (Linux), so no job runs twice at once
a PkbError           one line in the log and in `pkb jobs --failed`; a bug keeps its traceback

The role `jobs`: waits for jobs, forks a child for each, until told to stop.

    main thread    RQ's worker loop
    a thread       RQ's scheduler, and our heartbeat, so that `pkb status` shows the role as any other

India's time is set for all that asks the host's clock: RQ's cron, Python's local time.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import redis
from rq import Queue, Worker
from rq.executions import Execution
from rq.job import Job
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.timeouts import JobTimeoutException

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import MARKET_TIMEZONE
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.runtime.heartbeat import Heartbeat
from pkbrokers_redis.runtime.roles import now_ms, open_store, worker_id
from pkbrokers_redis.runtime.signals import STOP_SIGNALS, ignore_signal
from pkbrokers_redis.runtime.supervisor import PR_SET_PDEATHSIG
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import leases
from pkbrokers_redis.store.connect import describe, explain
from pkbrokers_redis.store.queue import KnownJob, connect_queue, describe_queue, queue_of

WAIT_SECONDS = 15  # one blocking look into an empty queue
MONITOR_SECONDS = 5  # how often a running job's worker says that it lives
ABANDONED_SECONDS = 20  # after this silence a run counts as abandoned
MAINTENANCE_SECONDS = 10  # how often abandoned runs are looked for
RECONNECT_SECONDS_MAX = 5.0
NICENESS = 10  # a tenth of the share that a worker of the pipeline gets of a core both want
LOCK_SECONDS = 10  # of the scheduler; renewed every second

log = logs.get("jobs")


class _OneLine(logging.Filter):
    """A Redis that is away is no bug of RQ's: no traceback for it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], redis.RedisError):
            record.exc_info = None
        return True


logging.getLogger("rq.worker").addFilter(_OneLine())


class JobWorker(Worker):
    """One at a time in a process. `stop` is set when a signal asks it to end, `place` names its Redis."""

    max_connection_wait_time = RECONNECT_SECONDS_MAX

    def __init__(self, queue: Queue, name: str, stop: threading.Event, place: str) -> None:
        super().__init__(
            [queue],
            name=name,
            connection=queue.connection,
            serializer=JSONSerializer,
            job_class=KnownJob,
            worker_ttl=WAIT_SECONDS + 15,  # RQ waits for jobs 15 s less than this
            job_monitoring_interval=MONITOR_SECONDS,
            maintenance_interval=MAINTENANCE_SECONDS,
        )
        self.stop = stop
        self._place = place
        self._told = ""  # the failure of the job at hand in one line

    def __enter__(self) -> JobWorker:
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread that RQ leaves behind where it could not say goodbye to Redis."""
        thread: Any = self.pubsub_thread
        if thread is not None:
            thread.stop()

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """SIGTERM, SIGINT: finish the job at hand, then end. A second one ends it at once."""
        super().request_stop(signum, frame)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Seconds of silence after which a run counts as abandoned."""
        return ABANDONED_SECONDS

    def main_work_horse(self, job: Job, queue: Queue) -> None:
        """The child. It ends with its worker, so that a job that is taken over is not still running here."""
        give_way(os.getloadavg()[0])
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        super().main_work_horse(job, queue)

    def perform_job(self, job: Job, queue: Queue, execution: Execution) -> bool:
        """Run it, and say so."""
        log.info("job_started", job=job.id)
        began = time.monotonic()
        done = super().perform_job(job, queue, execution)
        if done:
            log.info("job_ended", job=job.id, seconds=round(time.monotonic() - began, 1))
        return done

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """One line for what is no bug of ours."""
        self._told = told(exc_info[1], self._place)
        if not self._told:
            super().handle_exception(job, *exc_info)
        else:
            log.warning("job_failed", job=job.id, why=self._told, retries_left=job.retries_left or 0)

    def handle_job_failure(
        self,
        job: Job,
        queue: Queue,
        started_job_registry: Any = None,
        exc_string: str = "",
        execution: Execution | None = None,
    ) -> None:
        """As RQ's; what is kept of the failure is the one line, where there is one."""
        super().handle_job_failure(job, queue, started_job_registry, self._told or exc_string, execution)
        self._told = ""

    def procline(self, message: str) -> None:
        """The command line stays as it is: it says what we are."""


def give_way(load: float) -> None:
    """Let what serves the ticks go first: a snapshot is seconds of computing, on whose cores they would wait.

    Where cores are to spare (`load`: the average number of processes that want one) the job takes only what
    nobody else wants. Where they are not it keeps a tenth of a core: `ticks.json` must not wait for the
    screener to end.
    """
    os.nice(NICENESS)
    if sys.platform.startswith("linux") and load < (os.cpu_count() or 1):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Scheduler(RQScheduler):
    """RQ's scheduler as a thread on our own client: RQ's is a process that would outlive a killed worker, and
    that cannot find a Sentinel's master. A killed one is followed by another within LOCK_SECONDS."""

    def __init__(self, queue: Queue) -> None:
        super().__init__(
            [queue],
            connection=queue.connection,
            interval=LOCK_SECONDS - 60,  # used for this alone: a lock lives 60 s longer
            serializer=JSONSerializer,
            logging_level="WARNING",
        )
        self._ours = queue.connection
        self._born = False

    @property
    def connection(self) -> redis.Redis:
        """The queue's."""
        return self._ours

    def step(self) -> None:
        """What is due goes into the queue, if no other worker's scheduler does that. Call it every second."""
        if not self._born:
            self.register_birth()
            self._born = True
        if self._queue_names != self.acquired_locks:
            self.acquire_locks()
        self.heartbeat()
        self.enqueue_scheduled_jobs()

    def leave(self) -> None:
        """Let another worker's scheduler take over at once."""
        if self._born:
            self.stop()


def told(error: BaseException | None, place: str) -> str:
    """A failure in one line for people; "" for a bug, whose traceback is wanted."""
    if isinstance(error, JobTimeoutException):
        return "the run took longer than its time limit: it is stopped, and tried again from where it was"
    if isinstance(error, redis.RedisError):
        error = explain(error, place)
    return " ".join(str(error).split()) if isinstance(error, PkbError) else ""


ROLE = "jobs"
STEP_SECONDS = 1.0
RETRY_SECONDS = 2.0  # between two lives of RQ's loop, which ends when Redis hangs

log_role = logs.get(ROLE)


def jobs(settings: Settings, stop: threading.Event) -> None:
    """Run jobs until `stop` is set or a signal comes; the job at hand is finished first."""
    live_in_india()
    store = open_store(settings)
    connection = connect_queue(settings)
    place = describe_queue(settings) or describe(settings)
    queue, name = queue_of(connection), worker_id(ROLE)
    beside = _Beside(settings, store, queue, name)
    log_role.info("started", store=describe(settings), queue=place)
    beside.start()
    try:
        for life in itertools.count(1):
            # A new name each time: RQ takes no worker whose last life it has not seen end.
            try:
                with JobWorker(queue, f"{name}-{life}", stop, place) as beside.worker:
                    beside.worker.work(logging_level="WARNING")
            except redis.RedisError as error:
                if life == 1 or beside.worker is not None:  # once an outage
                    log_role.warning("redis_away", why=explain(error, place).message)
            beside.worker = None
            # RQ's handlers belong to its loop, which has ended. `run_role` still sets `stop`.
            for number in STOP_SIGNALS:
                signal.signal(number, ignore_signal)
            if stop.wait(0.0 if stop.is_set() else RETRY_SECONDS):
                break
    finally:
        beside.end()
    log_role.info("stopped", done=beside.done)


def live_in_india() -> None:
    """Local time is India's from now on, whatever the host's zone, in our children too."""
    os.environ["TZ"] = MARKET_TIMEZONE
    time.tzset()


def announce(store: redis.Redis, keys: Keys, role: str, name: str) -> None:
    """Say that this worker lives; its library is loaded where it is missing."""
    leases.announce(store, keys, role, name)


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
                log_role.exception("scheduler_failed")  # a bug; what is due later must not wait for a restart

    def end(self) -> None:
        """Let go of everything that names us."""
        self._over.set()
        self.join()
        try:
            self._scheduler.leave()
            leases.leave(self._store, self._settings.keys, ROLE, self._name)
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
