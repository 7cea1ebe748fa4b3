"""Taking over a shard: its book as the last commit left it, read back from Redis.

The aggregator's side of a commit: changes of a book → the arguments of one `FCALL pkb_commit`.

See `functions.lua` for the other side. Everything is absolute (rows, positions, sequence numbers),
nothing is incremented, so a batch that was applied again from the same cursor gives the same keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.candles import changeset as ch
from pkbrokers_redis.candles.changeset import Changes
from pkbrokers_redis.candles.model import TOKEN_MAX
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.errors import CommitRefused, PkbError, RedisUnavailable
from pkbrokers_redis.keys import AGGREGATOR_GROUP, Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.errors import expect_type, is_function_missing, is_transient, is_wrong_type
from pkbrokers_redis.store.streams import is_count

INSTRUMENTS_AT_ONCE = 1000  # a pipeline's bound: about 1 MB of replies


def load_book(
    client: redis.Redis, keys: Keys, shard: int, book: ShardState, on_odd: Callable[[str], None]
) -> dict[bytes, bytes]:
    """Restore every instrument of a shard into an empty book.

    One that cannot be read (a foreign hand) is reported through `on_odd` and starts anew with its next
    tick. Returns the state fields that are not per-candle: `<token>:revs`.
    """
    key = keys.state(shard)
    with expect_type(client, key, "hash"):
        fields: dict[bytes, bytes] = client.hgetall(key)  # type: ignore[assignment]
    others = {name: value for name, value in fields.items() if name.endswith(b":revs")}
    tokens = [token for token in map(_token_of, fields) if token]
    for first in range(0, len(tokens), INSTRUMENTS_AT_ONCE):
        chunk = tokens[first : first + INSTRUMENTS_AT_ONCE]
        pipeline = client.pipeline(transaction=False)
        for token in chunk:
            pipeline.hgetall(keys.current(token))
        replies = pipeline.execute(raise_on_error=False)
        for token, reply in zip(chunk, replies, strict=True):
            rows = {} if isinstance(reply, Exception) else {k.decode(): v for k, v in reply.items()}
            hot = fields[b"%d" % token]
            try:
                book.restore(token, hot, fields.get(b"%d:candles" % token), rows)
            except ValueError as error:
                on_odd(str(error))
                book.forget(token)
    return others


def _token_of(name: bytes) -> int:
    """The token a state field is named after; 0 for other fields, and for those of a foreign hand."""
    token = int(name) if name.isdigit() and len(name) <= 10 else 0
    return token if token <= TOKEN_MAX and name == b"%d" % token else 0


COMMIT = "pkb_commit"
_ENTRY_ID = re.compile(rb"\d{1,18}-\d{1,18}")


@dataclass(slots=True)
class Position:
    """Where a shard's commits stand: what `P:{S}:cursor` holds, and what we hold against it."""

    owner: str
    epoch: int
    commits: int = 0  # of the shard since it began: a Redis that went back in time shows another number
    id: str = "0-0"
    read: int = 0  # entries read since the stream began, for XINFO's lag
    sources: dict[bytes, int] = field(default_factory=dict)  # source id → last seq; unheard longest first
    repair: str = "0-0"  # the last entry of `P:{S}:repairs` applied


def read_position(client: redis.Redis, keys: Keys, shard: int, owner: str, epoch: int) -> Position:
    """Where the commits of a shard stand whose lease is ours (`lease.lease_shards` gave the epoch).

    Raises WrongKeyType when somebody filled `P:{S}:cursor` with something else, and PkbError when its
    fields are not ours.
    """
    cursor = keys.cursor(shard)
    with expect_type(client, cursor, "hash"):
        fields: dict[bytes, bytes] = client.hgetall(cursor)  # type: ignore[assignment]
    entry_id, read = fields.get(b"id", b"0-0"), fields.get(b"read", b"0")
    commits, repair = fields.get(b"commits", b"0"), fields.get(b"repair", b"0-0")
    if not _ENTRY_ID.fullmatch(entry_id) or not is_count(read) or not is_count(commits):
        raise PkbError(
            f"{cursor} holds no position in `id`, `read` and `commits`: "
            f"{entry_id[:40]!r}, {read[:40]!r}, {commits[:40]!r}",
            "set id and read to its group's last-delivered-id and entries-read (XINFO GROUPS); HDEL commits",
        )
    if not _ENTRY_ID.fullmatch(repair):
        raise PkbError(f"{cursor} holds no stream id in `repair`: {repair[:40]!r}", f"HDEL {cursor} repair")
    sources = {
        name[4:]: int(seq) for name, seq in fields.items() if name.startswith(b"src:") and is_count(seq)
    }
    return Position(owner, epoch, int(commits), entry_id.decode(), int(read), sources, repair.decode())


@dataclass(frozen=True, slots=True)
class Move:
    """A step of the cursor: the last stream id applied, entries read in all, sources' new numbers.

    `forget` are sources whose numbers may go (see `SOURCES_MAX` in the shard's worker). `repair` is the last
    entry of the repairs in this commit, "" where there is none. `forgotten` are instruments of which nothing
    stays, each with its intervals.
    """

    id: str
    read: int
    sources: Mapping[bytes, int]
    forget: Sequence[bytes] = ()
    repair: str = ""
    forgotten: Mapping[int, Sequence[str]] = field(default_factory=dict)


def commit_args(
    book: ShardState, changes: Changes, symbol_of: Callable[[int], bytes], extra_state: Mapping[bytes, bytes]
) -> list[Any]:
    """The counted sections of `pkb_commit` behind the header and its sources."""
    tokens = book.tokens  # indexed, not copied: a shard may hold many more instruments than changed
    names = [interval.name for interval in book.intervals]
    keeps = [interval.keep for interval in book.intervals]
    text = changes.text
    currents: list[Any] = []
    drops: list[Any] = []
    puts: list[Any] = []
    closed: list[Any] = []
    state: list[Any] = []
    lists: list[Any] = []
    for i, k, rows in changes.lists:
        lists += (int(tokens[i]), names[k], len(rows), *rows)
    counts = [0, 0, 0, 0]
    current_of, fields_at = -1, 0
    for kind, i, k, first, last, rev in changes.ops:
        token = int(tokens[i])
        if kind == ch.CURRENT:
            if current_of != i:
                current_of, fields_at = i, len(currents) + 1
                counts[0] += 1
                currents += (token, 0)
            currents[fields_at] += 1
            currents += (names[k], text[first:last])
        elif kind == ch.INST_STATE:
            state += (token, text[first:last])
        elif kind == ch.CANDLES_STATE:
            state += (f"{token}:candles", text[first:last])
        elif kind == ch.PUT:
            row = text[first:last]
            counts[2] += 1
            puts += (token, names[k], row[1 : row.index(b",")], keeps[k], row)
        elif kind == ch.CLOSED:
            counts[3] += 1
            closed += (token, symbol_of(token), names[k], text[first:last], rev)
        elif kind == ch.DROP:
            counts[1] += 1
            drops += (token, names[k])
    for name, value in extra_state.items():
        state += (name, value)
    return [
        *(counts[0], *currents),
        *(counts[1], *drops),
        *(len(changes.lists), *lists),
        *(counts[2], *puts),
        *(counts[3], *closed),
        *(len(state) // 2, *state),
    ]


def queue_commit(
    pipe: Pipe, keys: Keys, shard: int, held: Position, move: Move, closed_max: int, sections: list[Any]
) -> None:
    """Append one shard's commit to a pipeline; hand its reply to `settle_commit`."""
    cursor = keys.cursor(shard)
    sources: list[Any] = []
    for source, seq in move.sources.items():
        sources += (b"src:" + source, seq)
    base = cursor.removesuffix("cursor")
    forgotten: list[Any] = [len(move.forgotten)]
    for token, names in move.forgotten.items():
        forgotten += (token, len(names), *names)
    # A cluster looks at the keys it is told of before it runs a function. While a slot moves away key by key,
    # it then refuses a commit (TRYAGAIN) that would meet a key that is gone halfway through.
    touched: list[str] = []
    if pipe.is_clustered:
        touched = touched_keys(base, sections) + ([keys.repairs(shard)] if move.repair else [])
        for token, names in move.forgotten.items():
            touched += [f"{base}current:{token}", *(f"{base}candles:{token}:{name}" for name in names)]
    pipe.add(
        "FCALL", COMMIT, 4 + len(touched), cursor, keys.ticks(shard), keys.state(shard), keys.closed(shard),
        *touched, base, held.owner, held.epoch, held.commits, held.id, move.id, move.read,
        closed_max, move.repair, len(move.sources), *sources,
        len(move.forget), *(b"src:" + each for each in move.forget), *sections, *forgotten,
    )  # fmt: skip


def touched_keys(base: str, sections: Sequence[Any]) -> list[str]:
    """The `current:` and `candles:` keys that a commit's sections write, under the shard's prefix `base`."""
    touched: dict[str, None] = {}
    at = 1
    for _ in range(sections[0]):  # currents: token, n, n pairs
        touched[f"{base}current:{sections[at]}"] = None
        at += 2 + 2 * sections[at + 1]
    for _ in range(sections[at]):  # drops: token, interval
        touched[f"{base}current:{sections[at + 1]}"] = None
        at += 2
    at += 1
    for _ in range(sections[at]):  # lists: token, interval, n, n rows
        touched[f"{base}candles:{sections[at + 1]}:{sections[at + 2]}"] = None
        at += 3 + sections[at + 3]
    at += 1
    for _ in range(sections[at]):  # puts: token, interval, start, keep, row
        touched[f"{base}candles:{sections[at + 1]}:{sections[at + 2]}"] = None
        at += 5
    return list(touched)


def settle_commit(reply: Any, held: Position, move: Move) -> list[str]:
    """Move `held` on after a commit. Returns the keys that refused, with Redis's word on each.

    Raises CommitRefused when the shard is no longer ours or the cursor is not where we left it,
    RedisUnavailable when Redis cannot write now or has lost our functions, and whatever else it said as
    PkbError.
    """
    if isinstance(reply, ResponseError):
        text = str(reply)
        if text.startswith(("FENCED", "STALE")):
            raise CommitRefused(text)
        if is_transient(reply) or is_function_missing(reply):
            raise RedisUnavailable(f"Redis cannot commit now: {text}")
        raise PkbError(f"Redis refused a commit: {text}")
    if isinstance(reply, Exception):
        raise reply
    held.commits += 1
    held.id, held.read, held.repair = move.id, move.read, move.repair or held.repair
    for source, seq in move.sources.items():
        held.sources.pop(source, None)  # to the end: heard of last
        held.sources[source] = seq
    for source in move.forget:
        held.sources.pop(source, None)
    return [bytes(each).decode(errors="replace") for each in reply]


def ensure_groups(client: redis.Redis, keys: Keys) -> None:
    """Give every tick stream its `aggregator` group, so that lag shows before the first commit."""
    for shard in range(keys.shards):
        try:
            client.xgroup_create(keys.ticks(shard), AGGREGATOR_GROUP, id="0-0", mkstream=True, entries_read=0)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error) and not is_wrong_type(error):
                raise
