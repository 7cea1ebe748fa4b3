"""The jobs: one table. A new job is a file in `jobs/` and a row here.

Who enqueues a job (ingest after an outage, `pkb backfill --enqueue`, the cron) needs its row, not its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec

QUEUE = "pkb"
PACKAGE = "pkbrokers_redis.jobs"
DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What the queue must know of a job.

    `function` is `module.function` below `pkbrokers_redis.jobs`; its arguments are keywords of JSON types.
    `timeout_seconds` is how long one run may take: a job of many parts works for a slice and comes again
    (`jobs.slices`). A run that fails is tried again after each of `retry_seconds`, then listed as failed.
    Finished ones are remembered for `keep_seconds`, so that the same request is not carried out twice.
    """

    name: str
    function: str
    timeout_seconds: int = 300
    retry_seconds: tuple[int, ...] = (10, 60, 300)
    keep_seconds: int = DAY_SECONDS
    keep_failed_seconds: int = 7 * DAY_SECONDS

    @property
    def path(self) -> str:
        """What RQ imports."""
        return f"{PACKAGE}.{self.function}"


JOBS: dict[str, JobSpec] = {
    spec.name: spec
    for spec in (
        JobSpec("repair_gap", "backfill.repair_gap"),
        JobSpec("warm_start", "backfill.warm_start"),
        JobSpec("repair_day", "backfill.repair_day"),
        JobSpec("snapshot", "snapshots.snapshot", timeout_seconds=900),
        # the trading day (jobs/cron.py says when)
        JobSpec("login", "daily.login", retry_seconds=(60, 300)),
        JobSpec("instruments", "daily.instruments"),
        JobSpec("calendar", "daily.calendar", timeout_seconds=60, retry_seconds=(10,)),
        JobSpec("capacity", "daily.capacity", timeout_seconds=60),
        JobSpec("feed", "daily.feed", timeout_seconds=60, retry_seconds=(30, 60)),
        JobSpec("day_snapshot", "daily.day_snapshot"),
        JobSpec("settle", "daily.settle"),
        JobSpec("sync_push", "daily.sync_push", timeout_seconds=900),
        JobSpec("sync_pull", "daily.sync_pull", timeout_seconds=900),
        JobSpec("trim", "daily.trim", timeout_seconds=60),
    )
}

PATHS = {spec.path: spec for spec in JOBS.values()}


def job_id(name: str, arguments: dict[str, Any]) -> str:
    """The id of a job with these arguments: the same request is the same job, whoever makes it."""
    text = msgspec.json.encode(arguments, order="deterministic")
    return f"{name}-{sha256(text).hexdigest()[:16]}"
