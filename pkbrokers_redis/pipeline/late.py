"""What a commit needs beyond the book: rows that are in no slot any more, and their revisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.core import changes as ch
from pkbrokers_redis.core.book import Book, Changes, LateTick
from pkbrokers_redis.core.buckets import bucket_end_s
from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.core.late import amend
from pkbrokers_redis.core.model import FLAG_NAMES
from pkbrokers_redis.core.row_list import start_of
from pkbrokers_redis.core.slot_rows import flag_for

REVS_MAX = 64  # revisions remembered of an instrument's candles that left the book …
FLOOR = "*"  # … and the highest of those forgotten, which all others count on from

_revs_decoder = msgspec.json.Decoder(dict[str, int])


class Revisions:
    """Of the candles that left the book: token → "5m 1762745700" → rev. A candle's only ever rise."""

    def __init__(self, fields: Mapping[bytes, bytes]) -> None:
        """`<token>:revs` fields of `P:{S}:state`; what a foreign hand left there is passed over."""
        self._revs: dict[int, dict[str, int]] = {}
        self._changed: set[int] = set()
        for name, value in fields.items():
            try:
                self._revs[int(name.removesuffix(b":revs"))] = _revs_decoder.decode(value)
            except (msgspec.DecodeError, ValueError):
                continue

    def next(self, token: int, interval: str, start: int) -> int:
        """The revision to announce a row with; remembered."""
        revs = self._revs.get(token, {})
        rev = max(revs.get(f"{interval} {start}", 0), revs.get(FLOOR, 0)) + 1
        self.note(token, interval, start, rev)
        return rev

    def note(self, token: int, interval: str, start: int, rev: int) -> None:
        """Remember a revision that was announced."""
        revs = self._revs.setdefault(token, {})
        name = f"{interval} {start}"
        revs.pop(name, None)  # to the end: forgotten last
        revs[name] = rev
        self._changed.add(token)

    def forget(self, token: int) -> None:
        """An instrument that is another one from now on."""
        self._revs.pop(token, None)
        self._changed.discard(token)

    def collect(self) -> dict[bytes, bytes]:
        """State fields of what changed since the last collect."""
        fields: dict[bytes, bytes] = {}
        for token in self._changed:
            revs = self._revs[token]
            for oldest in [name for name in revs if name != FLOOR][:-REVS_MAX]:
                revs[FLOOR] = max(revs.get(FLOOR, 0), revs.pop(oldest))
            fields[b"%d:revs" % token] = msgspec.json.encode(revs)
        self._changed.clear()
        return fields


class Addenda:
    """Changes with rows added that are in no slot: put into their list, and announced again."""

    def __init__(self, book: Book, revs: Revisions, changes: Changes) -> None:
        self._book, self._revs = book, revs
        self._ops = list(changes.ops)
        self._text = [changes.text]
        self._size = len(changes.text)
        self._lists = list(changes.lists)

    def add(
        self, i: int, k: int, start: int, row: bytes, *, put: bool = True, first_told: bool = False
    ) -> None:
        """One row, announced with a raised revision, or with 0 where nobody was told of its candle before
        (`first_told`); `put` False where its list is replaced as a whole."""
        first, self._size = self._size, self._size + len(row)
        self._text.append(row)
        if put:
            self._ops.append([ch.PUT, i, k, first, self._size, 0])
        token, interval = int(self._book.tokens[i]), self._book.intervals[k].name
        rev = 0 if first_told else self._revs.next(token, interval, start)
        self._ops.append([ch.CLOSED, i, k, first, self._size, rev])

    def replace(self, i: int, k: int, rows: list[bytes]) -> None:
        """A whole list."""
        self._lists.append((i, k, rows))

    def changes(self) -> Changes:
        """All of it."""
        return Changes(self._ops, b"".join(self._text), self._lists)


def settle_late(client: redis.Redis, keys: Keys, book: Book, revs: Revisions, changes: Changes) -> Changes:
    """Complete a book's changes: very late ticks amend their rows, in the same commit.

    Their rows are read from Redis (with what this commit will put laid over them). `revs` is updated.
    """
    tokens = book.tokens
    for op in changes.ops:
        if op[0] == ch.REVISION:
            revs.note(int(tokens[op[1]]), book.intervals[op[2]].name, op[3], op[5])
    ticks = list(book.late_ticks())
    if not ticks:
        return changes
    addenda = Addenda(book, revs, changes)
    lists: dict[tuple[int, int], dict[int, bytes]] = {}
    for tick in ticks:
        interval = book.intervals[tick.interval]
        place = tick.token, tick.interval
        if place not in lists:
            lists[place] = _rows(client, keys, book, tick, interval.name, changes)
        rows = lists[place]
        i, is_day = book.index(tick.token), interval.seconds == 0
        day = book.sessions.day(int(book.tables.schedule[i]), tick.start * 1000)
        end = bucket_end_s(day, interval.seconds, tick.start)
        flag = "" if is_day else FLAG_NAMES[flag_for(book, i, tick.start, end)]
        texts = [rows[start] for start in sorted(rows)]
        for start, row, is_new in amend(texts, tick, is_day, keep=interval.keep, flag=flag):
            rows[start] = row
            addenda.add(i, tick.interval, start, row, first_told=is_new)
    return addenda.changes()


def _rows(
    client: redis.Redis, keys: Keys, book: Book, tick: LateTick, interval: str, changes: Changes
) -> dict[int, bytes]:
    try:
        stored: Any = client.lrange(keys.candles(tick.token, interval), 0, -1)
    except ResponseError:
        stored = []  # a foreign hand's key: the commit will say so
    i = book.index(tick.token)
    put = [
        changes.text[op[3] : op[4]]
        for op in changes.ops
        if op[0] == ch.PUT and op[1] == i and op[2] == tick.interval
    ]
    return {start: row for row in (*stored, *put) if (start := start_of(row)) is not None}
