"""The aggregator through restarts and outages; closing by the clock, late ticks, trimmed streams."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from pkbrokers_redis.aggregate import worker as aggregate_module
from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from tests.aggregate.stores import (
    EVENT,
    INFY,
    RELIANCE,
    START_S,
    Store,
    make_store,
    minute,
    some_frames,
    store,
    tick,
)
from tests.support import running_server, wait_until

__all__ = ["make_store", "store"]  # fixtures


# -- restarts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dirty_max", [1, 2, 500])
def test_an_aggregator_that_dies_after_any_commit_leaves_what_an_undisturbed_one_would(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, dirty_max: int
) -> None:
    """Small commits end in the middle of what was read; the next owner goes on from there."""
    whole, torn = make_store(prefix="whole", shards=2), make_store(prefix="torn", shards=2)
    monkeypatch.setattr(aggregate_module, "DIRTY_MAX", dirty_max)
    monkeypatch.setattr(aggregate_module, "ENTRIES_MAX", 7)
    for frame in some_frames():
        for each in (whole, torn):
            each.send(*frame)
    whole.drain()
    lives = 0
    while lag_entries(torn.client, torn.keys):
        torn.aggregator().step(block_ms_max=1)
        lives += 1
    torn.drain()
    assert lives > 10
    assert torn.all_rows() == whole.all_rows()
    assert sorted(torn.closed()) == sorted(whole.closed())
    assert len(set(whole.closed())) == len(whole.closed()) and {rev for *_, rev in whole.closed()} == {0}


def test_a_commit_whose_reply_was_lost_is_not_made_twice(store: Store) -> None:
    for frame in some_frames(120):
        store.send(*frame)
    aggregator = store.drain()
    before = store.all_rows(), store.closed()
    # What it holds is a step behind what Redis has, as if the answer to its last commit had never come.
    worker = aggregator.workers[store.keys.shard_of(INFY)]
    store.send(tick(200, 50, 9_000))
    twin = store.aggregator()
    store.drain(twin)
    after = store.all_rows(), store.closed()
    assert after != before
    store.drain(aggregator)
    assert (store.all_rows(), store.closed()) == after
    assert aggregator.counts["fenced"] + aggregator.counts["stale"] >= 1
    assert aggregator.workers.get(worker.shard) is not worker


def test_of_two_owners_the_older_can_commit_nothing(store: Store) -> None:
    store.send(tick(-10, 100, 1_000))
    older = store.drain()
    newer = store.aggregator()
    store.send(tick(5, 101, 1_010))
    older.step(block_ms_max=1)
    assert older.counts["fenced"] == 1
    assert store.rows() == [] and store.lag() == 1
    store.drain(newer)
    assert newer.counts["fenced"] == 0
    assert store.rows() == [minute(0, 101, 101, 101, 101, volume=10, ticks=1)]


def test_a_flushed_store_starts_again(store: Store) -> None:
    store.send(tick(-10, 100, 1_000))
    store.send(tick(5, 101, 1_010))
    aggregator = store.drain()
    store.client.flushall()
    store.seqs.clear()
    store.send(tick(125, 100, 2_000))
    store.send(tick(130, 102, 2_010))
    wait_until(lambda: aggregator.step(block_ms_max=1) >= 0 and store.rows(), what="a row after the flush")
    assert [row[:6] for row in store.rows()] == [[START_S + 120, 102, 102, 102, 102, 10]]
    assert aggregator.counts["stale"] + aggregator.counts["fenced"] >= 1


def run_in_thread(aggregator: Aggregator) -> tuple[threading.Event, threading.Thread, list[BaseException]]:
    stop, failures = threading.Event(), []  # type: ignore[var-annotated]

    def run() -> None:
        try:
            aggregator.run(stop)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return stop, thread, failures


@contextlib.contextmanager
def running(aggregator: Aggregator) -> Iterator[None]:
    stop, thread, failures = run_in_thread(aggregator)
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive() and not failures, failures


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_a_redis_that_is_killed_and_comes_back_costs_nothing(
    make_store: Callable[..., Store], make_settings: Callable[..., Settings], tmp_path: Path, server_kind: str
) -> None:
    whole = make_store()
    frames = some_frames()
    for frame in frames:
        whole.send(*frame)
    whole.drain()
    port = free_port()
    options = ("--port", str(port), "--appendonly", "yes", "--appendfsync", "everysec")
    settings = make_settings(**{**EVENT, "redis_url": f"redis://127.0.0.1:{port}/0", "lease_seconds": 0.5})
    with redis.Redis(port=port) as client:
        torn = Store(client, settings)
        aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: time.time() * 1000)
        with contextlib.ExitStack() as first_life:
            first_life.enter_context(running_server(tmp_path / "aof", *options, kind=server_kind))
            with running(aggregator):
                for frame in frames[:100]:
                    torn.send(*frame)
                wait_until(lambda: aggregator.counts["entries"] > 30, what="some commits")
                first_life.close()  # kill -9
                with running_server(tmp_path / "aof", *options, kind=server_kind):
                    for frame in frames[100:]:
                        torn.send(*frame)
                    wait_until(
                        lambda: torn.all_rows() == whole.all_rows(), what="the rows of an undisturbed run"
                    )
                    assert sorted(torn.closed()) == sorted(whole.closed())


@pytest.mark.parametrize("trouble", ["full", "functions"])
def test_an_aggregator_waits_for_a_redis_that_refuses_writes(store: Store, trouble: str) -> None:
    """Out of memory; its Functions gone: neither ends the worker, neither costs a tick."""
    store.send(tick(-10, 100, 1_000))
    store.drain().close()
    aggregator = Aggregator(
        lambda: connect(store.settings), store.settings, now_ms=lambda: time.time() * 1000
    )
    with running(aggregator):
        wait_until(lambda: len(aggregator.workers) == store.keys.shards, what="the shards")
        store.send(tick(5, 101, 1_010))
        wait_until(store.rows, what="a first row")
        if trouble == "full":
            store.client.config_set("maxmemory", "1")
            try:
                store.client.config_set("maxmemory", "0")
                store.send(tick(6, 102, 1_020))
                store.client.config_set("maxmemory", "1")
                wait_until(lambda: not aggregator.workers or store.lag() == 0, what="it to notice")
            finally:
                store.client.config_set("maxmemory", "0")
        else:
            store.client.function_flush("SYNC")
            store.send(tick(6, 102, 1_020))
        expected = [minute(0, 101, 102, 101, 102, volume=20, ticks=2)]
        wait_until(lambda: store.rows() == expected, what="the second tick")


# -- clocks ------------------------------------------------------------------------------------------


@pytest.fixture
def wall(make_store: Callable[..., Store]) -> Store:
    return make_store(clock="wall", intervals_text="1m,5m")


def test_a_candle_nobody_trades_in_any_more_closes_at_its_end_and_grace(wall: Store) -> None:
    wall.clock.set(4 * 60 + 1)
    wall.send(tick(-10, 100, 1_000))
    wall.send(tick(4 * 60 + 5, 101, 1_010))
    aggregator = wall.drain()
    wall.clock.set(5 * 60 + 1.999)
    aggregator.step(block_ms_max=1)
    assert wall.closed() == []
    wall.clock.set(5 * 60 + 2)
    aggregator.step(block_ms_max=1)
    assert sorted(wall.closed()) == [(INFY, "1m", START_S + 240, 0), (INFY, "5m", START_S, 0)]
    assert wall.client.hgetall(wall.keys.current(INFY)) == {}
    assert [row[0] for row in wall.rows()] == [START_S + 240]


def test_a_candle_that_was_open_when_its_aggregator_died_is_closed_by_the_next(wall: Store) -> None:
    wall.send(tick(-10, 100, 1_000))
    wall.send(tick(5, 101, 1_010))
    wall.drain()
    wall.clock.set(3600)
    wall.drain()
    assert sorted(wall.closed()) == [(INFY, "1m", START_S, 0), (INFY, "5m", START_S, 0)]


@pytest.mark.parametrize("restart", [False, True])
def test_a_backlog_is_not_closed_early_by_the_wall_clock(
    wall: Store, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    """An hour late, read in pieces: what waits in the stream belongs into its candle before that is final."""
    monkeypatch.setattr(aggregate_module, "ENTRIES_MAX", 10)
    other = INFY + (wall.keys.shards << 8)
    wall.send(tick(-10, 100, 1_000), tick(-10, 100, 1_000, other))
    for second in range(55):
        wall.send(tick(second, 100 + second, 1_001 + second))
    for second in range(55):  # the same minute of another one, behind it in the stream
        wall.send(tick(second, 100 + second, 1_001 + second, other))
    wall.clock.set(3600)
    aggregator = wall.aggregator()
    while wall.lag():
        assert wall.closed() == []
        if restart:
            aggregator = wall.aggregator()
        aggregator.step(block_ms_max=1)
    wall.drain(aggregator)
    assert sorted(wall.closed(interval="1m")) == [(INFY, "1m", START_S, 0), (other, "1m", START_S, 0)]
    assert wall.rows(other) == [minute(0, 100, 154, 100, 154, volume=55, ticks=55)]


def test_a_tick_from_the_future_is_put_at_its_receipt_and_closes_nothing(
    wall: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    wall.clock.set(10)
    wall.send(tick(-10, 100, 1_000), tick(-10, 100, 1_000, RELIANCE))
    wall.send(tick(5, 101, 1_010, RELIANCE))
    at_ms = (START_S + 6) * 1000
    wall.send(tick(86_400 * 365, 102, 1_020), at_ms=at_ms)
    aggregator = wall.drain()
    assert aggregator.figures()["future_clamped"] == 1
    logged = [line for line in capsys.readouterr().err.splitlines() if "future_clamped_tick" in line]
    assert len(logged) == 1 and "408065" in logged[0]
    assert wall.closed() == []
    assert wall.rows() == [minute(0, 102, 102, 102, 102, volume=20, ticks=1)]


def test_a_straggler_within_the_grace_amends_in_silence_and_a_late_one_is_announced(store: Store) -> None:
    store.send(tick(-10, 100, 1_000))
    store.send(tick(5, 101, 1_010))
    store.send(tick(61, 102, 1_030))
    store.send(tick(59, 103, 1_020))  # within the grace
    aggregator = store.drain()
    assert store.closed() == []
    store.send(tick(63, 102, 1_031))
    store.drain(aggregator)
    assert store.closed(interval="1m") == [(INFY, "1m", START_S, 0)]
    store.send(tick(58, 90, 1_015))  # too late: it is final, and is corrected
    store.drain(aggregator)
    assert store.closed(interval="1m") == [(INFY, "1m", START_S, 0), (INFY, "1m", START_S, 1)]
    assert store.rows()[0] == minute(0, 101, 103, 90, 103, volume=20, ticks=3)


def test_ticks_late_beyond_the_window_amend_their_rows_with_a_raised_rev_that_survives_a_restart(
    store: Store,
) -> None:
    for n in range(8):
        store.send(tick(60 * n + 5, 100, 1_000 + 10 * n))
    store.drain()
    first = store.rows()
    for life, price in enumerate((110, 120, 130), 1):
        store.send(tick(60 * 2 + 5 + life / 10, price, 1_020))
        store.drain()  # a new aggregator each time
        assert store.closed(interval="1m")[-1] == (INFY, "1m", START_S + 120, life)
        row = next(row for row in store.rows() if row[0] == START_S + 120)
        assert row[2] == price and row[7] == 1 + life
    assert [row[0] for row in store.rows()] == [row[0] for row in first]
    assert sum(row[5] for row in store.rows()) == sum(row[5] for row in first)


def test_the_volume_that_a_late_tick_adds_is_taken_from_the_next_open_candle(store: Store) -> None:
    for n in range(8):
        store.send(tick(60 * n + 5, 100, 1_000 + 10 * n))
    aggregator = store.drain()
    for life, n in enumerate((5, 4, 3, 5)):
        store.send(tick(60 * n + 30 + life, 101, 1_000 + 10 * n + 4 + life))
        aggregator = store.drain(aggregator if life % 2 else None)  # by the same, and by its successor
    volumes = {(row[0] - START_S) // 60: row[5] for row in store.rows()}
    assert volumes == {1: 10, 2: 10, 3: 16, 4: 9, 5: 12, 6: 3, 7: 10}


def test_a_minute_that_was_empty_gets_its_row_in_its_place(store: Store) -> None:
    for n in (0, 1, 4, 5, 6, 7):
        store.send(tick(60 * n + 5, 100, 1_000 + 10 * n))
    aggregator = store.drain()
    store.send(tick(60 * 2 + 5, 95, 1_020))
    store.drain(aggregator)
    starts = [row[0] - START_S for row in store.rows()]
    assert starts == sorted(set(starts)) and 120 in starts
    assert sum(row[5] for row in store.rows()) == 70
    store.send(tick(60 * 2 + 15, 94, 1_021))
    store.drain(aggregator)
    announced = [rev for _, _, start, rev in store.closed(interval="1m") if start == START_S + 120]
    assert announced == [0, 1]  # its first tick is its first announcement


def test_a_tick_older_than_the_first_row_opens_its_candle_while_the_list_has_room(store: Store) -> None:
    store.send(tick(5, 100, 1_000))
    for n in range(3, 8):
        store.send(tick(60 * n + 5, 100, 1_000 + 10 * n))
    aggregator = store.drain()
    store.send(tick(60 + 5, 95, 1_010), tick(20, 90, 1_005))
    store.drain(aggregator)
    assert store.rows()[:2] == [
        [*minute(0, 90, 90, 90, 90, volume=5, ticks=1), "partial"],
        minute(1, 95, 95, 95, 95, volume=5, ticks=1),
    ]
    assert sum(row[5] for row in store.rows()) == 70


# -- streams -----------------------------------------------------------------------------------------


def test_applied_entries_are_trimmed_and_waiting_ones_are_not(make_store: Callable[..., Store]) -> None:
    store = make_store(shards=1, stream_retention_seconds=0.001)
    for n in range(1_000):
        store.send(tick(n / 10, 100, 1_000 + n))
    store.clock.ms = time.time() * 1000 + 60_000
    aggregator = store.drain()
    store.clock.ms += 10_000
    aggregator.step(block_ms_max=1)
    assert store.client.xlen(store.keys.ticks(0)) <= 100  # one node
    for n in range(1_000):
        store.send(tick(100 + n / 10, 100, 2_000 + n))
    store.clock.ms += 10_000
    aggregator.close()  # nobody applies
    assert store.lag() == 1_000
    assert store.client.xlen(store.keys.ticks(0)) >= 1_000


def test_a_stream_cut_by_the_hard_cap_shows_no_lag_once_it_is_read(make_store: Callable[..., Store]) -> None:
    store = make_store(shards=1)
    store.send(tick(-10, 100, 1_000))
    aggregator = store.drain()
    for n in range(1_000):
        store.send(tick(n / 10, 100, 1_001 + n))
    store.client.xtrim(store.keys.ticks(0), maxlen=100, approximate=False)
    store.drain(aggregator)
    assert store.lag() == 0 and lag_entries(store.client, store.keys) == 0
    store.send(tick(200, 100, 5_000))
    assert store.lag() == 1
    store.drain(aggregator)
    assert store.lag() == 0
    assert sum(row[5] for row in store.rows()) == 4_000  # cumulative volumes bridge the hole
