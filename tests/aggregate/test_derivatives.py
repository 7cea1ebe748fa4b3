"""Which stocks have derivatives: read from the master, known to the books, looked at again each minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from pkbrokers_redis.aggregate.shard import SymbolCache
from pkbrokers_redis.aggregate.worker import HOURS_SECONDS, Aggregator
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.instruments import read_hours, swap_master

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


def test_an_aggregator_applies_the_hours_of_a_new_master_within_a_minute(
    client: redis.Redis, make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(shards=1)
    client.set(settings.keys.derivatives(), "x")  # a key of another type counts as no master
    cash, auction = (load_sessions("market").schedule_of(INFY, has) for has in (False, True))
    aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: time.time() * 1000)
    aggregator.start()
    try:

        def schedules() -> list[int]:
            state = aggregator.workers[0].state
            return [int(state.arrays.schedule[state.index(token)]) for token in (INFY, RELIANCE)]

        assert schedules() == [cash, cash]
        client.delete(settings.keys.derivatives())
        sync(client, settings, "INFY")
        later = time.monotonic() + HOURS_SECONDS
        monkeypatch.setattr("pkbrokers_redis.aggregate.worker.time.monotonic", lambda: later)
        aggregator.step(block_ms_max=1)
        assert schedules() == [auction, cash]
    finally:
        aggregator.close()


def test_the_masters_exchange_gives_the_hours_of_instruments_whose_token_says_another_one(
    client: redis.Redis, make_settings: Callable[..., Settings]
) -> None:
    keys, sessions = make_settings(shards=1).keys, load_sessions("market")
    mcx_index, gift = 273417, 291849
    rows = [
        {"instrument_token": str(token), "exchange": exchange, "tradingsymbol": name}
        for token, exchange, name in ((mcx_index, "MCX", "MCXBULLDEX"), (gift, "GLOBAL", "GIFT NIFTY"))
    ]
    index = {"instrument_token": "256265", "exchange": "NSE", "tradingsymbol": "NIFTY 50"}
    swap_master(client, keys, [*rows, index], ["NSE", "MCX", "GLOBAL"])
    assert read_hours(client, keys, sessions)
    assert not read_hours(client, keys, sessions)
    assert sessions.exchanges == {mcx_index: "MCX", gift: "GLOBAL"}
    assert sessions.schedules[sessions.schedule_of(mcx_index)] == "MCX"
    assert sessions.schedule_of(gift) == sessions.unknown_schedule
    swap_master(client, keys, [rows[0]], ["MCX"])  # another exchange's rows stay
    assert not read_hours(client, keys, sessions)
    swap_master(client, keys, [], ["MCX", "GLOBAL"])
    assert read_hours(client, keys, sessions)
    assert sessions.exchanges == {}


# --- symbols in announcements


def master_row(client: redis.Redis, settings: Settings, token: int, symbol: str) -> None:
    client.hset(settings.keys.instrument(token), mapping={"exchange": "NSE", "tradingsymbol": symbol})


def test_symbols_are_read_once_also_where_there_is_none(client: redis.Redis, settings: Settings) -> None:
    now = 1_000.0
    symbols = SymbolCache(settings.keys, monotonic=lambda: now)
    master_row(client, settings, INFY, "INFY")
    symbols.load(client, [INFY])
    calls_before = commands(client)
    assert symbols.symbol_of(client, INFY) == b"NSE:INFY"
    assert commands(client) == calls_before, "it was loaded with the shard"
    for _ in range(100):
        assert symbols.symbol_of(client, RELIANCE) == b"%d" % RELIANCE
    assert commands(client) == calls_before + 1, "one HMGET, not the whole name table"


def test_a_new_symbol_is_found_after_a_while_and_a_forgotten_one_at_once(
    client: redis.Redis, settings: Settings
) -> None:
    now = 1_000.0
    symbols = SymbolCache(settings.keys, monotonic=lambda: now)
    assert symbols.symbol_of(client, INFY) == b"%d" % INFY
    master_row(client, settings, INFY, "INFY")
    assert symbols.symbol_of(client, INFY) == b"%d" % INFY
    now += SymbolCache.UNKNOWN_SECONDS
    assert symbols.symbol_of(client, INFY) == b"NSE:INFY"
    master_row(client, settings, INFY, "INFOSYS")
    assert symbols.symbol_of(client, INFY) == b"NSE:INFY"
    symbols.forget(INFY)
    assert symbols.symbol_of(client, INFY) == b"NSE:INFOSYS"


def test_a_malformed_master_row_gives_the_token(client: redis.Redis, settings: Settings) -> None:
    client.set(settings.keys.instrument(INFY), "x")
    assert SymbolCache(settings.keys).symbol_of(client, INFY) == b"%d" % INFY


def commands(client: redis.Redis) -> int:
    """How many HMGETs the server has run."""
    stats: Any = client.info("commandstats")
    return int(stats.get("cmdstat_hmget", {}).get("calls", 0))
