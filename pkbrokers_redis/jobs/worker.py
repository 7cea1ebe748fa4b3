"""The role `jobs`: RQ's worker on the queue `pkb`, which forks a child for each job.

    main thread        RQ's worker loop
    background thread  RQ's scheduler and the heartbeat of the role

    a silent run       after 20 s another worker takes the job, as one of its retries
    a killed worker    its child dies with it (Linux), so no job runs twice at once
    a PkbError         one line in the log and in `pkb jobs --failed`; a bug keeps its traceback

The process sets its time zone to India's, because RQ and Python read local time.
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
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any

import redis
from rq import Queue, Worker
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.timeouts import JobTimeoutException

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import MARKET_TIMEZONE
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.runtime.cluster_state import Heartbeat
from pkbrokers_redis.runtime.roles import now_ms, open_store, worker_id
from pkbrokers_redis.runtime.supervisor import PR_SET_PDEATHSIG, STOP_SIGNALS, ignore_signal
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import leases
from pkbrokers_redis.store.connect import describe, explain
from pkbrokers_redis.store.queue import KnownJob, connect_queue, describe_queue, queue_of

WAIT_SECONDS = 15  # one blocking read of an empty queue
MONITOR_SECONDS = 5  # heartbeat of a running job
ABANDONED_SECONDS = 20  # a run without a heartbeat for so long is abandoned
MAINTENANCE_SECONDS = 10  # between checks for abandoned runs
RECONNECT_SECONDS_MAX = 5.0
NICENESS = 10  # a tenth of a pipeline worker's share of a contended core
LOCK_SECONDS = 10  # TTL of the scheduler's lock, renewed every second

LEFT_SECONDS = 60  # before a job of a newer release is looked at again

log = logs.get("jobs")
_once = logs.Once()


class _OneLine(logging.Filter):
    """Drop the traceback of RQ's records about an unavailable Redis."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], redis.RedisError):
            record.exc_info = None
        return True


logging.getLogger("rq.worker").addFilter(_OneLine())


class JobWorker(Worker):
    """RQ's worker with limits of its own. `stop` is set by a signal, `place` names its Redis."""

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
        self._failure_line = ""  # the failure of the current job, for people

    def __enter__(self) -> JobWorker:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread that RQ leaves behind when it cannot unsubscribe."""
        thread: Any = self.pubsub_thread
        if thread is not None:
            thread.stop()

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Finish the current job and end (SIGTERM, SIGINT); a second signal ends it at once."""
        super().request_stop(signum, frame)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Return the seconds without a heartbeat after which a run counts as abandoned."""
        return ABANDONED_SECONDS

    def main_work_horse(self, job: Job, queue: Queue) -> None:
        """Run in the child. It dies with its worker, so that a job that moved is not still running here."""
        lower_priority(os.getloadavg()[0])
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        super().main_work_horse(job, queue)

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run the job, unless it is of a newer release: that waits for a worker that knows it."""
        now = datetime.now(UTC)
        if not (isinstance(job, KnownJob) and job.is_newer(now)):
            super().execute_job(job, queue)
            return
        queue.scheduled_job_registry.schedule(job, now + timedelta(seconds=LEFT_SECONDS))
        job.set_status(JobStatus.SCHEDULED)
        queue.connection.lrem(queue.intermediate_queue_key, 1, job.id)
        if _once.first(job.path):
            hint = "start workers of that release; it waits a day for one"
            log.warning("job_left", job=job.id, function=job.path, reason="a newer release's", hint=hint)

    def perform_job(self, job: Job, queue: Queue, execution: Execution) -> bool:
        """Run the job and log its start and end."""
        log.info("job_started", job=job.id)
        began = time.monotonic()
        done = super().perform_job(job, queue, execution)
        if done:
            log.info("job_ended", job=job.id, seconds=round(time.monotonic() - began, 1))
        return done

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """Log an expected failure as one line, a bug with its traceback."""
        self._failure_line = failure_line(exc_info[1], self._place)
        if not self._failure_line:
            super().handle_exception(job, *exc_info)
        else:
            log.warning(
                "job_failed", job=job.id, reason=self._failure_line, retries_left=job.retries_left or 0
            )

    def handle_job_failure(
        self,
        job: Job,
        queue: Queue,
        started_job_registry: Any = None,
        exc_string: str = "",
        execution: Execution | None = None,
    ) -> None:
        """Record the failure as RQ does, with the one line instead of the traceback if there is one."""
        super().handle_job_failure(
            job, queue, started_job_registry, self._failure_line or exc_string, execution
        )
        self._failure_line = ""

    def procline(self, message: str) -> None:
        """Keep the command line, which names the role."""


def lower_priority(load: float) -> None:
    """Give the tick path priority: a snapshot computes for seconds.

    With spare cores (`load`, the average number of runnable processes, is below their number) the job runs
    only on idle time. Otherwise it keeps a tenth of a core: ticks.json must not wait for other programs.
    """
    os.nice(NICENESS)
    if sys.platform.startswith("linux") and load < (os.cpu_count() or 1):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Scheduler(RQScheduler):
    """RQ's scheduler in a thread, on the worker's client.

    RQ runs it as a process, which would outlive a killed worker and cannot find a Sentinel's master. Another
    worker takes over within LOCK_SECONDS.
    """

    def __init__(self, queue: Queue) -> None:
        super().__init__(
            [queue],
            connection=queue.connection,
            interval=LOCK_SECONDS - 60,  # used for this alone: a lock lives 60 s longer
            serializer=JSONSerializer,
            logging_level="WARNING",
        )
        self._client = queue.connection
        self._born = False

    @property
    def connection(self) -> redis.Redis:
        """Return the queue's client."""
        return self._client

    def step(self) -> None:
        """Enqueue due jobs unless another worker's scheduler does. Call it every second."""
        if not self._born:
            self.register_birth()
            self._born = True
        if self._queue_names != self.acquired_locks:
            self.acquire_locks()
        self.heartbeat()
        self.enqueue_scheduled_jobs()

    def leave(self) -> None:
        """Release the lock, so that another worker's scheduler takes over at once."""
        if self._born:
            self.stop()


def failure_line(error: BaseException | None, place: str) -> str:
    """Return a failure as one line for people, "" for a bug, which keeps its traceback."""
    if isinstance(error, JobTimeoutException):
        return "the run took longer than its time limit: it was stopped and resumes at the next try"
    if isinstance(error, redis.RedisError):
        error = explain(error, place)
    return " ".join(str(error).split()) if isinstance(error, PkbError) else ""


ROLE = "jobs"
STEP_SECONDS = 1.0
RETRY_SECONDS = 2.0  # until RQ's loop, which ends when Redis hangs, starts again

log_role = logs.get(ROLE)


def jobs(settings: Settings, stop: threading.Event) -> None:
    """Run jobs until `stop` is set or a signal arrives; finish the current job first."""
    use_market_timezone()
    store = open_store(settings)
    connection = connect_queue(settings)
    place = describe_queue(settings) or describe(settings)
    queue, name = queue_of(connection), worker_id(ROLE)
    background = _BackgroundThread(settings, store, queue, name)
    log_role.info("started", store=describe(settings), queue=place)
    background.start()
    try:
        for life in itertools.count(1):
            # A new name each time: RQ refuses a worker name whose end it has not seen.
            try:
                with JobWorker(queue, f"{name}-{life}", stop, place) as background.worker:
                    background.worker.work(logging_level="WARNING")
            except redis.RedisError as error:
                if life == 1 or background.worker is not None:  # once an outage
                    log_role.warning("redis_unavailable", reason=explain(error, place).message)
            background.worker = None
            # RQ's handlers belong to its loop, which has ended. `run_role` still sets `stop`.
            for number in STOP_SIGNALS:
                signal.signal(number, ignore_signal)
            if stop.wait(0.0 if stop.is_set() else RETRY_SECONDS):
                break
    finally:
        background.end()
    log_role.info("stopped", done=background.done)


def use_market_timezone() -> None:
    """Set the time zone of this process and its children to India's."""
    os.environ["TZ"] = MARKET_TIMEZONE
    time.tzset()


def announce(store: redis.Redis, keys: Keys, role: str, name: str) -> None:
    """Announce this worker; load the function library where it is missing."""
    leases.announce(store, keys, role, name)


class _BackgroundThread(threading.Thread):
    """Runs the scheduler and the heartbeat; retries silently: the worker logs an unavailable Redis."""

    def __init__(self, settings: Settings, store: redis.Redis, queue: Queue, name: str) -> None:
        super().__init__(name="jobs-background", daemon=True)
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
                pass  # the worker's loop logs it and waits
            except Exception:
                log_role.exception("scheduler_failed")  # a bug must not delay later jobs until a restart

    def end(self) -> None:
        """Stop, and release everything that this worker holds."""
        self._over.set()
        self.join()
        try:
            self._scheduler.leave()
            leases.leave(self._store, self._settings.keys, ROLE, self._name)
            self._heart.end(self._store)
        except redis.RedisError:
            pass  # all of it expires by itself

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
