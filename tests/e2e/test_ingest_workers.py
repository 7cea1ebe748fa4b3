"""Several ingest processes over one instrument list: each feed read by one, moved when its reader dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import redis

from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from tests.support import running_python, settings_env, wait_until

INSTRUMENTS = 7_500  # three feeds


@pytest.fixture
def server_kind() -> str:
    return "valkey"


@pytest.fixture
def kite() -> Iterator[SimulatorServer]:
    server = SimulatorServer(Market(universe(INSTRUMENTS), int(time.time() * 1000), rate=2_000))
    server.start()
    yield server
    server.stop()


def readers_a_token(kite: SimulatorServer) -> set[int]:
    """How many connections each token is subscribed on: {1} when each is on exactly one."""
    counts = sum((client.modes != 0).astype(int) for client in tuple(kite._clients)) + np.zeros(INSTRUMENTS)
    return set(counts.astype(int).tolist())


def owners(client: redis.Redis, settings: Settings) -> list[str]:
    found = [client.get(settings.keys.feed(n)) for n in range(3)]
    return [each.decode() for each in found if isinstance(each, bytes)]


def test_feed_of_a_dead_worker_is_taken_over_and_each_token_read_once(
    client: redis.Redis, settings: Settings, kite: SimulatorServer, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("\n".join(str(row["instrument_token"]) for row in universe(INSTRUMENTS)))
    env = {
        **settings_env(settings),
        "PKB_KITE_WS_URL": kite.url,
        "PKB_INSTRUMENTS": str(tokens),
        "PKB_SESSIONS": "always",
        "PKB_LEASE_SECONDS": "1.5",
    }
    with ExitStack() as stack:
        workers = [stack.enter_context(running_python("-m", "workers.ingest", env=env)) for _ in range(3)]
        pids = {f"-{worker.pid}": worker for worker in workers}

        def spread(number: int) -> bool:
            """Every feed has an owner, `number` workers share them, each token is subscribed once."""
            names = owners(client, settings)
            return len(names) == 3 and len(set(names)) == number and readers_a_token(kite) == {1}

        wait_until(lambda: spread(3), timeout_seconds=60, what="each worker to read one feed")
        assert kite.subscriptions == INSTRUMENTS

        victim = owners(client, settings)[1]
        [dead] = [worker for suffix, worker in pids.items() if victim.endswith(suffix)]
        os.kill(dead.pid, signal.SIGKILL)
        wait_until(lambda: spread(2), timeout_seconds=60, what="the two others to read three feeds")
        assert victim not in owners(client, settings)

        stack.enter_context(running_python("-m", "workers.ingest", env=env))
        wait_until(lambda: spread(3), timeout_seconds=60, what="a new worker to get its share")

        sleeper = next(worker for worker in workers if worker is not dead)
        os.kill(sleeper.pid, signal.SIGSTOP)
        wait_until(
            lambda: (
                not any(name.endswith(f"-{sleeper.pid}") for name in owners(client, settings))
                and len(owners(client, settings)) == 3
            ),
            timeout_seconds=60,
            what="the others to take the sleeper's feed",
        )
        os.kill(sleeper.pid, signal.SIGCONT)
        wait_until(lambda: spread(3), timeout_seconds=60, what="the sleeper to drop what is another's")

        for worker in workers:
            if worker is not dead:
                worker.send_signal(signal.SIGTERM)
        for worker in workers:
            if worker is not dead:
                assert worker.wait(timeout=30) == 0
        wait_until(lambda: spread(1), timeout_seconds=60, what="the last one to read all")
