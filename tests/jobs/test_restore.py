"""And back: a store filled from snapshots is the same again, and says so."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest
import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.clock import Clock
from pkbrokers_redis.errors import InputFileError, PkbError
from pkbrokers_redis.files import parquet
from pkbrokers_redis.jobs.restore import _newest, restore, verify
from pkbrokers_redis.jobs.snapshots import Run, snapshot
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.functions import load_functions
from pkbrokers_redis.store.leases import lease_shards
from pkbrokers_redis.store.meta import ensure_meta
from tests.client.contract import INFY, OPEN_S, RELIANCE, push, row, write_master
from tests.jobs.stores import DAY_S, at_close, rows_of, run, server_kind

__all__ = ["at_close", "run", "server_kind"]  # fixtures


def test_restore_gives_a_fresh_store_the_same_rows(client: redis.Redis, run: Run) -> None:
    intervals = list(run.store.intervals)
    for name in intervals[1:-1]:
        rows = [row(OPEN_S, 1500.5), row(OPEN_S + 3600, 1501, flag="partial")]
        push(client, run.store.keys, INFY, name, rows)
    snapshot("parquet", intervals=intervals, run=run)
    before = rows_of(client)
    assert verify(run=run) == []
    client.flushall()
    result = restore(run=run)
    assert (
        sum(result.rows.values()) == sum(len(rows) for rows in before.values()) and result.lists_skipped == 0
    )
    after = rows_of(client)
    assert {key: [json.loads(text) for text in rows] for key, rows in after.items()} == {
        key: [json.loads(text) for text in rows] for key, rows in before.items()
    }
    assert verify(run=run) == []
    assert run.store.resolve("RELIANCE") == (RELIANCE, "NSE:RELIANCE")
    assert all(client.get(run.store.keys.lease(shard)) is None for shard in range(run.store.keys.shards))


def test_aggregator_continues_after_restored_rows(client: redis.Redis, run: Run) -> None:
    settings, keys = run.settings, run.settings.keys
    before = rows_of(client)
    snapshot("parquet", run=run)
    client.flushall()
    ensure_meta(client, settings, "2026-01-06T09:00:00+05:30")
    write_master(client, keys)
    restore(run=run)
    open_s = OPEN_S + DAY_S  # Tuesday
    aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: (open_s + 600) * 1000)
    aggregator.start()
    try:
        for seq, (second, price, volume) in enumerate([(-5, 1500, 10), (5, 1501, 30), (65, 1502, 45)]):
            at = (open_s + second) * 1000
            ticks = [[INFY, price, 1, volume, 5, 1500, 1502, 1500, at]]
            fields = {"src": "t", "seq": seq, "at": at, "n": 1, "ticks": json.dumps(ticks)}
            client.xadd(keys.ticks(keys.shard_of(INFY)), fields)
        while aggregator.step(block_ms_max=1) or lag_entries(client, keys):
            pass
    finally:
        aggregator.close()
    minutes = keys.candles(INFY, "1m")
    rows = [json.loads(text) for text in client.lrange(minutes, 0, -1)]  # type: ignore[union-attr]
    restored = [json.loads(text) for text in before[minutes.encode()]]
    assert rows[: len(restored)] == restored
    assert [(each[0], each[5]) for each in rows[len(restored) :]] == [(open_s, 20), (open_s + 60, 15)]


def test_restore_computes_longer_intervals_from_minutes(client: redis.Redis, run: Run) -> None:
    snapshot("parquet", run=run)
    client.flushall()
    restore(run=run)
    candles = run.store.get_candles("INFY", "5m")
    assert [candle.start - OPEN_S for candle in candles] == [
        -3 * DAY_S + 22_200,
        0,
        300,
        600,
        900,
        1200,
        1500,
    ]
    first = candles[1]
    assert (first.open, first.close, first.volume, first.ticks, first.flag) == (
        1500.05,
        1501.05,
        60,
        15,
        "gap",
    )
    assert run.store.get_candles("INFY", "60m")[-1].volume == sum(10 + i for i in range(30))


def only_minutes(client: redis.Redis, run: Run, starts: Iterable[int]) -> None:
    """INFY's minutes are these, each of volume 10, and there is nothing else."""
    for key in rows_of(client):
        client.delete(key)
    push(client, run.store.keys, INFY, "1m", [row(start, 1500) for start in starts])


def clock_at(text: str) -> Clock:
    """Monday's market time that stands still."""
    ms = dt.datetime.fromisoformat(f"2026-01-05T{text}+05:30").timestamp() * 1000
    return cast(Clock, lambda: ms)


def restored(
    client: redis.Redis, run: Run, made: str, at: str, interval: str
) -> list[tuple[int, float, str]]:
    """(minutes after the open, volume, flag) of the candles restored `at` one time from a snapshot `made`."""
    run.clock = clock_at(made)
    snapshot("parquet", intervals=["1m"], run=run)
    client.flushall()
    run.clock = clock_at(at)
    restore(run=run)
    found = run.store.get_candles("INFY", interval, count=500)
    return [((each.start - OPEN_S) // 60, each.volume, each.flag) for each in found]


def test_candle_incomplete_at_snapshot_time_is_partial(client: redis.Redis, run: Run) -> None:
    only_minutes(client, run, range(OPEN_S, OPEN_S + 103 * 60, 60))
    assert restored(client, run, "10:58:02", "11:30:00", "60m") == [(0, 600, ""), (60, 430, "partial")]


def test_first_candle_without_its_beginning_is_partial(client: redis.Redis, run: Run) -> None:
    only_minutes(client, run, range(OPEN_S + 120, OPEN_S + 375 * 60, 60))
    found = restored(client, run, "16:15:00", "16:20:00", "4m")
    assert found[0] == (0, 20, "partial") and found[1] == (4, 40, "")


def test_last_candle_ends_with_the_session(client: redis.Redis, run: Run) -> None:
    only_minutes(client, run, range(OPEN_S, OPEN_S + 375 * 60, 60))
    found = restored(client, run, "15:42:00", "15:50:00", "60m")
    assert found[-2:] == [(300, 600, ""), (360, 150, "")]


def test_unfinished_candle_is_left_to_the_aggregator(client: redis.Redis, run: Run) -> None:
    only_minutes(client, run, range(OPEN_S, OPEN_S + 103 * 60, 60))
    assert restored(client, run, "10:58:02", "11:10:00", "60m") == [(0, 600, "")]


def test_instrument_without_recent_trades_is_restored(client: redis.Redis, run: Run) -> None:
    keys, keep = run.store.keys, 390
    only_minutes(client, run, range(OPEN_S - 3 * DAY_S, OPEN_S - 3 * DAY_S + keep * 60, 60))
    push(client, keys, RELIANCE, "1m", [row(OPEN_S - 3 * DAY_S + 60 * i, 1400) for i in range(20)])
    snapshot("parquet", intervals=["1m"], run=run)
    client.delete(keys.candles(INFY, "1m"))
    push(client, keys, INFY, "1m", [row(OPEN_S + 60 * i, 1500) for i in range(keep)])
    snapshot("parquet", intervals=["1m"], run=run)
    client.flushall()
    assert [line for line in verify(run=run) if "RELIANCE" in line]
    assert restore(run=run).rows["1m"] == keep + 20
    assert client.llen(keys.candles(RELIANCE, "1m")) == 20 and verify(run=run) == []


def test_restore_reads_only_tokens_of_partitions_it_does_not_need(
    client: redis.Redis, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot("parquet", run=run)
    read: list[Path] = []
    real = parquet.read_rows
    monkeypatch.setattr(parquet, "read_rows", lambda path: read.append(path) or real(path))  # type: ignore[func-returns-value]
    paths = [parquet.partition_path(run.folder, "1m", dt.date(2026, 1, day)) for day in (5, 2)]
    rows, names = _newest(1, paths)
    assert read == paths[:1] and len(rows) == len(names) == 3


def test_restore_never_changes_existing_rows(client: redis.Redis, run: Run) -> None:
    snapshot("parquet", run=run)
    key = run.store.keys.candles(INFY, "1m")
    client.delete(key, run.store.keys.candles(RELIANCE, "1m"))
    push(client, run.store.keys, INFY, "1m", [row(OPEN_S, 1.5)])
    result = restore(run=run)
    assert client.llen(key) == 1 and result.rows["1m"] == 31 and result.lists_skipped > 0
    assert any("NSE:INFY 1m" in line for line in verify(run=run))


def test_restore_refuses_while_an_aggregator_holds_a_shard(client: redis.Redis, run: Run) -> None:
    snapshot("parquet", run=run)
    client.flushall()
    load_functions(client)
    lease_shards(client, run.store.keys, [3], "aggregator-1", 60_000)
    with pytest.raises(PkbError, match=r"aggregator-1 holds a lease on this store \(it ends in \d+ s unless"):
        restore(run=run)
    assert rows_of(client) == {} and client.get(run.store.keys.lease(0)) is None


def test_damaged_snapshot_is_refused(client: redis.Redis, run: Run) -> None:
    with pytest.raises(InputFileError, match="no Parquet snapshot"):
        restore(run=run)
    snapshot("parquet", run=run)
    path = parquet.partition_path(run.folder, "1m", dt.date(2026, 1, 5))
    path.write_bytes(path.read_bytes()[:-1])
    client.flushall()
    with pytest.raises(InputFileError, match="damaged"):
        restore(run=run)
    assert rows_of(client) == {}


def test_snapshot_check_names_differences(client: redis.Redis, run: Run) -> None:
    snapshot("parquet", run=run)
    client.lset(run.store.keys.candles(INFY, "1m"), 5, row(OPEN_S + 240, 1.5))
    client.rpop(run.store.keys.candles(RELIANCE, "day"))
    assert verify(run=run) == ["NSE:INFY 1m: rows differ", "NSE:RELIANCE day: 1 rows, the snapshot has 2"]
