"""Instruments to choose from: by symbol or company name, or those that are streamed."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from pkbrokers_redis.store.instruments import search_instruments
from pkbrokers_redis.web.answers import json_answer
from pkbrokers_redis.web.questions import number_of, word_of
from pkbrokers_redis.web.registry import Route
from pkbrokers_redis.web.services import Services

LIMIT_MAX = 50


async def search(request: web.Request, services: Services) -> web.Response:
    """`?q=infos&limit=10`: the best matches. Without `q` the first instruments of which there were ticks."""
    text, limit = word_of(request, "q"), number_of(request, "limit", 10, LIMIT_MAX)
    return json_answer(await services.heavy(_read, services, text, limit))


def _read(services: Services, text: str, limit: int) -> list[dict[str, Any]]:
    store = services.store
    if text:
        found = search_instruments(store.client, store.keys, text, limit=limit)
        return [{name: row[name] for name in ("token", "symbol", "name")} for row in found.rows]
    tokens = sorted(store.tokens_seen())[:limit]
    return [{"token": token, "symbol": symbol, "name": ""} for token, symbol in store.resolve_all(tokens)]


ROUTES = [Route("/api/search", search, "/api/search?q=infy&limit=5")]
