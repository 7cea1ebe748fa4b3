"""InMemoryCandleStore's names: registered, moved, unknown; what the instrument master has stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from pkbrokers_redis.compat import candle_store as memory_store_module
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.rows import read_ticks
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, SENSEX, push, row, write_master
from tests.client.feeding import tick

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


@pytest.fixture
def store(client: redis.Redis, make_settings: Callable[..., Settings]) -> InMemoryCandleStore:
    write_master(client, make_settings().keys)
    return InMemoryCandleStore(settings=make_settings(clock="event"), client=client)


def test_names_are_registered_once_and_a_master_s_row_stays_unchanged(
    store: InMemoryCandleStore, client: redis.Redis
) -> None:
    client.hset(store.store.keys.instrument(INFY), "lot_size", "1")
    store.register_instrument(INFY, "INFY")
    assert client.hget(store.store.keys.instrument(INFY), "lot_size") == b"1"
    store.register_instrument(2953217, "TCS")
    store.register_instrument(128083204, "BSE:RELIANCE")
    store.register_instrument(260105, "NIFTY BANK")
    assert store.store.resolve("TCS") == (2953217, "NSE:TCS")
    assert store.store.resolve("BSE:RELIANCE") == (128083204, "BSE:RELIANCE")
    assert store.symbol_to_token["NIFTY BANK"] == 260105 and store.instrument_symbols[2953217] == "TCS"
    assert {"INFY", "TCS", "BSE:RELIANCE"} <= set(store.get_all_symbols())
    assert 2953217 in store.get_all_instrument_tokens() and 2953217 in store.instruments


def test_a_name_or_a_token_of_the_master_stays_unchanged(
    store: InMemoryCandleStore, client: redis.Redis
) -> None:
    before = client.hgetall(store.store.keys.symbols()), client.hgetall(store.store.keys.instrument(SENSEX))
    store.register_instrument(SENSEX, "SENSEX")  # an index that the master has on BSE
    store.register_instrument(INFY, "INFOSYS")
    store.register_instrument(RELIANCE, "INFY")
    store.register_instrument(2953217, "INFY")
    keys = store.store.keys
    assert (client.hgetall(keys.symbols()), client.hgetall(keys.instrument(SENSEX))) == before
    assert store.store.resolve("SENSEX") == (SENSEX, "BSE:SENSEX")
    assert store.store.resolve(INFY) == store.store.resolve("INFY") == (INFY, "NSE:INFY")


def test_a_name_that_cannot_be_registered_costs_no_tick(
    store: InMemoryCandleStore, client: redis.Redis
) -> None:
    assert store.process_tick(tick(0, 9, 1, token=2953217))
    store.store.client = redis.Redis(port=1)
    assert store.process_tick(tick(1, 10, 1, token=2953217, trading_symbol="TCS"))
    store.store.client = client
    assert store.process_tick(tick(2, 11, 2, token=2953217, trading_symbol="TCS"))
    assert store.store.resolve("TCS")[0] == 2953217
    assert [each.last_price for each in read_ticks(client, store.store.keys, 2953217, 9)] == [9, 10, 11]


def test_a_symbol_that_moves_to_another_token_is_followed(
    store: InMemoryCandleStore, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client, store.store.keys, INFY, "5m", [row(OPEN_S, 100)])
    push(client, store.store.keys, 2953217, "5m", [row(OPEN_S, 555)])
    assert "INFY" in store.get_all_symbols()
    assert store.get_candles(trading_symbol="INFY")[-1]["close"] == 100
    client.hset(store.store.keys.symbols(), "NSE:INFY", 2953217)
    monkeypatch.setattr(memory_store_module, "NAMES_SECONDS", -1)
    assert store.get_candles(trading_symbol="INFY")[-1]["close"] == 555


def test_an_unknown_name_is_looked_up_only_now_and_then(
    store: InMemoryCandleStore, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["INFY", "TCS", "nse: reliance", "NOBODY", str(NIFTY), "SENSEX", "99999999999"]
    known = ["INFY", "nse: reliance", str(NIFTY), "SENSEX"]
    assert store.known_of(names) == known and store.get_candles(trading_symbol="TCS") == []
    client.hset(store.store.keys.symbols(), "NSE:TCS", 2953217)
    push(client, store.store.keys, 2953217, "5m", [row(OPEN_S, 555)])
    assert store.known_of(names) == known and store.get_candles(trading_symbol="TCS") == []
    monkeypatch.setattr(memory_store_module, "NAMES_SECONDS", -1)
    assert store.known_of(names) == ["INFY", "TCS", *known[1:]]
    assert store.get_candles(trading_symbol="TCS")[-1]["close"] == 555


def test_a_tick_s_own_symbol_is_registered(store: InMemoryCandleStore) -> None:
    assert store.process_tick(tick(1, 10, 1, token=2953217, trading_symbol="TCS"))
    assert store.store.resolve("TCS")[0] == 2953217
