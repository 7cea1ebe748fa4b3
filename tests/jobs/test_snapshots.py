"""Snapshots and back: what the files hold, and that a store filled from them is the same again."""

from __future__ import annotations

import datetime as dt
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import polars as pl
import pytest
import redis

from pkbrokers_redis.consumers.database import LocalCandleDatabase
from pkbrokers_redis.consumers.files import parquet
from pkbrokers_redis.consumers.files.atomic import exclusively, sha256_of
from pkbrokers_redis.consumers.files.manifest import problems, read_manifest
from pkbrokers_redis.consumers.files.pickles import read_frames
from pkbrokers_redis.consumers.store import CandleStore
from pkbrokers_redis.core.errors import InputFileError, PkbError
from pkbrokers_redis.jobs import snapshots
from pkbrokers_redis.jobs.restore import restore, verify
from pkbrokers_redis.jobs.snapshots import Run, open_run, snapshot
from pkbrokers_redis.pipeline.aggregate import Aggregator
from pkbrokers_redis.pipeline.replay import lag_entries
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.commit import load_functions
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.lease import lease_shards
from pkbrokers_redis.store.meta import ensure_meta
from tests.consumers.contract import INFY, NIFTY, OPEN_S, RELIANCE, push, row, write_master
from tests.support import run_pkb, settings_env

DAY_S = 86_400
AFTER_CLOSE_S = OPEN_S + 7 * 3600


@pytest.fixture(params=["valkey"])
def server_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def at_close(make_settings: Callable[..., Settings]) -> Settings:
    """Settings at 16:15 on Monday, 2026-01-05."""
    return make_settings(time_shift=f"{AFTER_CLOSE_S},{dt.datetime.now(dt.UTC).timestamp()},1")


@pytest.fixture
def run(client: redis.Redis, at_close: Settings) -> Iterator[Run]:
    """A store with a few days and minutes of three instruments, and a run on it."""
    keys = at_close.keys
    ensure_meta(client, at_close, "2026-01-05T09:00:00+05:30")
    write_master(client, keys)
    for token, price in ((INFY, 1500.05), (RELIANCE, 1400.5)):
        minutes = [row(OPEN_S + 60 * i, price + i / 4, 10 + i, oi=5, ticks=i + 1) for i in range(30)]
        minutes[3] = row(OPEN_S + 180, price, 13, "gap", ticks=4)
        push(client, keys, token, "1m", [row(OPEN_S - 3 * DAY_S + 22_440, price), *minutes])
        push(client, keys, token, "day", [row(OPEN_S - DAY_S * n, price - n, 1000) for n in (4, 3)])
        client.hset(keys.current(token), "day", row(OPEN_S, price + 1, 5000, ticks=77))
    push(client, keys, NIFTY, "1m", [row(OPEN_S, 25_000.5, 0, oi=None)])
    client.hset(keys.cursor(1), mapping={"id": "1767600000000-7", "epoch": 1})
    with CandleStore(at_close, client) as store, open_run(at_close, store) as opened:
        yield opened


def rows_of(client: redis.Redis) -> dict[bytes, list[bytes]]:
    """Every candle list there is."""
    return {key: client.lrange(key, 0, -1) for key in client.scan_iter("pkb:*:candles:*", 1000)}  # type: ignore[misc]


def test_ticks_json_is_in_the_manifest(run: Run) -> None:
    told = snapshot("ticks", run=run)
    assert told["files"] == {"ticks.json": 2} and told["instruments"] == 2
    entry = read_manifest(run.folder)["ticks.json"]
    assert entry.sha256 == sha256_of(run.folder / "ticks.json") and entry.kind == "ticks"
    assert entry.made_at.startswith("2026-01-05T16:15") and entry.position == {"1": "1767600000000-7"}
    assert json.loads((run.folder / "ticks.json").read_text())[str(INFY)]["ohlcv"]["close"] == 1501.05


@pytest.mark.parametrize("shape", ["published", "split"])
def test_pickles_have_upstreams_names_and_shapes(run: Run, shape: Any) -> None:
    snapshot("pickle", shape, run=run)
    names = [
        "daily_candles.pkl",
        "intraday_1m_candles.pkl",
        "intraday_stock_data_05012026.pkl",
        "stock_data_05012026.pkl",
    ]
    assert sorted(read_manifest(run.folder)) == names and problems(run.folder) == []
    daily = read_frames(run.folder / "stock_data_05012026.pkl").frames
    assert daily["INFY"]["close"].to_list() == [1496.05, 1497.05, 1501.05]  # the day so far is the last
    minutes = read_frames(run.folder / "intraday_1m_candles.pkl").frames
    assert len(minutes["INFY"]) == 31 and list(minutes) == ["NIFTY 50", "INFY", "RELIANCE"]
    assert (run.folder / names[0]).read_bytes() == (run.folder / names[3]).read_bytes()
    value = pickle.loads((run.folder / names[3]).read_bytes())["INFY"]
    assert list(value) == (
        ["Open", "High", "Low", "Close", "Volume"] if shape == "published" else ["data", "columns", "index"]
    )


def test_days_that_the_store_does_not_have_come_from_the_candle_file(run: Run) -> None:
    with LocalCandleDatabase(run.folder, run.settings) as database:
        for day in ("2025-12-30", "2025-12-31", "2026-01-01", "2026-01-05"):
            database.update_daily_candle("INFY", day, 7, 7, 7, 7, 7)
    snapshot("pickle", run=run)
    closes = read_frames(run.folder / "daily_candles.pkl").frames["INFY"]["close"].to_list()
    assert closes == [7, 7, 1496.05, 1497.05, 1501.05]


def test_sqlite_is_updated_and_copied(run: Run) -> None:
    told = snapshot("sqlite", run=run)
    assert told["files"] == {"stock_data.db": 6 + 63} and problems(run.folder) == []
    (run.folder / "elsewhere").mkdir()
    (run.folder / "stock_data.db").rename(run.folder / "elsewhere" / "candles.db")
    with LocalCandleDatabase(run.folder / "elsewhere", run.settings) as database:
        assert database.get_daily_candles("INFY")["INFY"]["close"].to_list() == [1496.05, 1497.05, 1501.05]
        assert len(database.get_intraday_candles("RELIANCE")["RELIANCE"]) == 31


def test_parquet_is_what_polars_and_duckdb_read(run: Run) -> None:
    told = snapshot("parquet", run=run)
    assert told["files"]["parquet/interval=1m/date=2026-01-05/candles.parquet"] == 61
    assert len(told["files"]) == 4 and problems(run.folder) == []
    pattern = str(run.folder / "parquet" / "*" / "*" / "*.parquet")
    frame = pl.read_parquet(pattern, hive_partitioning=True)
    assert frame.height == 63 + 4 and set(frame["interval"].unique()) == {"1m", "day"}
    assert frame.filter(pl.col("flag") == "gap").height == 2
    assert frame["start"].dtype == pl.Datetime("us", "Asia/Kolkata")
    (count, close, when) = duckdb.sql(
        f"SELECT count(*), max(close), max(date) FROM read_parquet('{pattern}', hive_partitioning = true) "  # noqa: S608
        "WHERE symbol = 'NSE:INFY' AND interval = '1m'"
    ).fetchall()[0]
    assert (count, close, str(when)) == (31, 1507.3, "2026-01-05")


def test_a_later_run_writes_only_the_newest_days_and_keeps_what_the_store_dropped(
    client: redis.Redis, run: Run
) -> None:
    snapshot("parquet", run=run)
    before = read_manifest(run.folder)
    key = run.store.keys.candles(INFY, "1m")
    client.ltrim(key, -5, -1)
    client.lset(key, 0, row(OPEN_S + 25 * 60, 9999.5))
    client.delete(run.store.keys.candles(RELIANCE, "1m"))
    push(client, run.store.keys, INFY, "1m", [row(OPEN_S + 30 * 60, 1.5)])
    told = snapshot("parquet", intervals=["1m"], run=run)
    today = "parquet/interval=1m/date=2026-01-05/candles.parquet"
    assert told["files"] == {today: 62}
    frame = pl.read_parquet(run.folder / today).filter(pl.col("symbol") == "NSE:INFY")
    assert frame.height == 31 and frame["close"][25] == 9999.5 and frame["close"][30] == 1.5
    assert frame["close"][24] == 1500.05 + 6 and frame["start"].is_sorted()
    after = read_manifest(run.folder)
    friday = "parquet/interval=1m/date=2026-01-02/candles.parquet"
    assert after[friday] == before[friday] and after[today].sha256 != before[today].sha256
    assert problems(run.folder) == []


def test_slices_of_instruments_give_the_same_files(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot("parquet", run=run)
    whole = pl.read_parquet(str(run.folder / "parquet" / "*" / "*" / "*.parquet"))
    monkeypatch.setattr(snapshots, "ROWS_A_SLICE", 1)
    for _ in range(2):  # anew, then over the old ones
        snapshot("parquet", full=True, run=run)
        again = pl.read_parquet(str(run.folder / "parquet" / "*" / "*" / "*.parquet"))
        assert again.sort("token", "start").equals(whole.sort("token", "start"))


def test_a_damaged_partition_is_one_line_and_stays(run: Run) -> None:
    snapshot("parquet", run=run)
    path = parquet.partition_path(run.folder, "1m", dt.date(2026, 1, 5))
    path.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(InputFileError, match="no Parquet file of candles"):
        snapshot("parquet", run=run)
    assert path.read_bytes() == b"PAR1 nonsense PAR1"


def test_one_of_a_kind_at_a_time(run: Run) -> None:
    with exclusively(run.folder / ".snapshot-ticks.lock"):
        told: list[BaseException] = []

        def other() -> None:
            try:
                snapshot("ticks", run=run)
            except PkbError as error:
                told.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another run" in str(told[0])
    assert snapshot("ticks", run=run)["files"] == {"ticks.json": 2}


def test_an_unknown_kind_is_one_line(run: Run) -> None:
    with pytest.raises(PkbError, match="unknown snapshot"):
        snapshot("excel", run=run)


def test_an_empty_store_has_empty_snapshots(client: redis.Redis, at_close: Settings) -> None:
    ensure_meta(client, at_close, "2026-01-05T09:00:00+05:30")
    with CandleStore(at_close, client) as store, open_run(at_close, store) as empty:
        for kind in snapshots.KINDS:
            snapshot(kind, run=empty)
        assert problems(empty.folder) == [] and read_frames(empty.folder / "daily_candles.pkl").frames == {}


# Back again


def test_a_fresh_store_gets_the_same_rows(client: redis.Redis, run: Run) -> None:
    intervals = list(run.store.intervals)
    for name in intervals[1:-1]:
        rows = [row(OPEN_S, 1500.5), row(OPEN_S + 3600, 1501, flag="partial")]
        push(client, run.store.keys, INFY, name, rows)
    snapshot("parquet", intervals=intervals, run=run)
    before = rows_of(client)
    assert verify(run=run) == []
    client.flushall()
    told = restore(run=run)
    assert sum(told.rows.values()) == sum(len(rows) for rows in before.values()) and told.left_alone == 0
    after = rows_of(client)
    assert {key: [json.loads(text) for text in rows] for key, rows in after.items()} == {
        key: [json.loads(text) for text in rows] for key, rows in before.items()
    }
    assert verify(run=run) == []
    assert run.store.resolve("RELIANCE") == (RELIANCE, "NSE:RELIANCE")
    assert all(client.get(run.store.keys.lease(shard)) is None for shard in range(run.store.keys.shards))


def test_an_aggregator_goes_on_behind_what_was_restored(client: redis.Redis, run: Run) -> None:
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


def test_longer_intervals_are_made_from_the_minutes(client: redis.Redis, run: Run) -> None:
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


def test_rows_that_are_there_are_left_alone(client: redis.Redis, run: Run) -> None:
    snapshot("parquet", run=run)
    key = run.store.keys.candles(INFY, "1m")
    client.delete(key, run.store.keys.candles(RELIANCE, "1m"))
    push(client, run.store.keys, INFY, "1m", [row(OPEN_S, 1.5)])
    told = restore(run=run)
    assert client.llen(key) == 1 and told.rows["1m"] == 31 and told.left_alone > 0
    assert any("NSE:INFY 1m" in line for line in verify(run=run))


def test_while_an_aggregator_is_at_work_nothing_is_written(client: redis.Redis, run: Run) -> None:
    snapshot("parquet", run=run)
    client.flushall()
    load_functions(client)
    lease_shards(client, run.store.keys, [3], "aggregator-1", 60_000)
    with pytest.raises(PkbError, match="aggregators are at work"):
        restore(run=run)
    assert rows_of(client) == {} and client.get(run.store.keys.lease(0)) is None


def test_a_damaged_snapshot_is_not_restored(client: redis.Redis, run: Run) -> None:
    with pytest.raises(InputFileError, match="no Parquet snapshot"):
        restore(run=run)
    snapshot("parquet", run=run)
    path = parquet.partition_path(run.folder, "1m", dt.date(2026, 1, 5))
    path.write_bytes(path.read_bytes()[:-1])
    client.flushall()
    with pytest.raises(InputFileError, match="damaged"):
        restore(run=run)
    assert rows_of(client) == {}


def test_differences_are_named(client: redis.Redis, run: Run) -> None:
    snapshot("parquet", run=run)
    client.lset(run.store.keys.candles(INFY, "1m"), 5, row(OPEN_S + 240, 1.5))
    client.rpop(run.store.keys.candles(RELIANCE, "day"))
    assert verify(run=run) == ["NSE:INFY 1m: rows differ", "NSE:RELIANCE day: 1 rows, the snapshot has 2"]


def test_the_command_writes_restores_and_checks(client: redis.Redis, run: Run) -> None:
    env = settings_env(run.settings)
    done = run_pkb("snapshot", "parquet", "--json", env=env)
    assert done.returncode == 0 and json.loads(done.stdout)["instruments"] == 3, done.stderr
    client.flushall()
    done = run_pkb("snapshot", "restore", env=env)
    assert done.returncode == 0 and "63 rows" in done.stdout, done.stderr
    client.delete(run.store.keys.candles(INFY, "1m"))
    done = run_pkb("snapshot", "check", env=env)
    assert done.returncode == 1 and "NSE:INFY 1m: 0 rows, the snapshot has 31" in done.stdout
    done = run_pkb("snapshot", "excel", env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
