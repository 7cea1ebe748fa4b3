"""InMemoryCandleStore: upstream's arguments, answers and shapes, with the data in Redis."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import redis

from pkbrokers_redis.client.producer import TickProducer, tick_row
from pkbrokers_redis.compat import candle_store as memory_store_module
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore, get_candle_store
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.rows import read_ticks
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, push, row, write_master
from tests.client.feeding import aggregating, tick
from tests.support import running_server, wait_until

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

UPSTREAM_CANDLE_KEYS = {
    "timestamp",
    "last_tick_time",
    "open",
    "high",
    "low",
    "close",
    "volume",
    "oi",
    "tick_count",
    "is_complete",
}
UPSTREAM_STATS_KEYS = {
    "ticks_processed",
    "candles_created",
    "candles_completed",
    "last_tick_time",
    "start_time",
    "instrument_count",
    "instruments_with_ticks",
    "registered_symbols",
    "uptime_seconds",
    "memory_mb",
}


@pytest.fixture
def store(client: redis.Redis, make_settings: Callable[..., Settings]) -> InMemoryCandleStore:
    write_master(client, make_settings().keys)
    return InMemoryCandleStore(settings=make_settings(clock="event"), client=client)


@pytest.fixture
def drain(client: redis.Redis, store: InMemoryCandleStore) -> Iterator[Callable[[], None]]:
    with aggregating(client, store.store.settings) as drain:
        yield drain


@pytest.fixture
def traded(store: InMemoryCandleStore, drain: Callable[[], None]) -> InMemoryCandleStore:
    """Six minutes of INFY, twelve ticks after the first sight; the last candle of each interval forms."""
    ticks = [tick(0, 100, 1000)]
    ticks += [tick(30 * n + 1, 100 + n, 1010 + 10 * n) for n in range(12)]
    assert store.process_ticks_batch(ticks) == 13
    drain()
    return store


def test_ticks_sent_become_candles_that_upstream_s_calls_return(traded: InMemoryCandleStore) -> None:
    found = traded.get_candles(trading_symbol="INFY", interval="1m", count=3)
    assert [set(each) for each in found] == [UPSTREAM_CANDLE_KEYS] * 3
    assert [each["timestamp"] - OPEN_S for each in found] == [180, 240, 300]
    assert [(each["open"], each["high"], each["low"], each["close"]) for each in found][-1] == (
        110,
        111,
        110,
        111,
    )
    assert [each["is_complete"] for each in found] == [True, True, False]
    assert [each["volume"] for each in found] == [20, 20, 20] and [each["tick_count"] for each in found] == [
        2,
        2,
        2,
    ]
    assert found == traded.get_candles(INFY, interval="1m", count=3)
    assert (
        traded.get_candles(INFY, interval="1m", count=2, include_current=False)[-1]["timestamp"]
        == OPEN_S + 240
    )
    assert traded.get_current_candle(trading_symbol="INFY", interval="1m") == found[-1]
    assert traded.get_latest_price(trading_symbol="INFY") == 111
    day = traded.get_day_ohlcv(INFY)
    assert day is not None and (day["open"], day["close"], day["volume"]) == (
        100,
        111,
        1120,
    )  # Kite's own count of the day
    everything = traded.get_all_instruments_ohlcv()
    assert everything == {INFY: {**day, "trading_symbol": "INFY"}}


def test_a_frame_has_upstream_s_index_columns_and_dtypes(traded: InMemoryCandleStore) -> None:
    frame = traded.get_ohlcv_dataframe(trading_symbol="INFY", interval="1m", count=50)
    assert list(frame.columns) == ["open", "high", "low", "close", "volume"]
    assert [str(each) for each in frame.dtypes] == ["float64"] * 4 + ["int64"]
    assert frame.index.name == "datetime" and str(frame.index.dtype) == "datetime64[ns, Asia/Kolkata]"
    # As upstream makes it from the same candles.
    candles = traded.get_candles(INFY, interval="1m", count=50)
    expected = pd.DataFrame(candles)
    stamps = pd.to_datetime(expected["timestamp"], unit="s", utc=True).dt.tz_convert("Asia/Kolkata")
    expected["datetime"] = stamps.astype("datetime64[ns, Asia/Kolkata]")
    expected = expected.set_index("datetime")[["open", "high", "low", "close", "volume"]]
    pd.testing.assert_frame_equal(frame, expected, check_freq=False)
    empty = traded.get_ohlcv_dataframe(trading_symbol="RELIANCE")
    assert list(empty.columns) == ["timestamp", "open", "high", "low", "close", "volume"] and empty.empty


def test_unknown_instruments_are_empty_or_none_not_an_error(store: InMemoryCandleStore) -> None:
    assert store.get_candles(trading_symbol="NOBODY") == store.get_candles() == []
    assert store.get_candles(INFY, interval="7m") == store.get_candles(INFY, count=0) == []
    assert store.get_current_candle(trading_symbol="INFY") is None
    assert store.get_latest_price(trading_symbol="NOBODY") is None
    assert store.get_day_ohlcv(INFY) is None
    assert (
        store.get_all_instruments_ohlcv()
        == store.export_to_pickle_format()
        == store.export_to_ticks_json()
        == {}
    )
    assert not store.has_recent_data()


def test_the_day_s_candle_stays_after_the_close(store: InMemoryCandleStore, client: redis.Redis) -> None:
    push(client, store.store.keys, INFY, "day", [row(OPEN_S, 101.5, 42)])
    push(client, store.store.keys, INFY, "1m", [row(OPEN_S, 101.25, 42)])
    day = store.get_day_ohlcv(trading_symbol="INFY")
    assert day is not None and day["close"] == 101.5 and day["is_complete"]
    assert store.get_latest_price(INFY) == 101.25


def test_stats_have_upstream_s_keys_and_count_for_all_processes(traded: InMemoryCandleStore) -> None:
    shared: dict[str, Any] = {}
    traded.update_shared_stats(shared)
    stats = traded.get_stats()
    assert set(stats) == set(shared) == UPSTREAM_STATS_KEYS
    assert stats["ticks_processed"] == 13 and stats["instruments_with_ticks"] == 1
    assert stats["candles_completed"] >= 5 and stats["registered_symbols"] == stats["instrument_count"] == 8
    assert traded.has_recent_data() and stats["memory_mb"] > 0
    assert "registered_symbols: 8" in traded.get_diagnostic_info()
    other = InMemoryCandleStore(settings=traded.store.settings, client=traded.store.client)
    assert other.get_stats()["last_tick_time"] == stats["last_tick_time"]


def test_exports_have_upstream_s_shapes(
    traded: InMemoryCandleStore, client: redis.Redis, tmp_path: Path
) -> None:
    client.hset(
        traded.store.keys.quote(INFY),
        mapping={
            "last_trade_time": datetime.fromtimestamp(OPEN_S + 331).astimezone().isoformat(),
            "close": "99.5",
        },
    )
    entry = traded.export_to_ticks_json()[str(INFY)]
    assert (
        entry["instrument_token"] == INFY and entry["trading_symbol"] == "INFY" and entry["tick_count"] == 12
    )
    assert entry["ohlcv"] == {
        "timestamp": "2026-01-05T09:20:31+05:30",
        "open": 100,
        "high": 111,
        "low": 100,
        "close": 111,
        "volume": 1120,
        "oi": 0,
    }
    assert entry["last_update"] == entry["last_updated"] == "2026-01-05T09:20:31+05:30"
    assert entry["prev_day_close"] == 99.5 and entry["market_depth"] == {"bid": [], "ask": []}
    path = tmp_path / "deep" / "ticks.json"
    traded.save_ticks_json(path)
    assert json.loads(path.read_text()) == traded.export_to_ticks_json()
    traded.save_ticks_json()
    assert (traded.store.settings.data_dir / "ticks.json").exists()
    pickled = traded.export_to_pickle_format()
    assert pickled == {
        "INFY": {
            "data": [[100, 111, 100, 111, 1120]],
            "columns": ["open", "high", "low", "close", "volume"],
            "index": ["2026-01-05T09:20:31+05:30"],
        }
    }
    frame = pd.DataFrame(pickled["INFY"]["data"], pickled["INFY"]["index"], pickled["INFY"]["columns"])
    assert frame["volume"].dtype == "int64"


def test_instruments_have_upstream_s_attributes(traded: InMemoryCandleStore) -> None:
    with traded.lock:
        instrument = traded.instruments[INFY]
        assert instrument.trading_symbol == "INFY"
        assert [each.timestamp - OPEN_S for each in instrument.candles["1m"]] == [0, 60, 120, 180, 240]
        current = instrument.current_candle["5m"]
    assert current is not None and current.to_list() == [110, 111, 110, 111, 20]
    assert type(current).from_dict(current.to_dict()) == current


def test_clear_deletes_market_data_of_this_prefix_and_nothing_else(
    client: redis.Redis, make_settings: Callable[..., Settings], store: InMemoryCandleStore
) -> None:
    with aggregating(client, store.store.settings) as drain:
        store.process_ticks_batch([tick(0, 1, 1), tick(1, 2, 2)])
        drain()
        with pytest.raises(PkbError, match="the store is in use"):
            store.clear()
    neighbour = make_settings(prefix="pkb2").keys
    push(client, neighbour, INFY, "5m", [row(OPEN_S)])
    client.hset(store.store.keys.quote(INFY), "last_price", "1")
    client.hset(store.store.keys.auth(), "api_key", "k")
    client.set("mine", "1")
    assert store.get_candles(INFY)
    store.clear()
    assert store.get_candles(INFY) == [] and store.get_stats()["instruments_with_ticks"] == 0
    left = {key.decode() for key in client.keys("pkb:*")}  # type: ignore[union-attr]
    assert not [key for key in left if key.startswith("pkb:{") and not key.endswith(":lease")]
    assert {"pkb:meta", "pkb:symbols", "pkb:auth"} <= left
    assert client.exists("mine", neighbour.candles(INFY, "5m")) == 2


def test_malformed_ticks_are_refused_and_the_rest_is_accepted(
    store: InMemoryCandleStore, client: redis.Redis
) -> None:
    malformed: list[Any] = [
        {},
        {"instrument_token": INFY},
        {"instrument_token": INFY, "last_price": 0},
        {"instrument_token": INFY, "last_price": float("nan")},
        {"instrument_token": INFY, "last_price": "many"},
        {"instrument_token": -1, "last_price": 5},
        {"instrument_token": 1e99, "last_price": 5},
        {"instrument_token": INFY, "last_price": [1]},
        None,
        "tick",
        7,
    ]
    assert store.process_ticks_batch([*malformed, tick(1, 5, 1)]) == 1
    assert not store.process_tick({"instrument_token": INFY})
    assert [each.last_price for each in read_ticks(client, store.store.keys, INFY, 9)] == [5]


@pytest.mark.parametrize(
    ("moment", "expected_ms"),
    [
        (OPEN_S, OPEN_S * 1000),
        (OPEN_S + 0.5, OPEN_S * 1000 + 500),
        (OPEN_S * 1000, OPEN_S * 1000),
        ("2026-01-05T09:15:00", OPEN_S * 1000),
        ("2026-01-05T03:45:00+00:00", OPEN_S * 1000),
        (datetime.fromtimestamp(OPEN_S), OPEN_S * 1000),  # as KiteTicker makes it
        ("yesterday", 77),
        (None, 77),
        (-5, 77),
        (float("inf"), 77),
    ],
)
def test_a_tick_s_time_may_have_any_form(server_kind: str, moment: object, expected_ms: float) -> None:
    found = tick_row({"instrument_token": INFY, "last_price": 1, "exchange_timestamp": moment}, 77)
    assert found is not None and found[8] == expected_ms


def test_kite_ticker_s_own_dicts_are_understood(server_kind: str) -> None:
    found = tick_row(
        {
            "instrument_token": INFY,
            "last_price": 4084.0,
            "last_traded_quantity": 1,
            "volume_traded": 1175986,
            "oi": 3,
            "ohlc": {"open": 4015.75, "high": 4094.0, "low": 0, "close": 4000.0},
            "last_trade_time": datetime.fromtimestamp(OPEN_S + 4),
            "exchange_timestamp": datetime.fromtimestamp(OPEN_S + 5),
            "depth": {"buy": [], "sell": []},
        },
        99,
    )
    assert found is not None
    assert found[:7] == [INFY, 4084.0, 1, 1175986, 3, 4015.75, 4094.0] and math.isnan(found[7])
    assert found[8:] == [(OPEN_S + 4) * 1000, 99]
    index = tick_row({"instrument_token": NIFTY, "last_price": 25000.5, "day_volume": 0}, 99)
    assert index is not None and math.isnan(index[3])


def test_ticks_wait_in_order_while_redis_is_unavailable_and_none_is_sent_twice(
    server_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkbrokers_redis.client.producer.RETRY_SECONDS", 0.01)
    folder = tmp_path / "server"
    with running_server(folder, "--appendonly", "yes") as port:
        settings = load_settings(redis_url=f"redis://127.0.0.1:{port}", data_dir=tmp_path / "data")
        producer = TickProducer(settings)
        assert producer.send([tick(1, 1, 1)]) == (1, 0) and producer.waiting == 0
    assert producer.send([tick(2, 2, 2), {}]) == (1, 1) and producer.send([tick(3, 3, 3)]) == (1, 0)
    assert producer.waiting == 2
    with running_server(folder, "--appendonly", "yes", "--port", str(port)), redis.Redis(port=port) as client:
        wait_until(lambda: producer.send([]) and not producer.waiting, what="the ticks that waited")
        assert [each.last_price for each in read_ticks(client, settings.keys, INFY, 9)] == [1, 2, 3]


def test_ticks_are_refused_when_too_many_wait(
    server_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkbrokers_redis.client.producer.BATCHES_MAX", 2)
    producer = TickProducer(load_settings(redis_url="redis://127.0.0.1:1", data_dir=tmp_path))
    assert [producer.send([tick(n, 1, 1)]) for n in range(3)] == [(1, 0), (1, 0), (0, 1)]


def test_there_is_one_candle_store_a_process(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, client: redis.Redis
) -> None:
    assert settings.redis_url is not None
    monkeypatch.setenv("PKB_REDIS_URL", settings.redis_url.get_secret_value())
    monkeypatch.setattr(memory_store_module, "_instance", None)
    shared: dict[str, Any] = {}
    assert get_candle_store() is get_candle_store(shared_stats=shared)
    assert set(shared) == UPSTREAM_STATS_KEYS
    assert push(client, settings.keys, RELIANCE, "5m", [row(OPEN_S, 9)]) is None
    assert get_candle_store().get_candles(RELIANCE)[0]["close"] == 9
