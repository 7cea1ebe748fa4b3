"""The roles as processes: settings in, a loop until the stop event, everything of one kind alike.

`workers/<role>.py` and `pkb <role>` both end here.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.core.errors import PkbError, SettingsError
from pkbrokers_redis.pipeline.heartbeat import Heartbeat
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect, describe, explain
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.symbols import resolve_many

SWITCH_SECONDS = 0.001  # a reader thread waits at most this long for the writer's bytecode


def now_ms() -> float:
    """The wall clock, epoch milliseconds."""
    return time.time() * 1000


def worker_id(role: str) -> str:
    """Unique for a process's life: `aggregate-host-1234`."""
    return f"{role}-{socket.gethostname()}-{os.getpid()}"


def main(role: Callable[[Settings, threading.Event], None]) -> int:
    """Run a role in the foreground until SIGTERM or SIGINT. Returns the exit code; errors are one line."""
    stop = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stop.set())
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        settings = load_settings()
        logs.configure(settings)
        role(settings, stop)
    except (PkbError, redis.RedisError) as error:
        told = error if isinstance(error, PkbError) else explain(error, describe(settings))
        print(f"pkb: {' '.join(str(told).split())}", file=sys.stderr)  # noqa: T201  what a person reads
        return 2
    return 0


def open_store(settings: Settings) -> redis.Redis:
    """Connect, and write or check `P:meta`."""
    client = connect(settings)
    ensure_meta(client, settings, datetime.now(UTC).isoformat(timespec="seconds"))
    return client


def aggregate(settings: Settings, stop: threading.Event) -> None:
    """Run the aggregator of all shards until `stop` is set."""
    from pkbrokers_redis.pipeline.aggregate import Aggregator

    log = logs.get("aggregate")
    client = open_store(settings)
    aggregator = Aggregator(lambda: connect(settings), settings, now_ms=now_ms)
    heart = Heartbeat(settings.keys, "aggregate", worker_id("aggregate"), now_ms())

    def beat(_ticks: int) -> None:
        if heart.due(at := now_ms()):
            heart.beat(client, at, aggregator.ticks_total, aggregator.figures())

    log.info("started", store=describe(settings), shards=settings.shards, clock=settings.clock)
    try:
        aggregator.run(stop, beat)
    finally:
        heart.end(client)
    log.info("stopped", **aggregator.counts)


def ingest(settings: Settings, stop: threading.Event) -> None:
    """Stream PKB_INSTRUMENTS from Kite into Redis until `stop` is set."""
    from pkbrokers_redis.kite.urls import address_of, url_for
    from pkbrokers_redis.pipeline.ingest import Ingest, figures_of

    log = logs.get("ingest")
    address = address_of(url_for(settings))  # a missing session is a user's error, said at once
    client = open_store(settings)
    instruments = resolve_many(client, settings.keys, settings.instruments)
    if not instruments:
        raise SettingsError(
            "there is nothing to stream", "set PKB_INSTRUMENTS, e.g. NSE:INFY,NSE:TCS, or a file of tokens"
        )
    worker = Ingest(lambda: connect(settings), settings, instruments, now_ms=now_ms)
    heart = Heartbeat(settings.keys, "ingest", worker_id("ingest"), now_ms())

    def beat() -> None:
        if heart.due(at := now_ms()):
            heart.beat(client, at, worker.writer.counts["ticks"], figures_of(worker))

    log.info("started", store=describe(settings), kite=address, instruments=len(instruments))
    try:
        worker.run(stop, beat)
    finally:
        heart.end(client)
    log.info("stopped", **figures_of(worker))


ROLES: dict[str, Callable[[Settings, threading.Event], Any]] = {"ingest": ingest, "aggregate": aggregate}
