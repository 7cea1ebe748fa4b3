"""Equal shares of the living, and how they get from one distribution to the next."""

from __future__ import annotations

import random

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.aggregate.leases import ShardLeases, fair_share
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.functions import load_functions

KEYS = Keys("pkb", 8)
IDS = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=12, unique=True)


class Clock:
    """Seconds that a test advances."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@given(IDS, st.integers(1, 64))
def test_shares_are_even_and_their_windows_cover_each_shard_once(ids: list[str], shards: int) -> None:
    shares = [fair_share(ids, each, shards) for each in ids]
    assert max(n for n, _ in shares) - min(n for n, _ in shares) <= 1
    assert sorted(shard for n, first in shares for shard in range(first, first + n)) == list(range(shards))


def test_an_aggregator_that_is_not_a_member_yet_counts_itself() -> None:
    assert fair_share(["b"], "a", 8) == (4, 0)


@pytest.fixture
def _functions(client: redis.Redis) -> None:
    load_functions(client)


def leases(name: str, clock: Clock | None = None) -> ShardLeases:
    """An aggregator's leases that outlast any test."""
    return ShardLeases(KEYS, name, 300, clock or Clock())


def rounds(client: redis.Redis, group: list[ShardLeases], seed: int, most: int = 12) -> int:
    """Everybody looks, in random order, until twice nothing changes. Returns the rounds it took."""
    rng = random.Random(seed)
    quiet = 0
    for n in range(most):
        before = [dict(each.epochs) for each in group]
        for each in rng.sample(group, len(group)):
            each.renew(client)
        quiet = quiet + 1 if [each.epochs for each in group] == before else 0
        if quiet == 2:
            return n - 1
    raise AssertionError(f"still moving after {most} rounds")


@pytest.mark.usefixtures("_functions")
@pytest.mark.parametrize("seed", range(4))
def test_one_two_four_and_one_aggregator_share_evenly_and_stably(client: redis.Redis, seed: int) -> None:
    group = [leases("m")]
    assert rounds(client, group, seed) == 1
    assert sorted(group[0].epochs) == list(range(8))
    for name, size in (("c", 4), ("x", 2), ("d", 2)):  # ids before and behind the first one's
        group.append(leases(name))
        assert rounds(client, group, seed) <= 3
        sizes = sorted(len(each.epochs) for each in group)
        assert sizes[-1] - sizes[0] <= 1 and sizes[0] >= size
        assert sorted(shard for each in group for shard in each.epochs) == list(range(8))
    for each in group[1:]:
        each.leave(client)
    rounds(client, group[:1], seed)
    assert sorted(group[0].epochs) == list(range(8))


@pytest.mark.usefixtures("_functions")
def test_a_joining_aggregator_moves_no_shard_between_the_others(client: redis.Redis) -> None:
    group = [leases("b"), leases("d")]
    rounds(client, group, 1)
    before = [set(each.epochs) for each in group]
    group.append(leases("c"))
    rounds(client, group, 1)
    assert all(set(each.epochs) <= old for each, old in zip(group, before, strict=False))


@pytest.mark.usefixtures("_functions")
def test_more_aggregators_than_shards_leave_some_waiting(client: redis.Redis) -> None:
    group = [leases(f"w{n:02}") for n in range(11)]
    rounds(client, group, 3)
    assert sorted(len(each.epochs) for each in group) == [0, 0, 0] + [1] * 8


@pytest.mark.usefixtures("_functions")
def test_the_shards_of_a_dead_aggregator_move_once_its_leases_ran_out(client: redis.Redis) -> None:
    group = [leases("a"), leases("b")]
    rounds(client, group, 1)
    dead = group.pop()
    for shard in dead.epochs:  # as Redis does when the time has come
        client.delete(KEYS.lease(shard))
    client.zrem(KEYS.workers(), "aggregate b")
    rounds(client, group, 1)
    assert sorted(group[0].epochs) == list(range(8))
    assert all(group[0].epochs[shard] == epoch + 1 for shard, epoch in dead.epochs.items())


@pytest.mark.usefixtures("_functions")
def test_a_closing_aggregator_renews_and_takes_no_further_shard(client: redis.Redis) -> None:
    first, second = leases("a"), leases("b")
    rounds(client, [first, second], 1)
    first.closing = True
    mine = dict(first.epochs)
    second.leave(client)
    first.renew(client)
    assert first.epochs == mine
    client.delete(*(KEYS.lease(shard) for shard in mine))
    first.renew(client)
    assert set(first.epochs) == set(mine)


@pytest.mark.usefixtures("_functions")
def test_a_lease_key_of_another_type_does_not_block_the_other_shards(client: redis.Redis) -> None:
    client.rpush(KEYS.lease(0), "mine")
    group = [leases("a"), leases("b")]
    rounds(client, group, 2)
    assert sorted(shard for each in group for shard in each.epochs) == list(range(1, 8))
    assert {*group[0].refused, *group[1].refused} == {0}


@pytest.mark.usefixtures("_functions")
def test_leases_are_renewed_at_a_fifth_and_doubted_at_three_fifths_of_their_time(client: redis.Redis) -> None:
    clock = Clock()
    mine = ShardLeases(KEYS, "a", 300, clock)
    assert mine.due_seconds < 0 and mine.may_have_expired()
    mine.renew(client)
    assert (round(mine.due_seconds), mine.may_have_expired()) == (60, False)
    assert 179_000 < client.pttl(KEYS.lease(0)) <= 180_000
    clock.seconds += 179
    assert not mine.may_have_expired() and mine.due_seconds < 0
    clock.seconds += 1
    assert mine.may_have_expired()
