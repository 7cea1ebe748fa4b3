"""Leases keep two from doing one work, epochs keep the late one out, the list of workers says who lives."""

from __future__ import annotations

import pytest
import redis

from pkbrokers_redis.errors import CommitRefused, PkbError, WrongKeyType
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.commit import (
    Move,
    Position,
    queue_commit,
    read_position,
    settle_commit,
)
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.leases import (
    LeaderLease,
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
    held = read_position(client, KEYS, shard, owner, epoch)
    pipe, move = Pipe(client), Move(held.id, held.read, {})
    queue_commit(pipe, KEYS, shard, held, move, 100, [0, 0, 0, 0, 0, 1, "1", owner])
    settle_commit(pipe.execute()[0], held, move)


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


def test_a_lease_that_is_not_renewed_runs_out_and_renewing_extends_it(client: redis.Redis) -> None:
    key = KEYS.feed(0)
    LeaderLease(client, key, "a", 50 / 1000).acquire()
    wait_until(lambda: LeaderLease(client, key, "b", LONG_MS / 1000).acquire(), what="a's lease to run out")
    client.pexpire(key, 1_000)
    assert LeaderLease(client, key, "b", LONG_MS / 1000).acquire()
    assert client.pttl(key) > 1_000


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


def test_an_expired_lease_that_nobody_took_lets_its_owner_finish(client: redis.Redis) -> None:
    epoch = epoch_of(client, 1, "a")
    client.delete(KEYS.lease(1))
    commit(client, 1, "a", epoch)
    assert client.hgetall(KEYS.state(1)) == {b"1": b"a"}


def test_two_owners_of_one_epoch_are_told_apart(client: redis.Redis) -> None:
    """A failover may forget an epoch it gave; the next owner then gets the same number."""
    before = client.dump(KEYS.cursor(1)) or b""
    lost = epoch_of(client, 1, "a")
    client.delete(KEYS.lease(1), KEYS.cursor(1))
    assert before == b""
    assert epoch_of(client, 1, "b") == lost
    with pytest.raises(CommitRefused, match="FENCED"):
        commit(client, 1, "a", lost)


@pytest.mark.parametrize("name", ["lease", "cursor"])
def test_a_foreign_hands_key_refuses_its_shard_alone(client: redis.Redis, name: str) -> None:
    key = getattr(KEYS, name)(2)
    client.rpush(key, "mine")
    epochs, refused = lease_shards(client, KEYS, range(4), "a", LONG_MS)
    assert epochs == {0: 1, 1: 1, 3: 1}
    assert list(refused) == [2]
    assert isinstance(refused[2], WrongKeyType) and refused[2].key == key
    assert read_membership(client, KEYS, "aggregate", "a", LONG_MS).holders == ["a", "a", None, "a"]


def test_an_epoch_that_is_no_number_is_named(client: redis.Redis) -> None:
    client.hset(KEYS.cursor(0), "epoch", "first")
    _, refused = lease_shards(client, KEYS, [0], "a", LONG_MS)
    assert isinstance(refused[0], PkbError) and "HDEL" in refused[0].hint


# -- members -----------------------------------------------------------------------------------------


def test_members_are_those_of_the_role_that_live(client: redis.Redis) -> None:
    announce(client, KEYS, "aggregate", "b")
    announce(client, KEYS, "aggregate", "a")
    announce(client, KEYS, "ingest", "i")
    assert members(client, KEYS, "aggregate", LONG_MS) == ["a", "b"]
    assert members(client, KEYS, "ingest", LONG_MS) == ["i"]
    leave(client, KEYS, "aggregate", "b")
    assert members(client, KEYS, "aggregate", LONG_MS) == ["a"]


def test_who_falls_silent_is_no_member_and_is_forgotten_later(client: redis.Redis) -> None:
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


def test_a_survey_announces_and_tells_members_and_holders(client: redis.Redis) -> None:
    epoch_of(client, 3, "b")
    announce(client, KEYS, "aggregate", "b")
    found = read_membership(client, KEYS, "aggregate", "a", LONG_MS)
    assert found.members == ["a", "b"]
    assert found.holders == [None, None, None, "b"]


def test_a_survey_without_functions_says_so(client: redis.Redis) -> None:
    client.function_flush("SYNC")
    with pytest.raises(redis.ResponseError, match="Function not found"):
        read_membership(client, KEYS, "aggregate", "a", LONG_MS)


# -- a Redis that went back in time ------------------------------------------------------------------


def move_to(client: redis.Redis, held: Position, entry_id: str) -> None:
    pipe, move = Pipe(client), Move(entry_id, held.read + 1, {})
    queue_commit(pipe, KEYS, 1, held, move, 100, [0, 0, 0, 0, 0, 0])
    settle_commit(pipe.execute()[0], held, move)


def test_a_cursor_that_went_back_by_a_commit_that_moved_nothing_is_noticed(client: redis.Redis) -> None:
    """A candle closed by the clock moves no position, and a lagging replica may not have it."""
    held = read_position(client, KEYS, 1, "a", epoch_of(client, 1, "a"))
    older: bytes = client.dump(KEYS.cursor(1))  # type: ignore[assignment]
    move_to(client, held, held.id)
    client.restore(KEYS.cursor(1), 0, older, replace=True)  # type: ignore[arg-type]
    with pytest.raises(CommitRefused, match="STALE the cursor is at commit 0"):
        move_to(client, held, held.id)


def test_an_entry_that_this_redis_never_had_moves_no_cursor(client: redis.Redis) -> None:
    """We read it from a master whose replica did not get it: its source sends it again, under another id."""
    held = read_position(client, KEYS, 1, "a", epoch_of(client, 1, "a"))
    with pytest.raises(CommitRefused, match="STALE the stream never held entry 7-0"):
        move_to(client, held, "7-0")
    client.xadd(KEYS.ticks(1), {"n": 1}, id="5-0")
    with pytest.raises(CommitRefused, match="STALE"):
        move_to(client, held, "7-0")
    move_to(client, held, "5-0")
    client.xadd(KEYS.ticks(1), {"n": 1}, id="7-1")
    with pytest.raises(CommitRefused, match="STALE"):
        move_to(client, held, "7-0")  # between two that are there


def test_an_entry_that_the_hard_cap_cut_off_since_still_counts(client: redis.Redis) -> None:
    held = read_position(client, KEYS, 1, "a", epoch_of(client, 1, "a"))
    for ms in (5, 6, 7):
        client.xadd(KEYS.ticks(1), {"n": 1}, id=f"{ms}-0")
    client.xtrim(KEYS.ticks(1), maxlen=1, approximate=False)
    move_to(client, held, "6-0")
    assert client.hget(KEYS.cursor(1), "id") == b"6-0"
