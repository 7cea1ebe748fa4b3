"""Around every request: who may ask, what an error looks like, which headers go out, what is logged.

Logged are method, path and status; never the query, which may hold the token.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from pkbrokers_redis import logs
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.web.answers import error_answer, json_answer
from pkbrokers_redis.web.reading import REDIS_ERRORS
from pkbrokers_redis.web.services import Services

log = logs.get("web")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PATH_SHOWN_MAX = 120

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the page's own URL may hold the token
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Server": "pkb",
}


def make_guard(services: Services, open_paths: frozenset[str]) -> Any:
    """The middleware."""
    secret = services.settings.web_token
    token = secret.get_secret_value() if secret is not None else None

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.monotonic()
        services.counts["requests"] += 1
        answer: web.StreamResponse
        if token is not None and request.path not in open_paths and not _knows(request, token):
            answer = json_answer({"error": "this server wants a token: Authorization: Bearer …"}, 401)
            answer.headers["WWW-Authenticate"] = "Bearer"
        else:
            answer = await _answer(request, handler, services)
        if answer.status >= 400:
            services.counts["failed" if answer.status >= 500 else "refused"] += 1
        # A page that is open asks every two seconds: only refusals and failures are for everybody to read.
        (log.info if answer.status >= 400 else log.debug)(
            "request", method=request.method, path=request.rel_url.raw_path[:PATH_SHOWN_MAX],
            status=answer.status, ms=round((time.monotonic() - began) * 1000, 1),
        )  # fmt: skip
        return answer

    return guard


async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
    """To every answer, streams included."""
    for name, value in HEADERS.items():
        if name == "Server" or name not in response.headers:  # aiohttp's tells its version
            response.headers[name] = value


async def _answer(request: web.Request, handler: Handler, services: Services) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as refusal:  # no such path, or not to be POSTed to
        answer = json_answer({"error": (refusal.reason or "refused").lower()}, refusal.status)
        if "Allow" in refusal.headers:
            answer.headers["Allow"] = refusal.headers["Allow"]
        return answer
    except (PkbError, *REDIS_ERRORS) as error:
        return error_answer(error, services)
    except Exception as error:
        log.error("failed", what=request.rel_url.raw_path[:PATH_SHOWN_MAX], exc_info=error)
        return error_answer(error, services)


def _knows(request: web.Request, token: str) -> bool:
    """Compared in constant time."""
    kind, _, bearer = request.headers.get("Authorization", "").partition(" ")
    given = bearer.strip() if kind.lower() == "bearer" else request.query.get("token", "")
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
