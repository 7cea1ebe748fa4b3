"""Kite Connect's REST API on loopback, market data only: the official KiteConnect works unchanged.

    POST, DELETE /session/token                       open and end a session
    GET /user/profile  /user/margins[/{segment}]
    GET /instruments[/{exchange}]                     CSV, gzipped on request
    GET /quote  /quote/ohlc  /quote/ltp               ?i=NSE:INFY&i=…
    GET /instruments/historical/{token}/{interval}    ?from&to&oi&continuous

`login_pages.py` serves the same routes under /oms for a web session. Orders are not simulated.
The control API, loopback only:

    GET, POST, DELETE /_sim/faults                    body of POST: `FaultOptions`; DELETE: ?kind=429
    POST /_sim/expire                                 end every session; ?cut=1 disconnects the websockets too
    POST /_sim/disconnect                             disconnect the websockets
    GET /_sim/stats                                   counters
"""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec
from aiohttp import web

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.kite.history_api import local_text
from pkbrokers_redis.simulator.accounts import Account, Accounts
from pkbrokers_redis.simulator.faults import STATUS_KINDS, FaultOptions, Faults
from pkbrokers_redis.simulator.history import DAYS_MAX, History
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.responses import (
    INSTRUMENTS_MAX,
    KiteRefusal,
    failure,
    quote_of,
    success,
)
from pkbrokers_redis.simulator.universe import EXCHANGES, InstrumentsCsv
from pkbrokers_redis.simulator.websocket_server import ServerStats

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Authenticate = Callable[[web.Request], Account]
Action = Callable[[web.Request], Awaitable[Any]]

CONTROL_PATH: Final = "/_sim/"
BODY_BYTES_MAX = 2**20
YEARS: Final = (1990, 2100)  # of a history request's dates
SEGMENTS: Final = ("equity", "commodity")

REQUESTS_PER_SECOND: Final = {"historical": 3, "quote": 1, "other": 10}
# Requests that a client spaces by one second can arrive a little closer together.
WINDOW_SECONDS: Final = 0.98
REQUESTS_LOGGED_MAX: Final = 10_000
CLIENTS_MAX: Final = 1000

MAINTENANCE_PAGE = "<html><head><title>Kite</title></head><body>We are down for maintenance.</body></html>"
TRUNCATED_JSON = b'{"status": "success", "data": {"candles": [['


class RequestSeen(NamedTuple):
    """One REST request: monotonic seconds, the limit that counts it, path, HTTP status."""

    at_s: float
    kind: str
    path: str
    status: int


class Limits:
    """Kite's request limits for each app and kind of request: 429 beyond them while `enforced`.

    Attributes:
        enforced: Whether requests beyond a limit are refused.
        seen: The log of the last 10,000 requests.
    """

    def __init__(self, enforced: bool, now_s: Callable[[], float] = time.monotonic) -> None:
        self.enforced = enforced
        self.seen: deque[RequestSeen] = deque(maxlen=REQUESTS_LOGGED_MAX)
        self._now_s = now_s
        self._allowed: dict[tuple[str, str], deque[float]] = {}

    def allow(self, client: str, path: str) -> bool:
        """Count a request of `client`, and return whether it may pass."""
        kind, now_s = _kind_of(path), self._now_s()
        if (client, kind) not in self._allowed and len(self._allowed) >= CLIENTS_MAX:
            self._allowed.clear()
        times = self._allowed.setdefault((client, kind), deque(maxlen=REQUESTS_PER_SECOND[kind]))
        full = len(times) == REQUESTS_PER_SECOND[kind] and now_s - times[0] < WINDOW_SECONDS
        if full and self.enforced:
            return False
        times.append(now_s)
        return True

    def log(self, path: str, status: int) -> None:
        """Add an answered request to `seen`."""
        self.seen.append(RequestSeen(self._now_s(), _kind_of(path), path, status))


def _kind_of(path: str) -> str:
    if "/instruments/historical/" in path:
        return "historical"
    return "quote" if "/quote" in path else "other"


@dataclass(slots=True)
class SimulatorState:
    """What all routes read and change. `now_ms` returns market time, epoch ms."""

    market: Market
    instruments: InstrumentsCsv
    history: History
    accounts: Accounts
    faults: Faults
    limits: Limits
    now_ms: Callable[[], float]


def rest_app(state: SimulatorState) -> web.Application:
    """Return the application behind PKB_KITE_API_URL."""
    app = kite_app(state)
    sessions = _SessionRoutes(state)
    app.router.add_post("/session/token", sessions.open)
    app.router.add_delete("/session/token", sessions.end)
    add_market_data_routes(app, state, "", lambda request: _account_of_token(state, request))
    return app


def kite_app(state: SimulatorState) -> web.Application:
    """Return an application without routes that applies faults, limits and Kite's error envelope."""

    @web.middleware
    async def kite_behaviour(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(CONTROL_PATH):
            return await _answer(request, handler)

        async def limited(request: web.Request) -> web.StreamResponse:
            spoiled = await _fault_response(state.faults, request)
            if spoiled is not None:
                return spoiled
            client = request.headers.get("Authorization", "").partition(":")[0]
            if not state.limits.allow(client, request.path):
                raise KiteRefusal(429)
            return await handler(request)

        response = await _answer(request, limited)
        state.limits.log(request.path, response.status)
        return response

    return web.Application(middlewares=[kite_behaviour], client_max_size=BODY_BYTES_MAX)


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except KiteRefusal as refusal:
        return failure(refusal)
    except web.HTTPNotFound:
        return failure(KiteRefusal(404))
    except web.HTTPMethodNotAllowed:
        return failure(KiteRefusal(404, "Method not allowed"))


async def _fault_response(faults: Faults, request: web.Request) -> web.Response | None:
    """Return what an active fault answers instead. Raise KiteRefusal for Kite's own errors."""
    path = request.path
    slow = faults.strike("rest", "slow", path=path)
    if slow is not None:
        await asyncio.sleep(slow.delay_seconds)
    fault = faults.strike("rest", "drop", "html", "garbage_json", *STATUS_KINDS, path=path)
    if fault is None:
        return None
    if fault.kind == "drop":
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)  # never sent: the connection is closed
    if fault.kind == "html":
        return web.Response(status=503, text=MAINTENANCE_PAGE, content_type="text/html")
    if fault.kind == "garbage_json":
        return web.Response(body=TRUNCATED_JSON, content_type="application/json")
    raise KiteRefusal(int(fault.kind))


def add_market_data_routes(
    app: web.Application, state: SimulatorState, prefix: str, authenticate: Authenticate
) -> None:
    """Add profile, instruments, quotes and history below `prefix`: "" or `/oms`.

    `authenticate` returns the account of a request, or raises KiteRefusal.
    """
    routes = _MarketDataRoutes(state, authenticate)
    for path, handler in (
        ("/user/profile", routes.profile),
        ("/user/profile/full", routes.profile),
        ("/user/margins", routes.margins),
        ("/user/margins/{segment}", routes.margins),
        ("/instruments", routes.instruments),
        ("/instruments/{exchange}", routes.instruments),
        ("/instruments/historical/{token}/{interval}", routes.historical),
        ("/quote", routes.quotes),
        ("/quote/{kind:ohlc|ltp}", routes.quotes),
    ):
        app.router.add_get(prefix + path, handler)


def _account_of_token(state: SimulatorState, request: web.Request) -> Account:
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    api_key, _, token = credentials.partition(":")
    account = state.accounts.with_access(api_key, token) if scheme == "token" else None
    if account is None:
        raise KiteRefusal(403)
    return account


class _SessionRoutes:
    def __init__(self, state: SimulatorState) -> None:
        self._state = state

    async def open(self, request: web.Request) -> web.Response:
        form = await request.post()
        names = ("api_key", "request_token", "checksum")
        api_key, request_token, checksum = (str(form.get(name, "")) for name in names)
        if not (api_key and request_token and checksum):
            raise KiteRefusal(400, "Missing `api_key`, `request_token` or `checksum`.")
        account, token = self._state.accounts.exchange(api_key, request_token, checksum)
        session = {
            "api_key": api_key,
            "access_token": token,
            "public_token": token[::-1],
            "login_time": local_text(int(self._state.now_ms() // 1000)),
        }
        unused = dict.fromkeys(("enctoken", "refresh_token", "silo", "avatar_url"), "")
        return success(_profile(account) | session | unused)

    async def end(self, request: web.Request) -> web.Response:
        query = request.query
        self._state.accounts.end_access(query.get("api_key", ""), query.get("access_token", ""))
        return success(True)


class _MarketDataRoutes:
    def __init__(self, state: SimulatorState, authenticate: Authenticate) -> None:
        self._state = state
        self._authenticate = authenticate

    async def profile(self, request: web.Request) -> web.Response:
        return success(_profile(self._authenticate(request)))

    async def margins(self, request: web.Request) -> web.Response:
        self._authenticate(request)
        segment = request.match_info.get("segment")
        if segment is None:
            return success({name: _margin() for name in SEGMENTS})
        if segment not in SEGMENTS:
            raise KiteRefusal(400, "Invalid segment")
        return success(_margin())

    async def instruments(self, request: web.Request) -> web.Response:
        # The list is public, but a session that is sent must be alive, as on Kite.
        if request.headers.get("Authorization"):
            self._authenticate(request)
        exchange = request.match_info.get("exchange")
        if exchange is not None and exchange not in EXCHANGES:
            raise KiteRefusal(400, "Invalid exchange")
        plain, zipped = self._instruments_csv(exchange)
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            headers = {"Content-Encoding": "gzip"}
            return web.Response(body=zipped, content_type="text/csv", headers=headers)
        return web.Response(body=plain, content_type="text/csv")

    async def quotes(self, request: web.Request) -> web.Response:
        self._authenticate(request)
        kind = request.match_info.get("kind", "quote")
        names = request.query.getall("i", [])
        if not names:
            raise KiteRefusal(400, "Missing `i`: instruments as exchange:tradingsymbol")
        if len(names) > INSTRUMENTS_MAX[kind]:
            raise KiteRefusal(400, f"At most {INSTRUMENTS_MAX[kind]} instruments a request")
        market, now_s = self._state.market, self._state.now_ms() / 1000
        found: dict[str, Any] = {}
        for name in names:
            listed = self._state.instruments.find(name)
            row = None if listed is None else market.row_of.get(listed["instrument_token"])
            if row is not None:  # an unknown name is left out, as on Kite
                found[name] = quote_of(market, row, now_s, kind)
        return success(found)

    def _instruments_csv(self, exchange: str | None) -> tuple[bytes, bytes]:
        faults, instruments = self._state.faults, self._state.instruments
        listed = faults.listed(instruments.rows)
        plain, zipped = (instruments if listed is None else InstrumentsCsv(listed)).csv(exchange)
        spoiled = faults.spoil_csv(plain.decode()).encode()
        return (plain, zipped) if spoiled == plain else (spoiled, gzip.compress(spoiled))

    async def historical(self, request: web.Request) -> web.Response:
        self._authenticate(request)
        history, query = self._state.history, request.query
        interval, text = request.match_info["interval"], request.match_info["token"]
        if interval not in DAYS_MAX:
            raise KiteRefusal(400, "invalid interval")
        token = int(text) if text.isdecimal() and len(text) <= 10 else -1
        if not history.knows(token):
            raise KiteRefusal(400, "invalid token")
        from_s = _epoch_s("from", query.get("from", ""), end_of_day=False)
        to_s = _epoch_s("to", query.get("to", ""), end_of_day=True)
        if from_s > to_s:
            raise KiteRefusal(400, "invalid date range: `from` is after `to`")
        if to_s - from_s > DAYS_MAX[interval] * 86_400:
            raise KiteRefusal(400, f"interval exceeds max limit: {DAYS_MAX[interval]} days")
        if query.get("continuous") == "1" and interval != "day":
            raise KiteRefusal(400, "continuous data exists for day candles only")
        with_oi = query.get("oi") == "1"
        now_ms = self._state.now_ms()
        faults = self._state.faults
        candles = history.candles(
            token, interval, from_s, to_s, now_ms, with_oi=with_oi, offset_s=faults.offset_s
        )
        return success({"candles": faults.spoil_history(token, candles, interval)})


def _epoch_s(name: str, text: str, *, end_of_day: bool) -> int:
    """Parse `2017-12-15`, `2017-12-15 09:15:00`, or the same with a T or +, as Indian time."""
    text = text.replace("+", " ").replace("T", " ").strip()
    if len(text) == 10 and end_of_day:
        text += " 23:59:59"
    try:
        moment = datetime.fromisoformat(text).replace(tzinfo=IST)
        if not YEARS[0] <= moment.year <= YEARS[1]:
            raise ValueError
        return int(moment.timestamp())
    except ValueError:
        raise KiteRefusal(400, f"invalid {name} date") from None


def _profile(account: Account) -> dict[str, Any]:
    return {
        "user_id": account.user_id,
        "user_type": "individual",
        "email": f"{account.user_id.lower()}@example.com",
        "user_name": account.user_name,
        "user_shortname": account.user_name.split()[0],
        "broker": "ZERODHA",
        "exchanges": [*EXCHANGES, "MF"],
        "products": ["CNC", "NRML", "MIS", "BO", "CO"],
        "order_types": ["MARKET", "LIMIT", "SL", "SL-M"],
        "avatar_url": None,
        "meta": {"demat_consent": "physical"},
    }


def _margin() -> dict[str, Any]:
    cash = 100_000.0
    amounts = dict.fromkeys(("cash", "opening_balance", "live_balance", "collateral"), cash)
    return {
        "enabled": True,
        "net": cash,
        "available": amounts | {"adhoc_margin": 0, "intraday_payin": 0},
        "utilised": dict.fromkeys(("debits", "exposure", "m2m_realised", "m2m_unrealised", "span"), 0),
    }


# --- the control API, loopback only


def add_control_routes(
    app: web.Application,
    state: SimulatorState,
    stats: Callable[[], ServerStats],
    disconnect_all: Callable[[], None],
) -> None:
    """Add the routes under /_sim/, for `pkb sim` and tests in other processes. Faults do not affect them."""
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

    for method, path, action in (
        ("GET", "faults", show_faults),
        ("POST", "faults", add_fault),
        ("DELETE", "faults", clear_faults),
        ("POST", "expire", expire),
        ("POST", "disconnect", disconnect),
        ("GET", "stats", counters),
    ):
        app.router.add_route(method, CONTROL_PATH + path, _local_only(action))


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
