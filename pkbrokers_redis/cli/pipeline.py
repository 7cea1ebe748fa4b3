"""`pkb status`, `pkb top`, `pkb doctor`: the pipeline's health, once, live, and in full with fixes."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NoReturn

import redis
import typer
from redis.exceptions import ResponseError
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pkbrokers_redis.cli.common import AsJson, Seconds, dump, require_store
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError, RedisUnavailable
from pkbrokers_redis.runtime import health
from pkbrokers_redis.runtime.cluster_state import (
    ClusterState,
    Finding,
    Server,
    Worker,
    call_each_master,
    read_cluster_state,
    read_workers,
)
from pkbrokers_redis.runtime.health import (
    EXIT_CODES,
    STATUS_CHECKS,
    Health,
    check_health,
    check_host,
    counters,
    health_document,
    health_of,
    run_checks,
)
from pkbrokers_redis.runtime.supervisor import stop_on_signals
from pkbrokers_redis.settings import Settings, load_settings, unknown_names
from pkbrokers_redis.store.connect import ANSWER_SECONDS, connect, describe, explain
from pkbrokers_redis.store.functions import FUNCTION_NAMES
from pkbrokers_redis.store.instruments import read_manifest
from pkbrokers_redis.store.meta import adopt_meta, check_meta
from pkbrokers_redis.store.symbols import instrument_list

REFRESH_SECONDS = 1.0
STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
HEALTH_STYLES: dict[Health, str] = {"healthy": "green", "degraded": "yellow", "down": "red"}
WIDTH_MIN = 110  # of all columns; a narrower terminal lacks some


def status(
    as_json: AsJson = False,
    only_here: Annotated[
        bool, typer.Option("--here", help="check only this host's workers: for a container's healthcheck")
    ] = False,
) -> None:
    """Show the pipeline's health once: workers, shards, lag, Redis. Exits with 0 healthy, 1 degraded, 2 down.

    A problem is checked again after a second: one that has passed was a handover between workers.
    """
    settings = load_settings()
    cluster: ClusterState | None = None
    try:
        require_store(settings)
        with connect(settings, for_reading=True, socket_timeout_seconds=ANSWER_SECONDS) as client:
            if only_here:
                workers = read_workers(client, settings.keys, time.time() * 1000)
                findings = [check_host(workers, socket.gethostname())]
            else:
                cluster, findings = check_health(client, adopt_meta(client, settings))
    except RedisUnavailable as error:
        if not as_json:
            raise
        findings = [_unavailable(error, settings)]
    _finish(cluster, findings, as_json, _view(cluster, findings))


def top(seconds: Seconds = None) -> None:
    """Watch the pipeline: workers, rates, shards and lag, every second; without a terminal a line each."""
    settings = load_settings()
    require_store(settings)
    stop = threading.Event()
    client: redis.Redis | None = connect(settings, for_reading=True, socket_timeout_seconds=ANSWER_SECONDS)
    deadline = None if seconds is None else time.monotonic() + seconds
    screen = Live(console=_console(), auto_refresh=False) if sys.stdout.isatty() else None
    with stop_on_signals(stop), screen or contextlib.nullcontext():
        while True:
            cluster: ClusterState | None = None
            try:
                client = client or connect(settings, for_reading=True, socket_timeout_seconds=ANSWER_SECONDS)
                keys = adopt_meta(client, settings).keys
                cluster = read_cluster_state(client, keys, describe(settings, for_reading=True))
                findings = run_checks(cluster, STATUS_CHECKS)
            except (redis.RedisError, PkbError) as error:
                # Go on while Redis is unavailable: that is when a person watches.
                client = None
                findings = [_unavailable(error, settings)]
            if screen:
                screen.update(_view(cluster, findings), refresh=True)
            else:
                print(_line_of(cluster, findings), flush=True)
            if deadline is not None and time.monotonic() + REFRESH_SECONDS > deadline:
                break
            if stop.wait(REFRESH_SECONDS):
                break
    if client is not None:
        client.close()


def _finish(
    cluster: ClusterState | None, findings: list[Finding], as_json: bool, shown: RenderableType
) -> NoReturn:
    if as_json:
        print(dump(health_document(cluster, findings)))
    else:
        _console().print(shown)
    raise typer.Exit(EXIT_CODES[health_of(findings)])


def _unavailable(error: Exception, settings: Settings) -> Finding:
    if not isinstance(error, RedisUnavailable):
        error = explain(error, describe(settings, for_reading=True))
    return Finding("redis", "fail", error.message, error.hint)


def _line_of(cluster: ClusterState | None, findings: list[Finding]) -> str:
    problems = "; ".join(f"{each.check}: {each.message}" for each in findings if each.level != "ok")
    if cluster is None:
        return f"{health_of(findings)}  {problems}"
    rates = {
        role: sum(worker.number("ticks_per_second") for worker in cluster.alive(role))
        for role in ("ingest", "aggregate")
    }
    waiting = sum(shard.lag_entries for shard in cluster.shards)
    lag_ms = max((shard.lag_ms for shard in cluster.shards), default=0.0)
    text = (
        f"{health_of(findings)}  in {rates['ingest']:,.0f} ticks/s  applied {rates['aggregate']:,.0f} "
        f"ticks/s  waiting {waiting:,} entries, {lag_ms:,.0f} ms"
    )
    return f"{text}  {problems}".rstrip()


def _view(cluster: ClusterState | None, findings: list[Finding]) -> RenderableType:
    if cluster is None:
        return Group(*map(_finding_line, findings))
    health = health_of(findings)
    head = (health, f"bold {HEALTH_STYLES[health]}")
    lost = " · ".join(f"{name} {count:,}" for name, count in counters(cluster).items() if count)
    parts: list[Any] = [
        Text.assemble(head, f"  {cluster.place}  ", (_servers(cluster.servers), "dim")),
        *([_workers(cluster)] if cluster.workers else []),
        _shards(cluster),
        *([Text(lost, "yellow")] if lost else []),
    ]
    return Group(*parts, *(_finding_line(finding) for finding in findings if finding.level != "ok"))


def _finding_line(finding: Finding) -> Text:
    hint = f": {finding.hint}" if finding.hint else ""
    level = f"{finding.level:<5}", STYLES[finding.level]
    return Text.assemble(level, f"{finding.check:<12} {finding.message}{hint}")


def _console() -> Console:
    """Return a console that fits a terminal, whose tables then lack columns; a pipe gets every line whole."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH_MIN)
    return console


def _servers(servers: Sequence[Server]) -> str:
    if not servers:
        return ""
    used, limit = sum(each.used_bytes for each in servers), sum(each.limit_bytes for each in servers)
    memory = f"{used / 1e6:,.0f} MB" + (f" of {limit / 1e6:,.0f}" if limit else "")
    aof = "appendonly" if all(each.aof for each in servers) else "no appendonly"
    masters = f"{len(servers)} masters, " if len(servers) > 1 else ""
    return f"{masters}{servers[0].version}, {memory}, {aof}"


def _workers(cluster: ClusterState) -> Table:
    is_narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < WIDTH_MIN
    table = _table("worker", "beat>", "rate>", *(() if is_narrow else ("ticks>", "part")))
    for worker in sorted(cluster.workers, key=lambda each: (each.role != "ingest", each.role, each.id)):
        if worker.age_ms is None:
            table.add_row(worker.id, "expired", style="dim")
            continue
        rate, ticks = worker.number("ticks_per_second"), worker.number("ticks_total")
        age = f"{worker.age_ms / 1000:.1f} s"
        cells = worker.id, age, f"{rate:,.0f}/s", f"{ticks:,.0f}", _part_of(worker)
        table.add_row(*cells[: len(table.columns)])
    return table


def _part_of(worker: Worker) -> str:
    instruments = f"{worker.number('instruments'):,.0f} instruments"
    if worker.role == "ingest":
        feeds = worker.numbers("feeds")
        connected = f"{worker.number('connected'):.0f} of {len(feeds)} connected"
        return f"{instruments} in feeds {_list(feeds)}, {connected}"
    return f"{instruments} in shards {_list(worker.numbers('shards'))}" if worker.role == "aggregate" else ""


def _shards(cluster: ClusterState) -> Table:
    table = _table("shard>", "aggregator", "waiting>", "lag ms>", "stream>")
    for shard in cluster.shards:
        lag = f"{shard.lag_entries:,}", f"{shard.lag_ms:,.0f}"
        table.add_row(str(shard.number), shard.owner or "–", *lag, f"{shard.entries:,}")
    return table


def _table(*columns: str) -> Table:
    """Return an empty table; columns whose name ends in `>` hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        justify: Any = "right" if name.endswith(">") else "left"
        table.add_column(name.rstrip(">"), justify=justify, no_wrap=True, overflow="ellipsis")
    return table


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers)) or "none"


LOOK_SECONDS = 1.0  # between the two reads that show whether shards move
LIBRARY = "pkbrokers"
KEYS_AT_ONCE = 1_000
NAMES_MAX = 5


def doctor(as_json: AsJson = False) -> None:
    """Check the whole pipeline and print how to fix what is wrong. Exits as `pkb status` does.

    It takes a second or more: it reads twice whether shards move, and adds up every instrument's volumes.
    """
    settings = load_settings()
    findings = list(_settings_findings())
    cluster = None
    try:
        require_store(settings)
        place = describe(settings, for_reading=True)
        with connect(settings, for_reading=True, socket_timeout_seconds=ANSWER_SECONDS) as client:
            findings.append(Finding("redis", "ok", f"{place} answers"))
            findings.append(_meta_finding(client, settings))
            try:
                settings = adopt_meta(client, settings)
            except PkbError as error:
                findings.append(Finding("meta", "fail", error.message, error.hint))
            earlier = read_cluster_state(client, settings.keys, place)
            time.sleep(LOOK_SECONDS)
            cluster = read_cluster_state(client, settings.keys, place, stream_bytes=True)
            moving = health.progress_since(earlier), health.streams_below(settings.stream_max_entries)
            checks = (*STATUS_CHECKS, *moving, *health.SETUP_CHECKS)
            findings += _function_findings(client)
            findings += run_checks(cluster, checks)
            findings += _volume_findings(client, settings)
            findings.append(_quote_finding(client, settings))
            manifest = read_manifest(client, settings.keys)
            findings.append(health.check_master(manifest, market_clock(settings)() / 1000))
            findings += _job_findings(client, settings)
    except RedisUnavailable as error:
        findings.append(_unavailable(error, settings))
    _finish(cluster, findings, as_json, Group(*map(_finding_line, findings)))


def _settings_findings() -> Iterator[Finding]:
    """Variables that look like settings and are none."""
    for name, meant in unknown_names().items():
        hint = f"did you mean {meant}?" if meant else "unset it; pkb config lists the settings"
        yield Finding("settings", "warn", f"{name} is not a setting", hint)


def _meta_finding(client: redis.Redis, settings: Settings) -> Finding:
    try:
        return health.check_settings(None, check_meta(client, settings))
    except PkbError as error:
        return health.check_settings(error, True)


def _function_findings(client: redis.Redis) -> Iterator[Finding]:
    missing: set[str] = set()
    try:
        for name, libraries in call_each_master(client, "function_list", LIBRARY).items():
            loaded = repr(libraries)  # nested lists, whose order differs with the version
            missing |= {f"{each} {name}".strip() for each in FUNCTION_NAMES if f"{each!r}" not in loaded}
    except ResponseError:
        return  # the user has no permission
    yield health.check_functions(sorted(missing))


def _job_findings(client: redis.Redis, settings: Settings) -> Iterator[Finding]:
    from pkbrokers_redis.store.queue import connect_queue, has_queue  # RQ takes long to import

    if not has_queue(settings):
        return
    try:
        jobs = client if settings.rq_redis_url is None else connect_queue(settings)
        failed: Any = jobs.zcard(health.FAILED_JOBS)
        yield health.check_jobs(int(failed))
    except ResponseError:
        return  # the user has no permission
    except (PkbError, redis.ConnectionError) as error:
        hint = getattr(error, "hint", "") or "start it, or correct PKB_RQ_REDIS_URL"
        yield Finding("jobs", "warn", str(getattr(error, "message", "their Redis does not answer")), hint)


def _volume_findings(client: redis.Redis, settings: Settings) -> Iterator[Finding]:
    """An instrument's candle volumes add up to what was traded while it was streamed."""
    interval = health.longest_interval(settings.intervals)
    result = health.check_volumes(client, settings.keys, interval.name, keep=interval.keep)
    right = result.checked - len(result.wrong)
    message = f"{interval.name} candles add up for {right:,} of {result.checked:,} instruments"
    if result.truncated:
        message += f" ({result.truncated:,} lists do not reach back to the start of the day)"
    if result.malformed:
        hint = "see the aggregators' logs"
        yield Finding("volumes", "warn", f"{result.malformed:,} keys were changed by another writer", hint)
    if result.wrong:
        names = ", ".join(map(str, sorted(result.wrong)[:NAMES_MAX]))
        hint = f"look at {names}: backfill them; if nobody edited them by hand, report it"
        yield Finding("volumes", "fail", message, hint)
    else:
        yield Finding("volumes", "ok", message)


def _quote_finding(client: redis.Redis, settings: Settings) -> Finding:
    """Every instrument of PKB_INSTRUMENTS has a quote."""
    if not settings.instruments:
        return Finding("quotes", "ok", "not checked: PKB_INSTRUMENTS is not set here")
    try:
        instruments = instrument_list(client, settings)
    except PkbError as error:
        return Finding("quotes", "warn", error.message, error.hint)
    without: list[str] = []
    for first in range(0, len(instruments), KEYS_AT_ONCE):
        chunk = instruments[first : first + KEYS_AT_ONCE]
        pipeline = client.pipeline(transaction=False)
        for token, _ in chunk:
            pipeline.hlen(settings.keys.quote(token))
        sizes = pipeline.execute(raise_on_error=False)
        without += [name for (_, name), size in zip(chunk, sizes, strict=True) if not size]
    if not without:
        return Finding("quotes", "ok", f"all {len(instruments):,} instruments have one")
    names = ", ".join(without[:NAMES_MAX])
    return Finding(
        "quotes", "warn", f"{len(without):,} of {len(instruments):,} instruments have no quote: {names}",
        "wait for the market to open; otherwise the token is wrong or the instrument has expired",
    )  # fmt: skip
