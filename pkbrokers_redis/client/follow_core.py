"""The core of both followers of closed candles: positions, losses, filters and parsing. No I/O.

The closed streams are capped, and a reader may be slow or stopped. A position therefore carries for each
shard the id of the last entry read and that entry's ordinal: its number since the stream was created. Redis
counts all entries it ever added (`entries-added`), so the number of entries trimmed unread is exact.

    position   mc3k2f1a..7d ; ..0 ; mc3k2g00.1.7c ; …      one part a shard, numbers in base 36
               └─ms───┘ │ └┴─ ordinal
                        └─ sequence number, empty for 0
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pkbrokers_redis.candles.model import Candle
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.rows import Tally, parse_candle

NOW = "$"
BEGINNING = "0"
REDIS_NUMBERS = 2**64  # both halves of a stream id, and an ordinal, are below it
NO_STREAM: Mapping[str, Any] = {"entries-added": 0, "length": 0, "last-generated-id": "0-0"}
BASE36_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

StreamId = tuple[int, int]
Fields = dict[bytes, bytes]


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


@dataclass(slots=True)
class ShardPosition:
    """How far one shard's stream has been read."""

    id: StreamId = (0, 0)
    ordinal: int = 0

    @property
    def redis_id(self) -> str:
        """Return the id as Redis writes it."""
        return f"{self.id[0]}-{self.id[1]}"

    def __str__(self) -> str:
        return f"{_base36(self.id[0])}.{_base36(self.id[1])}.{_base36(self.ordinal) or '0'}"


class FollowCore:
    """A reader's position, the entries it has read and not returned, and the count of entries it missed.

    A shell (`Follower`, `AsyncFollower`) reads `streams()`, hands what it found to `receive` and returns
    `next_closed()`. If `is_check_due` it hands XINFO STREAM of all shards to `check`. `pending` is bounded by
    what one read can return. `missed` is exact once the reader has caught up. `restarts` counts streams that
    were found recreated; they are read from their beginning, and what they have trimmed counts as missed.
    """

    entries_per_read = 500  # of each stream; `pending` holds this times the shards at most
    check_seconds = 10.0  # how often a reader that keeps up checks whether entries were trimmed unread

    def __init__(
        self,
        keys: Keys,
        tokens: Collection[int] | None,
        intervals: Collection[str] | None,
        position: str | None,
    ) -> None:
        self.missed = 0
        self.restarts = 0
        self.checks_due = 0
        self.tally = Tally()
        self.pending: deque[tuple[StreamId, int, Fields]] = deque()
        self.shards = sorted(
            range(keys.shards) if tokens is None else {keys.shard_of(token) for token in tokens}
        )
        self._keys = keys
        self._tokens = None if tokens is None else frozenset(tokens)
        self._intervals = None if intervals is None else frozenset(intervals)
        self._shard_of_key = {keys.closed(shard).encode(): shard for shard in self.shards}
        self._starts_now = position in (None, NOW)
        self._starts_at_beginning = position == BEGINNING
        is_new = self._starts_now or self._starts_at_beginning
        self._positions = (
            [ShardPosition() for _ in range(keys.shards)] if is_new else parse_position(position, keys.shards)
        )
        self._parts = [str(shard_position) for shard_position in self._positions]
        self._id_at_check = [shard_position.id for shard_position in self._positions]
        self._checked_at = -math.inf  # monotonic seconds

    @property
    def position(self) -> str:
        """Return where to continue, in any process."""
        return ";".join(self._parts)

    def streams(self) -> dict[str, str]:
        """Return stream key → the id behind which to read."""
        return {self._keys.closed(shard): self._positions[shard].redis_id for shard in self.shards}

    def begin(self, infos: Mapping[int, Mapping[str, Any]], now: float) -> None:
        """Set the position of a new reader from the first XINFO STREAM (shard → fields)."""
        for shard, info in infos.items():
            added, length = info["entries-added"], info["length"]
            if self._starts_at_beginning:
                self._set(shard, ShardPosition((0, 0), added - length))
            elif self._starts_now:
                self._set(shard, ShardPosition(parse_id(info["last-generated-id"]), added))
        self.check(infos, now)

    def is_check_due(self, now: float) -> bool:
        """Return whether the next read needs a `check` before it."""
        return self.checks_due > 0 or now - self._checked_at > self.check_seconds

    def check(self, infos: Mapping[int, Mapping[str, Any]], now: float) -> None:
        """Compare the position with what each stream has trimmed. Call only while nothing is pending."""
        for shard in self.shards:
            self._check_shard(shard, infos.get(shard, NO_STREAM))
        self.checks_due = max(self.checks_due - 1, 0)
        self._checked_at = now

    def _check_shard(self, shard: int, info: Mapping[str, Any]) -> None:
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
            closed = parse_closed(fields, self.tally, self._tokens, self._intervals)
            if closed is not None:
                return closed._replace(position=self.position)
        return None

    def pop_all(self) -> tuple[list[Fields], bool]:
        """Return all pending entries, oldest first, and whether the reader has caught up."""
        entries = [fields for _, _, fields in self.pending]
        for entry_id, shard, _ in self.pending:
            self._advance(shard, entry_id)
        self.pending.clear()
        self._parts = [str(shard_position) for shard_position in self._positions]
        return entries, self.checks_due < 2

    def _advance(self, shard: int, entry_id: StreamId) -> None:
        read = self._positions[shard]
        read.id, read.ordinal = entry_id, read.ordinal + 1

    def _set(self, shard: int, read: ShardPosition) -> None:
        self._positions[shard], self._id_at_check[shard] = read, read.id
        self._parts[shard] = str(read)


def parse_closed(
    fields: Fields, tally: Tally, tokens: Collection[int] | None, intervals: Collection[str] | None
) -> ClosedCandle | None:
    """Parse an entry of a closed stream; `position` of the result is empty.

    Args:
        fields: The entry.
        tally: Counts an entry that holds no candle.
        tokens: Instruments to select; None selects all.
        intervals: Names of intervals to select; None selects all.

    Returns:
        The candle; None if it is filtered out or malformed.
    """
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
    milliseconds, _, sequence = text_of(raw).partition("-")
    return int(milliseconds), int(sequence or 0)


def parse_position(text: str | None, shards: int) -> list[ShardPosition]:
    """Parse a position. Raises PkbError if it is malformed, or of a store with another number of shards."""
    parts = (text or "").split(";")
    try:
        cells = [tuple(int(cell or "0", 36) for cell in part.split(".")) for part in parts]
        positions = [ShardPosition((ms, sequence), ordinal) for ms, sequence, ordinal in cells]
        if not all(0 <= number < REDIS_NUMBERS for cell in cells for number in cell):
            raise ValueError("out of range")
    except ValueError:
        raise PkbError(
            f"{(text or '')[:40]!r} is no position", "use the `position` of a candle that was followed"
        ) from None
    if len(positions) != shards:
        raise PkbError(
            f"the position is of a store with {len(positions)} shards, this one has {shards}",
            "follow without a position",
        )
    return positions


def text_of(value: bytes | str) -> str:
    """Return bytes of Redis as text."""
    return value.decode() if isinstance(value, bytes) else value


def _base36(number: int) -> str:
    """Write a number in base 36; 0 is empty."""
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = BASE36_DIGITS[digit] + digits
    return digits
