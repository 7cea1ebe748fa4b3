"""The queue of the jobs: RQ on PKB_RQ_REDIS_URL. How to reach it, and how a job gets in.

    queue = open_queue(settings)
    enqueue(queue, "repair_gap", {"tokens": [408065], "from_ms": …, "to_ms": …})

Arguments and results are JSON, and only functions of the table in `store/job_names.py` are run: what somebody
else writes into the queue is data to us, no code.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry as ConnectionRetry
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import (
    CONNECT_SECONDS_MAX,
    HEALTH_CHECK_SECONDS,
    connect,
    explain,
    open_url,
    place_of,
)
from pkbrokers_redis.store.job_names import JOBS, PATHS, QUEUE, job_id

SOCKET_SECONDS_MAX = 30.0
OURS, JOBS_OWN = "PKB_REDIS_URL", "PKB_RQ_REDIS_URL"
OVER = {JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED}


class UnknownJob(PkbError):
    """Raised when a job in the queue names a function that is not in our table."""


class KnownJob(Job):
    """RQ's job, confined to the functions of our table."""

    @property
    def func(self) -> Callable[..., Any] | None:
        """The function to run. Raises UnknownJob."""
        if self.func_name not in PATHS:
            raise UnknownJob(f"{self.func_name} is no job of ours", "look who else writes to the queue `pkb`")
        function: Callable[..., Any] | None = super().func
        return function


def connect_queue(settings: Settings) -> redis.Redis:
    """A client of the jobs' Redis that has answered; any Redis that RQ knows will do.

    Raises RedisUnavailable, and SettingsError for a cluster: RQ's keys have no common slot.
    """
    own = settings.rq_redis_url
    if not has_queue(settings):
        raise SettingsError(
            "RQ jobs do not run on a Redis Cluster", f"point {JOBS_OWN} at a single server or a Sentinel set"
        )
    if own is None:
        return connect(settings, socket_timeout_seconds=SOCKET_SECONDS_MAX)
    options = {
        "socket_timeout": SOCKET_SECONDS_MAX,
        "socket_connect_timeout": CONNECT_SECONDS_MAX,
        "health_check_interval": HEALTH_CHECK_SECONDS,
        "retry": ConnectionRetry(NoBackoff(), 0),
        "protocol": 2,
    }
    try:
        client = open_url(own.get_secret_value(), options)
        client.ping()
    except (PkbError, redis.RedisError, OSError, UnicodeError) as error:
        told = explain(error, place_of(own.get_secret_value()))
        told.message, told.hint = (text.replace(OURS, JOBS_OWN) for text in (told.message, told.hint))
        raise told from (None if told is error else error)
    return client


def has_queue(settings: Settings) -> bool:
    """Whether there is a Redis for the jobs: RQ does not run on a cluster."""
    url = settings.rq_redis_url or settings.redis_url
    return url is None or "+cluster:" not in url.get_secret_value().partition("//")[0]


def describe_queue(settings: Settings) -> str | None:
    """Where the jobs' own Redis is; None where they share the store's. Never holds a secret."""
    return None if settings.rq_redis_url is None else place_of(settings.rq_redis_url.get_secret_value())


def open_queue(settings: Settings, connection: redis.Redis | None = None) -> Queue:
    """The queue `pkb`. Raises as `connect_queue` does."""
    return queue_of(connect_queue(settings) if connection is None else connection)


def queue_of(connection: redis.Redis) -> Queue:
    """The queue `pkb` on a client of the jobs' Redis."""
    return Queue(QUEUE, connection=connection, serializer=JSONSerializer, job_class=KnownJob)


def enqueue(
    queue: Queue, name: str, arguments: dict[str, Any], *, delay_seconds: float = 0.0, again: bool = False
) -> str | None:
    """Put a job of the table into the queue, `delay_seconds` from now. Its id, None if it is there already.

    The id comes from name and arguments: a request that waits, runs or has been carried out lately is not
    taken twice. `again` takes it anew where it is over. Raises what redis-py raises, KeyError for a job that
    is not in the table.
    """
    spec, id_ = JOBS[name], job_id(name, arguments)
    if again:
        forget_if_over(queue, id_)
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


def forget_if_over(queue: Queue, id_: str) -> None:
    """Forget a job that has finished, failed or was stopped."""
    try:
        job = KnownJob.fetch(id_, connection=queue.connection, serializer=JSONSerializer)
        if job.get_status() in OVER:
            job.delete()
    except NoSuchJobError:
        pass
