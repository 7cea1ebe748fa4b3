"""The demo's live view: candles of a dozen instruments as they form, and how the pipeline fares."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import redis
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pkbrokers_redis.candles.model import Candle
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.settings import Settings

PLAIN_EVERY_SECONDS = 5.0  # without a terminal: a line now and then


@dataclass
class DemoSummary:
    """What a demo did; `--json` prints it."""

    instruments: int = 0
    seconds: float = 0.0
    ticks: int = 0
    ticks_per_second: float = 0.0
    candles_forming: int = 0
    candles_completed: int = 0
    closed_announced: int = 0
    volumes_checked: int = 0
    volumes_wrong: int = 0
    redis_url: str = ""
    data_dir: str = ""
    symbols: list[str] = field(default_factory=list)


class View:
    """A rich table on a terminal, a line every five seconds elsewhere, nothing with `quiet`."""

    def __init__(self, quiet: bool, summary: DemoSummary, settings: Settings) -> None:
        self._quiet = quiet
        self._summary = summary
        self._settings = settings
        self._terminal = sys.stdout.isatty() and not quiet
        self._live = Live(console=Console(), auto_refresh=False) if self._terminal else None
        self._told_at = 0.0
        self._last: dict[str, float] = {}
        self._worker_keys: list[bytes] = []

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        elif not self._quiet:
            print("starting: embedded Redis, Kite simulator, ingest, aggregator", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, store: CandleStore, client: redis.Redis) -> None:
        """Read the store and draw it."""
        workers = self._workers(client)
        ingest, aggregate = workers.get("ingest", {}), workers.get("aggregate", {})
        self._summary.ticks = max(self._summary.ticks, int(aggregate.get("ticks_total", 0)))
        if self._quiet:
            return
        if self._live:
            rows = [(symbol, store.get_current_candle(symbol, "1m")) for symbol in self._summary.symbols]
            self._live.update(self._draw(rows, ingest, aggregate), refresh=True)
        elif time.monotonic() - self._told_at >= PLAIN_EVERY_SECONDS and self._summary.seconds:
            self._told_at = time.monotonic()
            symbol = self._summary.symbols[-1]
            candle = store.get_current_candle(symbol, "1m")
            forming = f"{symbol} 1m {_plain(candle)}" if candle else ""
            print(f"{self._summary.seconds:5.0f} s  {_rate(aggregate)}  {forming}", flush=True)

    def _workers(self, client: redis.Redis) -> dict[str, dict[str, Any]]:
        if len(self._worker_keys) < 2:
            self._worker_keys = list(client.scan_iter(match=self._settings.keys.worker("*"), count=10_000))
        found: dict[str, dict[str, Any]] = {}
        for key in self._worker_keys:
            found_fields: Any = client.hgetall(key)
            fields = {name.decode(): value.decode() for name, value in found_fields.items()}
            if fields:
                found[fields["role"]] = fields
        return found

    def _draw(
        self, rows: list[tuple[str, Candle | None]], ingest: dict[str, Any], aggregate: dict[str, Any]
    ) -> Group:
        if not any(candle for _, candle in rows):
            return Group(
                Text("warming up: the first run compiles the candle rules (about 20 s, once)", "yellow")
            )
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("1m candle")
        for name in ("open", "high", "low", "close", "volume", "ticks"):
            table.add_column(name, justify="right", min_width=10)
        for symbol, candle in rows:
            if candle is None:
                table.add_row(symbol, *["–"] * 6)
                continue
            style = "green" if candle.close >= candle.open else "red"
            moved = self._last.get(symbol) != candle.close
            self._last[symbol] = candle.close
            close = Text(f"{candle.close:,.2f}", f"bold {style}" if moved else style)
            prices = (f"{candle.open:,.2f}", f"{candle.high:,.2f}", f"{candle.low:,.2f}")
            table.add_row(symbol, *prices, close, f"{candle.volume:,.0f}", str(candle.ticks))
        head = Text.assemble(
            ("pkbrokers-redis demo  ", "bold"),
            f"{self._summary.instruments:,} instruments  {_rate(aggregate)}  ",
            f"quotes {int(ingest.get('quotes', 0)):,}  lag {float(aggregate.get('lag_ms', 0)):.0f} ms  ",
            (f"{self._summary.seconds:.0f} s", "dim"),
        )
        foot = Text(
            "from another terminal: pkb candles RELIANCE 5m --current · pkb quote INFY · "
            "pkb closed --follow · Ctrl-C stops",
            "dim",
        )
        return Group(head, Text(), table, Text(), foot)


def _rate(aggregate: dict[str, Any]) -> str:
    return (
        f"{float(aggregate.get('ticks_per_second', 0)):,.0f} ticks/s  "
        f"{int(aggregate.get('ticks_total', 0)):,} ticks"
    )


def _plain(candle: Candle) -> str:
    return f"O {candle.open} H {candle.high} L {candle.low} C {candle.close} V {candle.volume:g}"
