"""A whole pipeline as processes: the simulator here, `workers.ingest` and `workers.aggregate` as children."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from pkbrokers_redis.store.symbols import save_instruments
from tests.support import running_python, settings_env, wait_until


class Clock:
    """The market's time, which can stand still: then nothing trades any more."""

    def __init__(self) -> None:
        self._stopped: float | None = None

    def __call__(self) -> float:
        return time.time() if self._stopped is None else self._stopped

    def stop(self) -> None:
        self._stopped = time.time()


@dataclass
class Pipeline:
    """`stop` ends it as an operator does: ingest first, then the aggregators, which drain."""

    market: Market
    clock: Clock
    ingest: subprocess.Popen[str]
    aggregators: list[subprocess.Popen[str]]
    tokens: list[int]

    def close_market(self, client: redis.Redis, keys: Keys) -> None:
        """Stop trading, and wait until the aggregators know every instrument's last volume."""
        self.clock.stop()

        def are_known() -> bool:
            wanted = dict(zip(self.market.tokens.tolist(), self.market.volume.tolist(), strict=True))
            known: dict[int, int] = {}
            for shard in range(keys.shards):
                state: Any = client.hgetall(keys.state(shard))
                for name, hot in state.items():
                    if name.isdigit():
                        known[int(name)] = json.loads(hot)[4]
            return all(volume == wanted[token] for token, volume in known.items() if volume is not None)

        wait_until(are_known, timeout_seconds=30, what="the last ticks to be committed")

    def stop(self) -> str:
        """All output of the workers; AssertionError when one did not end well."""
        output = ""
        for worker in (self.ingest, *self.aggregators):
            worker.send_signal(signal.SIGTERM)
            text, _ = worker.communicate(timeout=60)
            assert worker.returncode == 0, text
            output += text
        return output


@contextlib.contextmanager
def running_pipeline(
    settings: Settings,
    client: redis.Redis,
    folder: Path,
    *,
    instruments: int,
    rate: int,
    aggregators: int = 1,
) -> Iterator[Pipeline]:
    """`rate` ticks a second over all instruments, around the clock."""
    rows = universe(instruments)
    save_instruments(client, settings.keys, rows)
    tokens = [int(str(row["instrument_token"])) for row in rows]
    names = folder / "instruments.txt"
    names.write_text("\n".join(map(str, tokens)))
    market, clock = Market(rows, int(time.time() * 1000), rate=rate), Clock()
    kite = SimulatorServer(market, clock=clock)
    kite.start()
    env = {**settings_env(settings), "PKB_KITE_WS_URL": kite.url, "PKB_INSTRUMENTS": str(names)}
    try:
        with contextlib.ExitStack() as stack:
            readers = [
                stack.enter_context(running_python("-m", "workers.aggregate", env=env))
                for _ in range(aggregators)
            ]
            ingest = stack.enter_context(running_python("-m", "workers.ingest", env=env))
            yield Pipeline(market, clock, ingest, readers, tokens)
    finally:
        kite.stop()


def applied(client: redis.Redis, keys: Keys) -> int:
    """Entries that the aggregators have committed, of all shards."""
    return sum(int(client.hget(keys.cursor(shard), "read") or 0) for shard in range(keys.shards))  # type: ignore[arg-type]


def wait_for_entries(client: redis.Redis, keys: Keys, more: int) -> None:
    """Until so many entries more than now are committed; waits out a failover."""
    first: list[int] = []

    def are_there() -> bool:
        try:
            now = applied(client, keys)
        except redis.ConnectionError:
            return False
        first.append(now)
        return now >= first[0] + more

    wait_until(are_there, timeout_seconds=60, what=f"{more} more entries to be committed")


def is_drained(client: redis.Redis, keys: Keys) -> bool:
    """Whether the aggregators have committed all that is in the streams."""
    return lag_entries(client, keys) == 0
