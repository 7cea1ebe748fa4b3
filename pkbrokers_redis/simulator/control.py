"""The simulator's own pages, for `pkb sim` and tests in other processes. Loopback only.

GET    /_sim/faults                 the active faults
POST   /_sim/faults   {"kind": "429", "count": 3, "seconds": 10, "on": "rest", "path": "/quote",
                       "tokens": [408065], "share": 0.5, "delay_seconds": 2}     all but kind optional
DELETE /_sim/faults[?kind=429]
POST   /_sim/expire                 end every session; `?cut=1` cuts the websockets too
POST   /_sim/disconnect             cut the websockets
GET    /_sim/stats                  counters
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import asdict

import msgspec
from aiohttp import web

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.simulator.faults import Side
from pkbrokers_redis.simulator.responses import KiteRefusal, success
from pkbrokers_redis.simulator.rest import SimulatorState
from pkbrokers_redis.simulator.websocket_server import ServerStats


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    kind: str
    count: int | None = None
    seconds: float | None = None
    on: Side | None = None
    path: str = ""
    tokens: list[int] = []
    share: float = 0.2
    delay_seconds: float = 2.0


def add_control(
    app: web.Application, exchange: SimulatorState, stats: Callable[[], ServerStats], cut: Callable[[], None]
) -> None:
    """Add the pages; faults do not touch them."""
    faults, accounts = exchange.faults, exchange.accounts

    async def show(request: web.Request) -> web.Response:
        _must_be_local(request)
        return success(faults.active())

    async def add(request: web.Request) -> web.Response:
        _must_be_local(request)
        try:
            wanted = msgspec.json.decode(await request.read(), type=_Wanted)
            faults.add(**{name: getattr(wanted, name) for name in wanted.__struct_fields__})
        except (msgspec.DecodeError, UnicodeError, PkbError) as error:
            raise KiteRefusal(400, str(error)) from None
        return success(faults.active())

    async def clear(request: web.Request) -> web.Response:
        _must_be_local(request)
        faults.clear(request.query.get("kind"))
        return success(faults.active())

    async def expire(request: web.Request) -> web.Response:
        _must_be_local(request)
        accounts.expire_all()
        if request.query.get("cut") == "1":
            cut()
        return success(True)

    async def disconnect(request: web.Request) -> web.Response:
        _must_be_local(request)
        cut()
        return success(True)

    async def counters(request: web.Request) -> web.Response:
        _must_be_local(request)
        return success(
            asdict(stats())
            | {"logins": accounts.logins, "exchanges": accounts.exchanges, "struck": faults.struck}
        )

    app.router.add_get("/_sim/faults", show)
    app.router.add_post("/_sim/faults", add)
    app.router.add_delete("/_sim/faults", clear)
    app.router.add_post("/_sim/expire", expire)
    app.router.add_post("/_sim/disconnect", disconnect)
    app.router.add_get("/_sim/stats", counters)


def _must_be_local(request: web.Request) -> None:
    try:
        local = ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        local = False
    if not local:
        raise KiteRefusal(404)
