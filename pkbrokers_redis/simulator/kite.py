"""A whole Kite on loopback: websocket, REST, login pages, history, faults, in one object.

kite = SimulatedKite(universe(60), start_ms=…, speed=60, sessions=load_sessions("market"))
kite.start()
environment = kite.environment()      # points `pkb up`, or any process of the pipeline, at it
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
from pkbrokers_redis.simulator.faults import Faults
from pkbrokers_redis.simulator.history import History
from pkbrokers_redis.simulator.history_generator import HistoryGenerator
from pkbrokers_redis.simulator.login_pages import login_app
from pkbrokers_redis.simulator.market import Market, TradingHours
from pkbrokers_redis.simulator.rest import Limits, SimulatorState, add_control_routes, rest_app
from pkbrokers_redis.simulator.universe import InstrumentsCsv, expired_contracts
from pkbrokers_redis.simulator.websocket_server import HEARTBEAT_SECONDS, ServerStats, SimulatorServer

SHUTDOWN_SECONDS = 0.5
LINE_BYTES_MAX = 2**17  # a thousand instruments in one URL


class SimulatedKite:
    """Kite on loopback. `start()`, then `environment()`; `stop()` at the end.

    After `stop` it may start again, with the same ports, market and history. One thread and one asyncio loop
    run the websocket server, the market and both web applications. The methods may be called from any thread.

    Args:
        universe: The instruments that trade (see `simulator.universe`).
        listed: The rows of the instruments CSV; default: `universe` and some expired contracts.
        accounts: Users and sessions; default: one test account.
        faults: Default: none active, with `seed`.
        sessions: Each segment trades in these hours only; None: around the clock.
        start_ms: Market time at the start, epoch ms; None: now.
        speed: How many times as fast as the machine's clock market time runs.
        clock: A clock to use instead of `start_ms` and `speed`.
        seed: Of prices, generated history and faults.
        rate: Packets a second over all instruments; None: one a second of each instrument.
        rate_limits: Whether requests beyond Kite's limits get 429.
        connections_max: The most websockets; None: no limit.
        heartbeat_seconds: The time between heartbeats, machine time.
        capture: Records every frame that is sent.
        ws_port: The websocket's port; 0: a free one. `api_port` and `login_port` likewise.

    Example:
        >>> from pkbrokers_redis.simulator.universe import universe
        >>> with SimulatedKite(universe(3)) as kite:
        ...     kite.environment()["PKB_SESSIONS"]
        'always'
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
        hours = TradingHours(universe, sessions or load_sessions("always"), around_the_clock=sessions is None)
        generator = HistoryGenerator(universe, hours, seed=seed)
        self.market = Market(
            universe,
            begin_ms,
            seed=seed,
            rate=rate,
            hours=None if sessions is None else hours,
            opening=generator.opening(begin_ms),
        )
        self.history = History(self.market, hours, generator, begin_ms)
        self.accounts = accounts or Accounts()
        self.faults = known = faults or Faults(seed=seed)
        hours.is_open_anyway = lambda: bool(known.find("unlisted_session"))
        self.limits = Limits(rate_limits)
        self.instruments = InstrumentsCsv([*universe, *expired_contracts()] if listed is None else listed)
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
            authenticate=self._is_alive,
            recorder=self.history.record,
            services=self._web_apps,
        )
        self._ports = {"api": api_port, "login": login_port}

    # --- from any thread -----------------------------------------------------------------------------

    def start(self) -> None:
        """Serve in a thread of its own, and return when all ports are open. Raise SimulatorFailed."""
        self.server.start()

    def stop(self) -> None:
        """Disconnect every client and end the thread. A second call does nothing."""
        self.server.stop()

    def __enter__(self) -> SimulatedKite:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ws_url(self) -> str:
        """The address for PKB_KITE_WS_URL, or KiteTicker's `root`."""
        return self.server.url

    @property
    def api_url(self) -> str:
        """The address for PKB_KITE_API_URL, KiteConnect's `root`, and the control API."""
        return f"http://{self.server.host}:{self._ports['api']}"

    @property
    def login_url(self) -> str:
        """The address for PKB_KITE_LOGIN_URL."""
        return f"http://{self.server.host}:{self._ports['login']}"

    @property
    def stats(self) -> ServerStats:
        """The websocket server's counters. `limits.seen` has the REST requests."""
        return self.server.stats

    def now_ms(self) -> float:
        """Return market time, epoch ms."""
        return self.clock()

    def environment(self) -> dict[str, str]:
        """Return the settings that point another process here, with the test account's secrets."""
        account = self.accounts.first
        variables = {
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
            variables["PKB_SESSIONS"] = "always"
        if self.clock.speed != 1 or self.clock.virtual_s != self.clock.real_s:
            variables["PKB_TIME_SHIFT"] = self.clock.shift_text
        return variables

    def disconnect_all(self) -> None:
        """Close every websocket without a closing handshake, as a failing network does."""
        self.server.disconnect_all()

    def expire_sessions(self, *, cut: bool = True) -> None:
        """End every session: 403 on REST, and on websockets at their next connect.

        Args:
            cut: Whether to disconnect the websockets, so that they connect again now.
        """
        self.accounts.expire_all()
        if cut:
            self.disconnect_all()

    # --- in the server's thread ----------------------------------------------------------------------

    def _is_alive(self, query: dict[str, list[str]]) -> bool:
        api_key, access_token, enctoken = (
            query.get(name, [""])[0] for name in ("api_key", "access_token", "enctoken")
        )
        if access_token:
            return self.accounts.with_access(api_key, access_token) is not None
        return self.accounts.with_enctoken(enctoken) is not None

    @contextlib.asynccontextmanager
    async def _web_apps(self) -> AsyncIterator[None]:
        state = SimulatorState(
            self.market, self.instruments, self.history, self.accounts, self.faults, self.limits, self.now_ms
        )
        api = rest_app(state)
        add_control_routes(api, state, lambda: self.stats, self.disconnect_all)
        async with contextlib.AsyncExitStack() as stack:
            for name, app in (("api", api), ("login", login_app(state))):
                runner = web.AppRunner(
                    app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS, max_line_size=LINE_BYTES_MAX
                )
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                await web.TCPSite(runner, self.server.host, self._ports[name]).start()
                self._ports[name] = runner.addresses[0][1]
            yield
