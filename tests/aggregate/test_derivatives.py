"""Which stocks have derivatives: read from the master, known to the books, looked at again each minute."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis

from pkbrokers_redis.aggregate.worker import LOOK_SECONDS, Aggregator, Derivatives
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.instruments import swap_master

RELIANCE, INFY = 738561, 408065
pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


def sync(client: redis.Redis, settings: Settings, *with_futures: str) -> None:
    """A master of two stocks, of which these have a future."""
    rows = [
        {
            "instrument_token": str(token), "exchange": "NSE", "tradingsymbol": name, "segment": "NSE",
            "name": name, "instrument_type": "EQ", "expiry": "",
        }
        for token, name in ((RELIANCE, "RELIANCE"), (INFY, "INFY"))
    ] + [
        {
            "instrument_token": str(n << 8 | 2), "exchange": "NFO", "tradingsymbol": f"{name}30DECFUT",
            "segment": "NFO-FUT", "name": name, "instrument_type": "FUT", "expiry": "2030-12-30",
        }
        for n, name in enumerate(with_futures, 35_000)
    ]  # fmt: skip
    swap_master(client, settings.keys, rows, ["NSE", "NFO"])


def test_a_look_says_whether_they_changed(client: redis.Redis, settings: Settings) -> None:
    derivatives = Derivatives(settings.keys)
    assert not derivatives.look(client) and derivatives.tokens == frozenset()
    sync(client, settings, "INFY")
    assert derivatives.look(client) and derivatives.tokens == {INFY}
    assert not derivatives.look(client)
    assert not derivatives.look_if_due(client), "it has just looked"


def test_a_key_of_a_foreign_hand_counts_as_no_master(client: redis.Redis, settings: Settings) -> None:
    client.set(settings.keys.derivatives(), "x")
    derivatives = Derivatives(settings.keys)
    assert not derivatives.look(client) and derivatives.tokens == frozenset()


def test_an_aggregator_gives_a_stock_the_hours_of_the_master_of_today(
    client: redis.Redis, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(shards=1)
    cash, auction = (load_sessions("market").schedule_of(INFY, has) for has in (False, True))
    aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: time.time() * 1000)
    aggregator.start()
    try:

        def schedules() -> list[int]:
            book = aggregator.workers[0].book
            return [int(book.arrays.schedule[book.index(token)]) for token in (INFY, RELIANCE)]

        assert schedules() == [cash, cash]
        sync(client, settings, "INFY")
        later = time.monotonic() + LOOK_SECONDS
        monkeypatch.setattr("pkbrokers_redis.aggregate.worker.time.monotonic", lambda: later)
        aggregator.step(block_ms_max=1)
        assert schedules() == [auction, cash]
    finally:
        aggregator.close()
