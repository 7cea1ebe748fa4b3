"""The aiohttp application: the route table, and what happens around every request.

The middleware checks the token, turns errors into responses, sets headers, and logs. A log line has the
method, the path and the status, never the query, which can hold the token.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from pkbrokers_redis import logs
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.web import closed, market, pipeline
from pkbrokers_redis.web.executor import REDIS_ERRORS, Route, Services
from pkbrokers_redis.web.responses import error_response, json_response

log = logs.get("web")

ROUTES: tuple[Route, ...] = (*pipeline.ROUTES, *market.ROUTES, *closed.ROUTES)
PATH_SHOWN_MAX = 120

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the page's own URL can hold the token
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Server": "pkb",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(services: Services) -> web.Application:
    """Return the application that serves ROUTES, by GET only."""
    app = web.Application(middlewares=[_make_middleware(services)])
    for route in ROUTES:
        app.router.add_get(route.path, _bind(route, services), allow_head=not route.is_long)
    app.on_response_prepare.append(_add_headers)
    return app


def _bind(route: Route, services: Services) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        response: web.StreamResponse = await route.handler(request, services)
        return response

    return handle


def _make_middleware(services: Services) -> Any:
    secret = services.settings.web_token
    token = secret.get_secret_value() if secret is not None else None
    open_paths = frozenset(route.path for route in ROUTES if route.is_open)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.monotonic()
        services.counts["requests"] += 1
        response: web.StreamResponse
        if token is not None and request.path not in open_paths and not _has_token(request, token):
            response = json_response({"error": "this server needs a token: Authorization: Bearer …"}, 401)
            response.headers["WWW-Authenticate"] = "Bearer"
        else:
            response = await _respond(request, handler, services)
        if response.status >= 400:
            services.counts["failed" if response.status >= 500 else "refused"] += 1
        # An open page sends requests every two seconds: only refusals and failures are logged at info.
        (log.info if response.status >= 400 else log.debug)(
            "request_handled",
            method=request.method,
            path=request.rel_url.raw_path[:PATH_SHOWN_MAX],
            status=response.status,
            ms=round((time.monotonic() - started) * 1000, 1),
        )
        return response

    return middleware


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    """Set HEADERS on every response, streams included."""
    for name, value in HEADERS.items():
        if name == "Server" or name not in response.headers:  # aiohttp's own shows its version
            response.headers[name] = value


async def _respond(request: web.Request, handler: Handler, services: Services) -> web.StreamResponse:
    """Run the handler and turn every error into a response."""
    try:
        return await handler(request)
    except web.HTTPException as refusal:  # unknown path or method
        response = json_response({"error": (refusal.reason or "refused").lower()}, refusal.status)
        if "Allow" in refusal.headers:
            response.headers["Allow"] = refusal.headers["Allow"]
        return response
    except (PkbError, *REDIS_ERRORS) as error:
        return error_response(error, services)
    except Exception as error:
        log.error("request_failed", path=request.rel_url.raw_path[:PATH_SHOWN_MAX], exc_info=error)
        return error_response(error, services)


def _has_token(request: web.Request, token: str) -> bool:
    """Compare the request's token in constant time."""
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    given = bearer.strip() if scheme.lower() == "bearer" else request.query.get("token", "")
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
