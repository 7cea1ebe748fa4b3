"""One packet → names: the quote hash, the official SDK's dictionary, and upstream's Tick."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiteconnect import KiteTicker

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.compat.upstream_types import DepthEntry
from pkbrokers_redis.compat.websocket import ZerodhaWebSocketParser
from pkbrokers_redis.errors import FrameError
from pkbrokers_redis.kite.protocol import decode, encode_frame, encode_packet, quote_fields
from tests.support import SHARED_DATA

AT_MS = 1_625_461_888_045
WHEN = datetime(2021, 7, 5, 10, 41, 27, tzinfo=IST)
LEVELS = [{"quantity": 10 * n, "price": 1573.0 - n / 20, "orders": n} for n in range(1, 6)]
INFY: dict[str, Any] = {
    "last_price": 1573.7,
    "last_traded_quantity": 7,
    "average_traded_price": 1570.37,
    "volume_traded": 1_192_471,
    "total_buy_quantity": 256_443,
    "total_sell_quantity": 363_009,
    "ohlc": {"open": 1569.15, "high": 1575.0, "low": 1561.05, "close": 1567.8},
    "last_trade_time": WHEN,
    "oi": 3,
    "oi_day_high": 4,
    "oi_day_low": 2,
    "exchange_timestamp": WHEN,
    "depth": {"buy": LEVELS, "sell": LEVELS},
}


def test_the_quote_hash_of_a_full_packet_has_every_field_in_order() -> None:
    fields = quote_fields(encode_packet("full", 408065, **INFY), "NSE:INFY", AT_MS)
    depth = json.loads(str(fields.pop("depth")))
    assert list(depth["buy"][0]) == ["price", "quantity", "orders"]  # as Kite's quote API orders them
    assert depth == INFY["depth"]
    assert fields == {
        "symbol": "NSE:INFY",
        "last_price": 1573.7,
        "last_quantity": 7,
        "average_price": 1570.37,
        "volume": 1_192_471,
        "buy_quantity": 256_443,
        "sell_quantity": 363_009,
        "open": 1569.15,
        "high": 1575.0,
        "low": 1561.05,
        "close": 1567.8,
        "change": (1573.7 - 1567.8) * 100 / 1567.8,
        "oi": 3,
        "oi_day_high": 4,
        "oi_day_low": 2,
        "last_trade_time": "2021-07-05T10:41:27+05:30",
        "exchange_time": "2021-07-05T10:41:27+05:30",
        "received_at": "2021-07-05T10:41:28.045+05:30",
        "mode": "full",
    }


@pytest.mark.parametrize(
    ("mode", "token", "absent"),
    [
        ("ltp", 408065, {"volume", "open", "change", "oi", "exchange_time", "depth"}),
        ("quote", 408065, {"oi", "last_trade_time", "exchange_time", "depth"}),
        ("quote", 256265, {"volume", "oi", "exchange_time", "depth"}),
        ("full", 256265, {"volume", "last_quantity", "oi", "last_trade_time", "depth"}),
    ],
)
def test_the_quote_hash_has_only_what_the_packet_has(mode: str, token: int, absent: set[str]) -> None:
    fields = quote_fields(memoryview(encode_packet(mode, token, **INFY)), "X", AT_MS)
    assert not absent & fields.keys()
    assert fields["mode"] == mode
    assert {"symbol", "last_price", "received_at"} <= fields.keys()


def test_a_time_the_wire_leaves_at_zero_is_empty_and_not_1970() -> None:
    packet = encode_packet("full", 408065, last_price=1.0)
    fields = quote_fields(packet, "NSE:INFY", AT_MS)
    assert fields["last_trade_time"] == fields["exchange_time"] == ""
    assert fields["change"] == 0.0  # no previous close: no percentage, and no division by zero
    assert decode(packet)["last_trade_time"] is None


@given(st.integers(-(2**31), 2**31 - 1))
def test_prices_print_as_short_as_they_are(raw: int) -> None:
    price = quote_fields(encode_packet("ltp", 408065, last_price=raw / 100), "X", AT_MS)["last_price"]
    assert re.fullmatch(r"-?\d+\.\d{1,2}", repr(price))
    assert round(float(price) * 100) == raw


@pytest.mark.parametrize("reader", [decode, lambda packet: quote_fields(packet, "X", AT_MS)])
def test_a_packet_of_no_known_length_is_refused_with_its_bytes(reader: Any) -> None:
    with pytest.raises(FrameError) as caught:
        reader(b"x" * 164)
    assert caught.value.frame == b"x" * 64


@pytest.mark.parametrize(
    ("mode", "token"), [("ltp", 408065), ("quote", 408065), ("full", 408065), ("quote", 265), ("full", 265)]
)
def test_decode_says_what_the_official_sdk_says(mode: str, token: int) -> None:
    packet = encode_packet(mode, token, **INFY)
    parsed = decode(packet)
    (official,) = KiteTicker("key", "token")._parse_binary(encode_frame([packet]))
    for name in ("last_trade_time", "exchange_timestamp"):
        if name in official:
            assert (
                official[name].timestamp() == parsed[name].timestamp()
            )  # official is naive, of the host's zone
            official[name] = parsed[name]
    assert parsed == official


def test_encode_packet_undoes_decode() -> None:
    for mode, token in (
        ("full", 408065),
        ("quote", 408065),
        ("full", 256265),
        ("quote", 256265),
        ("ltp", 1025),
    ):
        packet = encode_packet(mode, token, **INFY)
        tick = decode(packet)
        tick.pop("mode"), tick.pop("tradable")
        assert encode_packet(mode, tick.pop("instrument_token"), **tick) == packet


# --- upstream's parser ---------------------------------------------------------------------------


def test_upstreams_parser_gives_ticks_with_upstreams_fields() -> None:
    frame = encode_frame([encode_packet("full", 408065, **INFY), encode_packet("full", 256265, **INFY)])
    stock, index = ZerodhaWebSocketParser.parse_binary_message(frame, websocket_index=2, batch_index=5)
    assert (stock.instrument_token, stock.last_price, stock.last_quantity) == (408065, 1573.7, 7)
    assert (stock.avg_price, stock.day_volume) == (1570.37, 1_192_471)
    assert (stock.buy_quantity, stock.sell_quantity) == (256_443, 363_009)
    assert (stock.open_price, stock.high_price, stock.low_price) == (1569.15, 1575.0, 1561.05)
    assert (stock.prev_day_close, stock.oi, stock.oi_day_high, stock.oi_day_low) == (1567.8, 3, 4, 2)
    assert stock.last_trade_timestamp == stock.exchange_timestamp == int(WHEN.timestamp())
    assert stock.depth is not None
    assert stock.depth["ask"][4] == DepthEntry(50, 1572.75, 5)
    assert (stock.websocket_index, stock.batch_index) == (2, 5)
    assert (index.high_price, index.low_price, index.open_price) == (1575.0, 1561.05, 1569.15)
    assert index.prev_day_close == 1567.8
    assert (index.day_volume, index.depth, index.last_trade_timestamp) == (None, None, None)
    assert index.exchange_timestamp == int(WHEN.timestamp())


def test_upstreams_parser_skips_what_it_cannot_read() -> None:
    good = encode_packet("ltp", 408065, last_price=10.0)
    ticks = ZerodhaWebSocketParser.parse_binary_message(encode_frame([b"?" * 99, good])[:-1] + b"")
    assert ticks == []
    assert len(ZerodhaWebSocketParser.parse_binary_message(encode_frame([b"?" * 99, good]))) == 1
    assert ZerodhaWebSocketParser.parse_binary_message(b"\0") == []


def test_the_recorded_packet_agrees_with_the_official_sdk() -> None:
    path = SHARED_DATA / "kite" / "packets.json"
    if not path.exists():
        pytest.skip("recorded packets (../shared/data/kite) are absent")
    for entry in json.loads(path.read_text()):
        data = bytes.fromhex(entry["hex"])
        frame = data if entry["framed"] else encode_frame([data])
        official = KiteTicker("key", "token")._parse_binary(frame)
        ticks = ZerodhaWebSocketParser.parse_binary_message(frame)
        assert [tick.last_price for tick in ticks] == [tick["last_price"] for tick in official]
        assert [tick.day_volume for tick in ticks] == [tick.get("volume_traded") for tick in official]
