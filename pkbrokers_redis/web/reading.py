"""The store is read in threads, of which there are few, and the line before them is short.

    quick   quotes, candles of one instrument, the health        4 threads, 64 waiting
    heavy   everything at once, searches through the master      2 threads, 8 waiting

Beyond that a request is told to come again: memory and Redis stay as they are however many ask.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import redis
from redis.exceptions import RedisClusterException

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.runtime.cluster_state import Facts
from pkbrokers_redis.runtime.health import Finding

T = TypeVar("T")

REDIS_ERRORS = (redis.RedisError, RedisClusterException, OSError)
READ_SECONDS_MAX = 10.0
PICTURE_SECONDS_MAX = 1.0  # how old a picture of the pipeline may be that is shown again


class Busy(PkbError):
    """Raised when more is asked for at once than we let in, or when the store is too slow."""


class Reading:
    """Runs blocking reads: `await reading(store.get_quote, "INFY")`. Raises Busy, and what it raises."""

    def __init__(self, name: str, threads: int, waiting_max: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"web-{name}")
        self._pending_max = threads + waiting_max
        self._pending = 0
        self._lock = threading.Lock()

    async def __call__(self, read: Callable[..., T], *arguments: Any) -> T:
        with self._lock:
            if self._pending >= self._pending_max:
                raise Busy("too many requests at once", "ask again in a moment")
            self._pending += 1
        future = self._pool.submit(read, *arguments)
        future.add_done_callback(self._is_done)
        try:
            async with asyncio.timeout(READ_SECONDS_MAX):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Busy("the store does not answer in time", "ask again in a moment") from None

    def _is_done(self, _: Future[Any]) -> None:
        with self._lock:
            self._pending -= 1

    def close(self) -> None:
        """Let go of the threads; what waits is not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Picture:
    """The pipeline's health, looked at once for all who ask within a second."""

    def __init__(
        self,
        reading: Reading,
        look: Callable[[], tuple[Facts, list[Finding]]],
        explain: Callable[[BaseException], PkbError],
    ) -> None:
        self._reading = reading
        self._look = look
        self._explain = explain
        self._lock = asyncio.Lock()
        self._at = float("-inf")
        self._seen: tuple[Facts | None, list[Finding]] = (None, [])

    async def get(self) -> tuple[Facts | None, list[Finding]]:
        """Facts and findings. A store that is away is no error here but a finding, without facts."""
        async with self._lock:
            if time.monotonic() - self._at > PICTURE_SECONDS_MAX:
                try:
                    self._seen = await self._reading(self._look)
                except (PkbError, *REDIS_ERRORS) as error:
                    told = self._explain(error)
                    self._seen = None, [Finding("redis", "fail", told.message, told.hint)]
                self._at = time.monotonic()
            return self._seen
