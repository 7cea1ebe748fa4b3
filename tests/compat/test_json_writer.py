"""A ticks.json kept from ticks that a program hands in."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pkbrokers_redis.compat.json_writer import JSONFileWriter, JSONWriter
from pkbrokers_redis.files.ticks_json import read_ticks_json
from tests.support import wait_until

TICK: dict[str, Any] = {
    "instrument_token": 408065, "last_price": 100.0, "open_price": 99.0, "high_price": 101.0,
    "low_price": 98.0,
    "prev_day_close": 97.0, "day_volume": 1000, "buy_quantity": 1, "sell_quantity": 2, "oi": 3,
    "timestamp": "2026-11-20T10:00:00+05:30",
    "depth": {"bid": [{"price": 1, "quantity": 2, "orders": 3}], "ask": []},
}  # fmt: skip


@pytest.fixture
def writer(tmp_path: Path) -> JSONWriter:
    return JSONWriter(tmp_path / "ticks.json", now=lambda: 1_795_150_000.0)


def saved(writer: JSONWriter) -> dict[str, Any]:
    writer.save()
    tree: dict[str, Any] = json.loads(Path(writer.json_file_path).read_text())
    return tree


def test_the_file_has_upstreams_shape(writer: JSONWriter) -> None:
    writer.kite_instruments = {408065: SimpleNamespace(tradingsymbol="INFY")}
    assert writer.add_tick(TICK)
    assert saved(writer)["408065"] == {
        "instrument_token": 408065,
        "trading_symbol": "INFY",
        "ohlcv": {
            "open": 99.0, "high": 101.0, "low": 98.0, "close": 100.0, "volume": 1000,
            "timestamp": TICK["timestamp"],
        },
        "prev_day_close": 97.0, "buy_quantity": 1, "sell_quantity": 2, "oi": 3, "market_depth": TICK["depth"],
        "last_updated": TICK["timestamp"], "tick_count": 1,
    }  # fmt: skip


def test_later_ticks_stretch_high_and_low(writer: JSONWriter) -> None:
    later = [
        {**TICK, "last_price": price, "high_price": 101.0, "low_price": 98.0} for price in (103.0, 96.0, 99.5)
    ]
    assert writer.add_batch([TICK, *later])
    entry = saved(writer)["408065"]
    assert (entry["ohlcv"]["high"], entry["ohlcv"]["low"], entry["ohlcv"]["close"]) == (103, 96, 99.5)
    assert entry["tick_count"] == 4


def test_kitetickers_dicts_are_understood(writer: JSONWriter) -> None:
    tick = {
        "instrument_token": 256265, "last_price": 25_000.5, "volume_traded": 7,
        "total_buy_quantity": 4,
        "ohlc": {"open": 24_900.0, "high": 25_100.0, "low": 24_800.0, "close": 24_950.0},
        "exchange_timestamp": dt.datetime(2026, 11, 20, 4, 30, tzinfo=dt.UTC),
        "depth": {"buy": [{"price": 1.0, "quantity": 2, "orders": 3}], "sell": []},
    }  # fmt: skip
    assert writer.add_tick(tick)
    entry = saved(writer)["256265"]
    assert entry["trading_symbol"] == "NIFTY 50" and entry["ohlcv"]["open"] == 24_900
    assert entry["prev_day_close"] == 24_950 and entry["buy_quantity"] == 4 and entry["ohlcv"]["volume"] == 7
    assert entry["market_depth"]["bid"] == [{"price": 1.0, "quantity": 2, "orders": 3}]
    assert entry["last_updated"] == "2026-11-20T10:00:00+05:30"


def test_a_new_day_resets_open_high_and_low(writer: JSONWriter) -> None:
    writer.add_tick({**TICK, "timestamp": "2026-11-19T15:29:00+05:30", "last_price": 500.0})
    writer.add_tick(TICK)
    ohlcv = saved(writer)["408065"]["ohlcv"]
    assert (ohlcv["open"], ohlcv["high"], ohlcv["low"]) == (99, 101, 98)


@pytest.mark.parametrize(
    "tick",
    [{}, {"instrument_token": 1}, {**TICK, "last_price": 0}, {**TICK, "last_price": float("nan")},
     {**TICK, "instrument_token": "x"}, {**TICK, "instrument_token": -1}, {**TICK, "timestamp": "soon"},
     None, 7],
)  # fmt: skip
def test_a_malformed_tick_is_refused_and_counted(writer: JSONWriter, tick: Any) -> None:
    assert not writer.add_tick(tick)
    assert not writer.add_batch([tick, TICK])
    assert writer.ticks_refused == 2 and saved(writer)["408065"]["tick_count"] == 1


def test_an_existing_file_is_continued(writer: JSONWriter) -> None:
    writer.add_tick(TICK)
    writer.save()
    again = JSONFileWriter(writer.json_file_path)
    again.add_tick(TICK)
    assert saved(again)["408065"]["tick_count"] == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": {}}', '{"408065": {"ohlcv": 1}}', '{"408065": null}'])
def test_a_damaged_file_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "ticks.json").write_text(text)
    writer = JSONWriter(tmp_path / "ticks.json")
    assert writer.add_tick(TICK) and list(saved(writer)) == ["408065"]


def test_a_thread_saves_until_stopped(tmp_path: Path) -> None:
    writer = JSONWriter(str(tmp_path / "ticks.json"), save_seconds=0.01)
    writer.start({408065: SimpleNamespace(tradingsymbol="INFY")})
    writer.start()
    writer.add_tick(TICK)
    wait_until(lambda: (tmp_path / "ticks.json").exists() and read_ticks_json(tmp_path / "ticks.json").frames)
    writer.add_tick({**TICK, "last_price": 100.5})
    writer.stop()
    assert read_ticks_json(tmp_path / "ticks.json").frames["INFY"]["close"].to_list() == [100.5]


def test_an_unwritable_disk_does_not_end_the_thread(tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    folder.write_text("a file where the folder should be")
    writer = JSONWriter(tmp_path / "x.json", save_seconds=0.01)
    writer._path = folder / "ticks.json"
    writer.start()
    writer.add_tick(TICK)
    folder.unlink()
    wait_until(lambda: (folder / "ticks.json").exists())
    writer.stop()
