"""Upstream's websocket client by constructor and methods, against the simulator."""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from pkbrokers_redis import ZerodhaWebSocketClient
from pkbrokers_redis.compat.upstream_types import DepthEntry, Tick
from pkbrokers_redis.compat.websocket import database_row
from pkbrokers_redis.errors import LoginNeeded, PkbError
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from pkbrokers_redis.store.symbols import save_instruments
from tests.support import wait_until


class Database:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.is_closed = False

    def insert_ticks(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows

    def close_all(self) -> None:
        self.is_closed = True


@pytest.fixture
def kite() -> Any:
    market = Market(universe(20), int(time.time() * 1000), rate=200)
    server = SimulatorServer(market)
    server.start()
    yield server
    server.stop()


def started(client: ZerodhaWebSocketClient) -> threading.Thread:
    thread = threading.Thread(target=client.start, daemon=True)
    thread.start()
    return thread


def test_ticks_reach_the_queue_and_the_database_with_their_batch(kite: Any) -> None:
    tokens = kite.market.tokens.tolist()
    ticks: queue.Queue[Tick] = queue.Queue()
    database, stop = Database(), threading.Event()
    client = ZerodhaWebSocketClient(
        enctoken="secret",
        user_id="AB1234",
        api_key="kitefront",
        token_batches=[tokens[:10], tokens[10:]],
        watcher_queue=ticks,
        db_conn=database,
        ws_stop_event=stop,
        settings=load_settings(kite_ws_url=kite.url),
    )
    thread = started(client)
    seen: dict[int, Tick] = {}

    def are_all_there() -> bool:
        while not ticks.empty():
            tick = ticks.get()
            seen[tick.instrument_token] = tick
        return len(seen) == 20

    wait_until(are_all_there, what="a tick of each instrument")
    assert all(seen[token].batch_index == (n >= 10) for n, token in enumerate(tokens))
    assert set(client.get_batch_last_tick_times()) == {0, 1}
    assert client.get_unhealthy_batches(time.time(), 60) == []
    assert client.get_unhealthy_batches(time.time() + 100, 60) == [0, 1]
    stop.set()
    thread.join(timeout=20)
    assert not thread.is_alive() and database.is_closed and client.dropped == 0
    assert {row["instrument_token"] for row in database.rows} == set(tokens)
    assert {"timestamp", "day_volume", "prev_day_close", "batch_index"} <= set(database.rows[0])


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_without_batches_the_configured_instruments_are_used(
    kite: Any, client: redis.Redis, make_settings: Callable[..., Settings]
) -> None:
    rows = universe(20)
    settings = make_settings(kite_ws_url=kite.url, instruments="all")
    save_instruments(client, settings.keys, rows)
    ticks: queue.Queue[Tick] = queue.Queue()
    own = ZerodhaWebSocketClient("e", "u", watcher_queue=ticks, settings=settings)
    thread = started(own)
    assert ticks.get(timeout=20).instrument_token in kite.market.tokens.tolist()
    own.stop()
    thread.join(timeout=20)
    assert sum(map(len, own.token_batches)) == len({row["instrument_token"] for row in rows})


def test_a_full_queue_drops_ticks_and_counts_them(kite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkbrokers_redis.compat.websocket.PUT_SECONDS", 0.001)
    own = ZerodhaWebSocketClient(
        "e",
        "u",
        token_batches=[kite.market.tokens.tolist()],
        watcher_queue=queue.Queue(maxsize=1),
        settings=load_settings(kite_ws_url=kite.url),
    )
    thread = started(own)
    wait_until(lambda: own.dropped > 3, what="ticks to be dropped")
    own.stop()
    thread.join(timeout=20)


def test_an_error_of_the_database_does_not_end_the_connection(kite: Any) -> None:
    class Locked(Database):
        calls = 0

        def insert_ticks(self, rows: list[dict[str, Any]]) -> None:
            self.calls += 1
            if self.calls <= 2:
                raise sqlite3.OperationalError("database is locked")
            super().insert_ticks(rows)

    database = Locked()
    own = ZerodhaWebSocketClient(
        "e",
        "u",
        token_batches=[kite.market.tokens.tolist()],
        db_conn=database,
        settings=load_settings(kite_ws_url=kite.url),
    )
    thread = started(own)
    wait_until(lambda: database.rows, what="rows after the refused ones")
    own.stop()
    thread.join(timeout=20)
    assert own.inserts_failed == 2


def test_too_many_instruments_are_a_one_line_error() -> None:
    batches = [[n << 8 | 1 for n in range(first, first + 500)] for first in range(1, 9_002, 500)]
    settings = load_settings(kite_ws_url="ws://127.0.0.1:1")
    with pytest.raises(PkbError, match=r"9,500 instruments are more than .* \(9,000\): give fewer") as error:
        ZerodhaWebSocketClient("e", "u", token_batches=batches, settings=settings).start()
    assert "\n" not in str(error.value)


def test_a_missing_session_is_a_one_line_error() -> None:
    with pytest.raises(LoginNeeded, match="there is no Kite session"):
        ZerodhaWebSocketClient(token_batches=[[408065]]).start()


def test_a_row_for_the_database_has_upstream_s_shape() -> None:
    level = DepthEntry(10, 99.5, 2)
    row = database_row(Tick(408065, 100.0, exchange_timestamp=1, depth={"bid": [level], "ask": []}))
    assert row["depth"] == {"bid": [{"price": 99.5, "quantity": 10, "orders": 2}], "ask": []}
    assert row["day_volume"] == row["oi"] == 0 and row["timestamp"].isoformat() == "1970-01-01T05:30:01+05:30"
