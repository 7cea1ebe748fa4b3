"""What a commit needs beyond the book: rows of very late ticks, and revisions of candles that left it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.core import changes as ch
from pkbrokers_redis.core.book import Book, Changes, LateTick
from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.core.late import amend

REVS_MAX = 64  # revisions remembered of an instrument's candles that left the book
START_DIGITS_MAX = 18

Revisions = dict[int, dict[str, int]]  # token → "5m 1762745700" → rev
_revs_decoder = msgspec.json.Decoder(dict[str, int])


def read_revisions(fields: Mapping[bytes, bytes]) -> Revisions:
    """`<token>:revs` fields of `P:{S}:state` → revisions; what a foreign hand left there is passed over."""
    revs: Revisions = {}
    for name, value in fields.items():
        try:
            revs[int(name.removesuffix(b":revs"))] = _revs_decoder.decode(value)
        except (msgspec.DecodeError, ValueError):
            continue
    return revs


def settle_late(
    client: redis.Redis, keys: Keys, book: Book, revs: Revisions, changes: Changes
) -> tuple[Changes, dict[bytes, bytes]]:
    """Complete a book's changes: very late ticks amend their rows, in the same commit.

    Their rows are read from Redis (with what this commit will put laid over them). Returns the changes
    and the state fields `<token>:revs` to write. `revs` is updated in place.
    """
    extra: dict[bytes, bytes] = {}
    tokens = book.tokens
    for op in changes.ops:
        if op[0] == ch.REVISION:
            _note(revs, int(tokens[op[1]]), f"{book.intervals[op[2]].name} {op[3]}", op[5], extra)
    ticks = list(book.late_ticks())
    if not ticks:
        return changes, extra
    ops, text, size = list(changes.ops), [changes.text], len(changes.text)
    lists: dict[tuple[int, int], dict[int, bytes]] = {}
    for tick in ticks:
        interval = book.intervals[tick.interval]
        place = tick.token, tick.interval
        if place not in lists:
            lists[place] = _rows(client, keys, book, tick, interval.name, changes)
        rows = lists[place]
        for start, row in amend([rows[s] for s in sorted(rows)], tick, interval.seconds == 0):
            rows[start] = row
            name = f"{interval.name} {start}"
            rev = revs.get(tick.token, {}).get(name, 0) + 1
            _note(revs, tick.token, name, rev, extra)
            i = book.index(tick.token)
            ops.append([ch.PUT, i, tick.interval, size, size + len(row), 0])
            ops.append([ch.CLOSED, i, tick.interval, size, size + len(row), rev])
            text.append(row)
            size += len(row)
    return Changes(ops, b"".join(text)), extra


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
    return {start: row for row in (*stored, *put) if (start := _start_of(row)) is not None}


def _start_of(row: bytes) -> int | None:
    start = row[1 : row.find(b",")]
    return int(start) if start.isdigit() and len(start) <= START_DIGITS_MAX else None


def _note(revs: Revisions, token: int, name: str, rev: int, extra: dict[bytes, bytes]) -> None:
    of_token = revs.setdefault(token, {})
    of_token[name] = rev
    while len(of_token) > REVS_MAX:
        del of_token[next(iter(of_token))]
    extra[b"%d:revs" % token] = msgspec.json.encode(of_token)
