"""`pkb demo`: the main job with nothing to configure, and a live view of candles forming."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import redis
import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import Candle
from pkbrokers_redis.cli.common import AsJson, show
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.runtime.cluster_state import Worker, read_workers
from pkbrokers_redis.runtime.health import check_volumes
from pkbrokers_redis.runtime.supervisor import RoleSpec, Supervisor, stop_on_signals, worker_argv
from pkbrokers_redis.runtime.warmup import is_compiled, start_compiling
from pkbrokers_redis.settings import Settings, env_name, load_settings
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.embedded import LINGER_SECONDS, attach, running, store_folder
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.symbols import save_instruments

WARM_UP_SECONDS_MAX = 180  # a large demo's first run compiles the candle rules before its first candle
UNCOMPILED_RATE_MAX = 1_500  # ticks a second: what the uncompiled rules manage on half a core
SECONDS_WITHOUT_TERMINAL = 65  # long enough for a minute to complete
REFRESH_SECONDS = 0.25
PLAIN_EVERY_SECONDS = 5.0  # without a terminal: a line now and then
RESTARTS_MAX = 3
WORKER_FIELDS = (
    *("data_dir", "prefix", "shards", "intervals_text", "sessions", "timezone", "clock"),
    *("close_grace_seconds", "kite_mode", "log_level", "log_format"),
)


def demo(
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="stop after this long; unset: Ctrl-C, or 65 s without a terminal"),
    ] = None,
    instruments: Annotated[int, typer.Option(min=1, max=9_000, help="how many instruments trade")] = 500,
    rate: Annotated[
        float | None, typer.Option(min=1, help="ticks a second over all; unset: one a second an instrument")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Watch candles form: embedded Redis, a local Kite simulator, ingest, aggregator, and a live view.

    It uses its own store in the data folder, created at each start; PKB_REDIS_URL is ignored.
    """
    if seconds is None and not sys.stdout.isatty():
        seconds = SECONDS_WITHOUT_TERMINAL
    settings = _own_settings()
    logs.configure(settings)
    stop = threading.Event()
    rows = universe(instruments)
    with stop_on_signals(stop), attach(settings) as server, connect(settings) as client:
        ensure_meta(client, settings, datetime.now(UTC).isoformat(timespec="seconds"))
        save_instruments(client, settings.keys, rows)
        market = Market(rows, int(time.time() * 1000), rate=rate)
        kite = SimulatorServer(market)
        kite.start()
        tokens = settings.data_dir / "instruments.txt"
        tokens.write_text("\n".join(str(row["instrument_token"]) for row in rows) + "\n")
        workers = Pipeline(_worker_env(settings, server.url, kite.url, tokens), rate or len(rows))
        summary = DemoSummary(
            instruments=len(rows),
            redis_url=server.url,
            data_dir=str(settings.data_dir),
            symbols=[f"{row['exchange']}:{row['tradingsymbol']}" for row in rows[:12]],
        )
        workers.start()
        try:
            with CandleStore(settings, client=client) as store, View(as_json, summary, store) as view:
                _watch(view, workers, stop, seconds)
        finally:
            workers.stop()
            kite.stop()
        _sum_up(client, settings, summary)
    show(asdict(summary), as_json, _summary_text(summary))


def _own_settings() -> Settings:
    base = load_settings()
    folder = base.data_dir / "demo"
    deadline = time.monotonic() + 3 * LINGER_SECONDS  # the server of an earlier demo ends a moment after it
    while (other := running(folder)) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    if other is not None:
        raise PkbError(f"a demo is running already (server pid {other.pid})", "stop it, or set PKB_DATA_DIR")
    shutil.rmtree(store_folder(folder), ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return load_settings(
        data_dir=folder,
        redis_url=None,
        prefix="pkb",
        sessions="always",
        clock="wall",
        kite_mode="full",
        log_level="warning",
    )


def _worker_env(settings: Settings, redis_url: str, kite_url: str, tokens: Path) -> dict[str, str]:
    """Return the demo's settings in full: neither the user's environment nor a `.env` reaches its workers."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PKB_")}
    env |= {env_name(field): str(getattr(settings, field)) for field in WORKER_FIELDS}
    return env | {"PKB_REDIS_URL": redis_url, "PKB_KITE_WS_URL": kite_url, "PKB_INSTRUMENTS": str(tokens)}


class Pipeline:
    """Ingest and an aggregator, which runs the rules uncompiled at first where they are not compiled yet.

    Compiling takes 20 seconds of a core, and Python manages a demo's rate. Then a compiled aggregator joins,
    and the first one hands its shards over, as any two aggregators do.
    """

    def __init__(self, env: dict[str, str], ticks_per_second: float) -> None:
        self._env = env
        self._ingest = Supervisor([RoleSpec("ingest", worker_argv("ingest"))], env=env)
        self._slow: Supervisor | None = None
        self._fast: Supervisor | None = None
        self._compiling: subprocess.Popen[bytes] | None = None
        self._starts_slow = not is_compiled() and ticks_per_second <= UNCOMPILED_RATE_MAX

    def start(self) -> None:
        """Start all processes."""
        if self._starts_slow:
            self._slow = self._start_aggregator({"NUMBA_DISABLE_JIT": "1"})
            self._compiling = start_compiling()
        else:
            self._fast = self._start_aggregator({})
        self._ingest.start()

    def _start_aggregator(self, more: dict[str, str]) -> Supervisor:
        spec = RoleSpec("aggregate", worker_argv("aggregate"))
        started = Supervisor([spec], env=self._env | more)
        started.start()
        return started

    @property
    def is_compiling(self) -> bool:
        """Whether the rules are being compiled beside the pipeline."""
        return self._compiling is not None

    def check(self) -> None:
        """Go on with compiled rules once they are there; raise PkbError when a worker cannot live."""
        if self._compiling is not None and self._compiling.poll() is not None:
            self._compiling, slow, self._slow = None, self._slow, None
            self._fast = self._start_aggregator({})
            if slow is not None:
                threading.Thread(target=slow.stop, name="handover", daemon=True).start()
        for status in [status for each in self._all() for status in each.statuses()]:
            if status.restarts >= RESTARTS_MAX or status.state == "failed":
                raise PkbError(f"{status.role} keeps failing: {status.last_line}", "look at the lines above")

    def _all(self) -> list[Supervisor]:
        return [each for each in (self._ingest, self._slow, self._fast) if each is not None]

    def stop(self) -> None:
        """Stop ingest first, then the aggregator, once it has applied what was written."""
        if self._compiling is not None:
            self._compiling.kill()
            self._compiling.wait()
        for each in self._all():
            each.stop()


def _watch(view: View, workers: Pipeline, stop: threading.Event, seconds: float | None) -> None:
    """Show candles until the time is up. The time counts from the first candle."""
    began: float | None = None
    started = time.monotonic()
    while not stop.is_set():
        now = time.monotonic()
        if began is None and view.has_candles():
            began = now
        workers.check()
        if began is None and now - started > WARM_UP_SECONDS_MAX:
            raise PkbError("no candle formed within 3 minutes", "look at the lines above, try again")
        if began is not None and seconds is not None and now - began >= seconds:
            break
        view.show(0.0 if began is None else now - began, now - started, workers.is_compiling)
        stop.wait(REFRESH_SECONDS)


def _sum_up(client: redis.Redis, settings: Settings, summary: DemoSummary) -> None:
    keys = settings.keys
    for key in client.scan_iter(match=f"{keys.prefix}:*", count=1000):
        name = key.decode()
        if ":current:" in name:
            summary.candles_forming += client.hlen(name)
        elif ":candles:" in name:
            summary.candles_completed += client.llen(name)
    for shard in range(keys.shards):
        summary.closed_announced += client.xlen(keys.closed(shard))
    volumes = check_volumes(client, keys)
    summary.volumes_checked, summary.volumes_wrong = volumes.checked, len(volumes.wrong)
    summary.ticks_per_second = round(summary.ticks / max(summary.seconds, 1e-9), 1)
    summary.seconds = round(summary.seconds, 1)


def _summary_text(summary: DemoSummary) -> str:
    right = summary.volumes_checked - summary.volumes_wrong
    return (
        f"{summary.ticks:,} ticks of {summary.instruments:,} instruments in {summary.seconds:.0f} s: "
        f"{summary.candles_completed:,} candles completed, {summary.candles_forming:,} forming\n"
        "candle volumes add up to the traded volume for "
        f"{right:,} of {summary.volumes_checked:,} instruments\n"
        "read on: pkb candles RELIANCE 1m --current   pkb quote INFY   pkb redis-cli HGETALL pkb:symbols"
    )


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

    def __init__(self, quiet: bool, summary: DemoSummary, store: CandleStore) -> None:
        self._quiet = quiet
        self._summary = summary
        self._store = store
        self._live = Live(auto_refresh=False) if sys.stdout.isatty() and not quiet else None
        self._printed_at = float("-inf")  # monotonic seconds
        self._last_close: dict[str, float] = {}
        self._applied: dict[str, int] = {}  # ticks, by aggregator
        self._starting, self._waited, self._is_compiling = "starting", 0.0, False

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        elif not self._quiet:
            print("starting: embedded Redis, Kite simulator, ingest, aggregator", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def has_candles(self) -> bool:
        """Return whether a candle of the shown instruments is forming."""
        tokens = [token for token, _ in self._store.resolve_all(self._summary.symbols)]
        return bool(self._store.client.exists(*map(self._store.keys.current, tokens)))

    def show(self, seconds: float, waited: float, is_compiling: bool) -> None:
        """Read the store and draw it.

        `seconds` have passed since the first candle, `waited` since the start.
        """
        summary = self._summary
        self._starting = f"starting: {waited:.0f} s" + (
            ", compiling the candle rules" if is_compiling else ""
        )
        self._is_compiling = is_compiling
        summary.seconds = seconds
        found = read_workers(self._store.client, self._store.keys, time.time() * 1000)
        workers = {worker.role: worker for worker in found if worker.age_ms is not None}
        aggregator = workers.get("aggregate")
        applied = {each.id: int(each.number("ticks_total")) for each in found if each.role == "aggregate"}
        self._applied |= applied
        summary.ticks = sum(self._applied.values())
        if self._live:
            self._live.update(self._draw(workers), refresh=True)
        elif not self._quiet and seconds and time.monotonic() - self._printed_at >= PLAIN_EVERY_SECONDS:
            self._printed_at = time.monotonic()
            candle = self._store.get_current_candle(summary.symbols[-1], "1m")
            forming = f"{summary.symbols[-1]} 1m {_plain(candle)}" if candle else ""
            compiling = "  (compiling the candle rules)" if is_compiling else ""
            print(f"{seconds:5.0f} s  {self._rate(aggregator)}  {forming}{compiling}", flush=True)
        elif not self._quiet and not seconds and waited - self._waited >= PLAIN_EVERY_SECONDS:
            self._waited = waited
            print(self._starting, flush=True)

    def _draw(self, workers: dict[str, Worker]) -> Group:
        symbols = self._summary.symbols
        rows = [(symbol, self._store.get_current_candle(symbol, "1m")) for symbol in symbols]
        if not any(candle for _, candle in rows):
            return Group(Text(self._starting, "yellow"))
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("1m candle")
        for name in ("open", "high", "low", "close", "volume", "ticks"):
            table.add_column(name, justify="right", min_width=10)
        for symbol, candle in rows:
            if candle is None:
                table.add_row(symbol, *["–"] * 6)
                continue
            style = "green" if candle.close >= candle.open else "red"
            has_moved = self._last_close.get(symbol) != candle.close
            self._last_close[symbol] = candle.close
            close = Text(f"{candle.close:,.2f}", f"bold {style}" if has_moved else style)
            prices = (f"{candle.open:,.2f}", f"{candle.high:,.2f}", f"{candle.low:,.2f}")
            table.add_row(symbol, *prices, close, f"{candle.volume:,.0f}", str(candle.ticks))
        ingest, aggregator = workers.get("ingest"), workers.get("aggregate")
        quotes, lag_ms = ingest and ingest.number("quotes"), aggregator and aggregator.number("lag_ms")
        head = Text.assemble(
            ("pkbrokers-redis demo  ", "bold"),
            f"{self._summary.instruments:,} instruments  {self._rate(aggregator)}  ",
            f"quotes {quotes or 0:,.0f}  lag {lag_ms or 0:.0f} ms  ",
            (f"{self._summary.seconds:.0f} s", "dim"),
            ("  compiling the candle rules" if self._is_compiling else "", "yellow"),
        )
        foot = Text(
            "from another terminal: pkb candles RELIANCE 5m --current · pkb quote INFY · "
            "pkb closed --follow · Ctrl-C stops",
            "dim",
        )
        return Group(head, Text(), table, Text(), foot)

    def _rate(self, aggregator: Worker | None) -> str:
        rate = aggregator.number("ticks_per_second") if aggregator else 0.0
        return f"{rate:,.0f} ticks/s  {self._summary.ticks:,} ticks"


def _plain(candle: Candle) -> str:
    return f"O {candle.open} H {candle.high} L {candle.low} C {candle.close} V {candle.volume:g}"
