"""Feeds: the same partition everywhere, agreed on through Redis, changed without moving an instrument."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.ingest.feeds import Feed, FeedAssignments, list_id, partition, repartition
from pkbrokers_redis.ingest.worker import WatchedList
from pkbrokers_redis.kite.websocket import TOKENS_PER_CONNECTION_MAX
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.symbols import edit_watch, save_instruments


@given(tokens=st.lists(st.integers(1, 2**31), max_size=400), sessions=st.integers(1, 4))
def test_every_token_is_in_exactly_one_feed(tokens: list[int], sessions: int) -> None:
    feeds = partition(tokens, sessions)
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
    assert [len(feed.tokens) for feed in partition(range(count), 1)] == sizes


def test_the_order_and_repeats_of_a_list_do_not_matter() -> None:
    assert partition([3, 1, 2, 3], 1) == partition([1, 2, 3], 1)
    assert list_id([3, 1, 2, 3]) == list_id([1, 2, 3]) != list_id([1, 2])


def test_three_feeds_an_api_key() -> None:
    feeds = partition(range(20_000), 3)
    assert [feed.session for feed in feeds] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(("count", "sessions", "needed"), [(9_001, 1, 2), (27_001, 3, 4), (100_000, 2, 12)])
def test_too_many_instruments_say_how_many_keys_are_needed(count: int, sessions: int, needed: int) -> None:
    with pytest.raises(SettingsError, match=rf"{count:,}.* {needed} api keys"):
        partition(range(count), sessions)
    assert partition(range(count), needed)


# -- another list


def tokens_of(feeds: list[Feed]) -> list[tuple[int, ...]]:
    return [feed.tokens for feed in feeds]


@given(
    st.sets(st.integers(1, 20_000), max_size=7_000),
    st.sets(st.integers(1, 20_000), max_size=300),
    st.sets(st.integers(1, 20_000), max_size=300),
)
def test_an_instrument_that_stays_keeps_its_feed(
    before: set[int], added: set[int], removed: set[int]
) -> None:
    first = partition(before, 3)
    tokens = (before | added) - removed
    second = repartition(tokens_of(first), tokens, 3)
    home = {token: feed.number for feed in first for token in feed.tokens}
    if before & tokens:
        assert all(home.get(token, n) == n for n, feed in enumerate(second) for token in feed.tokens)
    assert sorted(token for feed in second for token in feed.tokens) == sorted(tokens)
    assert all(len(feed.tokens) <= TOKENS_PER_CONNECTION_MAX for feed in second)
    assert tokens_of(repartition(tokens_of(second), tokens, 3)) == tokens_of(second)


def test_new_instruments_go_where_most_room_is() -> None:
    feeds = repartition([[1, 2, 3], [4]], [1, 2, 3, 4, 5, 6, 7], 1)
    assert tokens_of(feeds) == [(1, 2, 3, 7), (4, 5, 6)]


def test_a_feed_is_opened_only_when_all_are_full() -> None:
    full = list(range(1, 3_001))
    assert [len(feed.tokens) for feed in repartition([full], [*full, 9_000], 1)] == [3_000, 1]
    assert [len(feed.tokens) for feed in repartition([full[1:]], [*full[1:], 9_000], 1)] == [3_000]


def test_an_empty_last_feed_is_closed_and_an_inner_one_waits_for_the_next() -> None:
    assert tokens_of(repartition([[1], [2], [3]], [1, 2], 1)) == [(1,), (2,)]
    assert tokens_of(repartition([[1], [2], [3]], [1, 3], 1)) == [(1,), (), (3,)]
    assert tokens_of(repartition([[1], [], [3]], [1, 3, 4], 1)) == [(1,), (4,), (3,)]


@pytest.mark.parametrize(
    "members",
    [[], [[1], [1, 2]], [list(range(1, 3_002))], [[1], [2], [3], [4]], [[77]]],
    ids=["none", "a token twice", "too long", "too many", "unknown tokens"],
)
def test_a_malformed_partition_is_replaced(members: list[list[int]]) -> None:
    tokens = range(1, 3_002) if members and len(members[0]) > 3_000 else [1, 2, 3, 4]
    assert repartition(members, tokens, 1) == partition(tokens, 1)


def test_repartition_raises_for_too_many_instruments() -> None:
    with pytest.raises(SettingsError, match="9,001"):
        repartition([[1]], range(1, 9_002), 1)


# -- agreed on through Redis


@pytest.fixture
def server_kind() -> str:
    return "valkey"


class List:
    """A list that can change."""

    unknown: tuple[str, ...] = ()

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens
        self.failure: PkbError | None = None
        self.reads = 0

    def version(self, client: redis.Redis) -> str:
        return str(self.tokens)

    def read(self, client: redis.Redis) -> list[tuple[int, str]]:
        self.reads += 1
        if self.failure is not None:
            raise self.failure
        return [(token, f"NSE:S{token}") for token in self.tokens]


class Worker:
    """Feed assignments that may be updated at any time."""

    def __init__(self, client: redis.Redis, settings: Settings, own: List, sessions: int = 1) -> None:
        self.client, self.own = client, own
        self.assignments = FeedAssignments(settings.keys, own.read(client), sessions, own, clock=self._clock)
        self._seconds = 0.0

    def _clock(self) -> float:
        self._seconds += 10
        return self._seconds

    def update(self, *others: str) -> list[tuple[int, ...]]:
        self.assignments.update(self.client, others)
        return [feed.tokens for feed in self.assignments.feeds]


MakeWorker = Callable[..., Worker]


@pytest.fixture
def make_worker(client: redis.Redis, settings: Settings) -> MakeWorker:
    def make(*tokens: int, sessions: int = 1) -> Worker:
        return Worker(client, settings, List(*tokens), sessions)

    return make


def published(client: redis.Redis, settings: Settings) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = client.hgetall(settings.keys.feeds())  # type: ignore[assignment]
    return found


def test_the_first_worker_publishes_its_feeds_and_the_rest_follow(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    a, b = make_worker(3, 1, 2), make_worker(1, 2, 3)
    assert a.update() == b.update() == [(1, 2, 3)]
    assert published(client, settings) == {b"1": b"[[1,2,3]]"}
    assert (a.assignments.symbols, a.assignments.own_id) == (b.assignments.symbols, b.assignments.own_id)


def test_an_added_instrument_moves_no_other_and_all_agree(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    many = range(1, 6_001)
    a, b = make_worker(*many), make_worker(*many)
    before = a.update()
    assert b.update() == before
    for each in (a, b):
        each.own.tokens = (*many, 9_999)
    after = b.update()
    assert after == a.update() == [*before, (9_999,)]
    for each in (a, b):
        each.own.tokens = (*many[1:], 9_999)
    assert a.update() == b.update() == [before[0][1:], before[1], (9_999,)]
    assert list(published(client, settings)) == [b"3"]


def test_a_worker_with_instrument_lists_differ_does_not_stop_the_others_streams(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make_worker(1, 2, 3), make_worker(1, 2)
    a.update("b")
    client.hset(settings.keys.worker("a"), "list", a.assignments.own_id)
    client.hset(settings.keys.worker("b"), "list", b.assignments.own_id)
    for _ in range(3):
        assert b.update("a") == a.update("b") == [(1, 2, 3)]
    assert list(published(client, settings)) == [b"1"]
    assert capsys.readouterr().err.count("instrument_lists_differ") == 1
    assert a.assignments.own_id != b.assignments.own_id  # which `pkb doctor` sees
    b.own.tokens = (1, 2, 9)  # while it runs: it is meant
    assert b.update("a") == [(1, 2, 9)]
    client.hset(settings.keys.worker("b"), "list", b.assignments.own_id)
    assert a.update("b") == b.update("a") == [(1, 2, 9)]


def test_after_the_last_worker_with_the_old_list_the_new_one_is_streamed(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    a, b = make_worker(1, 2, 3), make_worker(1, 2)
    a.update("b")
    client.hset(settings.keys.worker("a"), "list", a.assignments.own_id)
    assert b.update("a") == [(1, 2, 3)]
    assert b.update() == [(1, 2)]  # a has ended


def test_the_worker_that_publishes_knows_which_instruments_it_added(make_worker: MakeWorker) -> None:
    first = make_worker(1, 2)
    first.update()
    assert first.assignments.added == frozenset()  # nothing was streamed before
    a, b = make_worker(2, 3), make_worker(2, 3)
    a.update(), b.update()
    assert (a.assignments.added, b.assignments.added) == ({3}, frozenset())
    for each in (b, a):
        each.own.tokens = (2, 3, 1, *range(10, 6_010))  # another feed, too
        each.update()
    assert a.assignments.added == {3} and b.assignments.added == {1, *range(10, 6_010)}


def test_a_restart_keeps_instruments_in_their_feeds(make_worker: MakeWorker) -> None:
    make_worker(*range(1, 3_101)).update()
    first = make_worker(*range(1, 3_102)).update()
    assert [len(tokens) for tokens in first] == [1_551, 1_550] and 3_101 in first[0]


def test_a_worker_that_is_alone_needs_no_more_feeds_than_the_list(make_worker: MakeWorker) -> None:
    make_worker(*range(1, 6_001)).update()
    assert make_worker(1, 2, 6_000).update("a") == [(1, 2), (6_000,)]
    assert make_worker(1, 2, 6_000).update("a") == [(1, 2), (6_000,)]
    make_worker(*range(1, 6_001)).update("a")
    assert make_worker(1, 2, 6_000).update() == [(1, 2, 6_000)]


def test_of_two_workers_that_publish_at_once_one_succeeds_and_both_agree(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    a, b = make_worker(1, 2), make_worker(1, 2, 3)
    read = client.hkeys
    client.hkeys = lambda *_: []  # type: ignore[method-assign,assignment,misc]  # b sees Redis before a wrote
    a_saw = a.assignments._read(client)
    client.hkeys = read  # type: ignore[method-assign]
    b.update()
    assert not a_saw
    a.assignments._publish(client, False, may_merge=False)
    assert [feed.tokens for feed in a.assignments.feeds] == [(1, 2, 3)]
    assert list(published(client, settings)) == [b"1"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[[0]]",
        b"[[1],[1]]",
        b'["x"]',
        b"[[-1]]",
        b"[]",
        b"[[99999999999]]",
        b"[[1]" + b",[]" * 9 + b"]",
    ],
)
def test_malformed_published_feeds_are_replaced(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings, text: bytes
) -> None:
    client.hset(settings.keys.feeds(), mapping={"7": text, "x": "[[5]]", "9" * 30: "[[5]]"})
    a = make_worker(1, 2)
    a.update()
    assert a.update() == [(1, 2)]
    assert published(client, settings) == {b"8": b"[[1,2]]"}


def test_a_key_of_another_type_is_logged_once_and_left_alone(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    client.set(settings.keys.feeds(), "mine")
    a = make_worker(1, 2)
    assert a.update() == a.update() == [(1, 2)]
    assert client.get(settings.keys.feeds()) == b"mine"
    assert capsys.readouterr().err.count("feeds_unreadable") == 1


def test_a_redis_that_lost_everything_gets_the_streamed_feeds(
    make_worker: MakeWorker, client: redis.Redis
) -> None:
    a = make_worker(1, 2, 3, *range(10, 3_100))
    before = a.update()
    a.own.tokens = (*a.own.tokens, 5)
    moved = a.update()
    assert moved != before
    client.flushall()
    assert a.update() == moved == make_worker(*a.own.tokens).update()


def test_an_unreadable_list_keeps_the_last_one_and_is_logged_once(
    make_worker: MakeWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_worker(1, 2)
    a.update()
    a.own.tokens, a.own.failure = (1,), PkbError("no file 'x'", "write it")
    assert a.update() == a.update() == [(1, 2)]
    a.own.failure = None
    a.own.tokens = tuple(range(1, 9_002))
    assert a.update() == a.update() == [(1, 2)]
    printed = capsys.readouterr().err
    assert printed.count("list_unreadable") == 2 and "9,001 instruments" in printed


def test_too_many_instruments_at_the_start_are_an_error(make_worker: MakeWorker) -> None:
    with pytest.raises(SettingsError, match="9,001"):
        make_worker(*range(1, 9_002))


def test_feeds_for_more_api_keys_than_configured_are_not_followed(make_worker: MakeWorker) -> None:
    make_worker(*range(1, 12_001), sessions=2).update()
    assert make_worker(1, 2).update() == [(1, 2)]


def test_live_changes_reach_the_feeds(client: redis.Redis, make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(instruments="NSE:INFY")
    rows = [
        {"instrument_token": n << 8 | 1, "tradingsymbol": name, "exchange": "NSE"}
        for n, name in enumerate(("INFY", "TCS"), 1)
    ]
    save_instruments(client, settings.keys, rows)
    own = WatchedList(settings)
    seconds = iter(range(0, 1_000, 10))
    assignments = FeedAssignments(settings.keys, own.read(client), 1, own, clock=lambda: next(seconds))
    assignments.update(client)
    edit_watch(client, settings.keys, add=["TCS"])
    assert assignments.update(client)
    assert [feed.tokens for feed in assignments.feeds] == [(257, 513)]
    edit_watch(client, settings.keys, remove=["INFY"])
    assert assignments.update(client)
    assert [feed.tokens for feed in assignments.feeds] == [(513,)]
    assert assignments.symbols == {513: "NSE:TCS"}
    assert not assignments.update(client)
