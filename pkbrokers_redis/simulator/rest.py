"""Faults of the REST side and of the login pages, applied before a request is looked at.

Kite's request limits: so many in any second, for each app and kind of request.

Kite Connect's REST API on loopback, as far as market data goes: the official KiteConnect works unchanged.

    POST, DELETE /session/token                       open and end a session
    GET /user/profile  /user/margins[/{segment}]
    GET /instruments[/{exchange}]                     CSV, gzipped on request
    GET /quote  /quote/ohlc  /quote/ltp               ?i=NSE:INFY&i=…
    GET /instruments/historical/{token}/{interval}    ?from&to&oi&continuous

The web pages serve the same under /oms with a web session (see `web.py`). Orders are not simulated.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from aiohttp import web

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.simulator.accounts import Account, Accounts
from pkbrokers_redis.simulator.faults import STATUS_KINDS, Faults
from pkbrokers_redis.simulator.history import DAYS_MAX, History
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.responses import (
    INSTRUMENTS_MAX,
    KiteRefusal,
    failure,
    local_text,
    quote_of,
    success,
)
from pkbrokers_redis.simulator.universe import EXCHANGES, InstrumentsCsv

MAINTENANCE_PAGE = "<html><head><title>Kite</title></head><body>We are down for maintenance.</body></html>"
CUT_OFF_JSON = b'{"status": "success", "data": {"candles": [['


async def spoil(faults: Faults, request: web.Request) -> web.Response | None:
    """The answer a fault gives instead; None if there is none. Raises KiteRefusal for Kite's own errors."""
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
        return web.Response(status=500)  # nobody is there to read it
    if fault.kind == "html":
        return web.Response(status=503, text=MAINTENANCE_PAGE, content_type="text/html")
    if fault.kind == "garbage_json":
        return web.Response(body=CUT_OFF_JSON, content_type="application/json")
    raise KiteRefusal(int(fault.kind))


PER_SECOND: Final = {"historical": 3, "quote": 1, "other": 10}
# A client that spaces its requests by a second over the network may see them come a little closer.
WINDOW_SECONDS: Final = 0.98
REQUESTS_KEPT: Final = 10_000
CLIENTS_MAX: Final = 1000


class RequestSeen(NamedTuple):
    """One REST request: monotonic seconds, what limit it falls under, path, HTTP status."""

    at_s: float
    kind: str
    path: str
    status: int


def kind_of(path: str) -> str:
    """`historical`, `quote` or `other`."""
    if "/instruments/historical/" in path:
        return "historical"
    return "quote" if "/quote" in path else "other"


class Limits:
    """Counts requests; refuses those beyond the limit while `enforced`. `seen` is the log, bounded."""

    def __init__(self, enforced: bool, now_s: Callable[[], float] = time.monotonic) -> None:
        self.enforced = enforced
        self.seen: deque[RequestSeen] = deque(maxlen=REQUESTS_KEPT)
        self._now_s = now_s
        self._allowed: dict[tuple[str, str], deque[float]] = {}

    def allow(self, client: str, path: str) -> bool:
        """Whether this request may pass."""
        kind, now = kind_of(path), self._now_s()
        if (client, kind) not in self._allowed and len(self._allowed) >= CLIENTS_MAX:
            self._allowed.clear()
        times = self._allowed.setdefault((client, kind), deque(maxlen=PER_SECOND[kind]))
        full = len(times) == PER_SECOND[kind] and now - times[0] < WINDOW_SECONDS
        if full and self.enforced:
            return False
        times.append(now)
        return True

    def note(self, path: str, status: int) -> None:
        """Remember a request that was answered."""
        self.seen.append(RequestSeen(self._now_s(), kind_of(path), path, status))


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Authenticate = Callable[[web.Request], Account]

PRODUCTS: Final = ["CNC", "NRML", "MIS", "BO", "CO"]
ORDER_TYPES: Final = ["MARKET", "LIMIT", "SL", "SL-M"]
SEGMENTS: Final = ("equity", "commodity")
CONTROL_PATH: Final = "/_sim/"
BODY_BYTES_MAX = 2**20
YEARS: Final = (1990, 2100)  # of history's dates


@dataclass(slots=True)
class SimulatorState:
    """What all pages speak about. `now_ms` is market time, epoch ms."""

    market: Market
    listing: InstrumentsCsv
    history: History
    accounts: Accounts
    faults: Faults
    limits: Limits
    now_ms: Callable[[], float]


def connect_app(exchange: SimulatorState) -> web.Application:
    """The application behind PKB_KITE_API_URL."""
    app = application(exchange)
    sessions = _SessionPages(exchange)
    app.router.add_post("/session/token", sessions.open)
    app.router.add_delete("/session/token", sessions.end)
    add_market_data(app, exchange, "", lambda request: _connect_account(exchange, request))
    return app


def application(exchange: SimulatorState) -> web.Application:
    """An empty one with what all share: faults, limits, errors as Kite words them."""

    @web.middleware
    async def kite_manners(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(CONTROL_PATH):
            try:
                return await handler(request)
            except KiteRefusal as refused:
                return failure(refused)
        try:
            spoiled = await spoil(exchange.faults, request)
            if spoiled is None:
                client = request.headers.get("Authorization", "").partition(":")[0]
                if not exchange.limits.allow(client, request.path):
                    raise KiteRefusal(429)
            response = spoiled or await handler(request)
        except KiteRefusal as refused:
            response = failure(refused)
        except web.HTTPNotFound:
            response = failure(KiteRefusal(404))
        except web.HTTPMethodNotAllowed:
            response = failure(KiteRefusal(404, "Method not allowed"))
        exchange.limits.note(request.path, response.status)
        return response

    return web.Application(middlewares=[kite_manners], client_max_size=BODY_BYTES_MAX)


def add_market_data(app: web.Application, exchange: SimulatorState, prefix: str, who: Authenticate) -> None:
    """Profile, instruments, quotes and history below `prefix`, for whom `who` lets in."""
    pages = _MarketPages(exchange, who)
    for path, handler in (
        ("/user/profile", pages.profile),
        ("/user/profile/full", pages.profile),
        ("/user/margins", pages.margins),
        ("/user/margins/{segment}", pages.margins),
        ("/instruments", pages.instruments),
        ("/instruments/{exchange}", pages.instruments),
        ("/instruments/historical/{token}/{interval}", pages.historical),
        ("/quote", pages.quotes),
        ("/quote/{kind:ohlc|ltp}", pages.quotes),
    ):
        app.router.add_get(prefix + path, handler)


def _connect_account(exchange: SimulatorState, request: web.Request) -> Account:
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    api_key, _, token = credentials.partition(":")
    account = exchange.accounts.with_access(api_key, token) if scheme == "token" else None
    if account is None:
        raise KiteRefusal(403)
    return account


class _SessionPages:
    def __init__(self, exchange: SimulatorState) -> None:
        self._exchange = exchange

    async def open(self, request: web.Request) -> web.Response:
        form = await request.post()
        names = ("api_key", "request_token", "checksum")
        api_key, request_token, checksum = (str(form.get(name, "")) for name in names)
        if not (api_key and request_token and checksum):
            raise KiteRefusal(400, "Missing `api_key`, `request_token` or `checksum`.")
        account, token = self._exchange.accounts.exchange(api_key, request_token, checksum)
        return success(
            _profile(account)
            | {
                "api_key": api_key,
                "access_token": token,
                "public_token": token[::-1],
                "enctoken": "",
                "refresh_token": "",
                "silo": "",
                "avatar_url": "",
                "login_time": local_text(self._exchange.now_ms() / 1000),
            }
        )

    async def end(self, request: web.Request) -> web.Response:
        query = request.query
        self._exchange.accounts.end_access(query.get("api_key", ""), query.get("access_token", ""))
        return success(True)


class _MarketPages:
    def __init__(self, exchange: SimulatorState, who: Authenticate) -> None:
        self._exchange = exchange
        self._who = who

    async def profile(self, request: web.Request) -> web.Response:
        return success(_profile(self._who(request)))

    async def margins(self, request: web.Request) -> web.Response:
        self._who(request)
        segment = request.match_info.get("segment")
        if segment is None:
            return success({name: _margin() for name in SEGMENTS})
        if segment not in SEGMENTS:
            raise KiteRefusal(400, "Invalid segment")
        return success(_margin())

    async def instruments(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization"):
            self._who(request)  # Kite gives this list to anybody, but knows a dead session when it sees one
        exchange = request.match_info.get("exchange")
        if exchange is not None and exchange not in EXCHANGES:
            raise KiteRefusal(400, "Invalid exchange")
        plain, zipped = self._exchange.listing.csv(exchange)
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            headers = {"Content-Encoding": "gzip"}
            return web.Response(body=zipped, content_type="text/csv", headers=headers)
        return web.Response(body=plain, content_type="text/csv")

    async def quotes(self, request: web.Request) -> web.Response:
        self._who(request)
        kind = request.match_info.get("kind", "quote")
        names = request.query.getall("i", [])
        if not names:
            raise KiteRefusal(400, "Missing `i`: instruments as exchange:tradingsymbol")
        if len(names) > INSTRUMENTS_MAX[kind]:
            raise KiteRefusal(400, f"At most {INSTRUMENTS_MAX[kind]} instruments a request")
        market, now_s = self._exchange.market, self._exchange.now_ms() / 1000
        answer: dict[str, Any] = {}
        for name in names:
            listed = self._exchange.listing.find(name)
            row = None if listed is None else market.row_of.get(listed["instrument_token"])
            if row is not None:  # an unknown name is left out, as on Kite
                answer[name] = quote_of(market, row, now_s, kind)
        return success(answer)

    async def historical(self, request: web.Request) -> web.Response:
        self._who(request)
        history, query = self._exchange.history, request.query
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
            raise KiteRefusal(400, "continuous data is there for day candles only")
        with_oi = query.get("oi") == "1"
        candles = history.answer(token, interval, from_s, to_s, self._exchange.now_ms(), with_oi=with_oi)
        return success({"candles": candles})


def _epoch_s(name: str, text: str, *, end_of_day: bool) -> int:
    """`2017-12-15`, `2017-12-15 09:15:00` or with a T or +; Indian time."""
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
        "products": PRODUCTS,
        "order_types": ORDER_TYPES,
        "avatar_url": None,
        "meta": {"demat_consent": "physical"},
    }


def _margin() -> dict[str, Any]:
    cash = 100_000.0
    return {
        "enabled": True,
        "net": cash,
        "available": {
            "adhoc_margin": 0,
            "cash": cash,
            "opening_balance": cash,
            "live_balance": cash,
            "collateral": 0,
            "intraday_payin": 0,
        },
        "utilised": {"debits": 0, "exposure": 0, "m2m_realised": 0, "m2m_unrealised": 0, "span": 0},
    }
