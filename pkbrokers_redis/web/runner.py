"""The role `web` as a process, and what happens around every request. Any number may run.

The middleware checks the token, turns errors into responses, sets headers, and logs. A log line has the
method, the path and the status, never the query, which can hold the token. The role writes only its
heartbeat, and it also serves when its Redis user may not write even that.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import redis
from aiohttp import web

from pkbrokers_redis import logs
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.runtime.roles import keep_heartbeat, worker_id
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.web import closed, market, pipeline
from pkbrokers_redis.web.executor import REDIS_ERRORS, Route, Services
from pkbrokers_redis.web.http import error_response, json_response

log = logs.get("web")

ROUTES: tuple[Route, ...] = (*pipeline.ROUTES, *market.ROUTES, *closed.ROUTES)
REDIS_SECONDS_MAX = 3.0  # a Redis that does not answer in this time counts as unavailable
STOP_POLL_SECONDS = 0.1
SHUTDOWN_SECONDS_MAX = 1.0  # for responses in progress; event streams end at once
KEEPALIVE_SECONDS_MAX = 30.0  # an idle connection
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
        handler = partial(route.handler, services=services)
        app.router.add_get(route.path, handler, allow_head=not route.is_long)
    app.on_response_prepare.append(_add_headers)
    return app


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


def serve(settings: Settings, stop: threading.Event) -> None:
    """Serve on PKB_WEB_HOST and PKB_WEB_PORT until `stop` is set. Raise PkbError when that is impossible."""
    with connect(settings, for_reading=True, socket_timeout_seconds=REDIS_SECONDS_MAX) as client:
        asyncio.run(_serve(settings, client, stop))


async def _serve(settings: Settings, client: redis.Redis, stop: threading.Event) -> None:
    services = Services(settings, CandleStore(settings, client))
    app = make_app(services)

    app.on_shutdown.append(services.end_streams)
    runner = web.AppRunner(
        app,
        access_log=None,  # the middleware logs without queries
        handler_cancellation=True,
        keepalive_timeout=KEEPALIVE_SECONDS_MAX,
        shutdown_timeout=SHUTDOWN_SECONDS_MAX,
    )
    await runner.setup()
    beats: asyncio.Task[None] | None = None
    try:
        url = await _listen(runner, settings)
        log.info("started", store=describe(settings, for_reading=True), url=url)
        if settings.web_token is None and not _is_loopback(settings.web_host):
            log.warning("token_missing", host=settings.web_host, hint="set PKB_WEB_TOKEN")
        beats = asyncio.create_task(
            keep_heartbeat(
                client, settings.keys, "web", worker_id("web"), lambda: {**services.figures(), "url": url}
            )
        )
        while not stop.is_set():  # noqa: ASYNC110  a signal handler sets it, in whichever thread
            await asyncio.sleep(STOP_POLL_SECONDS)
    finally:
        await runner.cleanup()
        if beats is not None:
            beats.cancel()
            await asyncio.gather(beats, return_exceptions=True)
        services.close()
    log.info("stopped", **services.figures())


async def _listen(runner: web.AppRunner, settings: Settings) -> str:
    """Start to listen and return the URL."""
    host, port = settings.web_host, settings.web_port
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        # Not a SettingsError: under `pkb up` the other roles go on, and this one is started again.
        reason = os.strerror(error.errno) if error.errno else str(error)  # asyncio wraps the text in more
        raise PkbError(
            f"cannot listen on {host}:{port} ({reason})",
            "set PKB_WEB_PORT or PKB_WEB_HOST, or stop the program that uses it",
        ) from None
    address = runner.addresses[0]
    shown_host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{shown_host}:{address[1]}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
