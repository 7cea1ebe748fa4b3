"""The routes: one file a group in `routes/`, one row each in `NAMES`.

A file defines `ROUTES`. Tests pick every row up: docs/web.md names it, it wants the token, nothing that is
asked of it is a traceback, and it says 503 in one line while Redis is away.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache

from aiohttp import web

from pkbrokers_redis.web.services import Services

Handler = Callable[[web.Request, Services], Awaitable[web.StreamResponse]]

NAMES = ("page", "health", "quote", "candles", "bulk", "search", "closed", "metrics")


@dataclass(frozen=True, slots=True)
class Route:
    """`GET path`. `example` is a path and query that it answers; `is_open`: without the token too; `is_long`:
    the body is sent piece by piece, so there is no HEAD."""

    path: str
    handler: Handler
    example: str
    is_open: bool = False
    is_long: bool = False


@cache
def routes() -> tuple[Route, ...]:
    """All of them, in the order of the table."""
    found: list[Route] = []
    for name in NAMES:
        found += importlib.import_module(f"pkbrokers_redis.web.routes.{name}").ROUTES
    return tuple(found)
