"""Candles close by what their feed was heard to: `P:feeds` and `P:feed_progress` on a real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import redis

from pkbrokers_redis.aggregate import repairs as repair_module
from pkbrokers_redis.aggregate.feed_progress import FeedProgress
from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.open_candles import UNHEARD_WAIT_MS
from pkbrokers_redis.store.repairs import send_gap
from tests.aggregate.stores import INFY, RELIANCE, START_S, TCS, Store, make_store, tick

__all__ = ["make_store"]  # a fixture
WAIT_S = UNHEARD_WAIT_MS / 1000
pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


@pytest.fixture
def store(
    make_store: Callable[..., Store], client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """Feed 0 has INFY, feed 1 RELIANCE; TCS comes from another producer."""
    monkeypatch.setattr(repair_module, "READ_EVERY_SECONDS", 0.0)
    store = make_store(shards=1, clock="wall", sessions="market", intervals_text="1m")
    client.hset(store.keys.feeds(), mapping={"3": "[[1]]", "12": json.dumps([[INFY], [RELIANCE]])})
    yield store
    for aggregator in store.started:
        aggregator.close()


def heard(store: Store, *seconds: float) -> None:
    mapping = {str(feed): int((START_S + second) * 1000) for feed, second in enumerate(seconds)}
    store.client.hset(store.keys.feed_progress(), mapping=mapping)


def trade(store: Store) -> Aggregator:
    """Three instruments trade until 09:15:48."""
    for token in (INFY, RELIANCE, TCS):
        for second, price, volume in ((-5, 100, 1_000), (5, 101, 1_010), (48, 102, 1_020)):
            store.send(tick(second, price, volume, token))
    store.clock.set(49)
    return store.drain()


def settle(store: Store, aggregator: Aggregator, second: float) -> dict[int, list[tuple[int, str]]]:
    """Let the clock say `second`; return (rev, flag) of all announcements by instrument."""
    store.clock.set(second)
    for _ in range(8):
        aggregator.step(block_ms_max=1)
    found: dict[int, list[tuple[int, str]]] = {}
    for _, each in store.client.xrange(store.keys.closed(0)):  # type: ignore[union-attr]
        row = json.loads(each[b"row"])
        flag = row[8] if len(row) > 8 else ""
        found.setdefault(int(each[b"token"]), []).append((int(each[b"rev"]), flag))
    return found


def test_a_dead_feed_flags_its_own_instruments_from_the_first_announcement(store: Store) -> None:
    aggregator = trade(store)
    heard(store, 50, 60.5)
    assert settle(store, aggregator, 62) == {RELIANCE: [(0, "")], TCS: [(0, "")]}
    assert settle(store, aggregator, 62 + WAIT_S)[INFY] == [(0, "gap")]
    assert aggregator.figures()["closed_unheard"] == 1
    heard(store, 70, 70)  # it was only late
    assert settle(store, aggregator, 70)[INFY] == [(0, "gap"), (1, "")]


def test_an_outage_that_is_reported_before_the_progress_is_in_the_first_announcement(store: Store) -> None:
    aggregator = trade(store)
    heard(store, 50, 60.5)
    assert INFY not in settle(store, aggregator, 62)
    send_gap(store.client, store.keys, [INFY], (START_S + 50) * 1000, (START_S + 62) * 1000, "no data")
    heard(store, 62.5, 62.5)
    settle(store, aggregator, 63)
    assert settle(store, aggregator, 63.2)[INFY] == [(0, "gap")]  # a waiting candle is looked at again
    assert settle(store, aggregator, 80)[INFY] == [(0, "gap")]


def test_a_new_aggregator_knows_the_progress_before_it_closes_anything(store: Store) -> None:
    trade(store).close()
    heard(store, 50, 60.5)
    store.clock.set(62)
    successor = store.aggregator()
    assert INFY not in settle(store, successor, 62)
    assert settle(store, successor, 62 + WAIT_S)[INFY] == [(0, "gap")]


@pytest.mark.parametrize(
    ("feeds", "progress"),
    [
        ({}, {}),
        ({"12": "junk"}, {"0": "1"}),
        ({"12": '[[1e99],["x"]]'}, {"0": "1"}),
        ({"12": f"[[{INFY}]]"}, {}),
        ({"12": f"[[{INFY}]]"}, {"0": "soon", "x": "1"}),
        ({"x": "y"}, {"0": "1"}),
        (None, None),
    ],
)
def test_what_is_malformed_counts_as_no_feed(
    store: Store, feeds: dict[str, str] | None, progress: dict[str, str] | None
) -> None:
    store.client.delete(store.keys.feeds(), store.keys.feed_progress())
    for key, fields in ((store.keys.feeds(), feeds), (store.keys.feed_progress(), progress)):
        if fields is None:
            store.client.set(key, "another type")
        elif fields:
            store.client.hset(key, mapping=fields)
    aggregator = trade(store)
    assert settle(store, aggregator, 62)[INFY] == [(0, "")]


def test_the_feeds_are_read_again_only_when_their_version_changes(store: Store) -> None:
    progress = FeedProgress(store.keys)
    heard(store, 50, 60)
    progress.read(store.client)
    store.client.hset(store.keys.feeds(), "13", json.dumps([[RELIANCE], [INFY]]))
    aggregator = trade(store)
    progress.note(state := aggregator.workers[0].state)
    before = [
        state.arrays.inst[state.index(token), col.HEARD] / 1000 - START_S for token in (INFY, RELIANCE, TCS)
    ]
    progress.read(store.client)
    progress.note(state)
    after = [state.arrays.inst[state.index(token), col.HEARD] / 1000 - START_S for token in (INFY, RELIANCE)]
    assert (before, after) == ([50, 60, -START_S], [60, 50])


def test_a_volume_that_was_taken_back_is_logged_with_its_instrument(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    master = {"exchange": "NSE", "tradingsymbol": "INFY"}
    store.client.hset(store.keys.instrument(INFY), mapping=master)
    for n, volume in enumerate((100_000, 1_200_000, 100_200, 100_250, 100_300)):
        store.send(tick(10 + n, 100, volume))
    aggregator = store.drain()
    assert store.rows()[-1][5] == 300
    assert aggregator.figures()["volumes_taken_back"] == 1
    assert capsys.readouterr().err.count("event=volume_taken_back symbol=NSE:INFY") == 1
