"""How far a job has come, in Redis: what `pkb jobs` shows, and where a job that was killed goes on.

P:job:<job>   hash, TTL   total, done, at (epoch s), and a field a finished part: `408065` → {"rows": 375}

A part is noted once it is finished for good; the others are done again. So a part must be something that may
be done twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import redis
from rq import get_current_job

from pkbrokers_redis.keys import Keys

TTL_SECONDS = 86_400
LISTENER_TTL_SECONDS = 3600, 60  # of a job that always begins anew: while it works, once it is done
RESERVED = {"total", "done", "at"}

Figures = dict[str, int]  # what became of a part: counts only, they are added up
Listener = Callable[[int, int, str], None]  # done, total, the part that was finished


class Progress:
    """The progress of one job. `listener` hears of each finished part: a bar in the terminal."""

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
        """Name all parts; returns those still to do, in their order. What an earlier run finished counts."""
        wanted = list(dict.fromkeys(parts))
        finished = self.figures()
        left = [part for part in wanted if part not in finished]
        done = len(wanted) - len(left)
        self._write({"total": len(wanted), "done": done})
        if self._listener is not None:
            self._listener(done, len(wanted), "")
        return left

    def note(self, part: str, figures: Figures, done: int, total: int) -> None:
        """One part is finished."""
        self._write({part: msgspec.json.encode(figures), "done": done, "total": total})
        if self._listener is not None:
            self._listener(done, total, part)

    def figures(self) -> dict[str, Figures]:
        """Finished part → its figures."""
        found: Any = self._client.hgetall(self._key)
        parts: dict[str, Figures] = {}
        for name, value in found.items():
            part = name.decode(errors="replace")
            if part in RESERVED:
                continue
            try:
                parts[part] = msgspec.json.decode(value, type=dict[str, int])
            except (msgspec.DecodeError, RecursionError):
                pass  # a foreign hand: that part is done again
        return parts

    def forget(self) -> None:
        """The job is over: the next of the same name begins anew."""
        self._client.delete(self._key)

    def _write(self, fields: dict[str, Any]) -> None:
        mapping: dict[Any, Any] = {**fields, "at": int(self._now())}
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hset(self._key, mapping=mapping)
        pipeline.expire(self._key, TTL_SECONDS)
        pipeline.execute()


def job_listener(client: redis.Redis, keys: Keys) -> Listener | None:
    """Writes the progress of the RQ job we are, for `pkb jobs --list`; None outside of a worker."""
    job = get_current_job()
    if job is None:
        return None
    key = keys.job(job.id)

    def hear(done: int, total: int, part: str) -> None:
        fields: dict[Any, Any] = {"done": done, "total": total, "at": int(time.time())}
        client.hset(key, mapping=fields)
        client.expire(key, LISTENER_TTL_SECONDS[done >= total])

    return hear


def add_up(parts: Iterable[Figures]) -> Figures:
    """The sum of all parts, figure by figure."""
    total: Figures = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total


def read_progress(client: redis.Redis, keys: Keys, job: str) -> tuple[int, int] | None:
    """(done, total) of a job; None where it keeps none."""
    found: Any = client.hmget(keys.job(job), ["done", "total"])
    done, total = (int(each) if each and bytes(each).isdigit() else 0 for each in found)
    return (done, total) if total else None
