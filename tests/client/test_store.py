"""CandleStore: what a program asks by symbol and interval."""

from __future__ import annotations

import datetime as dt
import itertools

import pytest
import redis

from pkbrokers_redis import CandleStore
from pkbrokers_redis.client import store as store_module
from pkbrokers_redis.errors import RedisUnavailable, UnknownInterval, UnknownSymbol
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.meta import ensure_meta
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, push, row, tick_frame, write_master


@pytest.fixture
def store(client: redis.Redis, settings: Settings) -> CandleStore:
    write_master(client, settings.keys)
    return CandleStore(settings, client)


def starts(candles: list[store_module.Candle]) -> list[int]:
    """Minutes after the open."""
    return [(candle.start - OPEN_S) // 60 for candle in candles]


def at(monkeypatch: pytest.MonkeyPatch, minutes: float) -> None:
    """It is that many minutes after the open."""
    monkeypatch.setattr(store_module, "market_clock", lambda _: lambda: (OPEN_S + minutes * 60) * 1000)


def test_candles_come_newest_last_and_the_current_one_only_if_asked(
    client: redis.Redis, store: CandleStore
) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S + 300 * i) for i in range(4)])
    client.hset(store.keys.current(INFY), "5m", row(OPEN_S + 1200, 105))
    assert starts(store.get_candles("INFY", "5m", 3)) == [5, 10, 15]
    assert starts(store.get_candles("nse:infy", "5M", 3, include_current=True)) == [10, 15, 20]
    assert starts(store.get_candles(INFY, "5m")) == [0, 5, 10, 15]
    assert store.get_candles("INFY", "5m", 0, include_current=True) == []
    current = store.get_current_candle("INFY", "5m")
    assert current is not None and current.close == 105


def test_missing_data_is_empty_not_an_error(store: CandleStore) -> None:
    assert store.get_candles("INFY", "1m") == []
    assert store.get_candles("INFY", "1m", include_current=True, fill=True) == []
    assert store.get_current_candle("INFY", "1m") is None
    assert store.get_quote("INFY") == {}
    assert store.ticks("INFY") == []
    assert store.get_dataframe("INFY", "1m").empty


def test_unknown_names_are_errors_with_suggestions(store: CandleStore) -> None:
    with pytest.raises(UnknownSymbol, match="did you mean NSE:RELIANCE"):
        store.get_candles("RELAINCE", "5m")
    with pytest.raises(UnknownInterval, match="1m 2m"):
        store.get_candles("INFY", "7m")


def test_a_reader_adopts_the_layout_of_the_store(client: redis.Redis, settings: Settings) -> None:
    writer = load_settings(shards=3, intervals_text="1m:50,2h:20")
    ensure_meta(client, writer, "2026-01-05T09:00:00+05:30")
    write_master(client, writer.keys)
    push(client, writer.keys, INFY, "2h", [row(OPEN_S)])
    store = CandleStore(settings, client)
    assert store.intervals == ("1m", "2h") and store.keys.shards == 3
    assert starts(store.get_candles("INFY", "2h")) == [0]


def test_a_reader_started_before_the_store_adopts_its_layout_later(
    client: redis.Redis, settings: Settings
) -> None:
    store = CandleStore(settings, client)
    assert store.keys.shards == 8
    writer = load_settings(shards=3)
    ensure_meta(client, writer, "2026-01-05T09:00:00+05:30")
    assert store.keys.shards == 3


def test_a_dataframe_is_indexed_by_kolkata_time(client: redis.Redis, store: CandleStore) -> None:
    push(client, store.keys, INFY, "day", [row(OPEN_S, 101.5, 42, oi=3)])
    frame = store.get_dataframe("INFY", "1d")
    assert frame.index.name == "datetime" and str(frame.index.tz) == "Asia/Kolkata"
    assert frame.index[0].to_pydatetime() == dt.datetime.fromtimestamp(OPEN_S, dt.UTC)
    assert frame.iloc[0][["open", "close", "volume", "oi", "flag"]].to_list() == [101.5, 101.5, 42, 3, ""]


def test_filled_candles_are_flat_at_the_last_close(
    client: redis.Redis, store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S, 100, oi=9), row(OPEN_S + 1200, 104)])
    at(monkeypatch, 24)
    found = store.get_candles("INFY", "5m", fill=True)
    assert starts(found) == [0, 5, 10, 15, 20]
    flat = found[2]
    assert flat[1:] == (100, 100, 100, 100, 0, 9, 0, "")
    assert starts(store.get_candles("INFY", "5m", 3, fill=True)) == [10, 15, 20]


def test_filling_continues_to_the_last_interval_that_has_ended(
    client: redis.Redis, store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S, 100)])
    at(monkeypatch, 15.01)  # less than the grace after 09:30
    assert starts(store.get_candles("INFY", "5m", fill=True)) == [0, 5]
    at(monkeypatch, 15.1)
    assert starts(store.get_candles("INFY", "5m", fill=True)) == [0, 5, 10]
    at(monkeypatch, 60 * 24)  # tomorrow
    assert starts(store.get_candles("INFY", "5m", fill=True)) == [0]


def test_filling_stops_at_the_sessions_end(
    client: redis.Redis, store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client, store.keys, INFY, "60m", [row(OPEN_S + 4 * 3600)])
    at(monkeypatch, 60 * 8)
    assert starts(store.get_candles("INFY", "60m", fill=True)) == [240, 300, 360]


def test_filling_before_a_hidden_current_candle(
    client: redis.Redis, store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client, store.keys, INFY, "5m", [row(OPEN_S)])
    client.hset(store.keys.current(INFY), "5m", row(OPEN_S + 900, 109))
    at(monkeypatch, 16)
    assert starts(store.get_candles("INFY", "5m", fill=True)) == [0, 5, 10]
    assert starts(store.get_candles("INFY", "5m", fill=True, include_current=True)) == [0, 5, 10, 15]
    assert starts(store.get_candles("INFY", "5m", 2, fill=True)) == [5, 10]


def test_filling_crosses_nights_and_holidays_without_inventing_any(
    client: redis.Redis, store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    friday_close = OPEN_S - 3 * 86_400 + 6 * 3600 + 600  # 2026-01-02 15:25
    push(client, store.keys, INFY, "5m", [row(friday_close - 600), row(OPEN_S + 300)])
    at(monkeypatch, 10)
    found = store.get_candles("INFY", "5m", fill=True)
    assert [candle.start for candle in found] == [
        friday_close - 600,
        friday_close - 300,
        friday_close,
        OPEN_S,
        OPEN_S + 300,
    ]


def test_a_share_that_rarely_trades_fills_only_the_requested_count(
    client: redis.Redis, store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client, store.keys, INFY, "1m", [row(OPEN_S - 400 * 86_400), row(OPEN_S + 600)])
    at(monkeypatch, 11)
    found = store.get_candles("INFY", "1m", 400, fill=True)
    assert len(found) == 400
    assert starts(found)[-11:] == list(range(11))
    assert all(a.start < b.start for a, b in itertools.pairwise(found))


def test_candles_out_of_hours_are_filled_round_the_clock(
    client: redis.Redis, store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    night = OPEN_S - 6 * 3600
    push(client, store.keys, INFY, "5m", [row(night), row(night + 900)])
    at(monkeypatch, -300)
    assert [candle.start - night for candle in store.get_candles("INFY", "5m", fill=True)][:4] == [
        0,
        300,
        600,
        900,
    ]


def test_quotes_and_ticks_go_by_symbol(client: redis.Redis, store: CandleStore) -> None:
    client.hset(store.keys.quote(NIFTY), mapping={"symbol": "NSE:NIFTY 50", "last_price": "25000.5"})
    assert store.get_quote("nifty 50")["last_price"] == 25000.5
    shard = store.keys.shard_of(RELIANCE)
    tick_frame(client, store.keys, shard, [[RELIANCE, 1400.5, 1, 1, None, None, None, None, 1]])
    assert [tick.last_price for tick in store.ticks("RELIANCE")] == [1400.5]


def test_malformed_rows_are_counted(client: redis.Redis, store: CandleStore) -> None:
    push(client, store.keys, INFY, "5m", ["?", row(OPEN_S)])
    client.hset(store.keys.current(INFY), "5m", "?")
    assert len(store.get_candles("INFY", "5m")) == 1
    assert store.get_current_candle("INFY", "5m") is None
    assert store.rows_refused == 2


def test_a_store_without_a_client_connects_and_closes(settings: Settings) -> None:
    with CandleStore(settings) as store:
        assert store.client.ping()


def test_an_unreachable_server_is_one_error() -> None:
    with pytest.raises(RedisUnavailable):
        CandleStore(load_settings(redis_url="redis://127.0.0.1:1"))
