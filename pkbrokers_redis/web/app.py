"""The aiohttp application: every route behind the guard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from pkbrokers_redis.web.guard import add_headers, make_guard
from pkbrokers_redis.web.registry import Route, routes
from pkbrokers_redis.web.services import Services


def make_app(services: Services) -> web.Application:
    """All of `registry.routes()`, GET and nothing else."""
    open_paths = frozenset(route.path for route in routes() if route.is_open)
    app = web.Application(middlewares=[make_guard(services, open_paths)])
    for route in routes():
        app.router.add_get(route.path, _bound(route, services), allow_head=not route.is_long)
    app.on_response_prepare.append(add_headers)
    return app


def _bound(route: Route, services: Services) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await route.handler(request, services)

    return answer
