"""Which worker reads which feed: shared evenly, taken over when a worker dies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from pkbrokers_redis.errors import RedisUnavailable, SettingsError
from pkbrokers_redis.ingest.feeds import FeedLeases, sessions_of, share_of
from pkbrokers_redis.kite.rest import url_for
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store import leases
from tests.support import wait_until


@pytest.fixture
def server_kind() -> str:
    """The leases' Functions are tested on both servers where they are; what is tested here is above them."""
    return "valkey"


# -- several api keys


def test_each_api_key_has_its_access_token() -> None:
    both = sessions_of(
        load_settings(
            kite_api_key="key1, key2", kite_access_token=SecretStr("one,two"), kite_ws_url="ws://127.0.0.1"
        )
    )
    assert [url_for(each) for each in both] == [
        "ws://127.0.0.1?api_key=key1&access_token=one",
        "ws://127.0.0.1?api_key=key2&access_token=two",
    ]


def test_without_any_key_there_is_one_session() -> None:
    [only] = sessions_of(load_settings(kite_ws_url="ws://127.0.0.1:1"))
    assert url_for(only) == "ws://127.0.0.1:1"


def test_lists_of_different_length_are_a_mistake_that_shows_no_secret() -> None:
    with pytest.raises(SettingsError, match=r"2 keys, PKB_KITE_ACCESS_TOKEN 1") as raised:
        sessions_of(load_settings(kite_api_key="a,b", kite_access_token=SecretStr("geheim")))
    assert "geheim" not in str(raised.value)


# -- sharing


@given(st.sets(st.text("abc", min_size=1), min_size=1, max_size=8), st.integers(0, 40))
def test_shares_are_even_and_add_up(members: set[str], feeds: int) -> None:
    shares = [share_of(each, members, feeds) for each in members]
    assert sum(shares) == feeds
    assert max(shares) - min(shares) <= 1


def test_a_worker_that_is_not_announced_yet_counts_itself() -> None:
    assert share_of("new", ["a"], 3) == 1


# -- leases, on a real server


class Worker:
    """A worker's leases and what it reads, without the sockets. Its clock is past the first wait."""

    def __init__(self, name: str, connect: Callable[[], redis.Redis], settings: Settings, feeds: int) -> None:
        self.reading: set[int] = set()
        self.ms = 0.0
        self.feeds = feeds
        self.open_fails = False
        self.handed_over: set[int] = set()  # closed while the lease was still held
        self.leases = FeedLeases(
            connect,
            settings.keys,
            name,
            settings.lease_seconds,
            self,
            clock=lambda: self.ms / 1000,
        )
        self.ms = 60_000.0

    def update_feeds(self, client: redis.Redis, other_workers: Collection[str]) -> int:
        self.others = list(other_workers)
        return self.feeds

    def open_feed(self, client: redis.Redis, number: int) -> None:
        if self.open_fails:
            self.open_fails = False
            raise redis.ConnectionError("down")
        self.reading.add(number)

    def close_feeds(self, client: redis.Redis | None, numbers: Collection[int]) -> None:
        assert self.reading.issuperset(numbers)
        self.reading.difference_update(numbers)
        if client is not None:
            self.handed_over.update(numbers)

    def look(self) -> set[int]:
        self.leases.look()
        assert self.reading == self.leases.held
        return self.reading


MakeWorker = Callable[..., Worker]


@pytest.fixture
def make_worker(client: redis.Redis, settings: Settings) -> MakeWorker:
    def make(name: str, feeds: int = 4, connect: Callable[[], redis.Redis] = lambda: client) -> Worker:
        return Worker(name, connect, settings, feeds)

    return make


@contextmanager
def unreachable(client: redis.Redis) -> Iterator[None]:
    """Every command of this client fails, as while Redis is unavailable."""
    pool = client.connection_pool
    client.connection_pool = redis.ConnectionPool(host="127.0.0.1", port=1)
    try:
        yield
    finally:
        client.connection_pool = pool


def test_a_lone_worker_reads_everything(make_worker: MakeWorker) -> None:
    assert make_worker("a").look() == {0, 1, 2, 3}


def test_at_its_first_look_a_worker_only_announces_itself(make_worker: MakeWorker) -> None:
    worker = make_worker("a")
    worker.ms = 0.0
    assert worker.look() == set()
    worker.ms += worker.leases.look_seconds * 1000
    assert worker.look() == {0, 1, 2, 3}


def test_a_joining_worker_gets_its_share_and_no_feed_is_read_twice(make_worker: MakeWorker) -> None:
    a, b, c = (make_worker(name) for name in "abc")
    a.look()
    assert b.look() == set()  # all are taken, until a has seen b
    assert a.look() == {0, 1}
    assert b.look() == {2, 3}
    c.look(), a.look(), b.look(), c.look()
    assert [len(each.reading) for each in (a, b, c)] == [2, 1, 1]
    assert a.reading | b.reading | c.reading == {0, 1, 2, 3}


def test_a_worker_beyond_the_number_of_feeds_waits_for_work(make_worker: MakeWorker) -> None:
    a, b = make_worker("a", feeds=1), make_worker("b", feeds=1)
    assert a.look() == {0}
    assert b.look() == set()
    a.leases.end()
    assert b.look() == {0}


def test_a_worker_that_leaves_hands_over_at_once(make_worker: MakeWorker) -> None:
    a, b = make_worker("a"), make_worker("b")
    a.look(), b.look(), a.look(), b.look()
    a.leases.end()
    assert a.reading == set() and a.handed_over == {0, 1, 2, 3}
    assert b.look() == {0, 1, 2, 3}


def test_the_feeds_of_a_worker_that_falls_silent_are_taken_over(
    make_worker: MakeWorker, settings: Settings
) -> None:
    a, b = make_worker("a"), make_worker("b")
    a.look(), b.look(), a.look(), b.look()
    wait_until(lambda: len(b.look()) == 4, what="b to read all")
    # Awake again, a finds its feeds gone and reads what its share then is.
    assert a.look() == set()
    assert a.leases.lost == 2 and a.handed_over == {2, 3}  # those it shared with b, before
    b.look()
    assert a.look() == {2, 3}
    assert b.reading == {0, 1}


def test_feeds_are_opened_and_closed_with_the_list(make_worker: MakeWorker) -> None:
    worker = make_worker("a", feeds=2)
    assert worker.look() == {0, 1} and worker.others == []
    worker.feeds = 3
    assert worker.look() == {0, 1, 2}
    worker.feeds = 1
    assert worker.look() == {0} and worker.handed_over == {1, 2}
    make_worker("b").look()
    worker.look()
    assert worker.others == ["b"]


def test_a_feed_that_cannot_be_opened_is_tried_again(make_worker: MakeWorker) -> None:
    worker = make_worker("a", feeds=1)
    worker.open_fails = True
    assert worker.look() == set()
    worker.ms += 60_000
    worker.look()
    worker.ms += 60_000
    assert worker.look() == {0}


def test_without_redis_a_worker_keeps_reading(make_worker: MakeWorker, client: redis.Redis) -> None:
    worker = make_worker("a")
    worker.look()
    with unreachable(client):
        assert worker.look() == {0, 1, 2, 3}
    assert worker.look() == {0, 1, 2, 3}


def test_a_feed_that_another_worker_took_meanwhile_is_closed(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    worker = make_worker("a")
    worker.look()
    with unreachable(client):
        worker.look()
    client.set(settings.keys.feed(1), "b")
    assert worker.look() == {0, 2, 3}


def test_after_an_outage_no_feed_is_taken_before_other_workers_could_renew(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    a, b = make_worker("a"), make_worker("b")
    a.look(), b.look(), a.look(), b.look()
    with unreachable(client):
        a.look(), b.look()
    client.flushall()  # every lease and every announcement is deleted
    assert a.look() == {0, 1}
    assert a.look() == {0, 1}  # though it believes to be alone, and the feeds of b are free
    assert b.look() == {2, 3}
    assert a.look() == {0, 1}


def test_a_store_that_lost_its_functions_gets_them_again(
    make_worker: MakeWorker, client: redis.Redis
) -> None:
    worker = make_worker("a")
    client.function_flush("SYNC")
    assert worker.look() == {0, 1, 2, 3}


def test_a_store_that_cannot_be_reached_at_first_is_tried_again(
    make_worker: MakeWorker, client: redis.Redis
) -> None:
    answers = iter([RedisUnavailable("down"), client, client])

    def connect() -> redis.Redis:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    worker = make_worker("a", connect=connect)
    assert worker.look() == set()
    worker.look()
    worker.ms += 60_000
    assert worker.look() == {0, 1, 2, 3}


def test_a_worker_is_in_the_registry_until_it_ends(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    worker = make_worker("ingest-host-1")
    worker.look()
    assert leases.members(client, settings.keys, "ingest", 60_000) == ["ingest-host-1"]
    worker.leases.end()
    assert leases.members(client, settings.keys, "ingest", 60_000) == []
