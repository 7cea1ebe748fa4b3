"""Fixtures of the job tests: a Kite with a stopped clock, a context on it, an aggregator in a thread."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.clock import Clock
from pkbrokers_redis.jobs.context import JobContext
from pkbrokers_redis.jobs.github import Target, target_of
from pkbrokers_redis.kite.history import KiteTickerHistory
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.rate_limit import Limiter
from pkbrokers_redis.store.symbols import save_instruments
from tests.jobs.remotes import Repository, snapshot, sync_settings
from tests.support import wait_until

NOW = datetime(2026, 8, 5, 11, 0, 30, tzinfo=IST)  # a Wednesday, 105 minutes into the session
NOW_S = int(NOW.timestamp())
OPENED_S = int(NOW.replace(hour=9, minute=15, second=0).timestamp())
KNOWN_S = NOW_S // 60 * 60  # minutes before it are over
ROWS = universe(12)
TOKENS = [int(row["instrument_token"]) for row in ROWS]


class MovableClock(Clock):
    """Market time that stands still until a test moves it."""

    __slots__ = ()
    now_s: list[float] = [float(NOW_S)]  # noqa: RUF012  shared by all copies, as time is

    def __call__(self) -> float:
        return self.now_s[0] * 1000

    def move(self, seconds: float) -> None:
        self.now_s[0] += seconds


@pytest.fixture
def clock() -> MovableClock:
    MovableClock.now_s[0] = float(NOW_S)
    return MovableClock()


@pytest.fixture
def kite(clock: MovableClock) -> Iterator[SimulatedKite]:
    with SimulatedKite(ROWS, clock=clock, sessions=load_sessions("market")) as kite:
        yield kite


@pytest.fixture
def kite_settings(settings: Settings, kite: SimulatedKite, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings that point at both servers, in the environment too, for jobs that open all themselves."""
    tokens = ",".join(str(row["instrument_token"]) for row in ROWS)
    assert settings.redis_url is not None
    env = {
        **kite.environment(),
        "PKB_REDIS_URL": settings.redis_url.get_secret_value(),
        "PKB_DATA_DIR": str(settings.data_dir),
        "PKB_INSTRUMENTS": tokens,
        "PKB_TIME_SHIFT": f"{NOW_S},{time.time()},0.01",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return load_settings()


@pytest.fixture
def context(kite_settings: Settings, client: redis.Redis, clock: MovableClock) -> JobContext:
    """A context that asks Kite without waiting for its turn."""
    ensure_meta(client, kite_settings, "2026-08-05T05:00:00+00:00")
    save_instruments(client, kite_settings.keys, ROWS)
    limiter = Limiter(client, kite_settings.keys, per_second=10_000)
    history = KiteTickerHistory(settings=kite_settings, client=client, limiter=limiter, now_ms=clock)
    return JobContext(kite_settings, client, history, load_sessions("market"), clock)


@pytest.fixture
def aggregator(context: JobContext, clock: MovableClock) -> Iterator[Callable[[], None]]:
    """Call it to start one; it ends with the test."""
    stop = threading.Event()
    worker = Aggregator(lambda: connect(context.settings), context.settings, now_ms=clock)
    thread = threading.Thread(target=worker.run, args=(stop,))

    def start() -> None:
        thread.start()
        wait_until(
            lambda: len(worker.workers) == context.settings.shards, timeout_seconds=60, what="the shards"
        )

    yield start
    stop.set()
    if thread.ident is not None:
        thread.join()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """The sync's remote."""
    return Repository(tmp_path / "remote" / "kite.git")


@pytest.fixture
def target(repository: Repository, tmp_path: Path) -> Target:
    return target_of(sync_settings(repository, tmp_path / "data"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Our files."""
    snapshot(tmp_path / "data" / "files", "ticks.json", b"{}")
    snapshot(tmp_path / "data" / "files", "daily_candles.pkl", pickle.dumps({"INFY": [1.5]}))
    return tmp_path / "data" / "files"


def fill(client: redis.Redis, settings: Settings, opened_s: int) -> None:
    """A morning's candles and a few days."""
    keys = settings.keys
    client.hset(keys.cursor(0), "id", "1-0")
    for number, token in enumerate(TOKENS):
        for i in range(5):
            price = 100 + number + i / 4
            row = [opened_s + 60 * i, price, price + 1, price - 1, price, 10 + i, None, 3]
            client.rpush(keys.candles(token, "1m"), json.dumps(row, separators=(",", ":")))
            row[0] = opened_s - (5 - i) * 86_400
            client.rpush(keys.candles(token, "day"), json.dumps(row, separators=(",", ":")))
        client.hset(
            keys.quote(token), mapping={"symbol": f"X{number}", "last_price": str(price), "volume": "60"}
        )
