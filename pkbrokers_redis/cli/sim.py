"""`pkb sim`: a Kite websocket server on loopback, with a market that trades."""

from __future__ import annotations

import signal
import threading
import time
from typing import Annotated

import typer

from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.server import SimulatorServer
from pkbrokers_redis.simulator.universe import universe


def sim(
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 takes a free one")] = 8765,
    instruments: Annotated[int, typer.Option(min=1, max=100_000, help="how many instruments trade")] = 500,
    rate: Annotated[
        float | None, typer.Option(min=1, help="ticks a second over all; unset: one a second an instrument")
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed walks the same prices")] = 1,
    seconds: Annotated[float | None, typer.Option(min=0, help="stop by itself after this long")] = None,
) -> None:
    """Run a Kite simulator on loopback: the websocket of Kite with random prices, for trying things out."""
    rows = universe(instruments)
    market = Market(rows, int(time.time() * 1000), seed=seed, rate=rate)
    server = SimulatorServer(market, port=port)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server.start()
    symbols = ",".join(str(row["instrument_token"]) for row in rows[:5])
    print(f"Kite simulator at {server.url}: {instruments} instruments, {_per_second(market)} ticks a second")
    print(f"  export PKB_KITE_WS_URL={server.url} PKB_SESSIONS=always PKB_INSTRUMENTS={symbols}")
    print("Ctrl-C stops it.", flush=True)
    try:
        stop.wait(seconds)
    finally:
        server.stop()
    print(f"{server.stats.connections} connections, {server.stats.frames} frames sent")


def _per_second(market: Market) -> str:
    return f"{len(market.tokens) * 1000 / market.interval_ms:,.0f}"
