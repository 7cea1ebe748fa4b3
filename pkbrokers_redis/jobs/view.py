"""The queue as `pkb jobs --list`, `--failed` and `--retry` show it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import redis
from rq import Queue
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.serializers import JSONSerializer

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.jobs.progress import read_progress
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.queue import PATHS, UNREADABLE, KnownJob

JOBS_MAX = 1_000  # per state; nobody reads a longer list
REASON_LENGTH_MAX = 200


def list_jobs(queue: Queue, store: redis.Redis, keys: Keys) -> list[dict[str, Any]]:
    """Return running, waiting and scheduled jobs; `since` is epoch seconds."""
    rows: list[dict[str, Any]] = []
    for state, ids in (
        ("running", queue.started_job_registry.get_job_ids(0, JOBS_MAX)),
        ("waiting", queue.get_job_ids(0, JOBS_MAX)),
        ("scheduled", queue.scheduled_job_registry.get_job_ids(0, JOBS_MAX)),
    ):
        for job in _fetch(queue, ids):
            progress = read_progress(store, keys, job.id)
            since = job.started_at if state == "running" else job.enqueued_at or job.created_at
            rows.append(
                {
                    "id": job.id,
                    "job": name_of(job),
                    "state": state,
                    "since": since.timestamp() if since else None,
                    "done": progress[0] if progress else None,
                    "total": progress[1] if progress else None,
                    "retries_left": job.retries_left or 0,
                }
            )
    return rows


def failed_jobs(queue: Queue) -> list[dict[str, Any]]:
    """Return jobs that failed for good: `id job at reason`, newest first."""
    ids = queue.failed_job_registry.get_job_ids(0, JOBS_MAX)
    rows = [
        {
            "id": job.id,
            "job": name_of(job),
            "at": job.ended_at.timestamp() if job.ended_at else None,
            "reason": reason(job),
        }
        for job in _fetch(queue, ids)
    ]
    return sorted(rows, key=lambda row: row["at"] or 0, reverse=True)


def retry(queue: Queue, chosen: str) -> list[str]:
    """Requeue a failed job, or `all` of them, with all retries. Raise PkbError for an unknown id."""
    failed: list[str] = queue.failed_job_registry.get_job_ids(0, JOBS_MAX)
    if chosen != "all" and chosen not in failed:
        raise PkbError(f"no failed job {chosen!r}", "see `pkb jobs --failed`")
    retried: list[str] = []
    for job in _fetch(queue, failed if chosen == "all" else [chosen]):
        if job.path == UNREADABLE:
            if chosen == "all":
                continue
            raise PkbError(
                f"job {chosen} {UNREADABLE}", "another program wrote it; it is deleted after a week"
            )
        spec = PATHS.get(job.path)
        job.retries_left = len(spec.retry_seconds) if spec is not None else None
        try:
            queue.failed_job_registry.requeue(job)
            retried.append(job.id)
        except (NoSuchJobError, InvalidJobOperation):
            pass  # another process requeued it, or it expired
    return retried


def name_of(job: KnownJob) -> str:
    """Return the job's name in the table, or the function of an unknown job."""
    spec = PATHS.get(job.path)
    return spec.name if spec is not None else job.path


def reason(job: KnownJob) -> str:
    """Return why the job failed: the last line of its traceback without the exception's package."""
    if job.path == UNREADABLE:
        return "its data is no JSON of a job: another program wrote it"
    result = job.latest_result()
    lines = ((result.exc_string if result is not None else None) or "").strip().splitlines()
    if not lines:
        return "it was rescheduled too often"
    kind, colon, text = lines[-1].partition(": ")
    line = f"{kind.rpartition('.')[2]}{colon}{text}" if " " not in kind else lines[-1]
    return " ".join(line.split())[:REASON_LENGTH_MAX]


def _fetch(queue: Queue, ids: Iterable[str]) -> list[KnownJob]:
    """Return the jobs that exist. One whose fields cannot be read is there, too, without them."""
    jobs: list[KnownJob] = []
    for id_ in ids:
        job = KnownJob(id_, connection=queue.connection, serializer=JSONSerializer)
        try:
            job.refresh()  # type: ignore[no-untyped-call]
        except NoSuchJobError:
            if not queue.connection.exists(job.key):
                continue  # it has ended meanwhile
        except Exception:  # whatever RQ raises for another program's fields
            job.data = b""
        jobs.append(job)
    return jobs
