"""Follow the streams: closed candles of every shard (`follow_core` decides), and one instrument's ticks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.client.follow_core import (
    ClosedCandle,
    Fields,
    FollowCore,
    StreamId,
    parse_closed,
    parse_id,
    text_of,
)
from pkbrokers_redis.errors import WrongKeyType
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import AsyncClient
from pkbrokers_redis.store.errors import expect_type, is_wrong_type
from pkbrokers_redis.store.rows import Tally, Tick, ticks_of
from pkbrokers_redis.store.streams import StreamReader

__all__ = ["AsyncFollower", "ClosedCandle", "Follower", "follow_ticks", "last_closed", "newest_first"]

BLOCK_SECONDS = 1.0  # of one waiting read; well below any socket timeout
SCAN_ENTRIES_MAX = 20_000  # of a shard, which a search for rare entries reads at most


class _Reader:
    """What both followers show of their core."""

    def __init__(
        self,
        keys: Keys,
        tokens: Collection[int] | None,
        intervals: Collection[str] | None,
        position: str | None,
        block_seconds: float | None,
    ) -> None:
        self._keys = keys
        self._block_seconds = block_seconds
        self._core = FollowCore(keys, tokens, intervals, position)

    @property
    def position(self) -> str:
        """Return where to continue, in any process: behind the last candle returned."""
        return self._core.position

    @property
    def missed(self) -> int:
        """Return how many announcements were trimmed unread; exact once the reader has caught up."""
        return self._core.missed

    @property
    def restarts(self) -> int:
        """Return how many streams were found recreated, and were read from their beginning."""
        return self._core.restarts

    @property
    def rows_refused(self) -> int:
        """Return how many entries held no candle."""
        return self._core.tally.rows_refused

    def _deadline(self, now: float) -> float | None:
        return None if self._block_seconds is None else now + self._block_seconds


class Follower(_Reader):
    """Iterate over closed candles as they are announced, oldest first; make one with `CandleStore.follow`.

    The iterator ends when nothing was announced for `block_seconds` (None: never). If Redis becomes
    unavailable it raises redis-py's ConnectionError; the position stays valid and `next` resumes.

    Example:
        >>> for closed in store.follow(["INFY"], ["1m"], position="0", block_seconds=0):
        ...     print(closed.symbol, closed.candle.close, closed.rev)
        ...     saved = closed.position
        NSE:INFY 1512.5 0
        >>> list(store.follow(position=saved, block_seconds=0))
        []
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        *,
        tokens: Collection[int] | None = None,
        intervals: Collection[str] | None = None,
        position: str | None = None,
        block_seconds: float | None = None,
    ) -> None:
        super().__init__(keys, tokens, intervals, position, block_seconds)
        self._client = client
        self._stream_reader = StreamReader(client)
        self._core.begin(self._infos(), time.monotonic())

    def close(self) -> None:
        """Close the connections that wait (on a cluster)."""
        self._stream_reader.close()

    def __iter__(self) -> Iterator[ClosedCandle]:
        return self

    def __next__(self) -> ClosedCandle:
        deadline = self._deadline(time.monotonic())
        while (closed := self._core.next_closed()) is None:
            wait_seconds = _wait_seconds(deadline, time.monotonic())
            if not self._read(wait_seconds) and not wait_seconds:
                raise StopIteration
        return closed

    def read_entries(self, wait_seconds: float) -> tuple[list[Fields], bool]:
        """Read all new entries, unparsed and unfiltered.

        Args:
            wait_seconds: How long to wait for the first entry.

        Returns:
            The entries, oldest first, and whether the reader has caught up.
        """
        self._read(max(wait_seconds, 0))
        return self._core.pop_all()

    def _read(self, wait_seconds: float) -> bool:
        now = time.monotonic()
        if self._core.is_check_due(now):
            self._core.check(self._infos(), now)
        found = self._stream_reader.read(
            self._core.streams(), self._core.entries_per_read, int(wait_seconds * 1000)
        )
        return self._core.receive(found)

    def _infos(self) -> dict[int, dict[str, Any]]:
        """Return XINFO STREAM of the shards that have a stream."""
        infos: dict[int, dict[str, Any]] = {}
        for shard in self._core.shards:
            key = self._keys.closed(shard)
            try:
                with expect_type(self._client, key, "stream"):
                    infos[shard] = _stream_info(self._client.xinfo_stream(key))
            except ResponseError as error:
                if not _is_missing(error):
                    raise
        return infos


class AsyncFollower(_Reader):
    """`Follower` for asyncio, with the same positions; make one with `CandleStore.follow_async`.

    It connects on the first read, and a follower without a position starts there. `async with` connects at
    once and closes the client at the end. On a cluster each stream has its own waiting read, because one
    XREAD cannot span slots.

    Example:
        >>> async def print_closed():
        ...     async with store.follow_async(position="0", block_seconds=0) as follower:
        ...         async for closed in follower:
        ...             print(closed.symbol, closed.candle.close)
        >>> asyncio.run(print_closed())
        NSE:INFY 1512.5
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
        super().__init__(keys, tokens, intervals, position, block_seconds)
        self._client = client
        self._has_begun = False
        self._is_clustered = not hasattr(client, "connection_pool")
        self._reads: dict[tuple[str, str], asyncio.Task[Any]] = {}  # cluster only: (key, id) → waiting XREAD

    async def __aenter__(self) -> AsyncFollower:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel the waiting reads and close the client."""
        reads, self._reads = list(self._reads.values()), {}
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        await self._client.aclose()

    def __aiter__(self) -> AsyncFollower:
        return self

    async def __anext__(self) -> ClosedCandle:
        await self._begin()
        deadline = self._deadline(time.monotonic())
        while (closed := self._core.next_closed()) is None:
            wait_seconds = _wait_seconds(deadline, time.monotonic())
            if not await self._read(wait_seconds) and not wait_seconds:
                raise StopAsyncIteration
        return closed

    async def _begin(self) -> None:
        if not self._has_begun:
            self._core.begin(await self._infos(), time.monotonic())
            self._has_begun = True

    async def _read(self, wait_seconds: float) -> bool:
        now = time.monotonic()
        if self._core.is_check_due(now):
            self._core.check(await self._infos(), now)
        streams = self._core.streams()
        if not streams:
            await asyncio.sleep(wait_seconds)
            return False
        read = self._read_each if self._is_clustered else self._read_all
        return self._core.receive(await read(streams, wait_seconds))

    async def _read_all(self, streams: dict[str, str], wait_seconds: float) -> list[Any]:
        """Read all streams of one server. A second XREAD fetches what arrived with the first entry."""
        found = await self._xread(streams, wait_seconds)
        read = {bytes(key) for key, _ in found}
        unread = {key: after for key, after in streams.items() if key.encode() not in read}
        if found and unread and wait_seconds:
            found += await self._xread(unread, 0)
        return found

    async def _read_each(self, streams: dict[str, str], wait_seconds: float) -> list[Any]:
        """Read each stream by its own XREAD; a read that found nothing waits on until the next call."""
        for stream in self._reads.keys() - streams.items():  # its position was reset
            self._reads.pop(stream).cancel()
        for key, after in streams.items():
            if (key, after) not in self._reads:
                self._reads[key, after] = asyncio.create_task(self._xread({key: after}, BLOCK_SECONDS))
        await asyncio.wait(
            self._reads.values(), timeout=wait_seconds or None, return_when=asyncio.FIRST_COMPLETED
        )
        if not wait_seconds:  # no waiting: let every read see its stream once
            await asyncio.wait(self._reads.values())
        done = [stream for stream, read in self._reads.items() if read.done()]
        return [batch for stream in done for batch in self._reads.pop(stream).result()]

    async def _xread(self, streams: dict[str, str], wait_seconds: float) -> list[Any]:
        block_ms = int(wait_seconds * 1000) or None
        found: Any = await self._client.xread(
            dict(streams), count=self._core.entries_per_read, block=block_ms
        )
        if isinstance(found, dict):  # RESP3
            found = [(key, [entry for part in parts for entry in part]) for key, parts in found.items()]
        return list(found or [])

    async def _infos(self) -> dict[int, dict[str, Any]]:
        """Return XINFO STREAM of the shards that have a stream. Raises WrongKeyType."""
        infos: dict[int, dict[str, Any]] = {}
        for shard in self._core.shards:
            key = self._keys.closed(shard)
            try:
                infos[shard] = _stream_info(await self._client.xinfo_stream(key))
            except ResponseError as error:
                if is_wrong_type(error):
                    kind: Any = await self._client.type(key)
                    raise WrongKeyType(key, text_of(kind), "stream") from error
                if not _is_missing(error):
                    raise
        return infos


def last_closed(
    client: redis.Redis,
    keys: Keys,
    count: int,
    *,
    tokens: Collection[int] | None = None,
    intervals: Collection[str] | None = None,
    tally: Tally | None = None,
) -> list[ClosedCandle]:
    """Return the last `count` announcements of all shards, newest last. Their `position` is empty."""
    tally = tally or Tally()
    shards = sorted(range(keys.shards) if tokens is None else {keys.shard_of(token) for token in tokens})
    found: list[tuple[StreamId, ClosedCandle]] = []
    for shard in shards if count > 0 else ():
        of_shard = 0
        for entry_id, fields in newest_first(client, keys.closed(shard), FollowCore.entries_per_read):
            closed = parse_closed(fields, tally, tokens, intervals)
            if closed is not None:
                found.append((entry_id, closed))
                of_shard += 1
            if of_shard == count:
                break
    found.sort(key=lambda pair: pair[0])
    return [closed for _, closed in found[-count:]] if count > 0 else []


def newest_first(
    client: redis.Redis, key: str, page: int, entries_max: int = SCAN_ENTRIES_MAX
) -> Iterator[tuple[StreamId, Fields]]:
    """Yield a stream's entries from the newest back, read `page` at a time. Raises WrongKeyType."""
    before = "+"
    for _ in range(0, entries_max, page):
        with expect_type(client, key, "stream"):
            entries: Any = client.xrevrange(key, before, "-", count=page)
        for raw_id, fields in entries:
            yield parse_id(raw_id), fields
        if len(entries) < page:
            return
        before = "(" + text_of(entries[-1][0])


def follow_ticks(
    client: redis.Redis,
    keys: Keys,
    token: int,
    block_seconds: float | None = None,
    tally: Tally | None = None,
) -> Iterator[Tick]:
    """Yield an instrument's ticks from now on; end when none arrived for `block_seconds` (None: never)."""
    key = keys.ticks(keys.shard_of(token))
    with expect_type(client, key, "stream"):
        newest: Any = client.xrevrange(key, count=1)
    last = newest[0][0] if newest else "0-0"
    last_tick_at = time.monotonic()
    reader = StreamReader(client)
    while True:
        found = reader.read({key: text_of(last)}, FollowCore.entries_per_read, int(BLOCK_SECONDS * 1000))
        for _, entries in found:
            for raw_id, fields in entries:
                last = raw_id
                for tick in ticks_of(fields, token, tally):
                    yield tick
                    last_tick_at = time.monotonic()
        if block_seconds is not None and time.monotonic() - last_tick_at >= block_seconds:
            return


def _wait_seconds(deadline: float | None, now: float) -> float:
    """Return how long the next read may wait; 0 at or past the deadline."""
    return BLOCK_SECONDS if deadline is None else max(0.0, min(BLOCK_SECONDS, deadline - now))


def _stream_info(reply: Any) -> dict[str, Any]:
    return {text_of(name): value for name, value in reply.items()}


def _is_missing(error: ResponseError) -> bool:
    return "no such key" in str(error)
