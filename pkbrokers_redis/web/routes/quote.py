"""The latest quotes of some instruments."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from pkbrokers_redis.store.rows import read_quote
from pkbrokers_redis.web.answers import json_answer
from pkbrokers_redis.web.questions import words
from pkbrokers_redis.web.registry import Route
from pkbrokers_redis.web.services import Services


async def quote(request: web.Request, services: Services) -> web.Response:
    """An object for one symbol, an array for several; only token and symbol where there is no quote yet."""
    names = words("symbols", request.match_info["symbols"].replace("/", ",").split(","))
    found = await services.quick(_read, services, names)
    return json_answer(found[0] if len(found) == 1 else found)


def _read(services: Services, names: list[str]) -> list[dict[str, Any]]:
    store = services.store
    return [
        {"token": token, "symbol": symbol, **read_quote(store.client, store.keys, token)}
        for token, symbol in store.resolve_all(names)
    ]


ROUTES = [Route("/api/quote/{symbols:.+}", quote, "/api/quote/INFY/NSE:RELIANCE")]
