"""Is what stands around the pipeline well: jobs, instrument master? Pure, as the rules of `health.py`."""

from __future__ import annotations

from pkbrokers_redis.core.jobs import QUEUE
from pkbrokers_redis.pipeline.health import Finding
from pkbrokers_redis.store.master import Manifest

FAILED_JOBS = f"rq:failed:{QUEUE}"  # RQ's own registry, a sorted set
MASTER_AGE_SECONDS_MAX = 4 * 86_400  # over a long weekend; contracts expire and tokens are given anew


def jobs_well(failed: int) -> Finding:
    """No job is listed as failed."""
    if failed:
        return Finding("jobs", "warn", f"{failed:,} have failed", "`pkb jobs --failed` lists them")
    return Finding("jobs", "ok", "none has failed")


def master_well(manifest: Manifest | None, now_s: float) -> Finding:
    """The instrument master is of these days."""
    if manifest is None:
        return Finding("master", "ok", "none was fetched; tokens and names given by hand do without")
    age_seconds = manifest.age_seconds(now_s)
    mend = "run `pkb instruments sync`, or keep `pkb cron` running: it does so each morning"
    if age_seconds is None:
        return Finding("master", "warn", "its time cannot be read", mend)
    what = f"{manifest.rows:,} instruments, fetched {age_seconds / 3600:,.0f} h ago"
    return Finding("master", "warn" if age_seconds > MASTER_AGE_SECONDS_MAX else "ok", what, mend)
