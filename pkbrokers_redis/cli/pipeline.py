"""`pkb status`: the pipeline's health in one look, for people, scripts and healthchecks.

`pkb top`: the pipeline's health, live.

`pkb doctor`: everything that may be wrong with a pipeline, checked one by one, each with its mend.

The pipeline's health for people: what `pkb status`, `pkb doctor` and `pkb top` print.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NoReturn

import redis
import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pkbrokers_redis.cli.common import AsJson, dump, require_store
from pkbrokers_redis.errors import PkbError, RedisUnavailable
from pkbrokers_redis.runtime.cluster_state import Facts, Server, Worker, gather, read_workers
from pkbrokers_redis.runtime.health import (
    EXIT_CODES,
    STATUS,
    Finding,
    Health,
    as_dict,
    counters,
    health_of,
    here,
    judge,
    look,
)
from pkbrokers_redis.runtime.signals import stop_on_signals
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect, describe, explain
from pkbrokers_redis.store.meta import adopt_meta


def status(
    as_json: AsJson = False,
    only_here: Annotated[
        bool,
        typer.Option("--here", help="only whether this host's workers live: for a container's healthcheck"),
    ] = False,
) -> None:
    """Show the pipeline's health once: workers, shards, lag, Redis. Exits with 0 healthy, 1 degraded, 2 down.

    Trouble is looked at twice, a second apart: what is there for a moment is a handover.
    """
    settings = load_settings()
    try:
        require_store(settings)
        client = connect(settings, for_reading=True)
    except RedisUnavailable as error:
        if not as_json:
            raise
        print(dump(as_dict(None, [Finding("redis", "fail", error.message, error.hint)])))
        raise typer.Exit(EXIT_CODES["down"]) from None
    with client:
        if only_here:
            _here(client, settings, as_json)
        settings = adopt_meta(client, settings)
        facts, findings = look(client, settings)
    if as_json:
        print(dump(as_dict(facts, findings)))
    else:
        console().print(view(facts, findings))
    raise typer.Exit(EXIT_CODES[health_of(findings)])


def _here(client: redis.Redis, settings: Settings, as_json: bool) -> NoReturn:
    workers = read_workers(client, settings.keys, time.time() * 1000)
    findings = here(workers, socket.gethostname())  # as their heartbeats have it
    if as_json:
        print(dump(as_dict(None, findings)))
    else:
        for finding in findings:
            console().print(line(finding))
    raise typer.Exit(EXIT_CODES[health_of(findings)])


REFRESH_SECONDS = 1.0


def top(
    seconds: Annotated[float | None, typer.Option(min=0, help="stop by itself after this long")] = None,
) -> None:
    """Watch the pipeline: workers, rates, shards and lag, every second; a line each where no terminal is."""
    settings = load_settings()
    require_store(settings)
    stop = threading.Event()
    client: redis.Redis | None = connect(settings, for_reading=True)
    deadline = None if seconds is None else time.monotonic() + seconds
    terminal = sys.stdout.isatty()
    screen = Live(console=console(), auto_refresh=False, screen=False) if terminal else None
    with stop_on_signals(stop), screen or contextlib.nullcontext():
        while True:
            facts: Facts | None = None
            try:
                client = client or connect(settings, for_reading=True)
                keys = adopt_meta(client, settings).keys
                facts = gather(client, keys, describe(settings, for_reading=True))
                findings = judge(facts, STATUS)
            except (redis.RedisError, PkbError) as error:
                # Go on while Redis is unavailable: that is when a person watches.
                client = None
                findings = [_away(error, settings)]
            if screen:
                screen.update(_picture(facts, findings), refresh=True)
            else:
                print(_plain(facts, findings), flush=True)
            if deadline is not None and time.monotonic() + REFRESH_SECONDS > deadline:
                break
            if stop.wait(REFRESH_SECONDS):
                break


def _away(error: Exception, settings: Settings) -> Finding:
    told = explain(error, describe(settings, for_reading=True))
    return Finding("redis", "fail", told.message, told.hint)


def _picture(facts: Facts | None, findings: list[Finding]) -> RenderableType:
    return view(facts, findings) if facts is not None else Group(*map(line, findings))


def _plain(facts: Facts | None, findings: list[Finding]) -> str:
    trouble = "; ".join(f"{each.check}: {each.what}" for each in findings if each.level != "ok")
    if facts is None:
        return f"{health_of(findings)}  {trouble}"
    ingest = sum(worker.number("ticks_per_second") for worker in facts.alive("ingest"))
    candles = sum(worker.number("ticks_per_second") for worker in facts.alive("aggregate"))
    waiting = sum(shard.lag_entries for shard in facts.shards)
    lag_ms = max((shard.lag_ms for shard in facts.shards), default=0.0)
    text = (
        f"{health_of(findings)}  in {ingest:,.0f} ticks/s  applied {candles:,.0f} ticks/s  "
        f"waiting {waiting:,} entries, {lag_ms:,.0f} ms"
    )
    return f"{text}  {trouble}".rstrip()


STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
STYLE_OF: dict[Health, str] = {"healthy": "green", "degraded": "yellow", "down": "red"}
WIDTH_MIN = 110  # rather wrapped by the terminal than cut short


def view(facts: Facts, findings: Iterable[Finding]) -> Group:
    """The whole picture, for a terminal or a pipe."""
    findings = list(findings)
    health = health_of(findings)
    trouble = [finding for finding in findings if finding.level != "ok"]
    lost = " · ".join(f"{name} {count:,}" for name, count in counters(facts).items() if count)
    head = (health, f"bold {STYLE_OF[health]}")
    parts: list[Any] = [
        Text.assemble(head, f"  {facts.place}  ", (_servers(facts.servers), "dim")),
        *([_workers(facts)] if facts.workers else []),
        _shards(facts),
    ]
    if lost:
        parts.append(Text(lost, "yellow"))
    return Group(*parts, *(line(finding) for finding in trouble))


def line(finding: Finding) -> Text:
    """One finding: level, what was looked at, what was found, the mend."""
    hint = f": {finding.hint}" if finding.hint else ""
    return Text.assemble(
        (f"{finding.level:<5}", STYLES[finding.level]), f"{finding.check:<12} {finding.what}{hint}"
    )


def console() -> Console:
    """stdout, wide enough for the tables."""
    found = Console(highlight=False, soft_wrap=True)
    found.width = max(found.width, WIDTH_MIN)
    return found


def _servers(servers: Sequence[Server]) -> str:
    if not servers:
        return ""
    used, limit = sum(each.used_bytes for each in servers), sum(each.limit_bytes for each in servers)
    memory = f"{used / 1e6:,.0f} MB" + (f" of {limit / 1e6:,.0f}" if limit else "")
    aof = "appendonly" if all(each.aof for each in servers) else "no appendonly"
    masters = f"{len(servers)} masters, " if len(servers) > 1 else ""
    return f"{masters}{servers[0].version}, {memory}, {aof}"


def _workers(facts: Facts) -> Table:
    table = _table(("worker", False), ("beat", True), ("ticks/s", True), ("ticks", True), ("has", False))
    for worker in sorted(facts.workers, key=lambda each: (each.role != "ingest", each.role, each.id)):
        if worker.age_ms is None:
            table.add_row(worker.id, "gone", "", "", "", style="dim")
            continue
        table.add_row(
            worker.id,
            f"{worker.age_ms / 1000:.1f} s",
            f"{worker.number('ticks_per_second'):,.0f}",
            f"{worker.number('ticks_total'):,.0f}",
            _has(worker),
        )
    return table


def _has(worker: Worker) -> str:
    if worker.role == "ingest":
        feeds = worker.numbers("feeds")
        return (
            f"{worker.number('instruments'):,.0f} instruments in feeds {_list(feeds)}, "
            f"{worker.number('connected'):.0f} of {len(feeds)} connected"
        )
    if worker.role == "aggregate":
        return f"{worker.number('instruments'):,.0f} instruments in shards {_list(worker.numbers('shards'))}"
    return ""


def _shards(facts: Facts) -> Table:
    table = _table(
        ("shard", True), ("aggregator", False), ("waiting", True), ("lag ms", True), ("stream", True)
    )
    for shard in facts.shards:
        table.add_row(
            str(shard.number),
            shard.owner or "–",
            f"{shard.lag_entries:,}",
            f"{shard.lag_ms:,.0f}",
            f"{shard.entries:,}",
        )
    return table


def _table(*columns: tuple[str, bool]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, is_number in columns:
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    return table


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers)) or "none"
