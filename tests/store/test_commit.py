"""One commit: everything of a batch and shard, or nothing; only its owner's, and only from where it stood."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pkbrokers_redis.errors import CommitRefused, PkbError, RedisUnavailable, WrongKeyType
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.commit import (
    CursorMove,
    ShardCursor,
    ensure_groups,
    finish_commit,
    queue_commit,
    read_cursor,
)
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.leases import lease_shards

KEYS = Keys("pkb", 1)
TOKEN, OTHER = 408065, 738561
CURSOR, TICKS, CLOSED, STATE = KEYS.cursor(0), KEYS.ticks(0), KEYS.closed(0), KEYS.state(0)
ENTRIES = ("5-0", "6-0", "7-0")
Put = tuple[int, str, int, int, bytes]


@pytest.fixture
def owner(client: redis.Redis) -> ShardCursor:
    """A shard under this worker's lease, with three entries in its stream."""
    load_functions(client)
    ensure_groups(client, KEYS)
    for entry_id in ENTRIES:
        client.xadd(TICKS, {"src": "s1"}, id=entry_id)
    return own(client)


def own(client: redis.Redis, worker: str = "one") -> ShardCursor:
    """Acquire the shard as after its owner's lease expired."""
    client.delete(KEYS.lease(0))
    epochs, refused = lease_shards(client, KEYS, [0], worker, 60_000)
    if refused:
        raise refused[0]
    return read_cursor(client, KEYS, 0, worker, epochs[0])


def row(start: int, close: float = 100) -> bytes:
    return json.dumps([start, 100, 101, 99, close, 10, None, 3], separators=(",", ":")).encode()


def put(start: int, close: float = 100, *, token: int = TOKEN, interval: str = "1m", keep: int = 5) -> Put:
    return token, interval, start, keep, row(start, close)


def commit(
    client: redis.Redis, held: ShardCursor, entry_id: str | None = None, *,
    read: int | None = None, sources: Mapping[bytes, int] | None = None, closed_max: int = 1000,
    currents: Mapping[int, Mapping[str, bytes]] | None = None, drops: Sequence[tuple[int, str]] = (),
    puts: Sequence[Put] = (), closed: Sequence[tuple[Any, ...]] = (),
    state: Mapping[Any, bytes] | None = None, forget: Sequence[bytes] = (),
    forgotten: Mapping[int, Sequence[str]] | None = None,
) -> list[str]:  # fmt: skip
    """One commit of hand-made sections; the keys that refused."""
    sections: list[Any] = [len(currents or {})]
    for token, rows in (currents or {}).items():
        sections += (token, len(rows), *(cell for pair in rows.items() for cell in pair))
    for part in (drops, (), puts, closed, list((state or {}).items())):
        sections += (len(part), *(cell for each in part for cell in each))
    move = CursorMove(
        entry_id or held.id, held.read if read is None else read, sources or {}, forget, "", forgotten or {}
    )
    pipe = Pipe(client)
    queue_commit(pipe, KEYS, 0, held, move, closed_max, sections)
    return finish_commit(pipe.execute()[0], held, move)


def everything(client: redis.Redis) -> dict[bytes, bytes]:
    """All keys as Redis would dump them, groups and positions of streams included."""
    return {key: client.dump(key) for key in client.scan_iter()}  # type: ignore[misc]


def group(client: redis.Redis) -> dict[str, Any]:
    return client.xinfo_groups(TICKS)[0]  # type: ignore[no-any-return,index]


def all_parts() -> dict[str, Any]:
    return {
        "sources": {b"s1": 7, b"s2": 9},
        "currents": {TOKEN: {"1m": row(120), "5m": row(0)}, OTHER: {"1m": row(120)}},
        "puts": [put(60), put(60, token=OTHER)],
        "closed": [(TOKEN, "NSE:INFY", "1m", row(60), 0), (OTHER, "NSE:RELIANCE", "1m", row(60), 3)],
        "state": {str(TOKEN): b"[1]", f"{TOKEN}:candles": b"[0,[1]]"},
    }


def test_forgotten_instrument_leaves_no_key_or_field(client: redis.Redis, owner: ShardCursor) -> None:
    commit(client, owner, **all_parts())
    client.hset(KEYS.quote(TOKEN), "last_price", "1")
    client.hset(STATE, f"{TOKEN}:revs", "{}")
    client.set(KEYS.candles(TOKEN, "5m"), "of another program")
    assert commit(client, owner, forgotten={TOKEN: ["1m", "5m"], 7: ["1m", "5m"]}) == []
    assert list(client.scan_iter(f"*:{TOKEN}*")) == []
    assert client.hgetall(STATE) == {}
    assert client.lrange(KEYS.candles(OTHER, "1m"), 0, -1) == [row(60)]
    assert client.hget(KEYS.current(OTHER), "1m") == row(120)
    former = ShardCursor("two", owner.epoch, owner.commits)
    with pytest.raises(CommitRefused):
        commit(client, former, forgotten={OTHER: ["1m"]})
    assert client.llen(KEYS.candles(OTHER, "1m")) == 1


def test_a_commit_writes_every_key_of_the_contract(client: redis.Redis, owner: ShardCursor) -> None:
    client.hset(KEYS.current(TOKEN), "15m", row(0))
    assert commit(client, owner, "5-0", read=1, drops=[(TOKEN, "15m")], **all_parts()) == []
    assert client.hgetall(CURSOR) == {
        b"owner": b"one", b"epoch": b"1", b"commits": b"1",
        b"id": b"5-0", b"read": b"1", b"src:s1": b"7", b"src:s2": b"9",
    }  # fmt: skip
    assert client.hgetall("pkb:{0}:current:408065") == {b"1m": row(120), b"5m": row(0)}
    assert client.hgetall("pkb:{0}:current:738561") == {b"1m": row(120)}
    assert client.lrange("pkb:{0}:candles:408065:1m", 0, -1) == [row(60)]
    assert [fields for _, fields in client.xrange("pkb:{0}:closed")] == [  # type: ignore[union-attr]
        {b"token": b"408065", b"symbol": b"NSE:INFY", b"interval": b"1m", b"row": row(60), b"rev": b"0"},
        {b"token": b"738561", b"symbol": b"NSE:RELIANCE", b"interval": b"1m", b"row": row(60), b"rev": b"3"},
    ]
    assert client.hgetall(STATE) == {b"408065": b"[1]", b"408065:candles": b"[0,[1]]"}
    assert owner == ShardCursor("one", 1, 1, "5-0", 1, {b"s1": 7, b"s2": 9})
    assert own(client, "two") == ShardCursor("two", 2, 1, "5-0", 1, {b"s1": 7, b"s2": 9})


def test_the_group_shows_position_and_lag(client: redis.Redis, owner: ShardCursor) -> None:
    assert (group(client)["name"], group(client)["lag"]) == (b"aggregator", 3)
    commit(client, owner, "6-0", read=2)
    assert group(client)["last-delivered-id"] == b"6-0"
    assert (group(client)["entries-read"], group(client)["lag"]) == (2, 1)
    commit(client, owner, "7-0", read=3)
    assert group(client)["lag"] == 0


def test_a_commit_that_moves_nothing_leaves_the_cursor(client: redis.Redis, owner: ShardCursor) -> None:
    assert commit(client, owner, state={"1": b"[]"}) == []
    assert client.hget(CURSOR, "id") in (None, b"0-0")
    assert group(client)["last-delivered-id"] == b"0-0"


def test_former_owner_of_a_shard_cannot_commit(client: redis.Redis, owner: ShardCursor) -> None:
    commit(client, owner, "5-0", read=1)
    newer = own(client, "two")
    before = everything(client)
    with pytest.raises(CommitRefused, match="FENCED two owns the shard in epoch 2"):
        commit(client, owner, "6-0", read=2, **all_parts())
    assert everything(client) == before
    assert (owner.id, owner.read) == ("5-0", 1)
    assert commit(client, newer, "6-0", read=2, **all_parts()) == []


def test_commit_from_another_position_is_refused_completely(client: redis.Redis, owner: ShardCursor) -> None:
    commit(client, owner, "5-0", read=1)
    client.hset(CURSOR, "id", "4-0")
    before = everything(client)
    with pytest.raises(CommitRefused, match=r"STALE the cursor is at .*4-0, not at .*5-0"):
        commit(client, owner, "6-0", read=2, **all_parts())
    assert everything(client) == before


def test_the_same_commit_twice_is_refused_the_second_time(client: redis.Redis, owner: ShardCursor) -> None:
    """A reply was lost: the second attempt is refused, because the first one arrived."""
    again = dataclasses.replace(owner)
    commit(client, owner, "5-0", read=1, **all_parts())
    before = everything(client)
    with pytest.raises(CommitRefused, match="STALE"):
        commit(client, again, "5-0", read=1, **all_parts())
    assert everything(client) == before


def test_flushed_store_is_stale_and_not_fenced(client: redis.Redis, owner: ShardCursor) -> None:
    """FENCED ends a worker. Data that went back has it load what there is and go on."""
    commit(client, owner, "5-0", read=1)
    client.flushall()
    with pytest.raises(CommitRefused, match="STALE"):
        commit(client, owner, "6-0", read=2, **all_parts())
    assert everything(client) == {}


# -- lists -------------------------------------------------------------------------------------------


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 99)), max_size=5), max_size=6),
    st.integers(1, 8),
)
def test_a_list_holds_each_start_once_in_order_and_no_more_than_its_cap(
    client: redis.Redis, batches: list[list[tuple[int, int]]], keep: int
) -> None:
    client.flushall()
    load_functions(client)
    held = own(client)
    model: dict[int, int] = {}
    for batch in batches:
        commit(client, held, puts=[put(60 * start, close, keep=keep) for start, close in batch])
        for start, close in batch:
            if start in model or len(model) < keep or start > min(model):
                model[start] = close
            if len(model) > keep:
                del model[min(model)]
    stored = client.lrange(KEYS.candles(TOKEN, "1m"), 0, -1)
    assert stored == [row(60 * start, model[start]) for start in sorted(model)]


def test_row_is_inserted_in_order_among_malformed_rows(client: redis.Redis, owner: ShardCursor) -> None:
    name = KEYS.candles(TOKEN, "1m")
    client.rpush(name, row(60), b"junk", row(180), b"[]")
    assert commit(client, owner, puts=[put(120), put(240), put(180, 7)]) == []
    stored: list[bytes] = client.lrange(name, 0, -1)  # type: ignore[assignment]
    assert [each for each in stored if each.startswith(b"[") and len(each) > 2] == [
        row(120), row(180, 7), row(240),
    ]  # fmt: skip


def test_commit_may_exceed_the_lua_stack(client: redis.Redis, owner: ShardCursor) -> None:
    state = {str(n): b"[%d]" % n for n in range(20_000)}
    assert commit(client, owner, state=state) == []
    assert client.hlen(STATE) == 20_000


def test_the_closed_stream_is_capped(client: redis.Redis, owner: ShardCursor) -> None:
    for n in range(20):
        commit(client, owner, closed=[(TOKEN, "S", "1m", row(n), 0)] * 100, closed_max=300)
    assert 300 <= client.xlen(CLOSED) <= 500  # trimmed in whole nodes


# -- keys that another program wrote ------------------------------------------------------------------------

LIST = KEYS.candles(TOKEN, "1m")


@pytest.mark.parametrize("name", [KEYS.current(TOKEN), LIST, CLOSED, STATE, TICKS])
def test_key_of_another_type_fails_alone(client: redis.Redis, owner: ShardCursor, name: str) -> None:
    assert commit(client, owner, "5-0", read=1, **all_parts()) == []
    skipped = {name, TICKS}
    expected = {key: value for key, value in _values(client).items() if key not in skipped}
    client.flushall()
    held = own(client)
    client.set(name, "mine")
    if name != TICKS:
        client.xadd(TICKS, {"src": "s1"}, id="5-0")
    refused = commit(client, held, "5-0", read=1, **all_parts())
    assert {each.partition(" ")[0] for each in refused} == {name}
    assert all("WRONGTYPE" in each for each in refused)
    assert client.get(name) == b"mine"
    assert {key: value for key, value in _values(client).items() if key not in skipped} == expected
    assert held.id == "5-0"


def _values(client: redis.Redis) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in client.scan_iter():
        kind = client.type(key)
        if kind == b"hash":
            values[key.decode()] = client.hgetall(key)
        elif kind == b"list":
            values[key.decode()] = client.lrange(key, 0, -1)
        elif kind == b"stream":
            values[key.decode()] = [fields for _, fields in client.xrange(key)]  # type: ignore[union-attr]
    return values


def test_cursor_of_another_type_is_named_with_a_hint(client: redis.Redis, owner: ShardCursor) -> None:
    client.delete(CURSOR)
    client.set(CURSOR, "mine")
    before = everything(client)
    with pytest.raises(PkbError, match="WRONGTYPE"):
        commit(client, owner, "5-0", read=1, **all_parts())
    assert everything(client) == before
    with pytest.raises(WrongKeyType) as error:
        own(client)
    assert error.value.key == CURSOR and "DEL" in error.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "five"),
        ("id", b"\xff"),
        ("read", "x"),
        ("read", "9" * 5000),
        ("commits", "-1"),
        ("epoch", "first"),
    ],
)
def test_malformed_cursor_is_named(client: redis.Redis, owner: ShardCursor, field: str, value: Any) -> None:
    client.hset(CURSOR, field, value)
    with pytest.raises(PkbError, match=r"pkb:\{0\}:cursor holds no"):
        own(client)


def test_malformed_sources_are_skipped(client: redis.Redis, owner: ShardCursor) -> None:
    client.hset(CURSOR, mapping={"src:valid": "12", "src:text": "1e5", "src:huge": "9" * 5000, "note": "hi"})
    assert own(client).sources == {b"valid": 12}


def test_evicted_sources_leave_the_cursor(client: redis.Redis, owner: ShardCursor) -> None:
    commit(client, owner, "5-0", read=1, sources={b"old": 3, b"new": 4})
    commit(client, owner, "6-0", read=2, sources={b"new": 5}, forget=[b"old"])
    assert owner.sources == {b"new": 5}
    assert own(client).sources == {b"new": 5}


def test_entry_that_the_stream_never_held_is_not_committed(client: redis.Redis, owner: ShardCursor) -> None:
    """The entry was read from a failed Redis, and the new master never held it."""
    before = everything(client)
    with pytest.raises(CommitRefused, match="STALE the stream never held entry 8-0"):
        commit(client, owner, "8-0", read=4, **all_parts())
    assert everything(client) == before


def test_entry_removed_by_the_hard_cap_is_committed(client: redis.Redis, owner: ShardCursor) -> None:
    client.xtrim(TICKS, maxlen=1, approximate=False)
    assert commit(client, owner, "5-0", read=1) == []


def test_groups_are_created_despite_a_key_of_another_type(client: redis.Redis) -> None:
    keys = Keys("pkb", 3)
    client.set(keys.ticks(1), "mine")
    ensure_groups(client, keys)
    ensure_groups(client, keys)
    assert [client.xinfo_groups(keys.ticks(shard))[0]["lag"] for shard in (0, 2)] == [0, 0]  # type: ignore[index]


# -- a Redis that cannot now -------------------------------------------------------------------------


@contextlib.contextmanager
def full_memory(client: redis.Redis) -> Iterator[None]:
    client.config_set("maxmemory", "1")
    try:
        yield
    finally:
        client.config_set("maxmemory", "0")


def test_full_redis_is_unavailable_and_the_cursor_stays(client: redis.Redis, owner: ShardCursor) -> None:
    commit(client, owner, "5-0", read=1)
    before = everything(client)
    with full_memory(client), pytest.raises(RedisUnavailable, match="memory"):
        commit(client, owner, "6-0", read=2, **all_parts())
    assert everything(client) == before
    assert commit(client, owner, "6-0", read=2, **all_parts()) == []


def test_redis_without_functions_is_unavailable_until_they_are_loaded(
    client: redis.Redis, owner: ShardCursor
) -> None:
    client.function_flush("SYNC")
    with pytest.raises(RedisUnavailable, match="Function not found"):
        commit(client, owner, "6-0", read=1)
    load_functions(client)
    load_functions(client)
    assert commit(client, owner, "6-0", read=1) == []


def test_replica_is_unavailable_for_commits(client: redis.Redis, owner: ShardCursor) -> None:
    client.replicaof("127.0.0.1", 1)
    try:
        with pytest.raises(RedisUnavailable, match="read only"):
            commit(client, owner, "6-0", read=1)
    finally:
        client.replicaof("NO", "ONE")
    assert commit(client, owner, "6-0", read=1) == []
