"""A restart on request: workers of a role that began before the request begin anew, in their process.

P:restart:<role>   string, TTL   when it was asked for, epoch ms by Redis's clock

The roles as processes: settings in, a loop until the stop event, everything of one kind alike.

`workers/<role>.py` and `pkb <role>` both end here.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import (
    InputFileError,
    MetaMismatch,
    PkbError,
    RedisUnsuitable,
    SettingsError,
    UnknownInterval,
    UnknownSymbol,
)
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.runtime.cluster_state import first_server
from pkbrokers_redis.runtime.heartbeat import Heartbeat
from pkbrokers_redis.runtime.supervisor import EXIT_TRY_AGAIN, EXIT_USER_ERROR, SUPERVISED
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect, describe, explain
from pkbrokers_redis.store.meta import ensure_meta

REMEMBERED_SECONDS = 600  # a worker that hangs for longer is started anew anyway


def redis_ms(client: redis.Redis) -> float:
    """Redis's clock: hosts' clocks need not agree."""
    seconds, micros = first_server(client, "time")
    return float(seconds * 1000 + micros / 1000)


def ask_restart(client: redis.Redis, keys: Keys, role: str) -> None:
    """Ask all workers of a role to begin anew."""
    client.set(keys.restart(role), int(redis_ms(client)), ex=REMEMBERED_SECONDS)


def is_asked(client: redis.Redis, keys: Keys, role: str, began_ms: float) -> bool:
    """Whether a worker that began then is meant. False while Redis is away."""
    try:
        found: Any = client.get(keys.restart(role))
    except redis.RedisError:
        return False
    return isinstance(found, bytes) and found.isdigit() and float(found) > began_ms


class RoleStop(threading.Event):
    """A role's stop event that knows why it is set: to end, or to begin anew in the same process.

    An end wins: a signal that comes while a role begins anew is not lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ended = self._again = False

    def end(self) -> None:
        """Stop for good."""
        self._ended = True
        self.set()

    def ask_again(self) -> None:
        """Stop, and begin anew."""
        self._again = True
        self.set()

    def begins_again(self) -> bool:
        """Once the role has returned: whether it is to be called again."""
        again, self._again = self._again and not self._ended, False
        if again:
            self.clear()
            if self._ended:  # between the two lines above
                self.set()
        return again


def heed(client: redis.Redis, keys: Keys, role: str, began_ms: float, stop: threading.Event) -> None:
    """For a role's heartbeat: stop to begin anew where that was asked for since `began_ms`."""
    if isinstance(stop, RoleStop) and is_asked(client, keys, role, began_ms):
        stop.ask_again()


# What no restart will mend.
USERS_MISTAKES = (
    SettingsError, UnknownSymbol, UnknownInterval, InputFileError, MetaMismatch, RedisUnsuitable
)  # fmt: skip

SWITCH_SECONDS = 0.001  # a reader thread waits at most this long for the writer's bytecode


def now_ms() -> float:
    """The wall clock, epoch milliseconds."""
    return time.time() * 1000


def worker_id(role: str) -> str:
    """Unique for a process's life: `aggregate-host-9f3c20-1234`. In containers host and pid may repeat."""
    return f"{role}-{socket.gethostname()}-{secrets.token_hex(3)}-{os.getpid()}"


def main(role: Callable[[Settings, threading.Event], None], arguments: Sequence[str] = ()) -> int:
    """Run a role in the foreground until SIGTERM or SIGINT. Returns the exit code; errors are one line.

    `arguments` are what a person gave a worker, which takes none.

    An error is 2. Under our supervisor 2 is a user's mistake only, and what may heal is 1: Redis away, a
    shard lost to another worker.
    """
    if arguments:
        usage = "a worker takes no arguments: it is set up by PKB_… variables, which `pkb config` lists"
        print(f"pkb: {usage}", file=sys.stderr)  # noqa: T201  what a person reads
        return 0 if arguments[0] in ("-h", "--help") else EXIT_USER_ERROR
    stop = RoleStop()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stop.end())
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        settings = load_settings()
        logs.configure(settings)
        role(settings, stop)
        while stop.begins_again():
            role(settings, stop)
    except (PkbError, redis.RedisError) as error:
        told = error if isinstance(error, PkbError) else explain(error, describe(settings))
        print(f"pkb: {' '.join(str(told).split())}", file=sys.stderr)  # noqa: T201  what a person reads
        may_heal = SUPERVISED in os.environ and not isinstance(told, USERS_MISTAKES)
        return EXIT_TRY_AGAIN if may_heal else EXIT_USER_ERROR
    return 0


def open_store(settings: Settings) -> redis.Redis:
    """Connect, and write or check `P:meta`."""
    client = connect(settings)
    ensure_meta(client, settings, datetime.now(UTC).isoformat(timespec="seconds"))
    return client


def aggregate(settings: Settings, stop: threading.Event) -> None:
    """Run an aggregator until `stop` is set; several share the shards."""
    from pkbrokers_redis.aggregate.worker import Aggregator
    from pkbrokers_redis.runtime.warmup import settle_heap

    log = logs.get("aggregate")
    client = open_store(settings)
    name = worker_id("aggregate")
    silence_seconds_max = max(2 * settings.lease_seconds, 5.0)  # of Redis, before we look for it anew
    aggregator = Aggregator(
        lambda: connect(settings, socket_timeout_seconds=silence_seconds_max),
        settings,
        now_ms=market_clock(settings),
        owner=name,
    )
    heart = Heartbeat(settings.keys, "aggregate", name, now_ms())

    def beat(_ticks: int) -> None:
        if heart.due(at := now_ms()):
            shards = sorted(aggregator.workers)
            heart.beat(client, at, aggregator.ticks_total, aggregator.figures(), shards)
            if aggregator.ticks_total:  # every kernel has run by now
                settle_heap()

    log.info("started", store=describe(settings), shards=settings.shards, clock=settings.clock)
    try:
        aggregator.run(stop, beat)
    finally:
        heart.end(client)
    log.info("stopped", **aggregator.counts)


def ingest(settings: Settings, stop: threading.Event) -> None:
    """Stream PKB_INSTRUMENTS from Kite into Redis until `stop` is set."""
    from pkbrokers_redis.ingest.worker import figures_of, make_ingest
    from pkbrokers_redis.runtime.warmup import settle_heap, warm_up_writer

    log = logs.get("ingest")
    client = open_store(settings)
    name = worker_id("ingest")
    began_ms = redis_ms(client)
    worker = make_ingest(settings, client, name, stop)
    warm_up_writer()
    heart = Heartbeat(settings.keys, "ingest", name, now_ms())

    def beat() -> None:
        if heart.due(at := now_ms()):
            heart.beat(client, at, worker.writer.counts["ticks"], figures_of(worker))
            if worker.writer.counts["ticks"]:
                settle_heap()
            heed(client, settings.keys, "ingest", began_ms, stop)

    log.info(
        "started", store=describe(settings), kite=worker.sessions[0].address, feeds=len(worker.feeds),
        instruments=len(worker.roster.symbols), api_keys=len(worker.sessions),
        repairs=worker.jobs is not None,
    )  # fmt: skip
    try:
        worker.run(stop, beat)
    finally:
        heart.end(client)
    log.info("stopped", **figures_of(worker))
