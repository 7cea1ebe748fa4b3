"""The queue of background jobs, and the table of jobs: RQ on PKB_RQ_REDIS_URL.

    queue = open_queue(settings)
    enqueue(queue, "repair_gap", {"tokens": [408065], "from_ms": …, "to_ms": …})

A new job is a function in `jobs/` and a row of `JOBS`. Arguments and results are JSON, and only functions of
the table run: another writer of the queue can add data, but no code. A caller that enqueues a job (ingest
after an outage, `pkb backfill --enqueue`, the cron) needs its row and not its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

import msgspec
import redis
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.keys import JOB_QUEUE
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import (
    client_options,
    connect,
    explain,
    open_url,
    place_of,
)

PACKAGE = "pkbrokers_redis.jobs"
DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What the queue must know of a job.

    `function` is `module.function` below `pkbrokers_redis.jobs`; its arguments are keywords of JSON types.
    `timeout_seconds` bounds one run: a job of many parts works for a slice and enqueues itself again
    (`jobs/progress.py`). A failed run is retried after each of `retry_seconds`, then listed as failed.
    Finished jobs are kept for `keep_seconds`, so that the same request does not run twice.
    """

    name: str
    function: str
    timeout_seconds: int = 300
    retry_seconds: tuple[int, ...] = (10, 60, 300)
    keep_seconds: int = DAY_SECONDS
    keep_failed_seconds: int = 7 * DAY_SECONDS

    @property
    def path(self) -> str:
        """Return the dotted name that RQ imports."""
        return f"{PACKAGE}.{self.function}"


JOBS: dict[str, JobSpec] = {
    spec.name: spec
    for spec in (
        JobSpec("repair_gap", "backfill.repair_gap"),
        JobSpec("warm_start", "backfill.warm_start"),
        JobSpec("repair_day", "backfill.repair_day"),
        JobSpec("snapshot", "snapshots.snapshot", timeout_seconds=900),
        # the trading day (times are in jobs/cron.py)
        JobSpec("login", "daily.login", retry_seconds=(60, 300)),
        JobSpec("instruments", "daily.instruments"),
        JobSpec("calendar", "daily.calendar", timeout_seconds=60, retry_seconds=(10,)),
        JobSpec("capacity", "daily.capacity", timeout_seconds=60),
        JobSpec("feed", "daily.feed", timeout_seconds=60, retry_seconds=(30, 60)),
        JobSpec("day_snapshot", "daily.day_snapshot"),
        JobSpec("final_candles", "daily.final_candles"),
        JobSpec("sync_push", "daily.sync_push", timeout_seconds=900),
        JobSpec("sync_pull", "daily.sync_pull", timeout_seconds=900),
        JobSpec("trim", "daily.trim", timeout_seconds=60),
    )
}

PATHS = {spec.path: spec for spec in JOBS.values()}
OLD_PATHS = {f"{PACKAGE}.daily.settle": f"{PACKAGE}.daily.final_candles"}  # of earlier releases, still queued
UNREADABLE = "cannot be read"  # shown for a job that another program wrote, or by another serializer
NEWER_DAYS_MAX = 1.0  # a job of a newer release waits so long for a worker that knows it

SOCKET_SECONDS_MAX = 30.0
STORE_URL, QUEUE_URL = "PKB_REDIS_URL", "PKB_RQ_REDIS_URL"
OVER = {JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED}


def job_id(name: str, arguments: dict[str, Any]) -> str:
    """Return the id of a job with these arguments. The same request is the same job, from any process."""
    text = msgspec.json.encode(arguments, order="deterministic")
    return f"{name}-{sha256(text).hexdigest()[:16]}"


class UnknownJob(PkbError):
    """Raised when a job in the queue names a function that is not in the table."""


class KnownJob(Job):
    """RQ's job, confined to the functions of the table."""

    @property
    def func(self) -> Callable[..., Any] | None:
        """Return the function to run. Raise UnknownJob when it is not in the table."""
        if self.path not in PATHS:
            hint = "find the other writer of the queue `pkb`, or start workers of its release"
            raise UnknownJob(f"{self.path} is not in the table of jobs", hint)
        self.func_name = self.path
        function: Callable[..., Any] | None = super().func
        return function

    @property
    def path(self) -> str:
        """Return the function's dotted name in this release; UNREADABLE for bytes that are no job."""
        try:
            name = str(self.func_name)
        except Exception:  # whatever the serializer raises for another one's bytes
            return UNREADABLE
        return OLD_PATHS.get(name, name)

    def is_newer(self, now: datetime) -> bool:
        """Return whether the job may be of a newer release: a function of ours that the table lacks."""
        is_ours = self.path.startswith(f"{PACKAGE}.") and self.path not in PATHS
        return is_ours and (now - self.created_at) < timedelta(days=NEWER_DAYS_MAX)


def connect_queue(settings: Settings) -> redis.Redis:
    """Return a client of the jobs' Redis, which has answered."""
    own = settings.rq_redis_url
    if not has_queue(settings):
        raise SettingsError(
            "RQ jobs do not run on a Redis Cluster", f"point {QUEUE_URL} at a single server or a Sentinel set"
        )
    if own is None:
        return connect(settings, socket_timeout_seconds=SOCKET_SECONDS_MAX)
    try:
        client = open_url(own.get_secret_value(), client_options(SOCKET_SECONDS_MAX, retries=0))
        client.ping()
    except (PkbError, redis.RedisError, OSError, UnicodeError) as error:
        explained = explain(error, place_of(own.get_secret_value()))
        explained.message = explained.message.replace(STORE_URL, QUEUE_URL)
        explained.hint = explained.hint.replace(STORE_URL, QUEUE_URL)
        raise explained from (None if explained is error else error)
    return client


def has_queue(settings: Settings) -> bool:
    """Return whether the settings name a Redis for the jobs: RQ does not run on a cluster."""
    url = settings.rq_redis_url or settings.redis_url
    return url is None or "+cluster:" not in url.get_secret_value().partition("//")[0]


def describe_queue(settings: Settings) -> str | None:
    """Return the address of the jobs' own Redis, without a secret; None when they share the store's."""
    return None if settings.rq_redis_url is None else place_of(settings.rq_redis_url.get_secret_value())


def open_queue(settings: Settings, connection: redis.Redis | None = None) -> Queue:
    """Return the queue `pkb`. Raise as `connect_queue` does."""
    return queue_of(connect_queue(settings) if connection is None else connection)


def queue_of(connection: redis.Redis) -> Queue:
    """Return the queue `pkb` on a client of the jobs' Redis."""
    return Queue(JOB_QUEUE, connection=connection, serializer=JSONSerializer, job_class=KnownJob)


def enqueue(
    queue: Queue, name: str, arguments: dict[str, Any], *, delay_seconds: float = 0.0, again: bool = False
) -> str | None:
    """Enqueue a job of the table.

    The id is derived from name and arguments, so that a request that waits, runs or has finished recently is
    not enqueued twice: then return None, else the job's id. `again` deletes a finished one first.
    """
    spec, id_ = JOBS[name], job_id(name, arguments)
    if again and (job := queue.fetch_job(id_)) is not None and job.get_status() in OVER:
        job.delete()
    options: dict[str, Any] = {
        "kwargs": arguments,
        "job_id": id_,
        "unique": True,
        "job_timeout": spec.timeout_seconds,
        "result_ttl": spec.keep_seconds,
        "failure_ttl": spec.keep_failed_seconds,
        "description": name,
    }
    if spec.retry_seconds:
        options["retry"] = Retry(max=len(spec.retry_seconds), interval=list(spec.retry_seconds))
    try:
        if delay_seconds > 0:
            queue.enqueue_in(timedelta(seconds=delay_seconds), spec.path, **options)
        else:
            queue.enqueue(spec.path, **options)
    except DuplicateJobError:
        return None
    return id_
