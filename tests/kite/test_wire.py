"""Whole frames → tick batches: recorded packets, made-up ones, and garbage."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.candles import model
from pkbrokers_redis.kite.protocol import (
    decode,
    encode_frame,
    encode_full,
    encode_packet,
    parse_frame,
    quote_fields,
)
from tests.support import SHARED_DATA

AT_MS = 1_700_000_000_123
PACKETS = SHARED_DATA / "kite" / "packets.json"
RECORDED: list[dict[str, Any]] = json.loads(PACKETS.read_text()) if PACKETS.exists() else []
needs_recorded = pytest.mark.skipif(not RECORDED, reason="recorded packets (../shared/data/kite) are absent")

TOKENS = st.builds(
    lambda number, segment: number << 8 | segment, st.integers(1, 2**24 - 1), st.integers(1, 9)
)


def frame_of(entry: dict[str, Any]) -> bytes:
    """The frame of a recorded entry; an entry that is one bare packet is framed here."""
    data = bytes.fromhex(entry["hex"])
    return data if entry["framed"] else encode_frame([data])


def as_recorded(tick: dict[str, Any]) -> dict[str, Any]:
    """`decode`'s dictionary in the recording's terms: epoch seconds, and no computed change."""
    plain = {name: value for name, value in tick.items() if name != "change"}
    for name in ("last_trade_time", "exchange_timestamp"):
        if plain.get(name) is not None:
            plain[name] = int(plain[name].timestamp())
    return plain


@needs_recorded
@pytest.mark.parametrize("entry", RECORDED, ids=lambda entry: entry["id"])
def test_a_recorded_packet_decodes_to_its_recorded_values(entry: dict[str, Any]) -> None:
    frame = frame_of(entry)
    parsed = parse_frame(frame, AT_MS)
    assert (parsed.unknown, parsed.truncated, parsed.trailing) == (0, False, 0)
    assert len(parsed.ticks) == len(entry["decoded_here"]) > 0
    rows = zip(parsed.ticks, parsed.offsets, parsed.lengths, entry["decoded_here"], strict=True)
    for row, offset, length, expected in rows:
        wanted = expected["decoded"]
        assert as_recorded(decode(frame[offset : offset + length])) == wanted
        assert row[model.TOKEN] == wanted["instrument_token"]
        assert row[model.LAST_PRICE] == wanted["last_price"]
        assert row[model.AT_MS] == AT_MS
        if wanted["mode"] == "ltp":
            assert np.isnan(row[model.LAST_QUANTITY : model.TIME_MS]).all()
            continue
        assert row[model.LAST_QUANTITY] == wanted["last_traded_quantity"]
        assert row[model.VOLUME] == wanted["volume_traded"]
        ohlc = wanted["ohlc"]
        assert row[model.DAY_OPEN : model.DAY_LOW + 1].tolist() == [ohlc["open"], ohlc["high"], ohlc["low"]]
        if wanted["mode"] == "full":
            assert row[model.OI] == wanted["oi"]
            assert row[model.TIME_MS] == wanted["last_trade_time"] * 1000
        else:
            assert math.isnan(row[model.OI])
            assert row[model.TIME_MS] == AT_MS


def test_a_trade_time_before_1990_counts_as_none() -> None:
    packet = encode_packet("full", 408065, last_price=1500.0, volume_traded=7, last_trade_time=1)
    parsed = parse_frame(encode_frame([packet]), AT_MS)
    assert parsed.ticks[0, model.TIME_MS] == AT_MS
    assert quote_fields(packet, "NSE:INFY", AT_MS)["last_trade_time"] == ""
    assert decode(packet)["last_trade_time"] is None


@needs_recorded
def test_the_live_two_packet_frame_gives_every_value_its_source_asserts() -> None:
    entry = next(each for each in RECORDED if each["id"] == "cpp/websocket_ticks")
    frame = frame_of(entry)
    parsed = parse_frame(frame, AT_MS)
    for offset, length, expected in zip(
        parsed.offsets, parsed.lengths, entry["expected_by_source"].values(), strict=True
    ):
        tick = decode(frame[offset : offset + length])
        plain = as_recorded(tick)
        for name in ("instrument_token", "last_price", "volume_traded", "average_traded_price", "oi", "ohlc"):
            assert plain[name] == expected[name]
        for name in ("last_traded_quantity", "total_buy_quantity", "total_sell_quantity", "last_trade_time"):
            assert plain[name] == expected[name]
        assert plain["exchange_timestamp"] == expected["timestamp"]
        assert tick["change"] == pytest.approx(expected["net_change_percent"], abs=1e-12)
        for side in ("buy", "sell"):
            levels = [[each["price"], each["quantity"], each["orders"]] for each in tick["depth"][side]]
            assert levels == expected[side]


def test_each_segment_has_its_own_price_divisor() -> None:
    raw = 841_550_000
    prices = {}
    for segment in range(1, 10):
        packet = struct.pack(">Ii", 7 << 8 | segment, raw)
        prices[segment] = parse_frame(encode_frame([packet]), AT_MS).ticks[0, model.LAST_PRICE]
    assert prices[3] == 84.155
    assert prices[6] == 84_155.0
    assert {price for segment, price in prices.items() if segment not in (3, 6)} == {8_415_500.0}


def test_prices_are_signed_and_quantities_are_not() -> None:
    packet = encode_packet("quote", 408065, last_price=-43.05, volume_traded=4_000_000_000)
    row = parse_frame(encode_frame([packet]), AT_MS).ticks[0]
    assert row[model.LAST_PRICE] == -43.05
    assert row[model.VOLUME] == 4_000_000_000


def test_an_index_is_told_by_length_and_its_time_is_the_exchange_timestamp() -> None:
    ohlc = {"open": 24_480.0, "high": 24_600.5, "low": 24_400.0, "close": 24_500.0}
    full = encode_packet("full", 256265, last_price=24_550.25, ohlc=ohlc, exchange_timestamp=1_625_461_887)
    quote = encode_packet("quote", 267785, last_price=24_550.25, ohlc=ohlc)  # missing in many SDKs' lists
    parsed = parse_frame(encode_frame([full, quote]), AT_MS)
    assert parsed.lengths == [32, 28]
    assert parsed.ticks[0, model.TIME_MS] == 1_625_461_887_000
    assert parsed.ticks[1, model.TIME_MS] == AT_MS
    for row in parsed.ticks:
        assert row[model.DAY_OPEN : model.DAY_LOW + 1].tolist() == [24_480.0, 24_600.5, 24_400.0]
        assert np.isnan(row[[model.LAST_QUANTITY, model.VOLUME, model.OI]]).all()


def test_a_day_without_a_trade_has_no_open_high_low_and_the_time_received() -> None:
    row = parse_frame(encode_frame([encode_packet("full", 408065, last_price=1500.0)]), AT_MS).ticks[0]
    assert np.isnan(row[model.DAY_OPEN : model.DAY_LOW + 1]).all()
    assert row[model.TIME_MS] == AT_MS
    assert row[model.VOLUME] == 0


def test_a_truncated_frame_gives_its_whole_packets() -> None:
    frame = encode_frame([encode_packet("full", n << 8 | 1, last_price=n) for n in (1, 2, 3)])
    for cut in range(2 + 2 * 186, len(frame)):
        parsed = parse_frame(frame[:cut], AT_MS)
        assert parsed.truncated
        assert parsed.ticks[:, model.LAST_PRICE].tolist() == [1.0, 2.0]


def test_unknown_lengths_are_counted_and_the_packets_behind_them_kept() -> None:
    known = encode_packet("ltp", 408065, last_price=10.0)
    frame = encode_frame([b"\0" * 164, known, b"", b"\0" * 300, known])
    parsed = parse_frame(frame, AT_MS)
    assert parsed.unknown == 3
    assert parsed.lengths == [8, 8]
    assert parsed.ticks[:, model.LAST_PRICE].tolist() == [10.0, 10.0]


def test_bytes_behind_the_last_packet_are_told() -> None:
    frame = encode_frame([encode_packet("ltp", 408065, last_price=10.0)]) + b"abc"
    parsed = parse_frame(frame, AT_MS)
    assert (len(parsed.ticks), parsed.trailing, parsed.truncated) == (1, 3, False)


def test_a_frame_of_one_byte_is_a_heartbeat_and_of_none_is_truncated() -> None:
    assert parse_frame(b"\0", AT_MS).heartbeat
    assert parse_frame(b"", AT_MS).truncated
    assert not parse_frame(b"\0\0", AT_MS).truncated
    for frame in (b"", b"\0", b"\0\0", b"\0\1", b"\0\1\0"):
        assert parse_frame(frame, AT_MS).ticks.shape == (0, model.BATCH_WIDTH)


@given(st.binary(max_size=600))
def test_no_bytes_whatever_make_the_parser_raise(frame: bytes) -> None:
    parsed = parse_frame(frame, AT_MS)
    assert len(parsed.ticks) == len(parsed.offsets) == len(parsed.lengths)


@given(
    st.lists(st.tuples(st.sampled_from([8, 28, 32, 44, 164, 184, 5]), st.binary(min_size=184, max_size=184)))
)
def test_a_mixed_frame_reads_like_its_packets_one_by_one(parts: list[tuple[int, bytes]]) -> None:
    packets = [data[:length] for length, data in parts]
    whole = parse_frame(encode_frame(packets), AT_MS)
    single = [parse_frame(encode_frame([packet]), AT_MS) for packet in packets]
    assert whole.unknown == sum(each.unknown for each in single)
    assert np.array_equal(
        whole.ticks, np.concatenate([each.ticks for each in single] or [whole.ticks]), equal_nan=True
    )


@st.composite
def ticks(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Batches as `full` packets can carry them: prices on the wire's grid, times in whole seconds."""
    rows = []
    for token in draw(st.lists(TOKENS, max_size=8)):
        divisor = {3: 1e7, 6: 1e4}.get(token & 0xFF, 100.0)
        price = st.integers(-(2**31), 2**31 - 1).filter(bool).map(lambda raw, by=divisor: raw / by)
        count = st.integers(0, 2**32 - 1).map(float)
        time_ms = draw(st.integers(631_152_000, 2**32 - 1)) * 1000.0  # since 1990
        rows.append([token, draw(price), *(draw(count) for _ in range(3)), *(draw(price) for _ in range(3))])
        rows[-1] += [time_ms, float(AT_MS)]
        if token & 0xFF == 9:
            rows[-1][model.LAST_QUANTITY : model.OI + 1] = [math.nan] * 3
    return np.array(rows, float).reshape(-1, model.BATCH_WIDTH)


@given(ticks())
def test_parsing_what_was_encoded_yields_the_ticks(batch: np.ndarray[Any, Any]) -> None:
    parsed = parse_frame(encode_full(batch), AT_MS)
    assert np.array_equal(parsed.ticks, batch, equal_nan=True)
    assert not parsed.truncated and not parsed.unknown and not parsed.trailing
