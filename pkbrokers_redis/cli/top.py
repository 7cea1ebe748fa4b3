"""`pkb top`: the pipeline's health, live."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Annotated

import redis
import typer
from rich.console import Group, RenderableType
from rich.live import Live

from pkbrokers_redis.cli.health_view import console, line, view
from pkbrokers_redis.cli.reader import require_store
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.runtime.cluster_state import Facts, gather
from pkbrokers_redis.runtime.health import STATUS, Finding, health_of, judge
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect, describe, explain
from pkbrokers_redis.store.meta import adopt_meta

REFRESH_SECONDS = 1.0


def top(
    seconds: Annotated[float | None, typer.Option(min=0, help="stop by itself after this long")] = None,
) -> None:
    """Watch the pipeline: workers, rates, shards and lag, every second; a line each where no terminal is."""
    settings = load_settings()
    require_store(settings)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    client: redis.Redis | None = connect(settings, for_reading=True)
    deadline = None if seconds is None else time.monotonic() + seconds
    terminal = sys.stdout.isatty()
    screen = Live(console=console(), auto_refresh=False, screen=False) if terminal else None
    if screen:
        screen.start()
    try:
        while True:
            facts: Facts | None = None
            try:
                client = client or connect(settings, for_reading=True)
                facts = gather(
                    client, adopt_meta(client, settings).keys, describe(settings, for_reading=True)
                )
                findings = judge(facts, STATUS)
            except (redis.RedisError, PkbError) as error:
                # Watching goes on while Redis is away: that is when one wants to watch.
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
    finally:
        if screen:
            screen.stop()
        if client is not None:
            client.close()


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
