"""Upstream PKBrokers' parser by name and shape, on our `kite.wire`: there is no second parser."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from pkbrokers_redis.kite.layout import FULL, INDEX_FULL, INDEX_QUOTE, PRICE_DIVISOR_OF, QUOTE, STRUCTS
from pkbrokers_redis.kite.wire import parse_frame


class DepthEntry(NamedTuple):
    """One level of the order book; price in rupees."""

    quantity: int
    price: float
    orders: int


@dataclass(slots=True)
class Tick:
    """One tick with upstream's field names: prices in rupees, times in epoch seconds, None where absent.

    `exchange_timestamp` of a packet without one is the time received, as upstream has it.
    """

    instrument_token: int
    last_price: float
    last_quantity: int | None = None
    avg_price: float | None = None
    day_volume: int | None = None
    buy_quantity: int | None = None
    sell_quantity: int | None = None
    open_price: float | None = None
    high_price: float | None = None
    low_price: float | None = None
    prev_day_close: float | None = None
    last_trade_timestamp: int | None = None
    oi: int | None = None
    oi_day_high: int | None = None
    oi_day_low: int | None = None
    exchange_timestamp: int | None = None
    depth: dict[str, list[DepthEntry]] | None = None
    websocket_index: int = -1
    batch_index: int = -1


class ZerodhaWebSocketParser:
    """Kite's binary frames → `Tick` objects. For whole arrays of ticks use `kite.wire.parse_frame`."""

    @staticmethod
    def parse_binary_message(message: bytes, websocket_index: int = -1, batch_index: int = -1) -> list[Tick]:
        """All ticks of a frame, in its order. Any bytes are fine; a heartbeat gives an empty list."""
        received_at = int(time.time())
        parsed = parse_frame(message, received_at * 1000)
        return [
            _tick(message[offset : offset + length], received_at, websocket_index, batch_index)
            for offset, length in zip(parsed.offsets, parsed.lengths, strict=True)
        ]


def _tick(packet: bytes, received_at: int, websocket_index: int, batch_index: int) -> Tick:
    wire = STRUCTS[len(packet)].unpack(packet)
    divisor = PRICE_DIVISOR_OF[wire[0] & 0xFF]
    tick = Tick(
        wire[0],
        wire[1] / divisor,
        exchange_timestamp=received_at,
        websocket_index=websocket_index,
        batch_index=batch_index,
    )
    if len(packet) in (INDEX_QUOTE, INDEX_FULL):
        tick.high_price, tick.low_price, tick.open_price, tick.prev_day_close = (
            value / divisor for value in wire[2:6]
        )
        if len(packet) == INDEX_FULL:
            tick.exchange_timestamp = wire[7] or received_at
    elif len(packet) in (QUOTE, FULL):
        tick.last_quantity, tick.avg_price = wire[2], wire[3] / divisor
        tick.day_volume, tick.buy_quantity, tick.sell_quantity = wire[4:7]
        tick.open_price, tick.high_price, tick.low_price, tick.prev_day_close = (
            value / divisor for value in wire[7:11]
        )
        if len(packet) == FULL:
            tick.last_trade_timestamp = wire[11] or None
            tick.oi, tick.oi_day_high, tick.oi_day_low = wire[12:15]
            tick.exchange_timestamp = wire[15] or received_at
            levels = [DepthEntry(wire[i], wire[i + 1] / divisor, wire[i + 2]) for i in range(16, 46, 3)]
            tick.depth = {"bid": levels[:5], "ask": levels[5:]}
    return tick
