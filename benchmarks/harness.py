"""What the benchmarks share: a private store, the workers as processes, ticks, this machine's state."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import redis

from pkbrokers_redis.candles.model import TickArray
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect

INSTRUMENTS = 2_000
MINUTE_MS = 60_000


@dataclass(frozen=True)
class Row:
    """One line of the table: what, the figure with its unit, and the ratio to the reference of this run."""

    name: str
    figure: str
    reference: str = ""
    ratio: str = ""
    goal: str = ""
    met: bool | None = None


@contextlib.contextmanager
def private_store(**overrides: Any) -> Iterator[tuple[Settings, redis.Redis]]:
    """An embedded server of its own, append-only file on, gone afterwards."""
    with TemporaryDirectory(prefix="pkb-bench-") as folder:
        for name in [each for each in os.environ if each.startswith("PKB_")]:
            del os.environ[name]
        settings = load_settings(data_dir=Path(folder), sessions="always", **overrides)
        client = connect(settings)
        try:
            yield settings, client
        finally:
            server = psutil.Process(client.info("server")["process_id"])
            client.shutdown()
            client.close()
            psutil.wait_procs([server], timeout=20)  # it writes to its folder until then


def worker_env(settings: Settings, **more: str) -> dict[str, str]:
    """The environment that makes a worker process use these settings."""
    return {
        **os.environ,
        "PKB_DATA_DIR": str(settings.data_dir),
        "PKB_SESSIONS": settings.sessions,
        "PKB_CLOCK": settings.clock,
        "PKB_INTERVALS": settings.intervals_text,
        "PKB_LOG_LEVEL": "warning",
        "PKB_COMPACT": str(int(settings.compact)),
        **more,
    }


@contextlib.contextmanager
def running(role: str, env: dict[str, str]) -> Iterator[psutil.Process]:
    """`python -m workers.<role>` for the length of the block."""
    process = subprocess.Popen([sys.executable, "-m", f"workers.{role}"], env=env)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def tokens(n: int = INSTRUMENTS) -> np.ndarray[Any, np.dtype[np.int64]]:
    """NSE-like tokens that spread over all shards."""
    return (np.arange(n, dtype=np.int64) + 1_000) * 256 + 1


def tick_stream(n: int, instruments: int, start_ms: int, ticks_per_second: float, seed: int = 1) -> TickArray:
    """`n` ticks in order of time, round the instruments in random order: rising volumes, a random walk."""
    rng = np.random.default_rng(seed)
    rounds = -(-n // instruments)
    order = np.concatenate([rng.permutation(instruments) for _ in range(rounds)])[:n]
    turn = np.repeat(np.arange(rounds), instruments)[:n]
    base = 100.0 + np.arange(instruments)[order]
    walk = np.cumsum(rng.integers(-2, 3, (rounds, instruments)), axis=0)[turn, order]
    ticks = np.full((n, 10), np.nan)
    ticks[:, 0] = tokens(instruments)[order]
    ticks[:, 1] = np.maximum(base * 20 + walk, 20) / 20
    ticks[:, 2] = 10
    ticks[:, 3] = 1_000 + turn * 10
    ticks[:, 4] = 0
    ticks[:, 5] = base
    ticks[:, 6] = base + 500
    ticks[:, 7] = 1.0
    ticks[:, 8] = (start_ms + np.arange(n) * 1000.0 / ticks_per_second) // 1000 * 1000
    ticks[:, 9] = start_ms
    return ticks


def committed(client: redis.Redis, settings: Settings) -> tuple[int, int]:
    """`(entries added, lag)` over all tick streams."""
    pipeline = client.pipeline(transaction=False)
    for shard in range(settings.shards):
        pipeline.xinfo_stream(settings.keys.ticks(shard))
        pipeline.xinfo_groups(settings.keys.ticks(shard))
    replies = pipeline.execute(raise_on_error=False)
    added = sum(each["entries-added"] for each in replies[::2] if isinstance(each, dict))
    lag = sum(g["lag"] or 0 for each in replies[1::2] if isinstance(each, list) for g in each)
    return added, lag


def wait_for(what: str, predicate: Any, seconds: float = 120.0, every: float = 0.02) -> float:
    """Poll until true; returns when it was, by the monotonic clock."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if predicate():
            return time.monotonic()
        time.sleep(every)
    raise TimeoutError(f"{what} did not come within {seconds:.0f} s")


def machine() -> str:
    """One line on the machine and its state: a figure without it says little."""
    load = os.getloadavg()[0]
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return (
        f"{os.cpu_count()} cores ({name}), load {load:.1f}, Python {platform.python_version()}, "
        f"{psutil.virtual_memory().available / 2**30:.0f} GiB free"
    )
