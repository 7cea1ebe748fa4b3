"""A role as a process: its exit code, its one line for a person, and a restart on request."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from pkbrokers_redis.runtime.roles import (
    RestartRequested,
    RestartWatch,
    redis_time_ms,
    request_restart,
    run_role,
)
from pkbrokers_redis.runtime.supervisor import SUPERVISED, RoleSpec, Supervisor, worker_argv
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from tests.support import running_python, settings_env, wait_until
from tests.topologies import free_ports, running_node

UNAVAILABLE = {"PKB_REDIS_URL": "redis://:geheim@127.0.0.1:1/0"}
MISTAKEN = {"PKB_SHARDS": "none"}


@pytest.mark.parametrize("role", ["ingest", "aggregate"])
@pytest.mark.parametrize(
    ("env", "supervised", "code"),
    [(UNAVAILABLE, False, 2), (UNAVAILABLE, True, 1), (MISTAKEN, False, 2), (MISTAKEN, True, 2)],
    ids=["unavailable", "unavailable, supervised", "mistaken", "mistaken, supervised"],
)
def test_a_worker_exits_with_2_and_one_line_but_with_1_where_its_supervisor_may_try_again(
    role: str, env: dict[str, str], supervised: bool, code: int
) -> None:
    env = {**env, "PKB_KITE_WS_URL": "ws://127.0.0.1:1", **({SUPERVISED: "1"} if supervised else {})}
    with running_python("-m", f"workers.{role}", env=env) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert out.startswith("pkb: ") and out.count("\n") == 1
    assert "geheim" not in out


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--shards=4", 2)])
def test_a_worker_refuses_arguments_and_names_the_settings(
    capsys: pytest.CaptureFixture[str], argument: str, code: int
) -> None:
    def role(settings: Settings, stop: threading.Event) -> None:
        raise AssertionError("it runs")

    assert run_role(role, [argument]) == code
    message = capsys.readouterr().err
    assert "takes no arguments" in message and message.count("\n") == 1


def test_a_supervised_worker_is_restarted_until_redis_is_available(tmp_path: Path) -> None:
    [port] = free_ports(1)
    env = {**os.environ, "PKB_REDIS_URL": f"redis://127.0.0.1:{port}/0", "PKB_DATA_DIR": str(tmp_path)}
    supervisor = Supervisor(
        [RoleSpec("aggregate", worker_argv("aggregate"))],
        env=env,
        output=io.BytesIO(),
        restart_seconds=(0.01, 0.1),
    )
    supervisor.start()
    try:
        wait_until(lambda: supervisor.statuses()[0].restarts >= 2, timeout_seconds=60)
        assert supervisor.failure is None
        with running_node(tmp_path / "redis", port), redis.Redis(port=port) as client:
            # Functions are loaded by an aggregator that has begun to work.
            wait_until(lambda: client.function_list("pkbrokers"), timeout_seconds=60)
            supervisor.stop()
    finally:
        supervisor.kill()
        supervisor.stop()


# --- restart on request


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_a_restart_request_concerns_older_workers_of_its_role_only(
    client: redis.Redis, settings: Settings
) -> None:
    older = RestartWatch(client, settings.keys, "ingest")
    other_role = RestartWatch(client, settings.keys, "aggregate")
    started_ms = redis_time_ms(client)
    wait_until(lambda: redis_time_ms(client) > started_ms + 1)
    request_restart(client, settings.keys, "ingest")
    requested_ms = redis_time_ms(client)
    wait_until(lambda: redis_time_ms(client) > requested_ms + 1)
    newer = RestartWatch(client, settings.keys, "ingest")
    for watch in (other_role, newer):
        watch.check(stop := threading.Event())
        watch.raise_if_requested()
        assert not stop.is_set()
    older.check(stop := threading.Event())
    assert stop.is_set()
    with pytest.raises(RestartRequested, match="exits with code 1"):
        older.raise_if_requested()


@pytest.fixture
def ingest_env(settings: Settings) -> Iterator[dict[str, str]]:
    """The environment of an ingest worker with a market to read."""
    market = SimulatorServer(Market(universe(3), int(time.time() * 1000)))
    market.start()
    tokens = ",".join(str(row["instrument_token"]) for row in universe(3))
    yield {**settings_env(settings), "PKB_KITE_WS_URL": market.url, "PKB_INSTRUMENTS": tokens}
    market.stop()


def ingest_workers(client: redis.Redis, settings: Settings) -> list[bytes]:
    """The heartbeat keys of the running ingest workers."""
    return list(client.scan_iter(settings.keys.worker("ingest-*")))


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_a_worker_without_a_supervisor_says_that_it_exits_and_exits_with_1(
    client: redis.Redis, settings: Settings, ingest_env: dict[str, str]
) -> None:
    with running_python("-m", "workers.ingest", env=ingest_env) as process:
        wait_until(lambda: ingest_workers(client, settings), timeout_seconds=60)
        request_restart(client, settings.keys, "ingest")
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "requested a restart of ingest" in out and "its supervisor" in out
    assert not ingest_workers(client, settings), "it left in good order"


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_the_supervisor_restarts_a_worker_on_request(
    client: redis.Redis, settings: Settings, ingest_env: dict[str, str]
) -> None:
    supervisor = Supervisor(
        [RoleSpec("ingest", worker_argv("ingest"))],
        env={**os.environ, **ingest_env},
        output=io.BytesIO(),
        restart_seconds=(0.01, 30.0),
    )
    supervisor.start()
    try:
        [before] = wait_until(lambda: ingest_workers(client, settings), timeout_seconds=60)
        request_restart(client, settings.keys, "ingest")
        wait_until(lambda: ingest_workers(client, settings) not in ([], [before]), timeout_seconds=60)
        [status] = supervisor.statuses()
        assert (status.restarts, status.exit_code) == (1, 1)
    finally:
        supervisor.stop()


# --- warm-up: what the ticks need is compiled before they come

# In a process of its own: the kernels of this one are long compiled.
FIRST_MINUTES = """
import gc, sys
import numpy as np
from pkbrokers_redis.candles.open_candles import close_candles
from pkbrokers_redis.candles.rules import apply_ticks
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.candles.model import DEFAULT_INTERVALS
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.runtime.warmup import freeze_heap, warm_up

def compiled():
    modules = [m for name, m in sys.modules.items() if name.startswith("pkbrokers_redis.candles.")]
    kernels = {f for module in modules for f in vars(module).values() if hasattr(f, "signatures")}
    return {f"{f.py_func.__name__} {s}" for f in kernels for s in f.signatures}

sessions = load_sessions("always")
warm_up(DEFAULT_INTERVALS)
before = compiled()
book = ShardState(DEFAULT_INTERVALS, sessions)
for minute in range(5):
    ticks = np.full((20, 10), np.nan)
    ticks[:, 0] = 256 * np.arange(1, 21)
    ticks[:, 1], ticks[:, 3], ticks[:, 5], ticks[:, 6] = 100 + minute, 10 * minute, 99, 110
    ticks[:, 8] = ticks[:, 9] = at_ms = 1_784_691_900_000.0 + 60_000 * minute
    taken = apply_ticks(book, ticks, 0, np.array([20]), 500)
    close_candles(book, at_ms + 59_000, book.dirty + 32)
    changes = book.collect()
freeze_heap()
print(taken, len(changes.ops) > 20, len(before) > 3, compiled() - before, gc.get_freeze_count() > 50_000)
"""


def test_the_first_minutes_compile_nothing_and_what_is_loaded_is_frozen() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_MINUTES], capture_output=True, text=True)
    assert done.stdout.strip() == "20 True True set() True", done.stdout + done.stderr
