"""The outbox of jobs that ingest requests: repair a gap, warm an instrument.

    add    HSET P:job_outbox <id> <job>, in the store, next to the outage's notice
    send   a thread of its own: into RQ's queue, then HDEL

RQ may live on another Redis, and may be unavailable for hours. Neither ticks nor notices wait for it, and no
request is lost with a process. The id is made of name and arguments, so sending a job twice runs it once.
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
from pkbrokers_redis.store.errors import is_wrong_type
from pkbrokers_redis.store.queue import JOBS, enqueue, job_id

log = logs.get("ingest")

JOBS_MAX = 1_000  # in the outbox; beyond it new ones are refused, counted and logged
SEND_SECONDS = 1.0
ORPHAN_MS = 30_000  # a request of another worker that waits so long is sent by any
RETRY_SECONDS_MAX = 30.0  # between attempts while RQ is unavailable


class _Job(msgspec.Struct):
    name: str
    arguments: dict[str, Any]
    at: int  # epoch ms, the machine's


class JobOutbox:
    """`add` in any thread, with its own client of the store; `run` in a thread of its own."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        open_queue: Callable[[], Queue],
        keys: Keys,
        *,
        now_ms: Callable[[], float] = lambda: time.time() * 1000,
    ) -> None:
        """Prepare; `connect` returns a client of the store, `open_queue` RQ's queue."""
        self._connect = connect
        self._open_queue = open_queue
        self._key = keys.job_outbox()
        self._now_ms = now_ms
        self._client: redis.Redis | None = None
        self._queue: Queue | None = None
        self._own: set[str] = set()  # ids of this worker's requests
        self._all_checked_ms = 0.0
        self._last_error = ""  # logged once
        self.counts = dict.fromkeys(("jobs_requested", "jobs_queued", "jobs_refused"), 0)

    def add(self, client: redis.Redis, name: str, arguments: dict[str, Any]) -> None:
        """Request a job of the table (`store/job_names.py`). Raises what redis-py raises."""
        id_ = job_id(name, arguments)
        job = msgspec.json.encode(_Job(name, arguments, int(self._now_ms())))
        try:
            if client.hlen(self._key) >= JOBS_MAX:
                self._refuse(name, f"{JOBS_MAX} jobs wait", "start the Redis of PKB_RQ_REDIS_URL")
                return
            client.hset(self._key, id_, job)
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            self._refuse(name, f"{self._key} is no hash", f"look at it, then `DEL {self._key}`")
            return
        self._own.add(id_)
        self.counts["jobs_requested"] += 1

    def _refuse(self, name: str, reason: str, hint: str) -> None:
        self.counts["jobs_refused"] += 1
        log.error("job_refused", job=name, reason=reason, hint=hint)

    def run(self, stop: threading.Event) -> None:
        """Send what was requested until `stop` is set."""
        pause_seconds = SEND_SECONDS
        while not stop.wait(pause_seconds):
            try:
                self.send()
                pause_seconds, self._last_error = SEND_SECONDS, ""
            except (redis.RedisError, PkbError) as error:
                self._client = self._queue = None
                pause_seconds = min(pause_seconds * 2, RETRY_SECONDS_MAX)
                reason = str(error).partition("\n")[0][:200]
                if reason != self._last_error:
                    self._last_error = reason
                    log.warning("job_queue_unavailable", reason=reason)

    def send(self) -> None:
        """Queue this worker's requests, and old ones of others. Raises what redis-py raises, and PkbError."""
        client = self._client = self._client or self._connect()
        ids: Any = client.hkeys(self._key)
        checks_all = not 0 <= self._now_ms() - self._all_checked_ms < ORPHAN_MS / 2
        for id_ in ids:
            name = id_.decode(errors="replace")
            if name not in self._own and not checks_all:
                continue
            text: Any = client.hget(self._key, id_)
            job = _decode(text)
            if job is not None and name not in self._own and abs(self._now_ms() - job.at) < ORPHAN_MS:
                continue
            if job is not None:
                self._queue = self._queue or self._open_queue()
                if enqueue(self._queue, job.name, job.arguments) is not None:
                    self.counts["jobs_queued"] += 1
            elif text is not None:
                log.warning("job_malformed", key=self._key, starts_with=text[:64].hex())
            client.hdel(self._key, id_)
            self._own.discard(name)
        if checks_all:
            self._all_checked_ms = self._now_ms()


def _decode(text: bytes | None) -> _Job | None:
    """Return the job; None for one that was deleted, or is no job of the table."""
    try:
        job = msgspec.json.decode(text or b"", type=_Job)
    except msgspec.DecodeError:
        return None
    return job if job.name in JOBS else None
