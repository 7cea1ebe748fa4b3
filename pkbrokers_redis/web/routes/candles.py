"""The last candles of one instrument."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from pkbrokers_redis.candles.model import CANDLE_FIELDS, find_interval
from pkbrokers_redis.web.answers import json_answer, row_of
from pkbrokers_redis.web.questions import flag_of, number_of, words
from pkbrokers_redis.web.registry import Route
from pkbrokers_redis.web.services import Services


async def candles(request: web.Request, services: Services) -> web.Response:
    """`?count=50&current=1&fill=1`: rows as in Redis, newest last; see `CandleStore.get_candles`."""
    [symbol] = words("symbol", [request.match_info["symbol"]]) or [""]
    [interval] = words("interval", [request.match_info["interval"]]) or [""]
    count, current, fill = (
        number_of(request, "count", 50), flag_of(request, "current"), flag_of(request, "fill")
    )  # fmt: skip
    return json_answer(await services.quick(_read, services, symbol, interval, count, current, fill))


def _read(
    services: Services, symbol: str, interval: str, count: int, current: bool, fill: bool
) -> dict[str, Any]:
    store = services.store
    wanted = find_interval(store.settings.intervals, interval)
    token, name = store.resolve(symbol)
    found = store.get_candles(token, wanted.name, count, current, fill)
    return {
        "token": token,
        "symbol": name,
        "interval": wanted.name,
        "fields": CANDLE_FIELDS,
        "candles": [row_of(candle) for candle in found],
    }


ROUTES = [Route("/api/candles/{symbol}/{interval}", candles, "/api/candles/INFY/5m?count=3&current=1&fill=1")]
