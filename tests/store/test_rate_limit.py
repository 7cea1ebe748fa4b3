"""The shared rate limit: slots are handed out by Redis, so the tests look at the slots, not at a watch."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.rate_limit import LIMITS_PER_SECOND, SPACING, Limiter
from tests.support import running_python, settings_env, wait_until

KEYS = Keys()
SECOND_US = 1_000_000


def limiter(client: redis.Redis, per_second: float, slept: list[float] | None = None) -> Limiter:
    """One that notes how long it would sleep instead of sleeping."""
    return Limiter(client, KEYS, per_second=per_second, sleep=(slept if slept is not None else []).append)


def most_in_a_second(slots: list[int]) -> int:
    """The highest number of slots in any window of one second."""
    slots = sorted(slots)
    return max(sum(start <= slot < start + SECOND_US for slot in slots) for start in slots)


def test_no_second_holds_more_requests_than_the_limit(client: redis.Redis) -> None:
    with ThreadPoolExecutor(8) as pool:
        shared = [limiter(redis.Redis(connection_pool=client.connection_pool), 3) for _ in range(8)]
        slots = list(pool.map(lambda number: shared[number % 8].wait(), range(60)))
    assert len(set(slots)) == 60
    assert most_in_a_second(slots) == 3


def test_slots_are_reserved_in_order(client: redis.Redis) -> None:
    one, other = limiter(client, 10), limiter(client, 10)
    slots = [each.wait() for _ in range(10) for each in (one, other)]
    assert slots == sorted(slots)
    gaps = {later - earlier for earlier, later in itertools.pairwise(slots)}
    assert min(gaps) >= round(SECOND_US * SPACING / 10)


def test_unused_limit_is_free_at_once(client: redis.Redis) -> None:
    slept: list[float] = []
    limiter(client, 3, slept).wait()
    assert slept == []
    assert 0 < client.ttl(KEYS.limit("history")) <= 70  # type: ignore[operator]


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_named_limits_are_those_of_kite(client: redis.Redis) -> None:
    assert LIMITS_PER_SECOND["history"] == 3
    own = Limiter(client, KEYS, "quote", sleep=lambda _: None)
    first, second = own.wait(), own.wait()
    assert second - first == round(SECOND_US * SPACING)


def test_a_429_delays_all_callers(client: redis.Redis) -> None:
    one = limiter(client, 1000)
    other = Limiter(client, KEYS, per_second=1000, sleep=lambda _: client.delete(KEYS.limit("history")))
    before = one.wait()
    one.back_off(5)
    one.back_off(2)  # a shorter one takes nothing back
    assert other.wait() - before >= 5 * SECOND_US


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_caller_that_sleeps_during_a_429_reserves_again(client: redis.Redis) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        if not slept:
            limiter(client, 3).back_off(5)
        slept.append(seconds)
        if len(slept) == 2:
            client.hdel(KEYS.limit("history"), "blocked")  # the five seconds are over

    limiter(client, 3).wait()
    Limiter(client, KEYS, sleep=sleep).wait()
    assert len(slept) == 2
    assert slept[0] < 1 < 4 < slept[1] <= 5


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_too_long_queue_is_refused_in_one_line(client: redis.Redis) -> None:
    limiter(client, 3).back_off(3_600)
    with pytest.raises(PkbError, match="reserved for the next 3,"):
        limiter(client, 3).wait()


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_a_stop_ends_the_wait(client: redis.Redis) -> None:
    stop = threading.Event()
    stop.set()
    limiter(client, 3).back_off(60)
    with pytest.raises(PkbError, match="stopped"):
        limiter(client, 3).wait(stop)


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_killed_process_loses_only_its_own_slot(client: redis.Redis, settings: object) -> None:
    mine = limiter(client, 0.5)
    mine.wait()
    program = (
        "from pkbrokers_redis.settings import load_settings\n"
        "from pkbrokers_redis.store.connect import connect\n"
        "from pkbrokers_redis.store.rate_limit import Limiter\n"
        "settings = load_settings()\n"
        "Limiter(connect(settings), settings.keys, per_second=0.5).wait()\n"
    )
    before = client.hget(KEYS.limit("history"), "next")
    with running_python("-c", program, env=settings_env(settings)) as process:  # type: ignore[arg-type]
        wait_until(lambda: client.hget(KEYS.limit("history"), "next") != before, timeout_seconds=60)
        process.kill()
    assert before is not None
    gap = round(SECOND_US * SPACING / 0.5)
    assert mine.wait() <= int(before) + gap + gap  # type: ignore[arg-type]
