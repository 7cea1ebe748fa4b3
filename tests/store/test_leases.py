"""Leases keep two from doing one work, epochs keep the late one out, the list of workers says who lives."""

from __future__ import annotations

import pytest
import redis

from pkbrokers_redis.errors import CommitRefused, PkbError, WrongKeyType
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.commit import (
    CursorMove,
    ShardCursor,
    finish_commit,
    queue_commit,
    read_cursor,
)
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.leases import (
    LeaderLease,
    LeaseTaken,
    announce,
    lease_shards,
    leave,
    members,
    read_membership,
    release_shards,
)
from tests.support import wait_until

KEYS = Keys("pkb", 4)
LONG_MS = 60_000


@pytest.fixture(autouse=True)
def _functions(client: redis.Redis) -> None:
    load_functions(client)


def epoch_of(client: redis.Redis, shard: int, owner: str, ttl_ms: int = LONG_MS) -> int:
    epochs, refused = lease_shards(client, KEYS, [shard], owner, ttl_ms)
    assert not refused
    return epochs.get(shard, 0)


def commit(client: redis.Redis, shard: int, owner: str, epoch: int) -> None:
    """A commit of one state field."""
    held = read_cursor(client, KEYS, shard, owner, epoch)
    pipe, move = Pipe(client), CursorMove(held.id, held.read, {})
    queue_commit(pipe, KEYS, shard, held, move, 100, [0, 0, 0, 0, 0, 1, "1", owner])
    finish_commit(pipe.execute()[0], held, move)


# -- plain leases ------------------------------------------------------------------------------------


def test_a_plain_lease_has_one_holder_until_it_is_released(client: redis.Redis) -> None:
    key = KEYS.feed(0)
    assert LeaderLease(client, key, "a", LONG_MS / 1000).acquire()
    assert not LeaderLease(client, key, "b", LONG_MS / 1000).acquire()
    assert LeaderLease(client, key, "a", LONG_MS / 1000).acquire()
    assert not LeaderLease(client, key, "b", 1.0).release()
    assert LeaderLease(client, key, "a", 1.0).release()
    assert LeaderLease(client, key, "b", LONG_MS / 1000).acquire()
    assert client.get(key) == b"b"


def test_lease_expires_unless_it_is_renewed(client: redis.Redis) -> None:
    key = KEYS.feed(0)
    LeaderLease(client, key, "a", 50 / 1000).acquire()
    wait_until(lambda: LeaderLease(client, key, "b", LONG_MS / 1000).acquire(), what="a's lease to run out")
    client.pexpire(key, 1_000)
    assert LeaderLease(client, key, "b", LONG_MS / 1000).acquire()
    assert client.pttl(key) > 1_000


def test_held_lease_is_renewed_until_its_block_ends(client: redis.Redis) -> None:
    key = KEYS.feed(0)
    first, second = LeaderLease(client, key, "a", 2.0), LeaderLease(client, key, "b", 2.0)
    with first.hold():
        with pytest.raises(LeaseTaken) as taken, second.hold():
            pass
        assert taken.value.holder == "a"
        client.blpop("nothing", timeout=2.4)  # longer than the TTL
        assert second.holder() == "a" and first.remaining_seconds > 0
    with second.hold():
        assert client.get(key) == b"b" and first.remaining_seconds < 0


def test_lease_loads_the_functions_where_they_are_missing(client: redis.Redis) -> None:
    client.function_flush("SYNC")
    assert LeaderLease(client, KEYS.feed(0), "a", 1.0).acquire()


# -- shards ------------------------------------------------------------------------------------------


def test_each_new_owner_gets_a_higher_epoch_and_renewing_keeps_it(client: redis.Redis) -> None:
    assert epoch_of(client, 1, "a") == 1
    assert epoch_of(client, 1, "a") == 1
    assert epoch_of(client, 1, "b") == 0
    release_shards(client, KEYS, [1], "a")
    assert epoch_of(client, 1, "b") == 2
    assert client.hmget(KEYS.cursor(1), "epoch", "owner") == [b"2", b"b"]
    assert 0 < client.pttl(KEYS.lease(1)) <= LONG_MS


def test_an_interrupted_lease_gives_a_new_epoch_to_the_same_owner(client: redis.Redis) -> None:
    """Another may have been there in between: what we know of the shard is worth nothing."""
    assert epoch_of(client, 1, "a") == 1
    client.delete(KEYS.lease(1))
    assert epoch_of(client, 1, "a") == 2


def test_releasing_is_only_for_the_owner(client: redis.Redis) -> None:
    epoch_of(client, 1, "a")
    release_shards(client, KEYS, [1, 2], "b")
    assert client.get(KEYS.lease(1)) == b"a"


def test_the_former_owner_cannot_commit_and_the_new_one_can(client: redis.Redis) -> None:
    old = epoch_of(client, 1, "a")
    commit(client, 1, "a", old)
    client.delete(KEYS.lease(1))
    new = epoch_of(client, 1, "b")
    with pytest.raises(CommitRefused, match="FENCED b owns the shard in epoch 2"):
        commit(client, 1, "a", old)
    commit(client, 1, "b", new)
    assert client.hgetall(KEYS.state(1)) == {b"1": b"b"}


def test_owner_may_commit_after_its_lease_expired_while_it_is_free(client: redis.Redis) -> None:
    epoch = epoch_of(client, 1, "a")
    client.delete(KEYS.lease(1))
    commit(client, 1, "a", epoch)
    assert client.hgetall(KEYS.state(1)) == {b"1": b"a"}


def test_two_owners_of_one_epoch_are_distinguished(client: redis.Redis) -> None:
    """A failover may forget an epoch it gave; the next owner then gets the same number."""
    before = client.dump(KEYS.cursor(1)) or b""
    lost = epoch_of(client, 1, "a")
    client.delete(KEYS.lease(1), KEYS.cursor(1))
    assert before == b""
    assert epoch_of(client, 1, "b") == lost
    with pytest.raises(CommitRefused, match="FENCED"):
        commit(client, 1, "a", lost)


@pytest.mark.parametrize("name", ["lease", "cursor"])
def test_key_of_another_type_refuses_only_its_shard(client: redis.Redis, name: str) -> None:
    key = getattr(KEYS, name)(2)
    client.rpush(key, "mine")
    epochs, refused = lease_shards(client, KEYS, range(4), "a", LONG_MS)
    assert epochs == {0: 1, 1: 1, 3: 1}
    assert list(refused) == [2]
    assert isinstance(refused[2], WrongKeyType) and refused[2].key == key
    assert read_membership(client, KEYS, "aggregate", "a", LONG_MS).holders == ["a", "a", None, "a"]


def test_malformed_epoch_is_named(client: redis.Redis) -> None:
    client.hset(KEYS.cursor(0), "epoch", "first")
    _, refused = lease_shards(client, KEYS, [0], "a", LONG_MS)
    assert isinstance(refused[0], PkbError) and "HDEL" in refused[0].hint


# -- members -----------------------------------------------------------------------------------------


def test_members_are_the_living_workers_of_the_role(client: redis.Redis) -> None:
    announce(client, KEYS, "aggregate", "b")
    announce(client, KEYS, "aggregate", "a")
    announce(client, KEYS, "ingest", "i")
    assert members(client, KEYS, "aggregate", LONG_MS) == ["a", "b"]
    assert members(client, KEYS, "ingest", LONG_MS) == ["i"]
    leave(client, KEYS, "aggregate", "b")
    assert members(client, KEYS, "aggregate", LONG_MS) == ["a"]


def test_silent_worker_leaves_members_and_later_the_list(client: redis.Redis) -> None:
    announce(client, KEYS, "aggregate", "a")
    client.zincrby(KEYS.workers(), -5_000, "aggregate a")
    announce(client, KEYS, "aggregate", "b")
    assert members(client, KEYS, "aggregate", 2_000) == ["b"]
    client.zincrby(KEYS.workers(), -3_600_000, "aggregate a")
    announce(client, KEYS, "aggregate", "b")
    assert client.zrange(KEYS.workers(), 0, -1) == [b"aggregate b"]


def test_a_store_without_functions_has_no_members(client: redis.Redis) -> None:
    client.function_flush("SYNC")
    assert members(client, KEYS, "aggregate", LONG_MS) == []


def test_membership_announces_and_returns_members_and_holders(client: redis.Redis) -> None:
    epoch_of(client, 3, "b")
    announce(client, KEYS, "aggregate", "b")
    found = read_membership(client, KEYS, "aggregate", "a", LONG_MS)
    assert found.members == ["a", "b"]
    assert found.holders == [None, None, None, "b"]


def test_membership_without_functions_raises(client: redis.Redis) -> None:
    client.function_flush("SYNC")
    with pytest.raises(redis.ResponseError, match="Function not found"):
        read_membership(client, KEYS, "aggregate", "a", LONG_MS)


# -- a Redis that went back in time ------------------------------------------------------------------


def move_to(client: redis.Redis, held: ShardCursor, entry_id: str) -> None:
    pipe, move = Pipe(client), CursorMove(entry_id, held.read + 1, {})
    queue_commit(pipe, KEYS, 1, held, move, 100, [0, 0, 0, 0, 0, 0])
    finish_commit(pipe.execute()[0], held, move)


def test_cursor_that_lost_a_commit_without_a_move_is_stale(client: redis.Redis) -> None:
    """A candle closed by the clock moves no position, and a lagging replica may not have it."""
    held = read_cursor(client, KEYS, 1, "a", epoch_of(client, 1, "a"))
    older: bytes = client.dump(KEYS.cursor(1))  # type: ignore[assignment]
    move_to(client, held, held.id)
    client.restore(KEYS.cursor(1), 0, older, replace=True)  # type: ignore[arg-type]
    with pytest.raises(CommitRefused, match="STALE the cursor is at commit 0"):
        move_to(client, held, held.id)


def test_entry_that_this_redis_never_held_moves_no_cursor(client: redis.Redis) -> None:
    """We read it from a master whose replica did not get it: its source sends it again, under another id."""
    held = read_cursor(client, KEYS, 1, "a", epoch_of(client, 1, "a"))
    with pytest.raises(CommitRefused, match="STALE the stream never held entry 7-0"):
        move_to(client, held, "7-0")
    client.xadd(KEYS.ticks(1), {"n": 1}, id="5-0")
    with pytest.raises(CommitRefused, match="STALE"):
        move_to(client, held, "7-0")
    move_to(client, held, "5-0")
    client.xadd(KEYS.ticks(1), {"n": 1}, id="7-1")
    with pytest.raises(CommitRefused, match="STALE"):
        move_to(client, held, "7-0")  # between two that are there


def test_entry_removed_by_the_hard_cap_still_counts(client: redis.Redis) -> None:
    held = read_cursor(client, KEYS, 1, "a", epoch_of(client, 1, "a"))
    for ms in (5, 6, 7):
        client.xadd(KEYS.ticks(1), {"n": 1}, id=f"{ms}-0")
    client.xtrim(KEYS.ticks(1), maxlen=1, approximate=False)
    move_to(client, held, "6-0")
    assert client.hget(KEYS.cursor(1), "id") == b"6-0"
