"""Tick streams: what an entry looks like, and that none goes before everybody is done with it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.candles.model import TickArray
from pkbrokers_redis.keys import AGGREGATOR_GROUP, Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.commit import ensure_groups
from pkbrokers_redis.store.streams import enforce_cap, id_order, trim
from pkbrokers_redis.store.tick_writer import queue_batches

KEYS = Keys("pkb", 2)
INFY, RELIANCE = 408065, 738561  # shards 0 and 1 of 2
NODE = 100  # entries of a stream's node: approximate trimming drops whole ones


def ticks(*rows: list[Any]) -> TickArray:
    return np.array([[math.nan if cell is None else cell for cell in (*row, 5)] for row in rows], float)


def infy(price: float, volume: int) -> list[Any]:
    return [INFY, price, 1, volume, None, None, None, None, 1_767_584_700_000]


def entries(client: redis.Redis, shard: int) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in client.xrange(KEYS.ticks(shard))]  # type: ignore[union-attr]


def fill(client: redis.Redis, shard: int, count: int, first_ms: int = 1) -> None:
    pipeline = client.pipeline(transaction=False)
    for n in range(count):
        pipeline.xadd(KEYS.ticks(shard), {"n": n}, id=f"{first_ms + n}-0")
    pipeline.execute()


def first_id(client: redis.Redis, shard: int = 0) -> str:
    return client.xrange(KEYS.ticks(shard), count=1)[0][0].decode()  # type: ignore[no-any-return,index]


def test_one_entry_per_frame_and_shard_with_the_documented_fields(client: redis.Redis) -> None:
    pipe = Pipe(client)
    reliance = [RELIANCE, 1412.95, 3, 900, 0, 1400, 1420.5, 1399, 1_767_584_701_000]
    frames = [
        (7, 1_767_584_700_123, ticks(infy(1500.05, 10), reliance)),
        (8, 1_767_584_701_124, ticks(infy(1501, 12))),
    ]
    assert queue_batches(pipe, KEYS, "s", frames) == [KEYS.ticks(0), KEYS.ticks(0), KEYS.ticks(1)]
    pipe.execute()
    assert entries(client, 0) == [
        {b"src": b"s", b"seq": b"7", b"at": b"1767584700123", b"n": b"1",
         b"ticks": b"[[408065,1500.05,1,10,null,null,null,null,1767584700000]]"},
        {b"src": b"s", b"seq": b"8", b"at": b"1767584701124", b"n": b"1",
         b"ticks": b"[[408065,1501,1,12,null,null,null,null,1767584700000]]"},
    ]  # fmt: skip
    assert entries(client, 1) == [
        {b"src": b"s", b"seq": b"7", b"at": b"1767584700123", b"n": b"1",
         b"ticks": b"[[738561,1412.95,3,900,0,1400,1420.5,1399,1767584701000]]"},
    ]  # fmt: skip


def test_a_shards_frames_are_refused_together(client: redis.Redis) -> None:
    """Memory ends inside the frames: no later one may be in while an earlier one is out."""
    frames = [(n, 0, ticks(*([infy(1500, n)] * 100))) for n in range(1, 201)]
    used: int = client.info("memory")["used_memory"]  # type: ignore[index]
    client.config_set("maxmemory", used + 400_000)
    try:
        pipe = Pipe(client)
        queue_batches(pipe, KEYS, "s", frames)
        replies = pipe.execute()
    finally:
        client.config_set("maxmemory", "0")
    assert any(isinstance(reply, redis.exceptions.OutOfMemoryError) for reply in replies)
    assert client.exists(KEYS.ticks(0)) == 0
    queue_batches(pipe, KEYS, "s", frames)
    pipe.execute()
    assert [int(each[b"seq"]) for each in entries(client, 0)] == list(range(1, 201))


def test_stream_of_another_type_refuses_only_its_frames(client: redis.Redis) -> None:
    client.set(KEYS.ticks(0), "mine")
    pipe = Pipe(client)
    reliance = [RELIANCE, 1, 1, 1, None, None, None, None, 1]
    queue_batches(pipe, KEYS, "s", [(n, 0, ticks(infy(1, n), reliance)) for n in (1, 2)])
    pipe.execute()
    assert client.get(KEYS.ticks(0)) == b"mine"
    assert len(entries(client, 1)) == 2


@given(
    st.tuples(st.integers(0, 10**15), st.integers(0, 10**9)),
    st.tuples(st.integers(0, 10**15), st.integers(0, 10**9)),
)
def test_ids_compare_as_numbers(one: tuple[int, int], other: tuple[int, int]) -> None:
    assert (id_order(f"{one[0]}-{one[1]}") < id_order(f"{other[0]}-{other[1]}")) == (one < other)


# -- trimming ----------------------------------------------------------------------------------------


@pytest.fixture
def groups(client: redis.Redis) -> None:
    ensure_groups(client, KEYS)


@pytest.mark.usefixtures("groups")
def test_old_entries_are_trimmed_once_applied(client: redis.Redis) -> None:
    fill(client, 0, 10 * NODE)
    client.xgroup_setid(KEYS.ticks(0), AGGREGATOR_GROUP, "1000-0")
    trim(client, KEYS, {0: "1000-0"}, now_ms=601_000, retention_seconds=600)
    assert id_order(first_id(client)) >= (1000 - NODE, 0)


@pytest.mark.usefixtures("groups")
def test_unapplied_entry_is_kept_at_any_age(client: redis.Redis) -> None:
    fill(client, 0, 10 * NODE)
    client.xgroup_setid(KEYS.ticks(0), AGGREGATOR_GROUP, "500-0")
    trim(client, KEYS, {0: "500-0"}, now_ms=10**12, retention_seconds=1)
    assert id_order("400-0") <= id_order(first_id(client)) <= id_order("500-0")
    trim(client, KEYS, {0: "0-0"}, now_ms=10**12, retention_seconds=1)
    assert client.xlen(KEYS.ticks(0)) >= 5 * NODE


@pytest.mark.usefixtures("groups")
def test_slowest_group_limits_trimming(client: redis.Redis) -> None:
    fill(client, 0, 10 * NODE)
    client.xgroup_setid(KEYS.ticks(0), AGGREGATOR_GROUP, "1000-0")
    client.xgroup_create(KEYS.ticks(0), "archive", id="200-0")
    trim(client, KEYS, {0: "1000-0"}, now_ms=10**12, retention_seconds=1)
    assert id_order("100-0") <= id_order(first_id(client)) <= id_order("200-0")
    client.xgroup_setid(KEYS.ticks(0), "archive", "0-0")
    fill(client, 0, 1, first_ms=2000)
    before = client.xlen(KEYS.ticks(0))
    trim(client, KEYS, {0: "1000-0"}, now_ms=10**12, retention_seconds=1)
    assert client.xlen(KEYS.ticks(0)) == before, "a reader that has read nothing yet may want everything"


@pytest.mark.usefixtures("groups")
def test_position_of_the_group_limits_trimming(client: redis.Redis) -> None:
    fill(client, 0, 10 * NODE)
    trim(client, KEYS, {0: "1000-0"}, now_ms=10**12, retention_seconds=1)
    assert client.xlen(KEYS.ticks(0)) == 10 * NODE


@pytest.mark.usefixtures("groups")
def test_young_entries_are_kept(client: redis.Redis) -> None:
    fill(client, 0, 10 * NODE)
    client.xgroup_setid(KEYS.ticks(0), AGGREGATOR_GROUP, "1000-0")
    trim(client, KEYS, {0: "1000-0"}, now_ms=600_500, retention_seconds=600)
    assert id_order("400-0") <= id_order(first_id(client)) <= id_order("500-0")
    client.delete(KEYS.ticks(0))
    fill(client, 0, 10 * NODE)
    trim(client, KEYS, {0: "1000-0"}, now_ms=1_000, retention_seconds=600)
    assert first_id(client) == "1-0"


def test_missing_stream_and_key_of_another_type_are_skipped(client: redis.Redis) -> None:
    keys = Keys("pkb", 3)
    ensure_groups(client, Keys("pkb", 1))
    fill(client, 0, 10 * NODE)
    client.xgroup_setid(keys.ticks(0), AGGREGATOR_GROUP, "1000-0")
    client.set(keys.ticks(1), "mine")
    trim(client, keys, {1: "5-0", 2: "5-0", 0: "1000-0"}, now_ms=10**12, retention_seconds=1)
    assert client.xlen(keys.ticks(0)) <= NODE
    assert enforce_cap(client, keys, 10) == 0 or client.xlen(keys.ticks(0)) <= NODE
    assert client.get(keys.ticks(1)) == b"mine"


@pytest.mark.usefixtures("groups")
def test_hard_cap_counts_only_unapplied_entries(client: redis.Redis) -> None:
    fill(client, 0, 10 * NODE)
    applied = 8 * NODE
    client.xgroup_setid(KEYS.ticks(0), AGGREGATOR_GROUP, f"{applied}-0", entries_read=applied)
    assert enforce_cap(client, KEYS, 5 * NODE) == 0
    assert client.xlen(KEYS.ticks(0)) <= 6 * NODE
    lost = enforce_cap(client, KEYS, NODE)
    assert lost == 2 * NODE - client.xlen(KEYS.ticks(0)) > 0


def test_hard_cap_removes_the_oldest_and_returns_the_count(client: redis.Redis) -> None:
    fill(client, 0, 10 * NODE)
    fill(client, 1, NODE)
    assert enforce_cap(client, KEYS, 10 * NODE) == 0
    dropped = enforce_cap(client, KEYS, 3 * NODE)
    assert client.xlen(KEYS.ticks(0)) == 10 * NODE - dropped
    assert 3 * NODE <= client.xlen(KEYS.ticks(0)) <= 4 * NODE
    assert client.xlen(KEYS.ticks(1)) == NODE
    assert json.loads(entries(client, 0)[-1][b"n"]) == 10 * NODE - 1
