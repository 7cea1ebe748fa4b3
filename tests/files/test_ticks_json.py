"""ticks.json in upstream's shape, from quotes and day candles; files of any origin are read."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import redis

from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.files import ticks_json
from pkbrokers_redis.files.atomic import replacing
from pkbrokers_redis.files.ticks_json import TicksFile, read_entries, read_ticks_json
from pkbrokers_redis.settings import Settings
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, row

SHAPE = {
    "instrument_token", "trading_symbol", "ohlcv", "prev_day_close", "buy_quantity", "sell_quantity", "oi",
    "market_depth", "last_updated", "tick_count",
}  # fmt: skip
INSTRUMENTS = [
    (INFY, "NSE:INFY"),
    (NIFTY, "NSE:NIFTY 50"),
    (RELIANCE, "NSE:RELIANCE"),
    (128053508, "BSE:INFY"),
]
DEPTH = {
    "buy": [{"quantity": 5, "price": 100.4, "orders": 1}, {"quantity": 0, "price": 0, "orders": 0}],
    "sell": [],
}
QUOTE = {
    "symbol": "NSE:INFY", "last_price": "100.5", "volume": "1200", "open": "99", "high": "101", "low": "98.5",
    "close": "97.5", "buy_quantity": "10", "sell_quantity": "20", "oi": "", "depth": json.dumps(DEPTH),
    "last_trade_time": "2026-01-05T10:00:01+05:30", "received_at": "2026-01-05T10:00:02+05:30",
}  # fmt: skip


@pytest.fixture(params=["valkey"])
def server_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(client: redis.Redis, settings: Settings, path: Path) -> dict[str, Any]:
    with replacing(path) as file:
        ticks = TicksFile(file)
        for token, entry in read_entries(client, settings.keys, INSTRUMENTS):
            ticks.add(token, entry)
        ticks.finish()
    tree: dict[str, Any] = json.loads(path.read_text())
    return tree


def test_entry_has_the_shape_of_upstream(client: redis.Redis, settings: Settings, tmp_path: Path) -> None:
    client.hset(settings.keys.quote(INFY), mapping=QUOTE)
    client.hset(settings.keys.current(INFY), "day", row(OPEN_S, 100.5, 1200, ticks=42))
    entry = write(client, settings, tmp_path / "ticks.json")[str(INFY)]
    assert set(entry) == SHAPE
    assert (
        entry["instrument_token"] == INFY and entry["trading_symbol"] == "INFY" and entry["tick_count"] == 42
    )
    assert entry["ohlcv"] == {
        "open": 99, "high": 101, "low": 98.5, "close": 100.5, "volume": 1200,
        "timestamp": QUOTE["last_trade_time"],
    }  # fmt: skip
    numbers = [entry[name] for name in ("prev_day_close", "buy_quantity", "sell_quantity", "oi")]
    assert numbers == [97.5, 10, 20, 0]
    assert entry["market_depth"] == {"bid": [{"price": 100.4, "quantity": 5, "orders": 1}], "ask": []}
    assert entry["last_updated"] == QUOTE["received_at"]


def test_prices_are_those_of_the_day_candle_without_a_quote(
    client: redis.Redis, settings: Settings, tmp_path: Path
) -> None:
    client.hset(settings.keys.current(NIFTY), "day", row(OPEN_S, 25_000, 0, open=24_900, ticks=7))
    entry = write(client, settings, tmp_path / "t.json")[str(NIFTY)]
    assert entry["trading_symbol"] == "NIFTY 50" and entry["ohlcv"]["open"] == 24_900
    assert entry["ohlcv"]["timestamp"] == "2026-01-05T09:15:00+05:30" and entry["tick_count"] == 7


def test_instruments_without_a_price_and_malformed_fields_are_left_out(
    client: redis.Redis, settings: Settings, tmp_path: Path
) -> None:
    client.hset(settings.keys.quote(INFY), mapping={**QUOTE, "depth": "{", "close": "?", "volume": "inf"})
    client.set(settings.keys.quote(RELIANCE), "no hash")
    client.hset(settings.keys.current(NIFTY), "day", "no row")
    tree = write(client, settings, tmp_path / "t.json")
    assert list(tree) == [str(INFY)]
    assert (
        tree[str(INFY)]["market_depth"] == {"bid": [], "ask": []} and tree[str(INFY)]["prev_day_close"] == 0
    )


def test_other_exchanges_keep_their_prefix(client: redis.Redis, settings: Settings, tmp_path: Path) -> None:
    for token, _ in INSTRUMENTS:
        client.hset(settings.keys.quote(token), mapping=QUOTE)
    names = [entry["trading_symbol"] for entry in write(client, settings, tmp_path / "t.json").values()]
    assert names == ["INFY", "NIFTY 50", "RELIANCE", "BSE:INFY"]


def test_written_file_is_read_as_one_row_per_symbol(
    client: redis.Redis, settings: Settings, tmp_path: Path
) -> None:
    client.hset(settings.keys.quote(INFY), mapping=QUOTE)
    write(client, settings, tmp_path / "ticks.json")
    found = read_ticks_json(tmp_path / "ticks.json")
    frame = found.frames["INFY"]
    assert frame.index[0].isoformat() == "2026-01-05T00:00:00+05:30" and str(frame.index.tz) == "Asia/Kolkata"
    assert frame.iloc[0].to_list() == [99, 101, 98.5, 100.5, 1200] and found.refused == 0
    assert found.as_of_ms == (OPEN_S + 45 * 60 + 1) * 1000


def test_empty_store_gives_an_empty_object(client: redis.Redis, settings: Settings, tmp_path: Path) -> None:
    assert write(client, settings, tmp_path / "t.json") == {}
    assert read_ticks_json(tmp_path / "t.json").frames == {}


def entry(**changes: Any) -> dict[str, Any]:
    ohlcv = {
        "open": 1,
        "high": 2,
        "low": 0.5,
        "close": 1.5,
        "volume": 9,
        "timestamp": "2026-01-05T10:00:00+05:30",
    }
    return {"trading_symbol": "INFY", "ohlcv": ohlcv, **changes}


def test_malformed_entries_are_counted_and_left_out() -> None:
    ohlcv = entry()["ohlcv"]
    tree = {
        "1": entry(),
        "2": entry(trading_symbol=""),
        "3": entry(trading_symbol=5),
        "4": entry(ohlcv={**ohlcv, "close": 0}),
        "5": entry(ohlcv={**ohlcv, "high": "x"}),
        "6": entry(trading_symbol="TCS", ohlcv={**ohlcv, "timestamp": "yesterday"}),
        "7": None,
        "8": [],
        "9": entry(ohlcv=None),
    }
    found = read_ticks_json(json.dumps(tree).encode())
    assert list(found.frames) == ["INFY"] and found.refused == 8 and found.why


def test_zip_of_upstream_is_read_and_a_zip_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ticks.json", json.dumps({"1": entry()}))
    assert list(read_ticks_json(file.getvalue()).frames) == ["INFY"]
    bomb = io.BytesIO()
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("ticks.json", "w") as member,
    ):
        member.write(bytes(2 << 20))
    monkeypatch.setattr(ticks_json, "BYTES_MAX", 1 << 20)
    with pytest.raises(InputFileError, match="larger"):
        read_ticks_json(bomb.getvalue())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"PK\x03\x04no zip", b"[" * 100_000])
def test_file_that_is_no_ticks_json_is_a_one_line_error(data: bytes) -> None:
    with pytest.raises(InputFileError) as refused:
        read_ticks_json(data)
    assert "\n" not in str(refused.value)
