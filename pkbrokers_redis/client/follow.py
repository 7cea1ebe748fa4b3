"""Follow the streams: closed candles of every shard, and one instrument's ticks.

The closed streams are capped, and a reader may be slow or stopped. A position therefore carries for each
shard the id of the last entry read and that entry's ordinal: its number since the stream was created. Redis
counts all entries it ever added (`entries-added`), so the number of entries trimmed unread is exact.

    position   mc3k2f1a..7d ; ..0 ; mc3k2g00.1.7c ; …      one part a shard, numbers in base 36
               └─ms───┘ │ └┴─ ordinal
                        └─ sequence number, empty for 0
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.candles.model import Candle
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.errors import expect_type
from pkbrokers_redis.store.rows import Tally, Tick, parse_candle, ticks_of
from pkbrokers_redis.store.streams import StreamReader

NOW, BEGINNING = "$", "0"  # positions without parts
REDIS_NUMBERS = 2**64  # both halves of a stream id, and an ordinal, are below it
BASE36_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
BLOCK_SECONDS = 1.0  # of one waiting read; well below any socket timeout
ENTRIES_PER_PAGE = 500
SCAN_ENTRIES_MAX = 20_000  # of a shard, which a search for rare entries reads at most
NO_STREAM: Mapping[str, Any] = {"entries-added": 0, "length": 0, "last-generated-id": "0-0"}

StreamId = tuple[int, int]
Fields = dict[bytes, bytes]
StreamInfo = Mapping[str, Any]  # XINFO STREAM


class ClosedCandle(NamedTuple):
    """A completed candle as announced; `rev` above 0 amends an earlier announcement.

    `position` continues behind it, in any process: `store.follow(position=closed.position)`.
    """

    token: int
    symbol: str
    interval: str
    candle: Candle
    rev: int
    position: str


class FollowOptions(NamedTuple):
    """What a follower selects, where it starts, and when it ends; see `CandleStore.follow`."""

    tokens: Set[int] | None = None
    intervals: Set[str] | None = None
    position: str | None = None
    block_seconds: float | None = None


@dataclass(slots=True)
class ShardPosition:
    """How far one shard's stream has been read."""

    id: StreamId = (0, 0)
    ordinal: int = 0

    def __str__(self) -> str:
        return f"{_base36(self.id[0])}.{_base36(self.id[1])}.{_base36(self.ordinal) or '0'}"


class FollowCore:
    """A reader's position, the entries it has read and not returned, and what it missed. No I/O.

    A follower reads `streams()`, hands what it found to `receive` and returns `next_closed()`. If
    `is_check_due` it hands XINFO STREAM of all shards to `check` first. `pending` is bounded by what one
    read can return.
    """

    entries_per_read = 500  # of each stream; `pending` holds this times the shards at most
    check_seconds = 10.0  # how often a reader that keeps up checks whether entries were trimmed unread

    def __init__(self, keys: Keys, options: FollowOptions) -> None:
        self.missed = 0  # announcements trimmed unread; exact once the reader has caught up
        self.restarts = 0  # streams that were found recreated, and are read from their beginning
        self.checks_due = 0
        self.tally = Tally()
        self.pending: deque[tuple[StreamId, int, Fields]] = deque()
        tokens = options.tokens
        self.shards = sorted(range(keys.shards) if tokens is None else set(map(keys.shard_of, tokens)))
        self._keys = keys
        self._options = options
        self._starts_at = NOW if options.position is None else options.position
        if self._starts_at in (NOW, BEGINNING):
            self._positions = [ShardPosition() for _ in range(keys.shards)]
        else:
            self._positions = parse_position(self._starts_at, keys.shards)
        self._parts = list(map(str, self._positions))
        self._id_at_check = [read.id for read in self._positions]
        self._checked_at = -math.inf  # monotonic seconds
        self._shard_of_key = {keys.closed(shard).encode(): shard for shard in self.shards}

    @property
    def position(self) -> str:
        """Return where to continue, in any process: behind the last candle returned."""
        return ";".join(self._parts)

    @property
    def rows_refused(self) -> int:
        """Return how many entries held no candle."""
        return self.tally.rows_refused

    def streams(self) -> dict[str, str]:
        """Return stream key → the id behind which to read."""
        ids = {shard: self._positions[shard].id for shard in self.shards}
        return {self._keys.closed(shard): f"{ms}-{sequence}" for shard, (ms, sequence) in ids.items()}

    def begin(self, infos: Mapping[int, StreamInfo]) -> None:
        """Set the position of a new reader from the first XINFO STREAM (shard → fields)."""
        for shard, info in infos.items():
            added = info["entries-added"]
            if self._starts_at == BEGINNING:
                self._set(shard, ShardPosition((0, 0), added - info["length"]))
            elif self._starts_at == NOW:
                self._set(shard, ShardPosition(parse_id(info["last-generated-id"]), added))
        self.check(infos)

    @property
    def is_check_due(self) -> bool:
        """Return whether the next read needs a `check` before it."""
        return self.checks_due > 0 or time.monotonic() - self._checked_at > self.check_seconds

    def check(self, infos: Mapping[int, StreamInfo]) -> None:
        """Compare the position with what each stream has trimmed. Call only while nothing is pending."""
        for shard in self.shards:
            self._check_shard(shard, infos.get(shard, NO_STREAM))
        self.checks_due = max(self.checks_due - 1, 0)
        self._checked_at = time.monotonic()

    def _check_shard(self, shard: int, info: StreamInfo) -> None:
        read, added = self._positions[shard], info["entries-added"]
        trimmed = added - info["length"]
        last = parse_id(info["last-generated-id"])
        first = info.get("first-entry")
        id_before, self._id_at_check[shard] = self._id_at_check[shard], read.id
        # The stream was recreated if it holds fewer entries than were read, all newer than the last check.
        # If older entries are left, a failover lost some, and the position stays valid.
        is_recreated = first is not None and added < read.ordinal and parse_id(first[0]) > id_before
        if is_recreated or last < read.id:
            self.restarts += 1
            self.missed += trimmed if is_recreated else 0
            self._set(shard, ShardPosition((0, 0), trimmed))
            return
        # Behind the last entry the ordinal is known exactly; before it, only how far the trimming came.
        lost = (added if last == read.id else trimmed) - read.ordinal
        if lost > 0 or last == read.id:
            self.missed += max(lost, 0)
            self._set(shard, ShardPosition(read.id, read.ordinal + lost))

    def receive(self, batches: list[tuple[bytes, list[Any]]]) -> bool:
        """Add what a read found (key, entries) to `pending`, by id. Return False if it found nothing."""
        for key, entries in batches:
            shard = self._shard_of_key[bytes(key)]
            self.pending.extend((parse_id(raw_id), shard, fields) for raw_id, fields in entries)
        if len(batches) > 1:
            self.pending = deque(sorted(self.pending, key=lambda entry: entry[0]))
        if any(len(entries) >= self.entries_per_read for _, entries in batches):
            # Only a reader that is behind reads full batches, and only such a reader can miss entries.
            # Check before the next read, and once more after it has caught up.
            self.checks_due = 2
        return bool(batches)

    def next_closed(self) -> ClosedCandle | None:
        """Return the oldest pending candle that the filters select; None if none is pending."""
        while self.pending:
            entry_id, shard, fields = self.pending.popleft()
            self._advance(shard, entry_id)
            self._parts[shard] = str(self._positions[shard])
            closed = parse_closed(fields, self.tally, self._options.tokens, self._options.intervals)
            if closed is not None:
                return closed._replace(position=self.position)
        return None

    def pop_all(self) -> tuple[list[Fields], bool]:
        """Return all pending entries, oldest first, and whether the reader has caught up."""
        entries = [fields for _, _, fields in self.pending]
        for entry_id, shard, _ in self.pending:
            self._advance(shard, entry_id)
        self.pending.clear()
        self._parts = list(map(str, self._positions))
        return entries, self.checks_due < 2

    def _advance(self, shard: int, entry_id: StreamId) -> None:
        read = self._positions[shard]
        read.id, read.ordinal = entry_id, read.ordinal + 1

    def _set(self, shard: int, read: ShardPosition) -> None:
        self._positions[shard], self._id_at_check[shard] = read, read.id
        self._parts[shard] = str(read)

    def deadline(self) -> float:
        """Return when to end if nothing is announced, in monotonic seconds."""
        block_seconds = self._options.block_seconds
        return math.inf if block_seconds is None else time.monotonic() + block_seconds


class _Reader(FollowCore):
    """A core that reads from a client."""

    def __init__(self, client: redis.Redis, keys: Keys, options: FollowOptions | None = None) -> None:
        super().__init__(keys, options or FollowOptions())
        self._client = client
        self._stream_reader = StreamReader(client)
        self.close = self._stream_reader.close

    def start(self) -> None:
        """Set the position of a new reader."""
        self.begin(self._infos())

    def read(self, wait_seconds: float) -> bool:
        """Read into `pending`, waiting at most so long; return False if there was nothing."""
        if self.is_check_due:
            self.check(self._infos())
        block_ms = int(wait_seconds * 1000)
        return self.receive(self._stream_reader.read(self.streams(), self.entries_per_read, block_ms))

    def _infos(self) -> dict[int, StreamInfo]:
        infos: dict[int, StreamInfo] = {}
        for shard in self.shards:
            key = self._keys.closed(shard)
            try:
                with expect_type(self._client, key, "stream"):
                    reply: Any = self._client.xinfo_stream(key)
                infos[shard] = {_text(name): value for name, value in reply.items()}
            except ResponseError as error:
                if "no such key" not in str(error):
                    raise
        return infos


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

    def __init__(self, client: redis.Redis, keys: Keys, options: FollowOptions | None = None) -> None:
        super().__init__(client, keys, options)
        self.start()

    def __iter__(self) -> Iterator[ClosedCandle]:
        return self

    def __next__(self) -> ClosedCandle:
        deadline = self.deadline()
        while (closed := self.next_closed()) is None:
            wait_seconds = _wait_seconds(deadline)
            if not self.read(wait_seconds) and not wait_seconds:
                raise StopIteration
        return closed

    def read_entries(self, wait_seconds: float) -> tuple[list[Fields], bool]:
        """Return all new entries, unparsed and unfiltered, and whether the reader has caught up.

        It waits at most so long for the first entry. They are in order, oldest first.
        """
        self.read(max(wait_seconds, 0))
        return self.pop_all()


class AsyncFollower(_Reader):
    """`Follower` for asyncio, with the same positions; make one with `CandleStore.follow_async`.

    A thread of its own reads; it waits BLOCK_SECONDS at a time, so that it ends soon after `aclose`. It
    connects on the first read, and a follower without a position starts there. `async with` connects at once
    and ends the thread at the end. A read that was cancelled is finished by the next one: nothing is lost.

    Example:
        >>> async def print_closed():
        ...     async with store.follow_async(position="0", block_seconds=0) as follower:
        ...         async for closed in follower:
        ...             print(closed.symbol, closed.candle.close)
        >>> asyncio.run(print_closed())
        NSE:INFY 1512.5
    """

    def __init__(self, client: redis.Redis, keys: Keys, options: FollowOptions | None = None) -> None:
        super().__init__(client, keys, options)
        self._has_started = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pkb-follow")
        self._call: asyncio.Future[Any] | None = None  # what the thread does now

    async def __aenter__(self) -> AsyncFollower:
        await self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the thread, without waiting for its last read."""
        self._thread.submit(self.close)
        self._thread.shutdown(wait=False)

    def __aiter__(self) -> AsyncFollower:
        return self

    async def __anext__(self) -> ClosedCandle:
        await self._begin()
        await self._finish()  # of a read that was cancelled
        deadline = self.deadline()
        while (closed := self.next_closed()) is None:
            wait_seconds = _wait_seconds(deadline)
            if not await self._in_thread(self.read, wait_seconds) and not wait_seconds:
                raise StopAsyncIteration
        return closed

    async def _begin(self) -> None:
        if not self._has_started:
            await self._finish()
            await self._in_thread(self.start)
            self._has_started = True

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        self._call = asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        return await self._finish()

    async def _finish(self) -> Any:
        """Return the result of the call in the thread; a cancelled wait leaves the call to the next one."""
        if self._call is None:
            return None
        try:
            return await asyncio.shield(self._call)
        finally:
            if self._call.done():
                self._call = None


def last_closed(
    client: redis.Redis, keys: Keys, count: int, intervals: Collection[str] | None, tally: Tally
) -> list[ClosedCandle]:
    """Return the last `count` announcements of all shards, newest last. Their `position` is empty."""
    found: list[tuple[StreamId, ClosedCandle]] = []
    for shard in range(keys.shards) if count > 0 else ():
        of_shard = 0
        for entry_id, fields in newest_first(client, keys.closed(shard), ENTRIES_PER_PAGE):
            closed = parse_closed(fields, tally, None, intervals)
            if closed is not None:
                found.append((entry_id, closed))
                of_shard += 1
            if of_shard == count:
                break
    found.sort(key=lambda pair: pair[0])
    return [closed for _, closed in found[-count:]]


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
        before = "(" + _text(entries[-1][0])


def follow_ticks(
    client: redis.Redis, keys: Keys, token: int, block_seconds: float | None, tally: Tally
) -> Iterator[Tick]:
    """Yield an instrument's ticks from now on; end when none arrived for `block_seconds` (None: never)."""
    key = keys.ticks(keys.shard_of(token))
    with expect_type(client, key, "stream"):
        newest: Any = client.xrevrange(key, count=1)
    last = newest[0][0] if newest else "0-0"
    last_tick_at = time.monotonic()
    reader = StreamReader(client)
    while True:
        found = reader.read({key: _text(last)}, ENTRIES_PER_PAGE, int(BLOCK_SECONDS * 1000))
        for _, entries in found:
            for raw_id, fields in entries:
                last = raw_id
                for tick in ticks_of(fields, token, tally):
                    yield tick
                    last_tick_at = time.monotonic()
        if block_seconds is not None and time.monotonic() - last_tick_at >= block_seconds:
            return


def parse_closed(
    fields: Fields, tally: Tally, tokens: Collection[int] | None, intervals: Collection[str] | None
) -> ClosedCandle | None:
    """Parse an entry of a closed stream; None if the filters drop it, or it is malformed and counted."""
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


def parse_id(raw: bytes | str) -> StreamId:
    """Parse `1718000000000-3` into (1718000000000, 3)."""
    milliseconds, _, sequence = _text(raw).partition("-")
    return int(milliseconds), int(sequence or 0)


def parse_position(text: str, shards: int) -> list[ShardPosition]:
    """Parse a position. Raises PkbError if it is malformed, or of a store with another number of shards."""
    try:
        cells = [tuple(int(cell or "0", 36) for cell in part.split(".")) for part in text.split(";")]
        positions = [ShardPosition((ms, sequence), ordinal) for ms, sequence, ordinal in cells]
        if not all(0 <= number < REDIS_NUMBERS for cell in cells for number in cell):
            raise ValueError("out of range")
    except ValueError:
        raise PkbError(
            f"{text[:40]!r} is no position", "use the `position` of a candle that was followed"
        ) from None
    if len(positions) != shards:
        raise PkbError(
            f"the position is of a store with {len(positions)} shards, this one has {shards}",
            "follow without a position",
        )
    return positions


def _wait_seconds(deadline: float) -> float:
    """Return how long the next read may wait; 0 at or past the deadline."""
    return max(0.0, min(BLOCK_SECONDS, deadline - time.monotonic()))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _base36(number: int) -> str:
    """Write a number in base 36; 0 is empty."""
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = BASE36_DIGITS[digit] + digits
    return digits
