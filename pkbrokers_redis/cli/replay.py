"""`pkb replay`: a capture or a trade file through the pipeline, at any speed."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from pkbrokers_redis import logs
from pkbrokers_redis.cli.output import dump
from pkbrokers_redis.client.replay import Replay
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.runtime.roles import open_store
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.connect import connect


def replay(
    file: Annotated[Path, typer.Argument(help="a capture of `pkb record`, or a CSV/Parquet of trades")],
    speed: Annotated[str, typer.Option(help="times real time, e.g. 1 or 60; or max")] = "max",
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable summary")] = False,
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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with open_store(settings):
        summary = Replay(lambda: connect(settings), settings, speed=times, stop=stop).run(file)
    if as_json:
        print(dump(vars(summary)))
        return
    rate = summary.ticks / max(summary.seconds, 1e-9)
    print(f"{summary.ticks:,} ticks in {summary.seconds:.1f} s ({rate:,.0f} ticks/s)")
    if summary.rows_refused:
        print(f"{summary.rows_refused:,} rows left out: no time, symbol, price above 0 or quantity")
    if summary.rows_older:
        print(f"{summary.rows_older:,} rows left out: older than what the store has of their instruments")
    if summary.symbols:
        shown = ", ".join(summary.symbols[:5]) + (" …" if len(summary.symbols) > 5 else "")
        print(f"look: pkb candles {summary.symbols[0]} 1m   (symbols: {shown})")


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    try:
        times = float(text)
    except ValueError:
        times = 0.0
    if not 0 < times < 1e9:
        raise SettingsError(f"--speed {text!r} is no speed", "give a number above 0, or max")
    return times
