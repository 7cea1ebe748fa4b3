"""A whole Kite on loopback: websocket, REST, login pages, history, faults, in one object.

kite = SimulatedKite(universe(60), start_ms=…, speed=60, sessions=load_sessions("market"))
kite.start()
environment = kite.environment()      # points `pkb up`, or any process of ours, at it
…
kite.faults.add("429", count=3); kite.accounts.expire_all(); kite.disconnect_all()
kite.stop()
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from pkbrokers_redis.candles.calendar import Sessions, load_sessions
from pkbrokers_redis.clock import Clock
from pkbrokers_redis.kite.capture import CaptureWriter
from pkbrokers_redis.simulator.accounts import Accounts
from pkbrokers_redis.simulator.control import add_control
from pkbrokers_redis.simulator.faults import Faults
from pkbrokers_redis.simulator.history import History
from pkbrokers_redis.simulator.history_generator import HistoryGenerator
from pkbrokers_redis.simulator.login_pages import web_app
from pkbrokers_redis.simulator.market import Hours, Market
from pkbrokers_redis.simulator.rest import Limits, SimulatorState, connect_app
from pkbrokers_redis.simulator.universe import InstrumentsCsv, expired_contracts
from pkbrokers_redis.simulator.websocket_server import HEARTBEAT_SECONDS, ServerStats, SimulatorServer

SHUTDOWN_SECONDS = 0.5
LINE_BYTES_MAX = 2**17  # a thousand instruments in one URL


class SimulatedKite:
    """`start()`, then `environment()`; `stop()` at the end, after which it may start again: same ports, same
    market, same history.

    `universe`: rows that trade (see `simulator.universe`); `listed`: rows of the instruments CSV, by default
    the same and some expired contracts. `sessions`: each segment trades in its hours only; unset: around the
    clock. `start_ms`, `speed`: market time runs from there, so many times as fast as the machine's clock;
    `clock` instead if there is one already. `rate_limits`: answer 429 beyond Kite's requests a second.
    """

    def __init__(
        self,
        universe: list[dict[str, Any]],
        *,
        listed: list[dict[str, Any]] | None = None,
        accounts: Accounts | None = None,
        faults: Faults | None = None,
        sessions: Sessions | None = None,
        start_ms: float | None = None,
        speed: float = 1.0,
        clock: Clock | None = None,
        seed: int = 1,
        rate: float | None = None,
        rate_limits: bool = False,
        connections_max: int | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        capture: CaptureWriter | None = None,
        ws_port: int = 0,
        api_port: int = 0,
        login_port: int = 0,
    ) -> None:
        if clock is None:
            real_s = time.time()
            clock = Clock(real_s if start_ms is None else start_ms / 1000, real_s, speed)
        self.clock = clock
        begin_ms = int(clock())
        self._has_sessions = sessions is not None
        hours = Hours(universe, sessions or load_sessions("always"), around_the_clock=sessions is None)
        past = HistoryGenerator(universe, hours, seed=seed)
        self.market = Market(
            universe,
            begin_ms,
            seed=seed,
            rate=rate,
            hours=None if sessions is None else hours,
            opening=past.opening(begin_ms),
        )
        self.history = History(self.market, hours, past, begin_ms)
        self.accounts = accounts or Accounts()
        self.faults = faults or Faults(seed=seed)
        self.limits = Limits(rate_limits)
        self.listing = InstrumentsCsv([*universe, *expired_contracts()] if listed is None else listed)
        self.server = SimulatorServer(
            self.market,
            port=ws_port,
            connections_max=connections_max,
            heartbeat_seconds=heartbeat_seconds,
            capture=capture,
            clock=lambda: clock() / 1000,
            speed=clock.speed,
            begin_ms=begin_ms,
            faults=self.faults,
            admit=self._may_enter,
            recorder=self.history.record,
            beside=self._pages,
        )
        self._ports = {"api": api_port, "login": login_port}

    # --- from any thread -----------------------------------------------------------------------------

    def start(self) -> None:
        """Serve in a thread of its own; returns when all ports are open. Raises SimulatorFailed."""
        self.server.start()

    def stop(self) -> None:
        """Disconnect everyone and end the thread. A second call does nothing."""
        self.server.stop()

    def __enter__(self) -> SimulatedKite:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ws_url(self) -> str:
        """For PKB_KITE_WS_URL, or KiteTicker's `root`."""
        return self.server.url

    @property
    def api_url(self) -> str:
        """For PKB_KITE_API_URL, or KiteConnect's `root`; the control pages too."""
        return f"http://{self.server.host}:{self._ports['api']}"

    @property
    def login_url(self) -> str:
        """For PKB_KITE_LOGIN_URL."""
        return f"http://{self.server.host}:{self._ports['login']}"

    @property
    def stats(self) -> ServerStats:
        """Counters of the websocket side; REST requests are in `limits.seen`."""
        return self.server.stats

    def now_ms(self) -> float:
        """Market time."""
        return self.clock()

    def environment(self) -> dict[str, str]:
        """The settings that point another process here, with the test account's secrets in them."""
        account = self.accounts.first
        found = {
            "PKB_KITE_WS_URL": self.ws_url,
            "PKB_KITE_API_URL": self.api_url,
            "PKB_KITE_LOGIN_URL": self.login_url,
            "PKB_KITE_API_KEY": account.api_key,
            "PKB_KITE_API_SECRET": account.api_secret,
            "PKB_KITE_USER_ID": account.user_id,
            "PKB_KITE_PASSWORD": account.password,
            "PKB_KITE_TOTP_SECRET": account.totp_secret,
        }
        if not self._has_sessions:
            found["PKB_SESSIONS"] = "always"
        if self.clock.speed != 1 or self.clock.virtual_s != self.clock.real_s:
            found["PKB_TIME_SHIFT"] = self.clock.shift_text
        return found

    def disconnect_all(self) -> None:
        """Cut every websocket, as a failing network would."""
        self.server.disconnect_all()

    def expire_sessions(self, *, cut: bool = True) -> None:
        """Every session is over: 403 on REST, and on websockets at their next connect, which `cut` forces."""
        self.accounts.expire_all()
        if cut:
            self.disconnect_all()

    # --- in the server's thread ----------------------------------------------------------------------

    def _may_enter(self, query: dict[str, list[str]]) -> bool:
        def given(name: str) -> str:
            return query.get(name, [""])[0]

        if given("access_token"):
            return self.accounts.with_access(given("api_key"), given("access_token")) is not None
        return self.accounts.with_enctoken(given("enctoken")) is not None

    @contextlib.asynccontextmanager
    async def _pages(self) -> AsyncIterator[None]:
        exchange = SimulatorState(
            self.market, self.listing, self.history, self.accounts, self.faults, self.limits, self.now_ms
        )
        api = connect_app(exchange)
        add_control(api, exchange, lambda: self.stats, self.disconnect_all)
        async with contextlib.AsyncExitStack() as stack:
            for name, app in (("api", api), ("login", web_app(exchange))):
                runner = web.AppRunner(
                    app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS, max_line_size=LINE_BYTES_MAX
                )
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                await web.TCPSite(runner, self.server.host, self._ports[name]).start()
                self._ports[name] = runner.addresses[0][1]
            yield
