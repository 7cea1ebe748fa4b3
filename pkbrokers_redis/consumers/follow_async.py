"""Following the closed candles under asyncio: `async for candle in store.follow_async(intervals=["1m"])`.

The same positions, filters and count of missed announcements as `Follower`; a position of the one is good in
the other. On a cluster each stream has its own waiting read, because an XREAD cannot span slots.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from types import TracebackType
from typing import Any

from redis.exceptions import ResponseError

from pkbrokers_redis.consumers.follow import (
    BLOCK_MS,
    CHECK_SECONDS,
    ENTRIES_A_READ,
    ClosedCandle,
    parse_entry,
)
from pkbrokers_redis.consumers.position import Progress, Reader, text_of
from pkbrokers_redis.core.errors import WrongKeyType
from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.store.async_client import AsyncClient
from pkbrokers_redis.store.read import Tally


class AsyncFollower(Reader):
    """Iterates over closed candles as they are announced; see `Follower` for `position` and `missed`.

    Makes its first contact with Redis when it is first asked: a fresh one begins there. To begin now, enter
    it as a context (`async with store.follow_async(…) as follower`), which also closes its client at the end.
    """

    def __init__(
        self,
        client: AsyncClient,
        keys: Keys,
        *,
        tokens: Collection[int] | None = None,
        intervals: Collection[str] | None = None,
        position: str | None = None,
        block_seconds: float | None = None,
    ) -> None:
        self._tally = Tally()
        self._client = client
        self._keys = keys
        self._tokens = None if tokens is None else frozenset(tokens)
        self._intervals = None if intervals is None else frozenset(intervals)
        self._block_seconds = block_seconds
        self._progress = Progress(keys, tokens, position)
        self._has_begun = False
        self._checked_at = 0.0  # monotonic seconds
        self._is_clustered = not hasattr(client, "connection_pool")
        self._reads: dict[tuple[str, str], asyncio.Task[Any]] = {}  # cluster only: (key, id) → pending XREAD

    async def __aenter__(self) -> AsyncFollower:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the pending reads and close the client."""
        reads, self._reads = list(self._reads.values()), {}
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        await self._client.aclose()

    def __aiter__(self) -> AsyncFollower:
        return self

    async def __anext__(self) -> ClosedCandle:
        await self._begin()
        clock = asyncio.get_running_loop().time
        give_up_at = None if self._block_seconds is None else clock() + self._block_seconds
        while True:
            while self._progress.pending:
                found = parse_entry(self._progress.pop(), self._tally, self._tokens, self._intervals)
                if found is not None:
                    return found._replace(position=self.position)
            wait_seconds = BLOCK_MS / 1000
            if give_up_at is not None:
                wait_seconds = min(wait_seconds, give_up_at - clock())
            if not await self._read(max(wait_seconds, 0)) and wait_seconds <= 0:
                raise StopAsyncIteration

    async def _begin(self) -> None:
        if not self._has_begun:
            self._progress.begin(await self._infos())
            self._has_begun = True
            self._checked_at = time.monotonic()

    async def _read(self, wait_seconds: float) -> bool:
        if self._progress.checks_due or time.monotonic() - self._checked_at > CHECK_SECONDS:
            self._progress.count_missed(await self._infos())
            self._progress.checks_due = max(self._progress.checks_due - 1, 0)
            self._checked_at = time.monotonic()
        ids = self._progress.ids()
        if not ids:
            await asyncio.sleep(wait_seconds)
            return False
        batches = await (self._read_each if self._is_clustered else self._read_all)(ids, wait_seconds)
        return self._progress.take(batches, ENTRIES_A_READ)

    async def _read_all(self, ids: dict[str, str], wait_seconds: float) -> list[Any]:
        """One XREAD over all streams: of one server. A second one fetches what came with what woke it."""
        found = await self._xread(ids, int(wait_seconds * 1000))
        seen = {bytes(key) for key, _ in found}
        others = {key: after for key, after in ids.items() if key.encode() not in seen}
        if found and others and wait_seconds:
            found += await self._xread(others, 0)
        return found

    async def _read_each(self, ids: dict[str, str], wait_seconds: float) -> list[Any]:
        """An XREAD a stream, all at once; those that found nothing go on waiting until the next call."""
        for place in self._reads.keys() - ids.items():  # of a stream that is read from its beginning again
            self._reads.pop(place).cancel()
        for key, after in ids.items():
            if (key, after) not in self._reads:
                self._reads[key, after] = asyncio.create_task(self._xread({key: after}, BLOCK_MS))
        await asyncio.wait(
            self._reads.values(), timeout=wait_seconds or None, return_when=asyncio.FIRST_COMPLETED
        )
        if not wait_seconds:  # a look without waiting: let each see its stream once
            await asyncio.wait(self._reads.values())
        done = [place for place, read in self._reads.items() if read.done()]
        return [batch for place in done for batch in self._reads.pop(place).result()]

    async def _xread(self, ids: dict[str, str], block_ms: int) -> list[Any]:
        found: Any = await self._client.xread(dict(ids), count=ENTRIES_A_READ, block=block_ms or None)
        if isinstance(found, dict):  # RESP3
            found = [(key, [each for part in parts for each in part]) for key, parts in found.items()]
        return list(found or [])

    async def _infos(self) -> dict[int, dict[str, Any]]:
        """XINFO STREAM of the shards that have a stream. Raises WrongKeyType."""
        infos: dict[int, dict[str, Any]] = {}
        for shard in self._progress.shards:
            key = self._keys.closed(shard)
            try:
                answer: Any = await self._client.xinfo_stream(key)
            except ResponseError as error:
                if "WRONGTYPE" in str(error):
                    kind: Any = await self._client.type(key)
                    raise WrongKeyType(key, text_of(kind), "stream") from error
                if "no such key" not in str(error):
                    raise
                continue
            infos[shard] = {text_of(name): value for name, value in answer.items()}
        return infos
