"""Feeds and who reads them: cut alike everywhere, shared evenly, moved when a worker dies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from pkbrokers_redis.core.errors import RedisUnavailable, SettingsError
from pkbrokers_redis.kite.urls import url_for
from pkbrokers_redis.pipeline.assign import FeedLeases, cut_feeds, list_id, sessions_of, share_of
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store import lease
from tests.support import wait_until


@pytest.fixture
def server_kind() -> str:
    """The leases' Functions are tested on both servers where they are; what is tested here is above them."""
    return "valkey"


# --- cutting the list


@given(tokens=st.lists(st.integers(1, 2**31), max_size=400), sessions=st.integers(1, 4))
def test_every_token_is_in_exactly_one_feed(tokens: list[int], sessions: int) -> None:
    feeds = cut_feeds(tokens, sessions)
    assert [token for feed in feeds for token in feed.tokens] == sorted(set(tokens))
    assert [feed.number for feed in feeds] == list(range(len(feeds)))


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (0, []),
        (1, [1]),
        (3_000, [3_000]),
        (3_001, [1_500, 1_501]),
        (7_500, [2_500] * 3),
        (9_000, [3_000] * 3),
    ],
)
def test_there_are_as_few_feeds_as_possible_and_they_are_even(count: int, sizes: list[int]) -> None:
    assert [len(feed.tokens) for feed in cut_feeds(range(count), 1)] == sizes


def test_the_order_and_repeats_of_a_list_do_not_matter() -> None:
    assert cut_feeds([3, 1, 2, 3], 1) == cut_feeds([1, 2, 3], 1)
    assert list_id([3, 1, 2, 3]) == list_id([1, 2, 3]) != list_id([1, 2])


def test_three_feeds_an_api_key() -> None:
    feeds = cut_feeds(range(20_000), 3)
    assert [feed.session for feed in feeds] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(("count", "sessions", "needed"), [(9_001, 1, 2), (27_001, 3, 4), (100_000, 2, 12)])
def test_too_many_instruments_say_how_many_keys_are_needed(count: int, sessions: int, needed: int) -> None:
    with pytest.raises(SettingsError, match=rf"{count:,}.* {needed} api keys"):
        cut_feeds(range(count), sessions)
    assert cut_feeds(range(count), needed)


# --- several api keys


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


# --- sharing


@given(st.sets(st.text("abc", min_size=1), min_size=1, max_size=8), st.integers(0, 40))
def test_shares_are_even_and_add_up(members: set[str], feeds: int) -> None:
    shares = [share_of(each, members, feeds) for each in members]
    assert sum(shares) == feeds
    assert max(shares) - min(shares) <= 1


def test_who_is_not_yet_seen_by_others_counts_itself() -> None:
    assert share_of("new", ["a"], 3) == 1


# --- leases, on a real server


class Worker:
    """A worker's leases and what it reads, without the sockets. Its clock stands past the first wait."""

    def __init__(self, name: str, connect: Callable[[], redis.Redis], settings: Settings, feeds: int) -> None:
        self.reading: set[int] = set()
        self.ms = 0.0
        self.leases = FeedLeases(
            connect,
            settings.keys,
            name,
            feeds,
            settings.lease_seconds,
            now_ms=lambda: self.ms,
            on_take=self.reading.add,
            on_drop=self._drop,
        )
        self.ms = 60_000.0

    def _drop(self, feeds: Collection[int]) -> None:
        assert self.reading.issuperset(feeds)
        self.reading.difference_update(feeds)

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
    """Every command of this client fails, as while Redis is away."""
    pool = client.connection_pool
    client.connection_pool = redis.ConnectionPool(host="127.0.0.1", port=1)
    try:
        yield
    finally:
        client.connection_pool = pool


def test_a_lone_worker_reads_everything(make_worker: MakeWorker) -> None:
    assert make_worker("a").look() == {0, 1, 2, 3}


def test_at_its_first_look_a_worker_only_shows_itself(make_worker: MakeWorker) -> None:
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
    assert a.reading == set()
    assert b.look() == {0, 1, 2, 3}


def test_the_feeds_of_a_worker_that_falls_silent_are_taken_over(
    make_worker: MakeWorker, settings: Settings
) -> None:
    a, b = make_worker("a"), make_worker("b")
    a.look(), b.look(), a.look(), b.look()
    wait_until(lambda: len(b.look()) == 4, what="b to read all")
    # Awake again, a finds its feeds gone and reads what its share then is.
    assert a.look() == set()
    assert a.leases.lost == 2
    b.look()
    assert a.look() == {2, 3}
    assert b.reading == {0, 1}


def test_without_redis_everybody_reads_on(make_worker: MakeWorker, client: redis.Redis) -> None:
    worker = make_worker("a")
    worker.look()
    with unreachable(client):
        assert worker.look() == {0, 1, 2, 3}
    assert worker.look() == {0, 1, 2, 3}


def test_a_feed_that_another_took_meanwhile_is_dropped_when_redis_is_back(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    worker = make_worker("a")
    worker.look()
    with unreachable(client):
        worker.look()
    client.set(settings.keys.feed(1), "b")
    assert worker.look() == {0, 2, 3}


def test_after_an_outage_nothing_new_is_taken_before_the_others_could_renew(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    a, b = make_worker("a"), make_worker("b")
    a.look(), b.look(), a.look(), b.look()
    with unreachable(client):
        a.look(), b.look()
    client.flushall()  # every lease and every sign of life is gone
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


def test_a_store_that_cannot_be_reached_at_first_is_asked_again(
    make_worker: MakeWorker, client: redis.Redis
) -> None:
    answers = iter([RedisUnavailable("away"), client, client])

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


def test_the_registry_names_the_worker(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    worker = make_worker("ingest-host-1")
    worker.look()
    assert lease.members(client, settings.keys, "ingest", 60_000) == ["ingest-host-1"]
    worker.leases.end()
    assert lease.members(client, settings.keys, "ingest", 60_000) == []
