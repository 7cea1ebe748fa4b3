"""`pkb sim`: a whole Kite on loopback; with --control it sends commands to a running one."""

from __future__ import annotations

import threading
from datetime import datetime
from typing import Annotated, Any

import requests
import typer

from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.runtime.signals import stop_on_signals
from pkbrokers_redis.simulator.faults import Faults, parse_fault
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe

CONTROL_TIMEOUT_SECONDS = 5


class ControlFailed(PkbError):
    """Raised when no simulator answers at the --control address, or it refuses the command."""


def sim(
    port: Annotated[int, typer.Option(min=0, max=65533, help="websocket port; 0 takes free ones")] = 8765,
    instruments: Annotated[int, typer.Option(min=1, max=100_000, help="how many instruments trade")] = 500,
    rate: Annotated[
        float | None, typer.Option(min=1, help="ticks a second over all; unset: one a second an instrument")
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed walks the same prices")] = 1,
    seconds: Annotated[float | None, typer.Option(min=0, help="stop by itself after this long")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="market time to begin at, as 2026-11-20T08:55 in India; unset: now"),
    ] = None,
    speed: Annotated[float, typer.Option(min=0.1, max=600, help="market seconds a second")] = 1.0,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="trade in market hours only, each segment in its own")
    ] = False,
    limits: Annotated[
        bool, typer.Option("--limits", help="answer 429 beyond Kite's requests a second")
    ] = False,
    fault: Annotated[
        list[str] | None, typer.Option(help="as mute,seconds=20 or 429,count=3; see docs/simulator.md")
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(help="REST address of a running simulator: send it --fault, --clear, --expire"),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="with --control: end all faults first")] = False,
    expire: Annotated[bool, typer.Option("--expire", help="with --control: end every session")] = False,
) -> None:
    """Run a Kite simulator on loopback: websocket, REST API, login pages, history, faults."""
    requested = [parse_fault(text) for text in fault or ()]
    if control is not None:
        _control(control, requested, clear=clear, expire=expire)
        return
    faults = Faults(seed=seed)
    for each in requested:
        faults.add(**each)
    kite = SimulatedKite(
        universe(instruments),
        faults=faults,
        sessions=load_sessions("market") if sessions else None,
        start_ms=None if start is None else _epoch_ms(start),
        speed=speed,
        seed=seed,
        rate=rate,
        rate_limits=limits,
        ws_port=port,
        api_port=port and port + 1,
        login_port=port and port + 2,
    )
    stop = threading.Event()
    kite.start()
    _announce(kite, instruments)
    try:
        with stop_on_signals(stop):
            stop.wait(seconds)
    finally:
        kite.stop()
    print(f"{kite.stats.connections} connections, {kite.stats.frames} frames sent")


def _announce(kite: SimulatedKite, instruments: int) -> None:
    rate = f"{len(kite.market.tokens) * 1000 / kite.market.interval_ms:,.0f}"
    print(f"Kite simulator: {instruments} instruments, {rate} ticks a second of market time")
    print(f"websocket {kite.ws_url}, REST {kite.api_url}, login {kite.login_url}")
    tokens = ",".join(map(str, kite.market.tokens[:5].tolist()))
    session = {"PKB_KITE_ACCESS_TOKEN": kite.accounts.open_session(), "PKB_INSTRUMENTS": tokens}
    for name, value in (kite.environment() | session).items():
        print(f"  export {name}={value}")
    print("Ctrl-C stops it.", flush=True)


def _epoch_ms(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"--start {text!r} is not a time", "give it as 2026-11-20T08:55") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=IST)).timestamp() * 1000


def _control(address: str, faults: list[dict[str, Any]], *, clear: bool, expire: bool) -> None:
    base = address.rstrip("/") + "/_sim/"
    if clear:
        _order("DELETE", base + "faults")
    for each in faults:
        _order("POST", base + "faults", each)
    if expire:
        _order("POST", base + "expire?cut=1")
    for active in _order("GET", base + "faults"):
        left = [f"{name} {active[name]}" for name in ("count", "seconds", "path") if active[name]]
        print(" ".join([active["kind"], f"struck {active['struck']}", *left]))


def _order(method: str, url: str, content: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    try:
        answer = requests.request(method, url, json=content, timeout=CONTROL_TIMEOUT_SECONDS)
        document = answer.json()
    except (requests.RequestException, ValueError):
        raise ControlFailed(f"no simulator answers at {url}", "give the REST address it printed") from None
    if not answer.ok:
        raise ControlFailed(f"the simulator refuses: {document.get('message', answer.status_code)}")
    data = document["data"]
    return data if isinstance(data, list) else []
