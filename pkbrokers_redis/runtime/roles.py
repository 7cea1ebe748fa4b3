"""Run one role of the pipeline in the foreground: settings, logging, signals, exit code.

`workers/<role>.py` and `pkb <role>` both call `run_role`. The roles themselves are functions of
`(settings, stop)` in the packages that do the work: `aggregate/worker.py`, `ingest/worker.py`, ….
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.errors import (
    InputFileError,
    MetaMismatch,
    PkbError,
    RedisUnsuitable,
    SettingsError,
    UnknownInterval,
    UnknownSymbol,
    WrongKeyType,
)
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.runtime.cluster_state import EVERY_MS, Heartbeat, call_one_master, read_servers
from pkbrokers_redis.runtime.supervisor import EXIT_TRY_AGAIN, EXIT_USER_ERROR, SUPERVISED, stop_on_signals
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect, describe, explain
from pkbrokers_redis.store.leases import announce, leave
from pkbrokers_redis.store.meta import ensure_meta, keep_meta

log = logs.get("roles")

Role = Callable[[Settings, threading.Event], None]

USER_ERRORS = (
    SettingsError, UnknownSymbol, UnknownInterval, InputFileError, MetaMismatch, RedisUnsuitable
)  # fmt: skip
"""What another start of the same process would meet again."""

SWITCH_SECONDS = 0.001  # a reader thread waits at most this long for the writer's bytecode
REQUEST_SECONDS = 600  # how long a restart request stays; a worker that hangs for longer is restarted anyway


class RestartRequested(PkbError):
    """Raised when an operator requested a restart of this worker's role (the bot's `/restart`)."""


def now_ms() -> float:
    """Return the wall clock in epoch milliseconds."""
    return time.time() * 1000


def worker_id(role: str) -> str:
    """Return an id for this process: `aggregate-host-9f3c20-1234`.

    It is unique although host and pid repeat in containers.
    """
    return f"{role}-{socket.gethostname()}-{secrets.token_hex(3)}-{os.getpid()}"


def open_store(settings: Settings) -> redis.Redis:
    """Connect, and write or check `P:meta`. Raises PkbError."""
    client = connect(settings)
    ensure_meta(client, settings, datetime.now(UTC).isoformat(timespec="seconds"))
    evicting = {each.eviction for each in read_servers(client)} - {"noeviction", ""}
    if evicting:
        log.warning(
            "redis_may_evict", policy=",".join(sorted(evicting)),
            reason="it deletes keys when memory is short",
            hint="CONFIG SET maxmemory-policy noeviction, and set it in redis.conf",
        )  # fmt: skip
    return client


def keep_store(client: redis.Redis, settings: Settings) -> None:
    """Let a running worker check `P:meta`, with each heartbeat. Raises MetaMismatch; an outage passes."""
    with suppress(redis.RedisError, WrongKeyType):
        keep_meta(client, settings, datetime.now(UTC).isoformat(timespec="seconds"))


def follow_calendar(sessions: Sessions) -> bool:
    """Let a running role follow PKB_CALENDAR; return whether other hours may apply.

    A malformed file is logged once a change; the hours stay as they were.
    """
    try:
        is_other = sessions.refresh()
    except SettingsError as error:
        log.error("calendar_refused", reason=error.message, hint="correct it; the hours stay as they were")
        return False
    if is_other:
        log.info("calendar_reloaded", reason="PKB_CALENDAR has changed")
    return is_other


def run_role(role: Role, arguments: Sequence[str] = ()) -> int:
    """Run a role until SIGTERM or SIGINT; print an error as one line; return the exit code.

    0: stopped by a signal. 1: a restart was requested. 2: an error. Under `pkb up` an error that may pass
    (Redis is unavailable) is 1 too: the supervisor restarts such a worker, and stops everything after a 2.
    """
    if arguments:
        usage = "a worker takes no arguments: set it up by PKB_… variables, which `pkb config` lists"
        print(f"pkb: {usage}", file=sys.stderr)  # noqa: T201  for a person
        return 0 if arguments[0] in ("-h", "--help") else EXIT_USER_ERROR
    sys.setswitchinterval(SWITCH_SECONDS)
    stop = threading.Event()
    with stop_on_signals(stop):
        try:
            settings = load_settings()
            logs.configure(settings)
            role(settings, stop)
        except (PkbError, redis.RedisError) as raised:
            error = raised if isinstance(raised, PkbError) else explain(raised, describe(settings))
            print(f"pkb: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201  for a person
            may_pass = SUPERVISED in os.environ and not isinstance(error, USER_ERRORS)
            return EXIT_TRY_AGAIN if may_pass or isinstance(error, RestartRequested) else EXIT_USER_ERROR
    return 0


async def keep_heartbeat(
    client: redis.Redis, keys: Keys, role: str, name: str, figures: Callable[[], Mapping[str, Any]]
) -> None:
    """Announce an asyncio role and write its heartbeat until cancelled, then delete both."""
    heart = Heartbeat(keys, role, name, now_ms())

    def beat() -> None:
        with suppress(redis.ResponseError):  # no worker has loaded the functions yet; the heartbeat suffices
            announce(client, keys, role, name, may_load=False)
        heart.beat(client, now_ms(), 0, figures())

    def end() -> None:
        leave(client, keys, role, name)
        heart.end(client)

    try:
        while True:
            with suppress(PkbError, redis.RedisError):
                await asyncio.to_thread(beat)
            await asyncio.sleep(EVERY_MS / 1000)
    finally:
        with suppress(PkbError, redis.RedisError):
            await asyncio.to_thread(end)


def redis_time_ms(client: redis.Redis) -> float:
    """Return Redis's clock in epoch milliseconds: the clocks of hosts need not agree."""
    seconds, micros = call_one_master(client, "time")
    return float(seconds * 1000 + micros / 1000)


def request_restart(client: redis.Redis, keys: Keys, role: str) -> None:
    """Request that all running workers of a role stop cleanly with exit code 1; supervisors restart them."""
    client.set(keys.restart(role), int(redis_time_ms(client)), ex=REQUEST_SECONDS)


class RestartWatch:
    """Notices a restart request that is newer than this worker; `check` goes with each heartbeat."""

    def __init__(self, client: redis.Redis, keys: Keys, role: str) -> None:
        self._client, self._key, self._role = client, keys.restart(role), role
        self._started_ms = redis_time_ms(client)
        self._requested = False

    def check(self, stop: threading.Event) -> None:
        """Set `stop` if a restart was requested since this worker started."""
        try:
            value: Any = self._client.get(self._key)
        except redis.RedisError:
            return
        if isinstance(value, bytes) and value.isdigit() and float(value) > self._started_ms:
            self._requested = True
            stop.set()

    def raise_if_requested(self) -> None:
        """Raise RestartRequested if `check` found a request."""
        if self._requested:
            raise RestartRequested(
                f"an operator requested a restart of {self._role}: this process exits with code "
                f"{EXIT_TRY_AGAIN}",
                "its supervisor (`pkb up`, systemd, compose) starts it again",
            )
