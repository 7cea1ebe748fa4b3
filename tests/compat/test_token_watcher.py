"""`KiteTokenWatcher`: login, instruments, subscription, candles and reconnect, in one process."""

from __future__ import annotations

import contextlib
import json
import pickle
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from pkbrokers_redis import KiteTokenWatcher
from pkbrokers_redis.errors import LoginNeeded, PkbError
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from tests.support import wait_until

ROWS = universe(10)
INFY = 408065


@pytest.fixture
def server_kind() -> str:
    return "valkey"


@pytest.fixture
def kite() -> Iterator[SimulatedKite]:
    with SimulatedKite(ROWS, rate=100) as server:
        yield server


MakeWatcher = Callable[..., KiteTokenWatcher]


@pytest.fixture
def make_watcher(
    make_settings: Callable[..., Settings], kite: SimulatedKite, monkeypatch: pytest.MonkeyPatch
) -> MakeWatcher:
    for name, value in kite.environment().items():
        monkeypatch.setenv(name, value)
    return lambda *arguments, **options: KiteTokenWatcher(
        *arguments, settings=make_settings(lease_seconds=0.5), **options
    )


@contextlib.contextmanager
def watching(watcher: KiteTokenWatcher) -> Iterator[list[BaseException]]:
    """`watch()` in a thread, surely ended; what it raised."""
    failures: list[BaseException] = []

    def watch() -> None:
        try:
            watcher.watch()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield failures
    finally:
        watcher.stop()
        thread.join(60)
        assert not thread.is_alive()


def test_login_to_candles_in_one_process(
    make_watcher: MakeWatcher, kite: SimulatedKite, client: redis.Redis, tmp_path: Path
) -> None:
    watcher = make_watcher(json_output_path=str(tmp_path / "ticks.json"))
    watcher._settings = watcher._settings.model_copy(update={"instruments": "NSE:INFY,indices"})
    with watching(watcher) as failures:
        wait_until(lambda: failures or watcher.get_candles("INFY", interval="1m"), timeout_seconds=60)
        assert not failures, failures
        assert kite.accounts.logins == 1
        assert kite.server.subscriptions == 1 + sum(int(row["instrument_token"]) & 0xFF == 9 for row in ROWS)
        assert watcher.get_day_ohlcv("INFY")["close"] > 0  # type: ignore[index]
        assert list(watcher.get_candles_df("INFY", interval="1m").columns) == [
            "open", "high", "low", "close", "volume"
        ]  # fmt: skip
        assert INFY in watcher.get_all_day_ohlcv()
        assert watcher.get_candle_store_stats()["instruments_with_ticks"] > 0
    assert str(INFY) in json.loads((tmp_path / "ticks.json").read_text())
    watcher.export_candle_store(pickle_path=str(tmp_path / "candles.pkl"))
    assert "INFY" in pickle.loads((tmp_path / "candles.pkl").read_bytes())


def test_tokens_alone_need_no_instrument_master(
    make_watcher: MakeWatcher, kite: SimulatedKite, client: redis.Redis
) -> None:
    watcher = make_watcher([INFY, INFY], aggregate=False)
    assert watcher.token_batches == [[INFY]]
    with watching(watcher) as failures:
        wait_until(lambda: failures or kite.server.subscriptions == 1, timeout_seconds=60)
    assert not failures
    assert kite.server.subscriptions == 0


def test_batches_have_upstream_s_size() -> None:
    watcher = KiteTokenWatcher(range(1, 1_101))
    assert [len(batch) for batch in watcher.token_batches] == [500, 500, 100]


def test_a_missing_session_is_raised_to_the_caller(make_settings: Callable[..., Settings]) -> None:
    with pytest.raises(LoginNeeded, match="pkb login"):
        KiteTokenWatcher([INFY], settings=make_settings(), aggregate=False).watch()


def test_an_unreachable_redis_is_raised_to_the_caller(make_settings: Callable[..., Settings]) -> None:
    with pytest.raises(PkbError, match="cannot be reached"):
        KiteTokenWatcher([INFY], settings=make_settings(redis_url="redis://127.0.0.1:1/0")).watch()


class OwnClient:
    """A source of ticks as upstream's users write them."""

    def __init__(self, ticks: queue.Queue[Any]) -> None:
        self.watcher_queue = ticks
        self.stopped = threading.Event()

    def start(self) -> None:
        self.watcher_queue.put({"instrument_token": INFY, "last_price": 1500.0, "day_volume": 10})
        self.stopped.wait()

    def stop(self) -> None:
        self.stopped.set()


@pytest.mark.parametrize("by", ["stop", "event", "queue"])
def test_a_caller_s_client_feeds_the_streams_and_stops_with_the_watcher(
    settings: Settings, client: redis.Redis, by: str
) -> None:
    own = OwnClient(queue.Queue())
    watcher = KiteTokenWatcher(client=own, settings=settings)
    event: threading.Event = threading.Event()
    stops: queue.Queue[str] = queue.Queue()
    watcher.set_ws_stop_event(event)
    watcher.set_stop_queue(stops)
    stream = settings.keys.ticks(settings.keys.shard_of(INFY))
    with watching(watcher) as failures:
        wait_until(lambda: failures or client.xlen(stream) == 1, timeout_seconds=30)
        if by == "event":
            event.set()
        elif by == "queue":
            stops.put("STOP")
        else:
            watcher.stop()
        wait_until(own.stopped.is_set)
    assert not failures
