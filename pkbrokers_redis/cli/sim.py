"""Ticks without the live market: `pkb sim`, a whole Kite on loopback, `pkb record` and `pkb replay`."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Annotated, Any

import requests
import typer

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.cli.common import AsJson, Seconds, parse_moment, show
from pkbrokers_redis.client.replay import Replay
from pkbrokers_redis.errors import PkbError, SessionExpired, SettingsError
from pkbrokers_redis.kite.capture import KIND_BINARY, CaptureWriter
from pkbrokers_redis.kite.rest import session_in, url_for
from pkbrokers_redis.kite.websocket import ZerodhaWebSocketClient
from pkbrokers_redis.runtime.roles import open_store
from pkbrokers_redis.runtime.supervisor import stop_on_signals
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.faults import Faults, parse_fault
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.store.auth import Session, load_session
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.embedded import reader_data_dir, store_folder
from pkbrokers_redis.store.symbols import resolve_many

CONTROL_TIMEOUT_SECONDS = 5


def sim(
    port: Annotated[int, typer.Option(min=0, max=65533, help="websocket port; 0 takes free ones")] = 8765,
    instruments: Annotated[int, typer.Option(min=1, max=100_000, help="how many instruments trade")] = 500,
    rate: Annotated[
        float | None, typer.Option(min=1, help="ticks a second over all; unset: one a second an instrument")
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed walks the same prices")] = 1,
    seconds: Seconds = None,
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
        start_ms=None if start is None else parse_moment(start, time.time()) * 1000,
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
        raise PkbError(f"no simulator answers at {url}", "give the REST address it printed") from None
    if not answer.ok:
        raise PkbError(f"the simulator refuses: {document.get('message', answer.status_code)}")
    data = document["data"]
    return data if isinstance(data, list) else []


def record(
    file: Annotated[Path, typer.Argument(help="capture to append to; a name ending in .gz is gzipped")],
    seconds: Seconds = None,
) -> None:
    """Record raw websocket frames of PKB_INSTRUMENTS into FILE until stopped."""
    settings = load_settings()
    tokens = _tokens(settings)
    url = url_for(settings, _shared_session(settings) or session_in(settings))
    stop = threading.Event()
    if seconds is not None:
        timer = threading.Timer(seconds, stop.set)
        timer.daemon = True
        timer.start()
    with CaptureWriter(file) as capture, stop_on_signals(stop):
        client = ZerodhaWebSocketClient(
            url,
            tokens,
            settings.kite_mode,
            on_frame=lambda frame, at_ms: capture.write(at_ms, KIND_BINARY, frame),
            on_forbidden=_give_up,
        )
        print(f"Recording {len(tokens)} instruments into {file}; Ctrl-C stops.", flush=True)
        client.run(stop)
    stats = client.stats
    print(f"{stats.frames - stats.heartbeats} frames, {stats.bytes:,} bytes, {stats.reconnects} reconnects")


def _give_up(_stop: threading.Event) -> None:
    raise SessionExpired("Kite refused the session (HTTP 403)", "run `pkb login` and record again")


def _shared_session(settings: Settings) -> Session | None:
    """Return what `pkb login` left in the store, if there is one: recording must not make one."""
    if settings.redis_url is None and not store_folder(reader_data_dir(settings)[0]).exists():
        return None
    with connect(settings, for_reading=True) as client:
        return load_session(client, settings.keys)


def _tokens(settings: Settings) -> list[int]:
    """Return PKB_INSTRUMENTS as tokens: numbers as they are, names by the symbols in the store."""
    names = [name.strip() for name in settings.instruments.split(",") if name.strip()]
    if not names:
        raise SettingsError(
            "PKB_INSTRUMENTS is empty", "name what to record, e.g. PKB_INSTRUMENTS=408065,738561"
        )
    if all(name.isdecimal() for name in names):
        return [int(name) for name in names]
    return [token for token, _ in resolve_many(connect(settings), settings.keys, settings.instruments)]


def replay(
    file: Annotated[Path, typer.Argument(help="a capture of `pkb record`, or a CSV/Parquet of trades")],
    speed: Annotated[str, typer.Option(help="times real time, e.g. 1 or 60; or max")] = "max",
    as_json: AsJson = False,
) -> None:
    """Write a recording into the tick streams; a running aggregator makes its candles.

    Trade files have the columns time,symbol,price,quantity (or volume, the day's so far). Replay several of a
    symbol in order of time. For old data run the aggregator with PKB_CLOCK=event, and with
    PKB_SESSIONS=always for another market's hours.
    """
    times = _speed(speed)
    settings = load_settings()
    logs.configure(settings)
    stop = threading.Event()
    with open_store(settings), stop_on_signals(stop):
        summary = Replay(lambda: connect(settings), settings, speed=times, stop=stop).run(file)
    rate = summary.ticks / max(summary.seconds, 1e-9)
    lines = [f"{summary.ticks:,} ticks in {summary.seconds:.1f} s ({rate:,.0f} ticks/s)"]
    for rows, reason in (
        (summary.rows_refused, "no time, symbol, price above 0 or quantity"),
        (summary.rows_older, "older than what the store has of their instruments"),
    ):
        if rows:
            lines.append(f"{rows:,} rows left out: {reason}")
    if summary.rows_unordered:
        lines.append(f"{summary.rows_unordered:,} rows were out of order: sorted by time and volume")
    if summary.rows_known:
        lines.append(f"{summary.rows_known:,} rows are in the store already: they change nothing")
    if summary.symbols:
        shown = ", ".join(summary.symbols[:5]) + (" …" if len(summary.symbols) > 5 else "")
        lines.append(f"look: pkb candles {summary.symbols[0]} 1m   (symbols: {shown})")
    show(vars(summary), as_json, "\n".join(lines))


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    try:
        times = float(text)
    except ValueError:
        times = 0.0
    if not 0 < times < 1e9:
        raise SettingsError(f"--speed {text!r} is not a speed", "give a number above 0, or max")
    return times
