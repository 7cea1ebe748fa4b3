"""The simulator's control API, for `pkb sim --control` and tests in other processes. Loopback only.

GET    /_sim/faults                 the active faults
POST   /_sim/faults   {"kind": "429", "count": 3, "seconds": 10, "on": "rest", "path": "/quote",
                       "tokens": [408065], "share": 0.5, "delay_seconds": 2}     all but kind optional
DELETE /_sim/faults[?kind=429]
POST   /_sim/expire                 end every session; `?cut=1` disconnects the websockets too
POST   /_sim/disconnect             disconnect the websockets
GET    /_sim/stats                  counters
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import msgspec
from aiohttp import web

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.simulator.faults import FaultOptions
from pkbrokers_redis.simulator.responses import KiteRefusal, success
from pkbrokers_redis.simulator.rest import SimulatorState
from pkbrokers_redis.simulator.websocket_server import ServerStats

Action = Callable[[web.Request], Awaitable[Any]]


def add_control_routes(
    app: web.Application,
    state: SimulatorState,
    stats: Callable[[], ServerStats],
    disconnect_all: Callable[[], None],
) -> None:
    """Add the control routes to the REST application. Faults do not affect them.

    Args:
        app: The application behind PKB_KITE_API_URL.
        state: What the routes show and change.
        stats: Returns the websocket server's counters.
        disconnect_all: Closes every websocket.
    """
    faults, accounts = state.faults, state.accounts

    async def show_faults(request: web.Request) -> Any:
        return faults.active()

    async def add_fault(request: web.Request) -> Any:
        try:
            options = msgspec.json.decode(await request.read(), type=FaultOptions)
            faults.add(**msgspec.structs.asdict(options))
        except (msgspec.DecodeError, UnicodeError, PkbError) as error:
            raise KiteRefusal(400, str(error)) from None
        return faults.active()

    async def clear_faults(request: web.Request) -> Any:
        faults.clear(request.query.get("kind"))
        return faults.active()

    async def expire(request: web.Request) -> Any:
        accounts.expire_all()
        if request.query.get("cut") == "1":
            disconnect_all()
        return True

    async def disconnect(request: web.Request) -> Any:
        disconnect_all()
        return True

    async def counters(request: web.Request) -> Any:
        logins = {"logins": accounts.logins, "exchanges": accounts.exchanges}
        return asdict(stats()) | logins | {"struck": faults.struck}

    app.router.add_get("/_sim/faults", _local_only(show_faults))
    app.router.add_post("/_sim/faults", _local_only(add_fault))
    app.router.add_delete("/_sim/faults", _local_only(clear_faults))
    app.router.add_post("/_sim/expire", _local_only(expire))
    app.router.add_post("/_sim/disconnect", _local_only(disconnect))
    app.router.add_get("/_sim/stats", _local_only(counters))


def _local_only(action: Action) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            is_local = ipaddress.ip_address(request.remote or "").is_loopback
        except ValueError:
            is_local = False
        if not is_local:
            raise KiteRefusal(404)
        return success(await action(request))

    return handler
