"""The shared cut of the instrument list: agreed on through Redis, followed live, safe from foreign hands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.ingest.feeds import Roster
from pkbrokers_redis.ingest.worker import WatchedList
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.instrument_list import edit_watch
from pkbrokers_redis.store.symbols import save_instruments


@pytest.fixture
def server_kind() -> str:
    return "valkey"


class List:
    """A list that can change."""

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
    """A roster that may look at any time."""

    def __init__(self, client: redis.Redis, settings: Settings, own: List, sessions: int = 1) -> None:
        self.client, self.own = client, own
        self.roster = Roster(settings.keys, own.read(client), sessions, own, clock=self._clock)
        self._seconds = 0.0

    def _clock(self) -> float:
        self._seconds += 10
        return self._seconds

    def look(self, *others: str) -> list[tuple[int, ...]]:
        self.roster.look(self.client, others)
        return [feed.tokens for feed in self.roster.feeds]


MakeWorker = Callable[..., Worker]


@pytest.fixture
def make_worker(client: redis.Redis, settings: Settings) -> MakeWorker:
    def make(*tokens: int, sessions: int = 1) -> Worker:
        return Worker(client, settings, List(*tokens), sessions)

    return make


def published(client: redis.Redis, settings: Settings) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = client.hgetall(settings.keys.feeds())  # type: ignore[assignment]
    return found


def test_the_first_worker_publishes_its_cut_and_others_read_it(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    a, b = make_worker(3, 1, 2), make_worker(1, 2, 3)
    assert a.look() == b.look() == [(1, 2, 3)]
    assert published(client, settings) == {b"1": b"[[1,2,3]]"}
    assert (a.roster.symbols, a.roster.own_id) == (b.roster.symbols, b.roster.own_id)


def test_an_added_instrument_moves_no_other_and_all_agree(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    many = range(1, 6_001)
    a, b = make_worker(*many), make_worker(*many)
    before = a.look()
    assert b.look() == before
    for each in (a, b):
        each.own.tokens = (*many, 9_999)
    after = b.look()
    assert after == a.look() == [*before, (9_999,)]
    for each in (a, b):
        each.own.tokens = (*many[1:], 9_999)
    assert a.look() == b.look() == [before[0][1:], before[1], (9_999,)]
    assert list(published(client, settings)) == [b"3"]


def test_a_worker_with_another_list_does_not_stop_the_others_streams(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make_worker(1, 2, 3), make_worker(1, 2)
    a.look("b")
    client.hset(settings.keys.worker("a"), "list", a.roster.own_id)
    client.hset(settings.keys.worker("b"), "list", b.roster.own_id)
    for _ in range(3):
        assert b.look("a") == a.look("b") == [(1, 2, 3)]
    assert list(published(client, settings)) == [b"1"]
    assert capsys.readouterr().err.count("another_list") == 1
    assert a.roster.own_id != b.roster.own_id  # which `pkb doctor` sees
    b.own.tokens = (1, 2, 9)  # while it runs: somebody means it
    assert b.look("a") == [(1, 2, 9)]
    client.hset(settings.keys.worker("b"), "list", b.roster.own_id)
    assert a.look("b") == b.look("a") == [(1, 2, 9)]


def test_after_the_last_worker_with_the_old_list_the_new_one_is_streamed(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    a, b = make_worker(1, 2, 3), make_worker(1, 2)
    a.look("b")
    client.hset(settings.keys.worker("a"), "list", a.roster.own_id)
    assert b.look("a") == [(1, 2, 3)]
    assert b.look() == [(1, 2)]  # a is gone


def test_whoever_writes_a_cut_knows_whom_it_added(make_worker: MakeWorker) -> None:
    first = make_worker(1, 2)
    first.look()
    assert first.roster.added == frozenset()  # nobody was streamed before
    a, b = make_worker(2, 3), make_worker(2, 3)
    a.look(), b.look()
    assert (a.roster.added, b.roster.added) == ({3}, frozenset())
    for each in (b, a):
        each.own.tokens = (2, 3, 1, *range(10, 6_010))  # another feed, too
        each.look()
    assert a.roster.added == {3} and b.roster.added == {1, *range(10, 6_010)}


def test_a_restart_keeps_who_stayed_where_it_was(make_worker: MakeWorker) -> None:
    make_worker(*range(1, 3_101)).look()
    first = make_worker(*range(1, 3_102)).look()
    assert [len(tokens) for tokens in first] == [1_551, 1_550] and 3_101 in first[0]


def test_a_worker_that_is_alone_needs_no_more_feeds_than_the_list(make_worker: MakeWorker) -> None:
    make_worker(*range(1, 6_001)).look()
    assert make_worker(1, 2, 6_000).look("a") == [(1, 2), (6_000,)]
    assert make_worker(1, 2, 6_000).look("a") == [(1, 2), (6_000,)]
    make_worker(*range(1, 6_001)).look("a")
    assert make_worker(1, 2, 6_000).look() == [(1, 2, 6_000)]


def test_a_race_is_won_by_one_and_lost_by_nobody(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings
) -> None:
    a, b = make_worker(1, 2), make_worker(1, 2, 3)
    read = client.hkeys
    client.hkeys = lambda *_: []  # type: ignore[method-assign,assignment,misc]  # b sees Redis before a wrote
    a_saw = a.roster._read(client)
    client.hkeys = read  # type: ignore[method-assign]
    b.look()
    assert not a_saw
    a.roster._write(client, False, anew=False)
    assert [feed.tokens for feed in a.roster.feeds] == [(1, 2, 3)]
    assert list(published(client, settings)) == [b"1"]


@pytest.mark.parametrize(
    "odd",
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
def test_a_cut_of_a_foreign_hand_is_passed_over_and_written_anew(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings, odd: bytes
) -> None:
    client.hset(settings.keys.feeds(), mapping={"7": odd, "x": "[[5]]", "9" * 30: "[[5]]"})
    a = make_worker(1, 2)
    a.look()
    assert a.look() == [(1, 2)]
    assert published(client, settings) == {b"8": b"[[1,2]]"}


def test_a_key_of_another_type_is_told_once_and_left_alone(
    make_worker: MakeWorker, client: redis.Redis, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    client.set(settings.keys.feeds(), "mine")
    a = make_worker(1, 2)
    assert a.look() == a.look() == [(1, 2)]
    assert client.get(settings.keys.feeds()) == b"mine"
    assert capsys.readouterr().err.count("feeds_unreadable") == 1


def test_a_redis_that_lost_everything_gets_the_cut_we_stream(
    make_worker: MakeWorker, client: redis.Redis
) -> None:
    a = make_worker(1, 2, 3, *range(10, 3_100))
    before = a.look()
    a.own.tokens = (*a.own.tokens, 5)
    moved = a.look()
    assert moved != before
    client.flushall()
    assert a.look() == moved == make_worker(*a.own.tokens).look()


def test_a_list_that_cannot_be_read_is_kept_and_told_once(
    make_worker: MakeWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_worker(1, 2)
    a.look()
    a.own.tokens, a.own.failure = (1,), PkbError("no file 'x'", "write it")
    assert a.look() == a.look() == [(1, 2)]
    a.own.failure = None
    a.own.tokens = tuple(range(1, 9_002))
    assert a.look() == a.look() == [(1, 2)]
    printed = capsys.readouterr().err
    assert printed.count("list_unreadable") == 2 and "9,001 instruments" in printed


def test_too_many_instruments_at_the_start_are_an_error(make_worker: MakeWorker) -> None:
    with pytest.raises(SettingsError, match="9,001"):
        make_worker(*range(1, 9_002))


def test_a_cut_for_more_api_keys_than_ours_is_not_followed(make_worker: MakeWorker) -> None:
    make_worker(*range(1, 12_001), sessions=2).look()
    assert make_worker(1, 2).look() == [(1, 2)]


def test_live_changes_reach_the_feeds(client: redis.Redis, make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(instruments="NSE:INFY")
    rows = [
        {"instrument_token": n << 8 | 1, "tradingsymbol": name, "exchange": "NSE"}
        for n, name in enumerate(("INFY", "TCS"), 1)
    ]
    save_instruments(client, settings.keys, rows)
    own = WatchedList(settings)
    seconds = iter(range(0, 1_000, 10))
    roster = Roster(settings.keys, own.read(client), 1, own, clock=lambda: next(seconds))
    roster.look(client)
    edit_watch(client, settings.keys, add=["TCS"])
    assert roster.look(client)
    assert [feed.tokens for feed in roster.feeds] == [(257, 513)]
    edit_watch(client, settings.keys, remove=["INFY"])
    assert roster.look(client)
    assert [feed.tokens for feed in roster.feeds] == [(513,)]
    assert roster.symbols == {513: "NSE:TCS"}
    assert not roster.look(client)
