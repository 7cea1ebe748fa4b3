"""Jobs that ingest wants done (repair a gap, warm an instrument), and how they get to RQ.

    want   HSET P:job_outbox <id> <job>, in the store, where the outage's notice goes too
    carry  a thread of its own: into RQ's queue, then HDEL

RQ may live on another Redis, and may be away for hours: neither ticks nor notices wait for it, and no request
is lost with a process. The id comes from name and arguments, so that carrying one twice does it once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import redis
from redis.exceptions import ResponseError
from rq import Queue

from pkbrokers_redis import logs
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.job_names import JOBS, job_id
from pkbrokers_redis.store.queue import enqueue

log = logs.get("ingest")

JOBS_MAX = 1_000  # that wait in P:job_outbox; beyond it new ones are refused, counted and logged
LOOK_SECONDS = 1.0
ORPHAN_MS = 30_000  # another worker's request that waited so long is carried by whoever sees it
PAUSE_SECONDS_MAX = 30.0  # between tries while RQ is away


class _Job(msgspec.Struct):
    name: str
    arguments: dict[str, Any]
    at: int  # epoch ms, the machine's


class WantedJobs:
    """`want` in any thread with a client of the store; `run` in one of its own."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        open_queue: Callable[[], Queue],
        keys: Keys,
        *,
        now_ms: Callable[[], float] = lambda: time.time() * 1000,
    ) -> None:
        self._connect = connect
        self._open_queue = open_queue
        self._key = keys.job_outbox()
        self._now_ms = now_ms
        self._client: redis.Redis | None = None
        self._queue: Queue | None = None
        self._ours: set[str] = set()
        self._looked_at_all_ms = 0.0
        self._told = ""
        self.counts = dict.fromkeys(("jobs_wanted", "jobs_queued", "jobs_refused"), 0)

    def want(self, client: redis.Redis, name: str, arguments: dict[str, Any]) -> None:
        """Ask for a job of the table (`store/job_names.py`). Raises what redis-py raises."""
        id_ = job_id(name, arguments)
        text = msgspec.json.encode(_Job(name, arguments, int(self._now_ms())))
        try:
            if client.hlen(self._key) >= JOBS_MAX:
                self._refuse(name, f"{JOBS_MAX} wait", "bring PKB_RQ_REDIS_URL back")
                return
            client.hset(self._key, id_, text)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._refuse(name, f"{self._key} is no hash", f"look at it, then `DEL {self._key}`")
            return
        self._ours.add(id_)
        self.counts["jobs_wanted"] += 1

    def _refuse(self, name: str, why: str, hint: str) -> None:
        self.counts["jobs_refused"] += 1
        log.error("job_refused", job=name, why=why, hint=hint)

    def run(self, stop: threading.Event) -> None:
        """Carry what is wanted, again and again."""
        pause_seconds = LOOK_SECONDS
        while not stop.wait(pause_seconds):
            try:
                self.carry()
                pause_seconds, self._told = LOOK_SECONDS, ""
            except (redis.RedisError, PkbError) as error:
                self._client = self._queue = None
                pause_seconds = min(pause_seconds * 2, PAUSE_SECONDS_MAX)
                why = str(error).partition("\n")[0][:200]
                if why != self._told:
                    self._told = why
                    log.warning("jobs_wait", why=why)

    def carry(self) -> None:
        """Put into RQ what is ours, or has waited for long. Raises what redis-py raises, and PkbError."""
        client = self._client = self._client or self._connect()
        ids: Any = client.hkeys(self._key)
        looks_at_all = not 0 <= self._now_ms() - self._looked_at_all_ms < ORPHAN_MS / 2
        for id_ in ids:
            name = id_.decode(errors="replace")
            if name not in self._ours and not looks_at_all:
                continue
            found: Any = client.hget(self._key, id_)
            job = _decode(found)
            if job is not None and name not in self._ours and abs(self._now_ms() - job.at) < ORPHAN_MS:
                continue
            if job is not None:
                self._queue = self._queue or self._open_queue()
                if enqueue(self._queue, job.name, job.arguments) is not None:
                    self.counts["jobs_queued"] += 1
            elif found is not None:
                log.warning("odd_job", key=self._key, starts_with=found[:64].hex())
            client.hdel(self._key, id_)
            self._ours.discard(name)
        if looks_at_all:
            self._looked_at_all_ms = self._now_ms()


def _decode(found: bytes | None) -> _Job | None:
    """The job; None for one that is gone, or that a foreign hand wrote."""
    try:
        job = msgspec.json.decode(found or b"", type=_Job)
    except msgspec.DecodeError:
        return None
    return job if job.name in JOBS else None
