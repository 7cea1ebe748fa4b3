"""What the routes share: the store, the threads that read it, the cached health, and counters.

    quick   quotes, candles of one instrument, the health        4 threads, 64 waiting
    heavy   bulk reads, searches through the instrument list     2 threads, 8 waiting

A request beyond these bounds gets 503, so that memory and the load on Redis stay bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
from aiohttp import web
from redis.exceptions import RedisClusterException

from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.runtime.cluster_state import ClusterState, Finding
from pkbrokers_redis.runtime.health import check_health
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import describe, explain

T = TypeVar("T")

REDIS_ERRORS = (redis.RedisError, RedisClusterException, OSError)
READ_SECONDS_MAX = 10.0
HEALTH_AGE_SECONDS_MAX = 1.0  # requests within this time share one health check
STREAMS_MAX = 64  # clients of /api/closed; each has a connection to Redis
DOWNLOADS_MAX = 4  # responses of /api/bulk that are computed or sent


class TooBusy(PkbError):
    """Raised when too many requests run at once, or when the store is too slow."""


class Executor:
    """A bounded thread pool for one event loop's blocking reads: `await quick(store.get_quote, "INFY")`."""

    def __init__(self, name: str, threads: int, waiting_max: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"web-{name}")
        self._pending: set[asyncio.Future[Any]] = set()
        self._pending_max = threads + waiting_max

    async def __call__(self, read: Callable[..., T], *arguments: Any) -> T:
        """Return what `read` returns. Raise TooBusy for a full queue, or after READ_SECONDS_MAX."""
        if len(self._pending) >= self._pending_max:
            raise TooBusy("too many requests at once", "try again in a moment")
        future = asyncio.get_running_loop().run_in_executor(self._pool, read, *arguments)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        done, _ = await asyncio.wait(
            {future}, timeout=READ_SECONDS_MAX
        )  # the thread itself cannot be stopped
        if not done:
            raise TooBusy("the store does not answer in time", "try again in a moment")
        return future.result()

    def _finished(self, future: asyncio.Future[Any]) -> None:
        self._pending.discard(future)
        if not future.cancelled():
            future.exception()  # seen, also where the request no longer waits

    def close(self) -> None:
        """Stop the threads; reads that still wait do not start."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Services:
    """Everything a route needs. Create it inside the event loop.

    `quick` and `heavy` run blocking reads, `streams` and `downloads` count what is open, `counts` are the
    counters of the heartbeat and of /metrics.
    """

    def __init__(self, settings: Settings, store: CandleStore) -> None:
        self.settings = settings
        self.store = store
        self.quick = Executor("quick", threads=4, waiting_max=64)
        self.heavy = Executor("heavy", threads=2, waiting_max=8)
        self.streams: set[asyncio.Task[None]] = set()
        self.downloads = 0
        self.counts: Counter[str] = Counter(requests=0, refused=0, failed=0, streams_dropped=0)
        self._health_lock = asyncio.Lock()
        self._health_at = float("-inf")
        self._health: tuple[ClusterState | None, list[Finding]] = (None, [])

    async def health(self) -> tuple[ClusterState | None, list[Finding]]:
        """Return the pipeline's state and findings, at most HEALTH_AGE_SECONDS_MAX old.

        An unavailable Redis is a finding, with None for the state.
        """
        async with self._health_lock:
            if time.monotonic() - self._health_at > HEALTH_AGE_SECONDS_MAX:
                try:
                    self._health = await self.quick(check_health, self.store.client, self.store.settings)
                except (PkbError, *REDIS_ERRORS) as error:
                    shown = self.explain(error)
                    self._health = None, [Finding("redis", "fail", shown.message, shown.hint)]
                self._health_at = time.monotonic()
            return self._health

    def explain(self, error: BaseException) -> PkbError:
        """Return a store's error as one line without secrets."""
        return explain(error, describe(self.settings, for_reading=True))

    def figures(self) -> dict[str, int]:
        """Return the counters for the heartbeat."""
        return {**self.counts, "streams": len(self.streams), "downloads": self.downloads}

    async def end_streams(self, _: web.Application) -> None:
        """End the event streams of all clients."""
        streams = list(self.streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)

    def close(self) -> None:
        """Stop the threads."""
        self.quick.close()
        self.heavy.close()


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the route table: `GET path`.

    `example` is a path with query that the route answers (tests request it). `is_open` routes need no token.
    `is_long` routes send their body in pieces and have no HEAD.
    """

    path: str
    handler: Callable[..., Any]  # of the request, and of `services`
    example: str
    is_open: bool = False
    is_long: bool = False
