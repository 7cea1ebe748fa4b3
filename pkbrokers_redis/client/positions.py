"""Where a reader of the closed-candle streams stands, and what it missed. No I/O: it counts what it is told.

A closed-candle stream is capped, and a consumer may be slow or away. The position therefore carries for
each shard, beside the id of the last entry read, that entry's ordinal in the stream's whole life. Redis
counts what it ever added (`entries-added`), so the entries that were trimmed unread are known exactly.

        position   mc3k2f1a..7d ; ..0 ; mc3k2g00.1.7c ; …      one part per shard, in base 36:
                   └─ms──┘ │ └┴─ ordinal
                           └─ sequence number, nothing for 0
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.rows import Tally

NOW = "$"
BEGINNING = "0"
REDIS_NUMBERS = 2**64  # both halves of an id, and an ordinal, are below it
NO_STREAM: Mapping[str, Any] = {"entries-added": 0, "length": 0, "last-generated-id": "0-0"}

Id = tuple[int, int]
Fields = dict[bytes, bytes]


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


class Progress:
    """A reader's marks, the entries it has read and not given out, and what was trimmed before it came.

    `pending` is bounded by what one read may return. `missed` is exact once the reader has caught up.
    `restarts` counts streams that were found made anew and are read from their beginning; what such a one has
    trimmed counts as missed.
    """

    def __init__(self, keys: Keys, tokens: Collection[int] | None, position: str | None) -> None:
        self.missed = 0
        self.restarts = 0
        self.checks_due = 0
        self.shards = sorted(
            range(keys.shards) if tokens is None else {keys.shard_of(token) for token in tokens}
        )
        self.pending: deque[tuple[Id, int, Fields]] = deque()
        self.is_fresh = position in (None, NOW, BEGINNING)
        self._from_beginning = position == BEGINNING
        self._keys = keys
        self._shard_of_key = {keys.closed(shard).encode(): shard for shard in self.shards}
        self._marks = (
            [Mark() for _ in range(keys.shards)] if self.is_fresh else parse_position(position, keys.shards)
        )
        self._parts = [str(mark) for mark in self._marks]
        self._looked = [mark.id for mark in self._marks]  # where each was at the last look at its stream

    @property
    def position(self) -> str:
        """Where to continue, in any process."""
        return ";".join(self._parts)

    def ids(self) -> dict[str, str]:
        """Stream key → the id behind which to read."""
        return {self._keys.closed(shard): self._marks[shard].redis_id for shard in self.shards}

    def begin(self, infos: Mapping[int, Mapping[str, Any]]) -> None:
        """The first look at XINFO STREAM (shard → fields), which places a fresh reader."""
        if self.is_fresh:
            for shard, info in infos.items():
                added, length = info["entries-added"], info["length"]
                last = parse_id(info["last-generated-id"])
                self._set(shard, Mark((0, 0), added - length) if self._from_beginning else Mark(last, added))
        self.count_missed(infos)

    def count_missed(self, infos: Mapping[int, Mapping[str, Any]]) -> None:
        """Compare each mark with what its stream has trimmed. Only while nothing is pending."""
        for shard in self.shards:
            mark, info = self._marks[shard], infos.get(shard, NO_STREAM)
            added, length = info["entries-added"], info["length"]
            last = parse_id(info["last-generated-id"])
            first = info.get("first-entry")
            looked, self._looked[shard] = self._looked[shard], mark.id
            # Fewer entries than we have seen, all of them later than the last look: the store was made anew.
            # Where older ones are left, a failover lost some.
            is_another = first is not None and added < mark.ordinal and parse_id(first[0]) > looked
            if is_another or last < mark.id:
                self.restarts += 1
                self.missed += added - length if is_another else 0
                self._set(shard, Mark((0, 0), added - length))
                continue
            # With the last entry read, the ordinal is known; before it, only how far the trimming came.
            lost = (added if last == mark.id else added - length) - mark.ordinal
            if lost > 0 or last == mark.id:
                self.missed += max(lost, 0)
                self._set(shard, Mark(mark.id, mark.ordinal + lost))

    def take(self, batches: list[tuple[bytes, list[Any]]], entries_a_read: int) -> bool:
        """What a read found (key, entries), into `pending` in the order of ids. False for nothing."""
        for key, entries in batches:
            shard = self._shard_of_key[bytes(key)]
            for raw_id, fields in entries:
                self.pending.append((parse_id(raw_id), shard, fields))
        if len(batches) > 1:
            self.pending = deque(sorted(self.pending, key=lambda entry: entry[0]))
        if any(len(entries) >= entries_a_read for _, entries in batches):
            # Only a reader that is behind gets full batches, and only such a one can fall off the end.
            # Look before each next read, and once more when it has caught up.
            self.checks_due = 2
        return bool(batches)

    def pop(self) -> Fields:
        """The oldest pending entry; the position is behind it from now on."""
        entry_id, shard, fields = self.pending.popleft()
        mark = self._marks[shard]
        mark.id, mark.ordinal = entry_id, mark.ordinal + 1
        self._parts[shard] = str(mark)
        return fields

    def pop_all(self) -> list[Fields]:
        """All pending entries at once, oldest first."""
        popped = [fields for _, _, fields in self.pending]
        for entry_id, shard, _ in self.pending:
            mark = self._marks[shard]
            mark.id, mark.ordinal = entry_id, mark.ordinal + 1
        self.pending.clear()
        self._parts = [str(mark) for mark in self._marks]
        return popped

    def _set(self, shard: int, mark: Mark) -> None:
        self._marks[shard], self._looked[shard] = mark, mark.id
        self._parts[shard] = str(mark)


def parse_id(raw: bytes | str) -> Id:
    """`1718000000000-3` → (1718000000000, 3)."""
    milliseconds, _, sequence = text_of(raw).partition("-")
    return int(milliseconds), int(sequence or 0)


def parse_position(text: str | None, shards: int) -> list[Mark]:
    """A position's marks. Raises PkbError when it is none, or of a store with other shards."""
    parts = (text or "").split(";")
    try:
        cells = [tuple(int(cell or "0", 36) for cell in part.split(".")) for part in parts]
        marks = [Mark((ms, sequence), ordinal) for ms, sequence, ordinal in cells]
        if not all(0 <= number < REDIS_NUMBERS for cell in cells for number in cell):
            raise ValueError("no numbers of Redis'")
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
    """Digits and letters of a number from 0 on, nothing at all for 0."""
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits


def text_of(value: bytes | str) -> str:
    """Redis' bytes as text."""
    return value.decode() if isinstance(value, bytes) else value


class Reader:
    """What every follower tells of itself, whichever way it waits."""

    _progress: Progress
    _tally: Tally

    @property
    def position(self) -> str:
        """Where to continue, in any process."""
        return self._progress.position

    @property
    def missed(self) -> int:
        return self._progress.missed

    @property
    def restarts(self) -> int:
        return self._progress.restarts

    @property
    def rows_refused(self) -> int:
        return self._tally.rows_refused
