"""HighPerformanceDataProvider: a screener's questions, from the mirror after the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
import redis

from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.compat import shapes
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore
from pkbrokers_redis.compat.data_provider import HighPerformanceDataProvider
from pkbrokers_redis.settings import Settings
from tests.client.contract import INFY, OPEN_S, RELIANCE, announce, push, row, write_master
from tests.support import wait_until

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


@pytest.fixture
def store(client: redis.Redis, settings: Settings) -> CandleStore:
    write_master(client, settings.keys)
    for token in (INFY, RELIANCE):
        push(client, settings.keys, token, "5m", [row(OPEN_S + 300 * n, token + n, 10 + n) for n in range(5)])
        push(client, settings.keys, token, "day", [row(OPEN_S, 9)])
    client.hset(settings.keys.current(INFY), "5m", row(OPEN_S + 1500, 77.5, 3))
    return CandleStore(settings, client)


@pytest.fixture
def provider(store: CandleStore) -> Iterator[HighPerformanceDataProvider]:
    candle_store = InMemoryCandleStore(settings=store.settings, client=store.client)
    provider = HighPerformanceDataProvider(candle_store=candle_store)
    yield provider
    provider.close()


def test_frames_equal_the_candle_store_s(provider: HighPerformanceDataProvider) -> None:
    for symbol, interval in (("INFY", "5m"), ("NSE:RELIANCE", "5M"), ("INFY", "day"), ("INFY", "1d")):
        for _ in range(2):  # from Redis, then from the mirror
            frame = provider.get_stock_data(symbol, interval, 4)
            expected = provider.candle_store.get_ohlcv_dataframe(None, symbol, interval, 4)
            pd.testing.assert_frame_equal(frame, expected)
    assert provider.get_stock_data("INFY", "5m", 99)["close"].tolist()[-1] == 77.5
    assert provider.get_intraday_data("INFY")["close"].tolist()[-2:] == [INFY + 4, 77.5]


def test_after_the_first_read_redis_is_not_used(provider: HighPerformanceDataProvider) -> None:
    provider.mirror.close()
    provider.mirror.current_seconds = 3600
    first = provider.get_stock_data("INFY", "5m", 4)
    provider.candle_store.store.client = None  # type: ignore[assignment]  # any use of Redis fails now
    provider.mirror.store.client = None  # type: ignore[assignment]
    pd.testing.assert_frame_equal(provider.get_stock_data("INFY", "5m", 4), first)
    assert provider.get_stock_data("INFY", "5m", 2)["close"].tolist() == first["close"].tolist()[-2:]


def test_a_frame_is_the_caller_s_own(provider: HighPerformanceDataProvider) -> None:
    frame = provider.get_stock_data("INFY", "5m", 4)
    frame["close"] = 0.0
    frame.iloc[0, 0] = -1
    frame["rsi"] = 5
    assert provider.get_stock_data("INFY", "5m", 4)["close"].tolist()[-1] == 77.5
    assert "rsi" not in provider.get_stock_data("INFY", "5m", 4)


def test_new_candles_appear_in_the_frames(provider: HighPerformanceDataProvider, store: CandleStore) -> None:
    assert len(provider.get_stock_data("RELIANCE", "5m")) == 5
    text = row(OPEN_S + 1500, 42)
    push(store.client, store.keys, RELIANCE, "5m", [text])
    announce(store.client, store.keys, RELIANCE, "5m", text)
    wait_until(
        lambda: provider.get_stock_data("RELIANCE", "5m")["close"].tolist()[-1] == 42, what="the new candle"
    )
    assert provider.mirror.lag_ms < 60_000


def test_many_symbols_are_one_bulk_read(provider: HighPerformanceDataProvider) -> None:
    found = provider.get_stocks_data(["INFY", "NOBODY", "RELIANCE", "NIFTY 50"], "5m", 3)
    assert list(found) == ["INFY", "RELIANCE"]  # neither what is unknown nor what has no candles
    for symbol, frame in found.items():
        pd.testing.assert_frame_equal(frame, provider.get_stock_data(symbol, "5m", 3))
    assert provider.get_stocks_data(["INFY"], "7m") == provider.get_stocks_data([], "5m") == {}


def test_unknown_symbols_cost_few_reads_of_the_whole_master(
    provider: HighPerformanceDataProvider, store: CandleStore
) -> None:
    def looks() -> int:
        stats: Any = store.client.info("commandstats")
        return int(stats.get("cmdstat_hscan", {"calls": 0})["calls"])

    symbols = ["INFY", *(f"NOBODY{n}" for n in range(20)), "RELIANCE"]
    before = looks()
    assert list(provider.get_stocks_data(symbols, "5m")) == ["INFY", "RELIANCE"]
    after = looks()
    assert after - before <= 2
    assert list(provider.get_stocks_data(symbols, "5m")) == ["INFY", "RELIANCE"]
    assert provider.get_stock_data("NOBODY7", "1m").empty and provider.get_current_price("NOBODY7") is None
    assert looks() == after


def test_an_unknown_symbol_is_an_empty_frame(provider: HighPerformanceDataProvider) -> None:
    for frame in (provider.get_stock_data("NOBODY"), provider.get_stock_data("INFY", "7m")):
        assert frame.empty and list(frame.columns) == list(shapes.EMPTY_COLUMNS)
    assert provider.get_stock_data("NIFTY 50", "5m").empty
    assert provider.get_current_price("NOBODY") is None


def test_quotes_and_days(provider: HighPerformanceDataProvider) -> None:
    assert provider.get_current_price("INFY") == 9.0
    day = provider.get_current_ohlcv("INFY")
    assert day is not None and day["close"] == 9
    assert set(provider.get_market_data()) == {"INFY", "RELIANCE"}
    assert provider.is_data_available("INFY") and not provider.is_data_available("NIFTY 50")
    assert {"INFY", "NIFTY 50", "BSE:SENSEX"} <= set(provider.get_available_symbols())


def test_frames_of_older_pandas_are_the_same(server_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    rows = np.array([[OPEN_S + 300 * n, 1, 2, 0.5, 1.5, 10 + n, np.nan, 3] for n in range(4)], np.float64)
    new = shapes.ohlcv_frame(rows)
    monkeypatch.setattr(shapes, "_pandas_api", None)
    pd.testing.assert_frame_equal(shapes.ohlcv_frame(rows), new)
    rows[0, 5] = 0.25  # a market that trades fractions
    assert shapes.ohlcv_frame(rows)["volume"].tolist() == [0.25, 11, 12, 13]


def test_one_unknown_symbol_does_not_hide_the_known_ones_at_the_second_read(
    provider: HighPerformanceDataProvider,
) -> None:
    for _ in range(3):
        assert list(provider.get_stocks_data(["INFY", "NOPE"], "5m", 5)) == ["INFY"]
