"""The market's last packets as Kite's quote API gives them: quote, ohlc, ltp."""

from __future__ import annotations

from typing import Any, Final

from pkbrokers_redis.kite.protocol import PRICE_DIVISOR_OF
from pkbrokers_redis.simulator.answers import local_text
from pkbrokers_redis.simulator.market import BAND, Market

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
