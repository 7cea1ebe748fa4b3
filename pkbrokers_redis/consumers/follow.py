"""Following the streams: closed candles of every shard, and the ticks of one instrument.

A closed-candle stream is capped, and a consumer may be slow or away. The position therefore carries for
each shard, beside the id of the last entry read, that entry's ordinal in the stream's whole life. Redis
counts what it ever added (`entries-added`), so the entries that were trimmed unread are known exactly.

        position   mc3k2f1a..7d ; ..0 ; mc3k2g00.1.7c ; …      one part a shard, in base 36:
                   └─ms──┘ │ └┴─ ordinal
                           └─ sequence number, nothing for 0
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import redis

from pkbrokers_redis.core.errors import PkbError
from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.core.model import Candle
from pkbrokers_redis.store.read import Tally, Tick, expecting, parse_candle, ticks_of
from pkbrokers_redis.store.streams import StreamReader

ENTRIES_A_READ = 500  # a stream and read; what waits in memory is this times the shards at most
BLOCK_MS = 1_000  # a slice of waiting, well below any socket timeout
SCAN_MAX = 20_000  # entries a shard that `last_closed` looks through for rare intervals

NOW = "$"
BEGINNING = "0"

Id = tuple[int, int]


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


@dataclass(slots=True)
class Mark:
    """How far one shard's stream has been read."""

    id: Id = (0, 0)
    ordinal: int = 0

    @property
    def redis_id(self) -> str:
        return f"{self.id[0]}-{self.id[1]}"

    def __str__(self) -> str:
        return f"{_base36(self.id[0])}.{_base36(self.id[1])}.{_base36(self.ordinal) or '0'}"


class Follower:
    """Iterates over closed candles as they are announced, oldest first within what is there.

    `position`      after the last candle given out; also moves over what the filters left out
    `missed`        announcements that were trimmed before this reader came to them; exact once it has
                    caught up
    `rows_refused`  entries that hold no candle

    The iterator ends when nothing came for `block_seconds` (None: never). A Redis that goes away raises
    its ConnectionError; `position` stays good.
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
        self.missed = 0
        self._tally = Tally()
        self._client = client
        self._keys = keys
        self._tokens = None if tokens is None else frozenset(tokens)
        self._intervals = None if intervals is None else frozenset(intervals)
        self._block_seconds = block_seconds
        self._shards = sorted(range(keys.shards) if tokens is None else {keys.shard_of(t) for t in tokens})
        self._pending: deque[tuple[Id, int, dict[bytes, bytes]]] = deque()
        self._checks_due = 0
        self._reader = StreamReader(client)
        fresh = position in (None, NOW, BEGINNING)
        self._marks = [Mark() for _ in range(keys.shards)] if fresh else parse_position(position, keys.shards)
        self._parts = [str(mark) for mark in self._marks]
        infos = self._infos()
        if fresh:
            self._place_marks(infos, at_end=position != BEGINNING)
        self._count_missed(infos)

    @property
    def position(self) -> str:
        """Where to continue, in any process."""
        return ";".join(self._parts)

    @property
    def rows_refused(self) -> int:
        return self._tally.rows_refused

    def __iter__(self) -> Iterator[ClosedCandle]:
        return self

    def __next__(self) -> ClosedCandle:
        give_up_at = None if self._block_seconds is None else time.monotonic() + self._block_seconds
        while True:
            while self._pending:
                entry_id, shard, fields = self._pending.popleft()
                mark = self._marks[shard]
                mark.id, mark.ordinal = entry_id, mark.ordinal + 1
                self._parts[shard] = str(mark)
                found = _parse_entry(fields, self._tally, self._tokens, self._intervals)
                if found is not None:
                    return found._replace(position=self.position)
            wait_seconds = BLOCK_MS / 1000
            if give_up_at is not None:
                wait_seconds = min(wait_seconds, give_up_at - time.monotonic())
            if not self._read(max(wait_seconds, 0)) and wait_seconds <= 0:
                raise StopIteration

    def _read(self, wait_seconds: float) -> bool:
        """Fill `_pending` from all shards, in the order of their ids. False when nothing was there."""
        if self._checks_due:
            self._count_missed(self._infos())
            self._checks_due -= 1
        batches = self._read_streams(wait_seconds)
        for shard, entries in batches.items():
            for raw_id, fields in entries:
                self._pending.append((parse_id(raw_id), shard, fields))
        if len(batches) > 1:
            self._pending = deque(sorted(self._pending, key=lambda entry: entry[0]))
        if any(len(entries) == ENTRIES_A_READ for entries in batches.values()):
            # Only a reader that is behind gets full batches, and only such a one can fall off the end.
            # Look before each next read, and once more when it has caught up.
            self._checks_due = 2
        return bool(batches)

    def _read_streams(self, wait_seconds: float) -> dict[int, list[Any]]:
        shard_of = {self._keys.closed(shard): shard for shard in self._shards}
        positions = {key: self._marks[shard].redis_id for key, shard in shard_of.items()}
        found = self._reader.read(positions, ENTRIES_A_READ, int(wait_seconds * 1000))
        return {shard_of[key.decode()]: entries for key, entries in found}

    def _infos(self) -> dict[int, dict[str, Any]]:
        """XINFO STREAM of the shards that have a stream."""
        infos: dict[int, dict[str, Any]] = {}
        for shard in self._shards:
            key = self._keys.closed(shard)
            try:
                with expecting(self._client, key, "stream"):
                    answer: Any = self._client.xinfo_stream(key)
            except redis.ResponseError as error:
                if "no such key" not in str(error):
                    raise
                continue
            infos[shard] = {_text(name): value for name, value in answer.items()}
        return infos

    def _place_marks(self, infos: dict[int, dict[str, Any]], at_end: bool) -> None:
        for shard, info in infos.items():
            added, length = info["entries-added"], info["length"]
            last = parse_id(info["last-generated-id"])
            self._set(shard, Mark(last, added) if at_end else Mark((0, 0), added - length))

    def _count_missed(self, infos: dict[int, dict[str, Any]]) -> None:
        """Compare each mark with what its stream has trimmed. Only while nothing is pending."""
        for shard, info in infos.items():
            mark = self._marks[shard]
            added, length = info["entries-added"], info["length"]
            last = parse_id(info["last-generated-id"])
            if last < mark.id:
                # Another stream under the old name: the store was made anew. Read it from its beginning.
                self._set(shard, Mark((0, 0), added - length))
                continue
            # With the last entry read, the ordinal is known; before it, only how far the trimming came.
            lost = (added if last == mark.id else added - length) - mark.ordinal
            if lost > 0:
                self.missed += lost
                self._set(shard, Mark(mark.id, mark.ordinal + lost))

    def _set(self, shard: int, mark: Mark) -> None:
        self._marks[shard] = mark
        self._parts[shard] = str(mark)


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
                closed = _parse_entry(fields, tally, tokens, intervals)
                if closed is not None:
                    mine.append((parse_id(raw_id), closed))
            if len(entries) < ENTRIES_A_READ:
                break
            scanned += len(entries)
            before = "(" + _text(entries[-1][0])
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
        for _, entries in reader.read({key: _text(last)}, ENTRIES_A_READ, BLOCK_MS):
            for raw_id, fields in entries:
                last = raw_id
                for tick in ticks_of(fields, token, tally):
                    yield tick
                    heard_at = time.monotonic()
        if block_seconds is not None and time.monotonic() - heard_at >= block_seconds:
            return


def _parse_entry(
    fields: dict[bytes, bytes],
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


def parse_id(raw: bytes | str) -> Id:
    """`1718000000000-3` → (1718000000000, 3)."""
    milliseconds, _, sequence = _text(raw).partition("-")
    return int(milliseconds), int(sequence or 0)


def parse_position(text: str | None, shards: int) -> list[Mark]:
    """A position's marks. Raises PkbError when it is none, or of a store with other shards."""
    parts = (text or "").split(";")
    try:
        cells = [tuple(int(cell or "0", 36) for cell in part.split(".")) for part in parts]
        marks = [Mark((ms, sequence), ordinal) for ms, sequence, ordinal in cells]
    except ValueError:
        raise PkbError(f"{(text or '')[:40]!r} is no position", "give one that a candle carried") from None
    if len(marks) != shards:
        raise PkbError(
            f"the position is of a store with {len(marks)} shards, this one has {shards}",
            "start anew, without a position",
        )
    return marks


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _base36(number: int) -> str:
    """Digits and letters, nothing at all for 0."""
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
