"""Kite's answers as JSON: `{"status": "success", "data": …}`, or an error with Kite's exception name.

    HTTP  error_type                          when
    400   InputException                      a parameter is missing or wrong
    403   TokenException, UserException, …    the session is over; a login is refused
    404   GeneralException                    no such route
    429   NetworkException                    too many requests
    500   GeneralException
    502   DataException                       the order system behind answers nonsense
    503   NetworkException                    the order system behind does not answer

Source: https://kite.trade/docs/connect/v3/exceptions/ and the official SDKs.

The market's last packets as Kite's quote API gives them: quote, ohlc, ltp.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import msgspec
from aiohttp import web

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.kite.protocol import PRICE_DIVISOR_OF
from pkbrokers_redis.simulator.market import BAND, Market

ERROR_TYPES: Final = {
    400: "InputException",
    403: "TokenException",
    404: "GeneralException",
    429: "NetworkException",
    500: "GeneralException",
    502: "DataException",
    503: "NetworkException",
}
MESSAGES: Final = {
    403: "Incorrect `api_key` or `access_token`.",
    404: "Route not found",
    429: "Too many requests",
    500: "Something unexpected happened",
    502: "Unable to fetch the data from the OMS",
    503: "The OMS is not responding",
}


class KiteRefusal(Exception):
    """Raised inside the simulator to answer a request with one of Kite's errors."""

    def __init__(
        self,
        status: int,
        message: str | None = None,
        error_type: str | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        self.status = status
        self.message = message or MESSAGES.get(status, "Bad request")
        self.error_type = error_type or ERROR_TYPES[status]
        self.data = data
        super().__init__(self.message)


def success(data: Any) -> web.Response:
    """`data` in Kite's envelope."""
    return _json(200, {"status": "success", "data": data})


def failure(error: KiteRefusal) -> web.Response:
    """Kite's error envelope."""
    content = {
        "status": "error",
        "message": error.message,
        "data": error.data,
        "error_type": error.error_type,
    }
    return _json(error.status, content)


def _json(status: int, content: dict[str, Any]) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(content), content_type="application/json")


def local_text(epoch_s: float) -> str:
    """`2021-06-08 15:45:56`: Indian time as Kite's quotes and sessions write it."""
    return datetime.fromtimestamp(int(epoch_s), IST).strftime("%Y-%m-%d %H:%M:%S")


INSTRUMENTS_MAX: Final = {"quote": 500, "ohlc": 1000, "ltp": 1000}  # of one request


def quote_of(market: Market, row: int, now_s: float, kind: str) -> dict[str, Any]:
    """One instrument's entry; `kind` is a key of INSTRUMENTS_MAX. Prices in rupees, times Indian."""
    is_index = bool(market.is_index[row])
    packet = (market.index_packets if is_index else market.packets)[row]
    token = int(market.tokens[row])
    divisor = PRICE_DIVISOR_OF[token & 0xFF]

    def price(name: str) -> float:
        return int(packet[name]) / float(divisor)

    brief: dict[str, Any] = {"instrument_token": token, "last_price": price("last_price")}
    if kind == "ltp":
        return brief
    brief["ohlc"] = {name: price(name) for name in ("open", "high", "low", "close")}
    if kind == "ohlc":
        return brief
    change = (int(packet["last_price"]) - int(packet["close"])) / divisor
    head = brief | {"timestamp": local_text(now_s), "net_change": change}
    if is_index:
        return head | {"lower_circuit_limit": 0, "upper_circuit_limit": 0}
    names = ("oi", "oi_day_high", "oi_day_low")
    return (
        head
        | {
            "last_trade_time": local_text(int(packet["last_trade_time"])),
            "last_quantity": int(packet["last_traded_quantity"]),
            "buy_quantity": int(packet["total_buy_quantity"]),
            "sell_quantity": int(packet["total_sell_quantity"]),
            "volume": int(packet["volume_traded"]),
            "average_price": price("average_traded_price"),
            "lower_circuit_limit": round(price("close") * (1 - BAND), 2),
            "upper_circuit_limit": round(price("close") * (1 + BAND), 2),
            "depth": {
                side: [
                    {
                        "price": int(level["price"]) / divisor,
                        "quantity": int(level["quantity"]),
                        "orders": int(level["orders"]),
                    }
                    for level in packet["depth"][number]
                ]
                for number, side in enumerate(("buy", "sell"))
            },
        }
        | {name: int(packet[name]) for name in names}
    )
