"""The progress of long jobs, kept in Redis, and their work in slices.

    P:job:<job>   hash, TTL   total, done, at (epoch s), one field per finished part: `408065` → {"rows": 375}

`pkb jobs --list` shows the progress, and a job that was killed resumes at it. A part is recorded when it is
complete; other parts are done again, so each part must be repeatable.

A long job runs in slices: it works for a while, then queues itself behind the waiting jobs. So a warm start
of 3,000 instruments (twenty minutes at three requests a second) does not delay the repair of an outage, a run
needs no timeout of hours, and a crash costs one part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import redis
from rq import Retry, get_current_job

from pkbrokers_redis.keys import Keys

TTL_SECONDS = 86_400
LISTENER_TTL_SECONDS = 3600, 60  # for a job without resume: while it runs, after its end
RESERVED = {"total", "done", "at"}

Figures = dict[str, int]  # counts of one part; they are summed
Listener = Callable[[int, int, str], None]  # done, total, the finished part


class Progress:
    """The progress of one job. `listener` is called for each finished part, for a progress bar."""

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        job: str,
        listener: Listener | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._client, self._key, self._now = client, keys.job(job), now
        self._listener = listener

    def begin(self, parts: Iterable[str]) -> list[str]:
        """Record all parts. Return those that no earlier run finished, in order."""
        named = list(dict.fromkeys(parts))
        finished = self.figures()
        left = [part for part in named if part not in finished]
        done = len(named) - len(left)
        self._write({"total": len(named), "done": done})
        if self._listener is not None:
            self._listener(done, len(named), "")
        return left

    def note(self, part: str, figures: Figures, done: int, total: int) -> None:
        """Record a finished part."""
        self._write({part: msgspec.json.encode(figures), "done": done, "total": total})
        if self._listener is not None:
            self._listener(done, total, part)

    def figures(self) -> dict[str, Figures]:
        """Return finished part → its figures."""
        found: Any = self._client.hgetall(self._key)
        parts: dict[str, Figures] = {}
        for name, value in found.items():
            part = name.decode(errors="replace")
            if part in RESERVED:
                continue
            try:
                parts[part] = msgspec.json.decode(value, type=dict[str, int])
            except (msgspec.DecodeError, RecursionError):
                pass  # written by another program: the part is done again
        return parts

    def forget(self) -> None:
        """Forget the progress, so that the next job of this name starts from the beginning."""
        self._client.delete(self._key)

    def _write(self, fields: dict[str, Any]) -> None:
        mapping: dict[Any, Any] = {**fields, "at": int(self._now())}
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hset(self._key, mapping=mapping)
        pipeline.expire(self._key, TTL_SECONDS)
        pipeline.execute()


def job_listener(client: redis.Redis, keys: Keys) -> Listener | None:
    """Return a listener that writes the current RQ job's progress; None outside a worker."""
    job = get_current_job()
    if job is None:
        return None
    key = keys.job(job.id)

    def record(done: int, total: int, part: str) -> None:
        fields: dict[Any, Any] = {"done": done, "total": total, "at": int(time.time())}
        client.hset(key, mapping=fields)
        client.expire(key, LISTENER_TTL_SECONDS[done >= total])

    return record


def add_up(parts: Iterable[Figures]) -> Figures:
    """Sum the figures of all parts."""
    total: Figures = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total


def read_progress(client: redis.Redis, keys: Keys, job: str) -> tuple[int, int] | None:
    """Return (done, total) of a job, None if it records none."""
    found: Any = client.hmget(keys.job(job), ["done", "total"])
    done, total = (int(each) if each and bytes(each).isdigit() else 0 for each in found)
    return (done, total) if total else None


SLICE_SECONDS = 30.0
RUNS_MAX = 100_000  # of one job; more slices than any list of instruments needs

Work = Callable[[str], Figures]


def run_parts(
    progress: Progress,
    parts: Iterable[str],
    work: Work,
    *,
    seconds_max: float | None = SLICE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Figures | None:
    """Do the unfinished parts until the slice ends.

    Args:
        progress: where finished parts are recorded.
        parts: names of all parts.
        work: does one part and returns its counts.
        seconds_max: length of a slice; at least one part is done in it. None does all parts.
        clock: monotonic seconds.

    Returns:
        The summed figures of all parts, or None if the slice ended first.
    """
    left = progress.begin(parts)
    finished = progress.figures()
    total = len(finished) + len(left)
    began = clock()
    for number, part in enumerate(left):
        if number and seconds_max is not None and clock() - began >= seconds_max:
            return None
        finished[part] = work(part)
        progress.note(part, finished[part], len(finished), total)
    return add_up(finished.values())


def reschedule(after_seconds: float = 0.0) -> Retry:
    """Return what a job returns to run again: behind the waiting jobs, or after so many seconds."""
    return Retry(max=RUNS_MAX, interval=max(0, round(after_seconds + 0.499)))


def current_job_id(otherwise: str) -> str:
    """Return the id of the current RQ job, `otherwise` outside a worker."""
    job = get_current_job()
    return otherwise if job is None else job.id
