"""Kite's JSON: the success and error envelopes, and quotes.

    HTTP  error_type                          when
    400   InputException                      a parameter is missing or wrong
    403   TokenException, UserException, …    the session is over; a login is refused
    404   GeneralException                    no such route
    429   NetworkException                    too many requests
    500   GeneralException
    502   DataException                       the order system (OMS) returned invalid data
    503   NetworkException                    the order system (OMS) did not respond

Source: https://kite.trade/docs/connect/v3/exceptions/ and the official SDKs.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from aiohttp import web

from pkbrokers_redis.kite.history_api import local_text
from pkbrokers_redis.kite.protocol import PRICE_DIVISOR_OF
from pkbrokers_redis.simulator.market import BAND, Market

# HTTP status → Kite's exception name and its usual message.
ERRORS: Final = {
    400: ("InputException", "Bad request"),
    403: ("TokenException", "Incorrect `api_key` or `access_token`."),
    404: ("GeneralException", "Route not found"),
    429: ("NetworkException", "Too many requests"),
    500: ("GeneralException", "Something unexpected happened"),
    502: ("DataException", "Unable to fetch the data from the OMS"),
    503: ("NetworkException", "The OMS is not responding"),
}
INSTRUMENTS_MAX: Final = {"quote": 500, "ohlc": 1000, "ltp": 1000}  # of one quote request


class KiteRefusal(Exception):
    """Raised inside the simulator to answer a request with one of Kite's errors."""

    def __init__(
        self,
        status: int,
        message: str | None = None,
        error_type: str | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        usual_type, usual_message = ERRORS[status]
        self.status = status
        self.message = message or usual_message
        self.error_type = error_type or usual_type
        self.data = data
        super().__init__(self.message)


def success(data: Any) -> web.Response:
    """Return `data` in Kite's success envelope."""
    return _json(200, {"status": "success", "data": data})


def failure(error: KiteRefusal) -> web.Response:
    """Return Kite's error envelope."""
    content = {
        "status": "error",
        "message": error.message,
        "data": error.data,
        "error_type": error.error_type,
    }
    return _json(error.status, content)


def _json(status: int, content: dict[str, Any]) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(content), content_type="application/json")


def quote_of(market: Market, row: int, now_s: float, kind: str) -> dict[str, Any]:
    """Return a row's last packet as an entry of Kite's quote API; `kind` is `quote`, `ohlc` or `ltp`."""
    is_index = bool(market.is_index[row])
    packet = (market.index_packets if is_index else market.packets)[row]
    token = int(market.tokens[row])
    divisor = float(PRICE_DIVISOR_OF[token & 0xFF])

    def price(name: str) -> float:
        return int(packet[name]) / divisor

    quote: dict[str, Any] = {"instrument_token": token, "last_price": price("last_price")}
    if kind == "ltp":
        return quote
    quote["ohlc"] = {name: price(name) for name in ("open", "high", "low", "close")}
    if kind == "ohlc":
        return quote
    change = (int(packet["last_price"]) - int(packet["close"])) / divisor
    quote |= {"timestamp": local_text(int(now_s)), "net_change": change}
    if is_index:
        return quote | {"lower_circuit_limit": 0, "upper_circuit_limit": 0}
    counts = {
        "last_quantity": "last_traded_quantity",
        "buy_quantity": "total_buy_quantity",
        "sell_quantity": "total_sell_quantity",
        "volume": "volume_traded",
        "oi": "oi",
        "oi_day_high": "oi_day_high",
        "oi_day_low": "oi_day_low",
    }
    quote |= {name: int(packet[field]) for name, field in counts.items()}
    return quote | {
        "last_trade_time": local_text(int(packet["last_trade_time"])),
        "average_price": price("average_traded_price"),
        "lower_circuit_limit": round(price("close") * (1 - BAND), 2),
        "upper_circuit_limit": round(price("close") * (1 + BAND), 2),
        "depth": {
            side: [_depth_level(level, divisor) for level in levels]
            for side, levels in zip(("buy", "sell"), packet["depth"], strict=True)
        },
    }


def _depth_level(level: Any, divisor: float) -> dict[str, Any]:
    quantity, orders = int(level["quantity"]), int(level["orders"])
    return {"price": int(level["price"]) / divisor, "quantity": quantity, "orders": orders}
