"""The aggregator's side of a commit: restore a shard from Redis, and write its changes by `pkb_commit`.

`functions.lua` documents the call's keys and arguments, and checks the fencing epoch. All values are absolute
(rows, positions, sequence numbers), so that applying a batch again from the same cursor gives the same keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.candles import codec
from pkbrokers_redis.candles.codec import Changes
from pkbrokers_redis.candles.model import TOKEN_MAX
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.errors import CommitRefused, PkbError, RedisUnavailable
from pkbrokers_redis.keys import AGGREGATOR_GROUP, Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.errors import expect_type, is_function_missing, is_transient, is_wrong_type
from pkbrokers_redis.store.streams import is_count

INSTRUMENTS_AT_ONCE = 1000  # bound of a pipeline: about 1 MB of replies
EVIDENCE_BYTES = 40  # of a malformed field, shown in an error
_ENTRY_ID = re.compile(rb"\d{1,18}-\d{1,18}")


def restore_shard(
    client: redis.Redis, keys: Keys, shard: int, state: ShardState, on_malformed: Callable[[str], None]
) -> dict[bytes, bytes]:
    """Restore every instrument of a shard into an empty state; return the fields `<token>:revs`.

    An instrument that cannot be read is reported to `on_malformed` and starts with its next tick.
    """
    key = keys.state(shard)
    with expect_type(client, key, "hash"):
        fields: dict[bytes, bytes] = client.hgetall(key)  # type: ignore[assignment]
    tokens = [token for token in map(_token_of, fields) if token]
    for first in range(0, len(tokens), INSTRUMENTS_AT_ONCE):
        chunk = tokens[first : first + INSTRUMENTS_AT_ONCE]
        pipeline = client.pipeline(transaction=False)
        for token in chunk:
            pipeline.hgetall(keys.current(token))
        for token, reply in zip(chunk, pipeline.execute(raise_on_error=False), strict=True):
            rows = {} if isinstance(reply, Exception) else {k.decode(): v for k, v in reply.items()}
            try:
                state.restore(token, fields[b"%d" % token], fields.get(b"%d:candles" % token), rows)
            except ValueError as error:
                on_malformed(str(error))
                state.forget(token)
    return {name: value for name, value in fields.items() if name.endswith(b":revs")}


def _token_of(name: bytes) -> int:
    """Return the token that a state field is named after, 0 for other fields."""
    token = int(name) if name.isdigit() and len(name) <= 10 else 0
    return token if token <= TOKEN_MAX and name == b"%d" % token else 0


@dataclass(slots=True)
class ShardCursor:
    """What `P:{S}:cursor` holds, as this worker left it: how far the shard's commits are."""

    owner: str
    epoch: int
    commits: int = 0  # since the shard began: a Redis with older data has another number
    id: str = "0-0"  # the last stream entry applied
    read: int = 0  # entries read since the stream began, for XINFO's lag
    sources: dict[bytes, int] = field(default_factory=dict)  # source id → last seq, least recent first
    repair: str = "0-0"  # the last entry of `P:{S}:repairs` applied


def read_cursor(client: redis.Redis, keys: Keys, shard: int, owner: str, epoch: int) -> ShardCursor:
    """Read the cursor of a shard whose lease this worker holds. Raise PkbError for a malformed one."""
    cursor = keys.cursor(shard)
    with expect_type(client, cursor, "hash"):
        fields: dict[bytes, bytes] = client.hgetall(cursor)  # type: ignore[assignment]
    entry_id, read = fields.get(b"id", b"0-0"), fields.get(b"read", b"0")
    commits, repair = fields.get(b"commits", b"0"), fields.get(b"repair", b"0-0")
    if not _ENTRY_ID.fullmatch(entry_id) or not is_count(read) or not is_count(commits):
        evidence = ", ".join(repr(text[:EVIDENCE_BYTES]) for text in (entry_id, read, commits))
        raise PkbError(
            f"{cursor} holds no position in `id`, `read` and `commits`: {evidence}",
            "set id and read to its group's last-delivered-id and entries-read (XINFO GROUPS); HDEL commits",
        )
    if not _ENTRY_ID.fullmatch(repair):
        evidence = repr(repair[:EVIDENCE_BYTES])
        raise PkbError(f"{cursor} holds no stream id in `repair`: {evidence}", f"HDEL {cursor} repair")
    sources = {
        name[4:]: int(seq) for name, seq in fields.items() if name.startswith(b"src:") and is_count(seq)
    }
    return ShardCursor(owner, epoch, int(commits), entry_id.decode(), int(read), sources, repair.decode())


@dataclass(frozen=True, slots=True)
class CursorMove:
    """One commit's step of the cursor."""

    id: str  # the last stream entry applied
    read: int  # entries read since the stream began
    sources: Mapping[bytes, int]  # the producers' new sequence numbers
    forget: Sequence[bytes] = ()  # producers whose number is evicted
    repair: str = ""  # the last repair in this commit, "" for none
    forgotten: Mapping[int, Sequence[str]] = field(default_factory=dict)  # instrument to delete → intervals


def commit_args(
    state: ShardState,
    changes: Changes,
    symbol_of: Callable[[int], bytes],
    extra_state: Mapping[bytes, bytes],
) -> list[Any]:
    """Return the sections of `pkb_commit` from `current` to `state`."""
    tokens = state.tokens  # indexed, not copied: a shard holds many more instruments than a commit changes
    names, keeps = zip(*((each.name, each.keep) for each in state.intervals), strict=True)
    text = changes.text
    currents: list[Any] = []
    drops: list[Any] = []
    upserts: list[Any] = []
    closed: list[Any] = []
    fields: list[Any] = []
    lists: list[Any] = []
    for i, k, rows in changes.lists:
        lists += (int(tokens[i]), names[k], len(rows), *rows)
    current_count = drop_count = upsert_count = closed_count = 0
    current_of, count_at = -1, 0
    for kind, i, k, first, last, rev in changes.ops:
        token = int(tokens[i])
        if kind == codec.CURRENT:
            if current_of != i:
                current_of, count_at = i, len(currents) + 1
                current_count += 1
                currents += (token, 0)
            currents[count_at] += 1
            currents += (names[k], text[first:last])
        elif kind == codec.INST_STATE:
            fields += (token, text[first:last])
        elif kind == codec.CANDLES_STATE:
            fields += (f"{token}:candles", text[first:last])
        elif kind == codec.PUT:
            row = text[first:last]
            upsert_count += 1
            upserts += (token, names[k], row[1 : row.index(b",")], keeps[k], row)
        elif kind == codec.CLOSED:
            closed_count += 1
            closed += (token, symbol_of(token), names[k], text[first:last], rev)
        elif kind == codec.DROP:
            drop_count += 1
            drops += (token, names[k])
    for name, value in extra_state.items():
        fields += (name, value)
    return [
        *(current_count, *currents),
        *(drop_count, *drops),
        *(len(changes.lists), *lists),
        *(upsert_count, *upserts),
        *(closed_count, *closed),
        *(len(fields) // 2, *fields),
    ]


def queue_commit(
    pipe: Pipe,
    keys: Keys,
    shard: int,
    held: ShardCursor,
    move: CursorMove,
    closed_max: int,
    sections: list[Any],
) -> None:
    """Append one shard's commit to a pipeline. Hand its reply to `finish_commit`."""
    cursor = keys.cursor(shard)
    base = cursor.removesuffix("cursor")
    sources: list[Any] = []
    for source, seq in move.sources.items():
        sources += (b"src:" + source, seq)
    evicted = [b"src:" + source for source in move.forget]
    forgotten: list[Any] = []
    for token, names in move.forgotten.items():
        forgotten += (token, len(names), *names)
    # A cluster checks the stated keys before it runs a function. While a slot migrates key by key, it then
    # refuses (TRYAGAIN) a commit that would meet a key which has moved already.
    touched: list[str] = []
    if pipe.is_clustered:
        touched = touched_keys(base, sections) + ([keys.repairs(shard)] if move.repair else [])
        for token, names in move.forgotten.items():
            touched += [f"{base}current:{token}", *(f"{base}candles:{token}:{name}" for name in names)]
    redis_keys = [cursor, keys.ticks(shard), keys.state(shard), keys.closed(shard), *touched]
    header = (
        base, held.owner, held.epoch, held.commits, held.id, move.id, move.read, closed_max, move.repair,
    )  # fmt: skip
    pipe.add(
        "FCALL", "pkb_commit", len(redis_keys), *redis_keys, *header, len(move.sources), *sources,
        len(evicted), *evicted, *sections, len(move.forgotten), *forgotten,
    )  # fmt: skip


def touched_keys(base: str, sections: Sequence[Any]) -> list[str]:
    """Return the `current:` and `candles:` keys that the sections write, under the shard's prefix `base`."""
    touched: dict[str, None] = {}
    at = 1
    for _ in range(sections[0]):  # current: token, n, n pairs
        touched[f"{base}current:{sections[at]}"] = None
        at += 2 + 2 * sections[at + 1]
    for _ in range(sections[at]):  # drop: token, interval
        touched[f"{base}current:{sections[at + 1]}"] = None
        at += 2
    at += 1
    for _ in range(sections[at]):  # list: token, interval, n, n rows
        touched[f"{base}candles:{sections[at + 1]}:{sections[at + 2]}"] = None
        at += 3 + sections[at + 3]
    at += 1
    for _ in range(sections[at]):  # upsert: token, interval, start, keep, row
        touched[f"{base}candles:{sections[at + 1]}:{sections[at + 2]}"] = None
        at += 5
    return list(touched)


def finish_commit(reply: Any, held: ShardCursor, move: CursorMove) -> list[str]:
    """Move `held` to a commit's new position; return the keys of another type, which were not written."""
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
        held.sources.pop(source, None)  # re-inserted at the end: the most recent producer is last
        held.sources[source] = seq
    for source in move.forget:
        held.sources.pop(source, None)
    return [bytes(refusal).decode(errors="replace") for refusal in reply]


def ensure_groups(client: redis.Redis, keys: Keys) -> None:
    """Create the group `aggregator` of every tick stream, so that its lag shows before the first commit."""
    for shard in range(keys.shards):
        try:
            client.xgroup_create(keys.ticks(shard), AGGREGATOR_GROUP, id="0-0", mkstream=True, entries_read=0)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error) and not is_wrong_type(error):
                raise
