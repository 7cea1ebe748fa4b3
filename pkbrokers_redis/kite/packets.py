"""One packet → named fields: the quote hash's mapping, and the official SDK's dictionary."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Any

import msgspec

from pkbrokers_redis.core.errors import FrameError
from pkbrokers_redis.core.india import IST
from pkbrokers_redis.core.model import SEGMENT_INDICES
from pkbrokers_redis.kite.layout import (
    FULL,
    INDEX_FULL,
    INDEX_QUOTE,
    LTP,
    MODE_OF_LENGTH,
    PRICE_DIVISOR_OF,
    QUOTE,
    STRUCTS,
)

_json = msgspec.json.Encoder()


class _Level(msgspec.Struct):
    """A depth level, in the order and with the names of Kite's quote API."""

    price: float
    quantity: int
    orders: int


class _Depth(msgspec.Struct):
    buy: list[_Level]
    sell: list[_Level]


@lru_cache(maxsize=4096)  # neighbours in a frame share their second
def iso_ist(seconds: int) -> str:
    """Unix seconds → `2021-07-05T10:41:27+05:30`; "" for 0, which on the wire means none."""
    return datetime.fromtimestamp(seconds, IST).isoformat() if seconds else ""


@lru_cache(maxsize=1024)  # all packets of a frame share it
def iso_ist_ms(epoch_ms: int) -> str:
    """Unix milliseconds → `2021-07-05T10:41:27.005+05:30`."""
    return f"{iso_ist(epoch_ms // 1000)[:19]}.{epoch_ms % 1000:03d}+05:30"


def _unpack(packet: bytes | memoryview) -> tuple[int, ...]:
    layout = STRUCTS.get(len(packet))
    if layout is None:
        raise FrameError(f"a packet of {len(packet)} bytes is none of Kite's", bytes(packet[:64]))
    return layout.unpack(packet)


def quote_fields(packet: bytes | memoryview, symbol: str, at_ms: int) -> dict[str, str | int | float]:
    """The quote hash's fields (docs/keys.md) that this packet has. Times are ISO 8601 in IST, "" for none.

    `change` is per cent against the previous close, as the official SDKs compute it.
    Raises FrameError for a packet whose length is none of Kite's.
    """
    wire = _unpack(packet)
    length = len(packet)
    divisor = PRICE_DIVISOR_OF[wire[0] & 0xFF]
    last = wire[1] / divisor
    fields: dict[str, str | int | float] = {"symbol": symbol, "last_price": last}
    if length in (QUOTE, FULL):
        close = wire[10] / divisor
        fields["last_quantity"] = wire[2]
        fields["average_price"] = wire[3] / divisor
        fields["volume"] = wire[4]
        fields["buy_quantity"] = wire[5]
        fields["sell_quantity"] = wire[6]
        fields["open"] = wire[7] / divisor
        fields["high"] = wire[8] / divisor
        fields["low"] = wire[9] / divisor
        fields["close"] = close
        fields["change"] = _percent(last, close)
        if length == FULL:
            fields["oi"] = wire[12]
            fields["oi_day_high"] = wire[13]
            fields["oi_day_low"] = wire[14]
            fields["last_trade_time"] = iso_ist(wire[11])
            fields["exchange_time"] = iso_ist(wire[15])
    elif length != LTP:
        close = wire[5] / divisor
        fields["open"] = wire[4] / divisor
        fields["high"] = wire[2] / divisor
        fields["low"] = wire[3] / divisor
        fields["close"] = close
        fields["change"] = _percent(last, close)
        if length == INDEX_FULL:
            fields["exchange_time"] = iso_ist(wire[7])
    fields["received_at"] = iso_ist_ms(at_ms)
    fields["mode"] = MODE_OF_LENGTH[length]
    if length == FULL:
        levels = [_Level(wire[i + 1] / divisor, wire[i], wire[i + 2]) for i in range(16, 46, 3)]
        fields["depth"] = _json.encode(_Depth(levels[:5], levels[5:])).decode()
    return fields


def _percent(last: float, close: float) -> float:
    return (last - close) * 100 / close if close else 0.0


def decode(packet: bytes | memoryview) -> dict[str, Any]:
    """One packet as the official pykiteconnect names it, with times as aware datetimes in IST (None for 0).

    Raises FrameError for a packet whose length is none of Kite's.
    """
    wire = _unpack(packet)
    length = len(packet)
    token, divisor = wire[0], PRICE_DIVISOR_OF[wire[0] & 0xFF]
    tick: dict[str, Any] = {
        "tradable": token & 0xFF != SEGMENT_INDICES,
        "mode": MODE_OF_LENGTH[length],
        "instrument_token": token,
        "last_price": wire[1] / divisor,
    }
    if length == LTP:
        return tick
    if length in (INDEX_QUOTE, INDEX_FULL):
        high, low, opening, close = (value / divisor for value in wire[2:6])
        tick["ohlc"] = {"open": opening, "high": high, "low": low, "close": close}
        tick["change"] = _percent(tick["last_price"], close)
        if length == INDEX_FULL:
            tick["exchange_timestamp"] = _datetime(wire[7])
        return tick
    tick["last_traded_quantity"] = wire[2]
    tick["average_traded_price"] = wire[3] / divisor
    tick["volume_traded"] = wire[4]
    tick["total_buy_quantity"] = wire[5]
    tick["total_sell_quantity"] = wire[6]
    opening, high, low, close = (value / divisor for value in wire[7:11])
    tick["ohlc"] = {"open": opening, "high": high, "low": low, "close": close}
    tick["change"] = _percent(tick["last_price"], close)
    if length == FULL:
        tick["last_trade_time"] = _datetime(wire[11])
        tick["oi"], tick["oi_day_high"], tick["oi_day_low"] = wire[12:15]
        tick["exchange_timestamp"] = _datetime(wire[15])
        levels = [
            {"quantity": wire[i], "price": wire[i + 1] / divisor, "orders": wire[i + 2]}
            for i in range(16, 46, 3)
        ]
        tick["depth"] = {"buy": levels[:5], "sell": levels[5:]}
    return tick


def _datetime(seconds: int) -> datetime | None:
    return datetime.fromtimestamp(seconds, IST) if seconds else None
