"""Following the streams: closed candles of every shard, and the ticks of one instrument.

`position` says how positions and the count of missed entries work; `follow_async` is the same for asyncio.

Following the closed candles under asyncio: `async for candle in store.follow_async(intervals=["1m"])`.

The same positions, filters and count of missed announcements as `Follower`; a position of the one is good in
the other. On a cluster each stream has its own waiting read, because an XREAD cannot span slots.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.candles.model import Candle
from pkbrokers_redis.client.positions import (
    BEGINNING,
    NOW,
    Fields,
    Id,
    Mark,
    Progress,
    Reader,
    parse_id,
    parse_position,
    text_of,
)
from pkbrokers_redis.errors import WrongKeyType
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import AsyncClient
from pkbrokers_redis.store.rows import Tally, Tick, expecting, parse_candle, ticks_of
from pkbrokers_redis.store.streams import StreamReader

__all__ = [
    "BEGINNING",
    "NOW",
    "ClosedCandle",
    "Follower",
    "Mark",
    "follow_ticks",
    "last_closed",
    "parse_entry",
    "parse_id",
    "parse_position",
]

ENTRIES_A_READ = 500  # a stream and read; what waits in memory is this times the shards at most
CHECK_SECONDS = 10.0  # how often even a reader that keeps up looks whether something was trimmed unread
BLOCK_MS = 1_000  # a slice of waiting, well below any socket timeout
SCAN_MAX = 20_000  # entries per shard that `last_closed` looks through for rare intervals


class ClosedCandle(NamedTuple):
    """A completed candle as announced; `rev` above 0 says that it amends an earlier announcement.

    `position` continues after it: `follow(position=candle.position)`, in any process.
    """

    token: int
    symbol: str
    interval: str
    candle: Candle
    rev: int
    position: str


class Follower(Reader):
    """Iterates over closed candles as they are announced, oldest first within what is there.

    `position`      after the last candle given out; also moves over what the filters left out
    `missed`        announcements that were trimmed before this reader came to them; exact once it has
                    caught up
    `restarts`      streams that were found made anew, and are read from their beginning
    `rows_refused`  entries that hold no candle

    The iterator ends when nothing came for `block_seconds` (None: never). A Redis that goes away raises
    its ConnectionError; `position` stays good, and so does the iterator: ask it again.
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
        self._tally = Tally()
        self._client = client
        self._keys = keys
        self._tokens = None if tokens is None else frozenset(tokens)
        self._intervals = None if intervals is None else frozenset(intervals)
        self._block_seconds = block_seconds
        self._reader = StreamReader(client)
        self._progress = Progress(keys, tokens, position)
        self._progress.begin(self._infos())
        self._checked_at = time.monotonic()

    def close(self) -> None:
        """Give up the connections that wait (on a cluster)."""
        self._reader.close()

    def __iter__(self) -> Iterator[ClosedCandle]:
        return self

    def __next__(self) -> ClosedCandle:
        give_up_at = None if self._block_seconds is None else time.monotonic() + self._block_seconds
        while True:
            while self._progress.pending:
                fields = self._progress.pop()
                found = parse_entry(fields, self._tally, self._tokens, self._intervals)
                if found is not None:
                    return found._replace(position=self.position)
            wait_seconds = BLOCK_MS / 1000
            if give_up_at is not None:
                wait_seconds = min(wait_seconds, give_up_at - time.monotonic())
            if not self._read(max(wait_seconds, 0)) and wait_seconds <= 0:
                raise StopIteration

    def read_entries(self, wait_seconds: float) -> tuple[list[Fields], bool]:
        """All entries that are there as they are, unfiltered, waiting for the first; for readers of many.

        The second value says that there are none behind them: the reader has caught up.
        """
        self._read(max(wait_seconds, 0))
        behind = self._progress.checks_due == 2
        return self._progress.pop_all(), not behind

    def _read(self, wait_seconds: float) -> bool:
        """Fill `pending` from all shards, in the order of their ids. False when nothing was there."""
        if self._progress.checks_due or time.monotonic() - self._checked_at > CHECK_SECONDS:
            self._progress.count_missed(self._infos())
            self._progress.checks_due = max(self._progress.checks_due - 1, 0)
            self._checked_at = time.monotonic()
        found = self._reader.read(self._progress.ids(), ENTRIES_A_READ, int(wait_seconds * 1000))
        return self._progress.take(found, ENTRIES_A_READ)

    def _infos(self) -> dict[int, dict[str, Any]]:
        """XINFO STREAM of the shards that have a stream."""
        infos: dict[int, dict[str, Any]] = {}
        for shard in self._progress.shards:
            key = self._keys.closed(shard)
            try:
                with expecting(self._client, key, "stream"):
                    answer: Any = self._client.xinfo_stream(key)
            except redis.ResponseError as error:
                if "no such key" not in str(error):
                    raise
                continue
            infos[shard] = {text_of(name): value for name, value in answer.items()}
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
    """The last `count` announcements of all shards, newest last. Their `position` is empty."""
    tally = tally or Tally()
    shards = sorted(range(keys.shards) if tokens is None else {keys.shard_of(token) for token in tokens})
    found: list[tuple[Id, ClosedCandle]] = []
    for shard in shards:
        key = keys.closed(shard)
        mine: list[tuple[Id, ClosedCandle]] = []
        before, scanned = "+", 0
        while len(mine) < count and scanned < SCAN_MAX:
            with expecting(client, key, "stream"):
                entries: Any = client.xrevrange(key, before, "-", count=ENTRIES_A_READ)
            for raw_id, fields in entries:
                closed = parse_entry(fields, tally, tokens, intervals)
                if closed is not None:
                    mine.append((parse_id(raw_id), closed))
            if len(entries) < ENTRIES_A_READ:
                break
            scanned += len(entries)
            before = "(" + text_of(entries[-1][0])
        found += mine[: max(count, 0)]
    found.sort(key=lambda each: each[0])
    return [closed for _, closed in found[-count:]] if count > 0 else []


def follow_ticks(
    client: redis.Redis,
    keys: Keys,
    token: int,
    block_seconds: float | None = None,
    tally: Tally | None = None,
) -> Iterator[Tick]:
    """An instrument's ticks from now on. Ends when none came for `block_seconds` (None: never)."""
    key = keys.ticks(keys.shard_of(token))
    with expecting(client, key, "stream"):
        newest: Any = client.xrevrange(key, count=1)
    last = newest[0][0] if newest else "0-0"
    heard_at = time.monotonic()
    reader = StreamReader(client)
    while True:
        for _, entries in reader.read({key: text_of(last)}, ENTRIES_A_READ, BLOCK_MS):
            for raw_id, fields in entries:
                last = raw_id
                for tick in ticks_of(fields, token, tally):
                    yield tick
                    heard_at = time.monotonic()
        if block_seconds is not None and time.monotonic() - heard_at >= block_seconds:
            return


def parse_entry(
    fields: Fields,
    tally: Tally,
    tokens: Collection[int] | None,
    intervals: Collection[str] | None,
) -> ClosedCandle | None:
    """A stream entry → ClosedCandle; None for one that is filtered out, or (counted) that is none."""
    try:
        token = int(fields[b"token"])
        interval = fields[b"interval"].decode()
        rev = int(fields.get(b"rev", b"0"))
    except (KeyError, ValueError):
        tally.rows_refused += 1
        return None
    if (tokens is not None and token not in tokens) or (intervals is not None and interval not in intervals):
        return None
    candle = parse_candle(fields.get(b"row", b""))
    if candle is None:
        tally.rows_refused += 1
        return None
    symbol = fields.get(b"symbol", b"").decode(errors="replace") or str(token)
    return ClosedCandle(token, symbol, interval, candle, rev, "")


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
