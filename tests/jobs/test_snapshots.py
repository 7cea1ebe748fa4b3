"""Snapshots: the files' content, their manifest, and the state after a kill."""

from __future__ import annotations

import datetime as dt
import json
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import polars as pl
import pytest
import redis

from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import InputFileError, PkbError
from pkbrokers_redis.files import atomic, parquet
from pkbrokers_redis.files.atomic import FilesUnwritable, exclusively, sha256_of
from pkbrokers_redis.files.manifest import problems, read_manifest
from pkbrokers_redis.files.pickles import read_frames
from pkbrokers_redis.files.sqlite import LocalCandleDatabase
from pkbrokers_redis.jobs import progress, snapshots
from pkbrokers_redis.jobs.progress import read_progress
from pkbrokers_redis.jobs.snapshots import Run, open_run, snapshot
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.meta import ensure_meta
from tests.client.contract import INFY, MASTER, OPEN_S, RELIANCE, push, row
from tests.jobs.stores import DAY_S, at_close, run, server_kind
from tests.support import run_pkb, settings_env

__all__ = ["at_close", "run", "server_kind"]  # fixtures


def test_ticks_json_is_written_with_its_manifest_entry(run: Run) -> None:
    result = snapshot("ticks", run=run)
    assert result["files"] == {"ticks.json": 2} and result["instruments"] == 2
    entry = read_manifest(run.folder)["ticks.json"]
    assert entry.sha256 == sha256_of(run.folder / "ticks.json") and entry.kind == "ticks"
    assert entry.made_at.startswith("2026-01-05T16:15") and entry.position == {"1": "1767600000000-7"}
    assert json.loads((run.folder / "ticks.json").read_text())[str(INFY)]["ohlcv"]["close"] == 1501.05


@pytest.mark.parametrize("shape", ["published", "split"])
def test_pickles_have_the_names_and_shapes_of_upstream(run: Run, shape: Any) -> None:
    snapshot("pickle", shape, run=run)
    names = [
        "daily_candles.pkl",
        "intraday_1m_candles.pkl",
        "intraday_stock_data_05012026.pkl",
        "stock_data_05012026.pkl",
    ]
    assert sorted(read_manifest(run.folder)) == names and problems(run.folder) == []
    daily = read_frames(run.folder / "stock_data_05012026.pkl").frames
    assert daily["INFY"]["close"].to_list() == [1496.05, 1497.05, 1501.05]  # the current day is the last
    minutes = read_frames(run.folder / "intraday_1m_candles.pkl").frames
    assert len(minutes["INFY"]) == 31 and list(minutes) == ["NIFTY 50", "INFY", "RELIANCE"]
    assert (run.folder / names[0]).read_bytes() == (run.folder / names[3]).read_bytes()
    value = pickle.loads((run.folder / names[3]).read_bytes())["INFY"]
    assert list(value) == (
        ["Open", "High", "Low", "Close", "Volume"] if shape == "published" else ["data", "columns", "index"]
    )


def test_pickle_takes_older_days_from_the_candle_file(run: Run) -> None:
    with LocalCandleDatabase(run.folder, run.settings) as database:
        for day in ("2025-12-30", "2025-12-31", "2026-01-01", "2026-01-05"):
            database.update_daily_candle("INFY", day, 7, 7, 7, 7, 7)
    snapshot("pickle", run=run)
    closes = read_frames(run.folder / "daily_candles.pkl").frames["INFY"]["close"].to_list()
    assert closes == [7, 7, 1496.05, 1497.05, 1501.05]


def test_sqlite_snapshot_updates_the_file_and_copies_it(run: Run) -> None:
    result = snapshot("sqlite", run=run)
    assert result["files"] == {"stock_data.db": 6 + 63} and problems(run.folder) == []
    (run.folder / "elsewhere").mkdir()
    (run.folder / "stock_data.db").rename(run.folder / "elsewhere" / "candles.db")
    with LocalCandleDatabase(run.folder / "elsewhere", run.settings) as database:
        assert database.get_daily_candles("INFY")["INFY"]["close"].to_list() == [1496.05, 1497.05, 1501.05]
        assert len(database.get_intraday_candles("RELIANCE")["RELIANCE"]) == 31


def test_polars_and_duckdb_read_the_parquet(run: Run) -> None:
    result = snapshot("parquet", run=run)
    assert result["files"]["parquet/interval=1m/date=2026-01-05/candles.parquet"] == 61
    assert len(result["files"]) == 4 and problems(run.folder) == []
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


def test_incremental_parquet_writes_the_newest_days_and_keeps_rows_that_left_the_store(
    client: redis.Redis, run: Run
) -> None:
    snapshot("parquet", run=run)
    before = read_manifest(run.folder)
    key = run.store.keys.candles(INFY, "1m")
    client.ltrim(key, -5, -1)
    client.lset(key, 0, row(OPEN_S + 25 * 60, 9999.5))
    client.delete(run.store.keys.candles(RELIANCE, "1m"))
    push(client, run.store.keys, INFY, "1m", [row(OPEN_S + 30 * 60, 1.5)])
    result = snapshot("parquet", intervals=["1m"], run=run)
    today = "parquet/interval=1m/date=2026-01-05/candles.parquet"
    assert result["files"] == {today: 62}
    frame = pl.read_parquet(run.folder / today).filter(pl.col("symbol") == "NSE:INFY")
    assert frame.height == 31 and frame["close"][25] == 9999.5 and frame["close"][30] == 1.5
    assert frame["close"][24] == 1500.05 + 6 and frame["start"].is_sorted()
    after = read_manifest(run.folder)
    friday = "parquet/interval=1m/date=2026-01-02/candles.parquet"
    assert after[friday] == before[friday] and after[today].sha256 != before[today].sha256
    assert problems(run.folder) == []


def test_size_of_the_slices_does_not_change_the_files(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot("parquet", run=run)
    full = pl.read_parquet(str(run.folder / "parquet" / "*" / "*" / "*.parquet"))
    monkeypatch.setattr(snapshots, "ROWS_A_SLICE", 1)
    for _ in range(2):  # first without, then with the old files
        snapshot("parquet", full=True, run=run)
        again = pl.read_parquet(str(run.folder / "parquet" / "*" / "*" / "*.parquet"))
        assert again.sort("token", "start").equals(full.sort("token", "start"))


def test_damaged_partition_is_a_one_line_error_and_stays(run: Run) -> None:
    snapshot("parquet", run=run)
    path = parquet.partition_path(run.folder, "1m", dt.date(2026, 1, 5))
    path.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(InputFileError, match="no Parquet file of candles"):
        snapshot("parquet", run=run)
    assert path.read_bytes() == b"PAR1 nonsense PAR1"


def test_second_run_of_a_kind_is_refused_while_the_first_holds_the_lock(run: Run) -> None:
    with exclusively(run.folder / ".snapshot-ticks.lock"):
        errors: list[BaseException] = []

        def other() -> None:
            try:
                snapshot("ticks", run=run)
            except PkbError as error:
                errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another run" in str(errors[0])
    assert snapshot("ticks", run=run)["files"] == {"ticks.json": 2}


def test_unknown_kind_is_a_one_line_error(run: Run) -> None:
    with pytest.raises(PkbError, match="unknown snapshot"):
        snapshot("excel", run=run)


def test_empty_store_writes_no_files(client: redis.Redis, at_close: Settings) -> None:
    ensure_meta(client, at_close, "2026-01-05T09:00:00+05:30")
    with CandleStore(at_close, client) as store, open_run(at_close, store) as empty:
        for kind in snapshots.KINDS:
            assert snapshot(kind, run=empty)["files"] == {}
        assert read_manifest(empty.folder) == {} and not list(empty.folder.glob("*.pkl"))


def test_emptied_store_keeps_the_files_of_yesterday(client: redis.Redis, run: Run) -> None:
    for kind in snapshots.KINDS:
        snapshot(kind, run=run)
    before = read_manifest(run.folder)
    client.flushall()
    ensure_meta(client, run.settings, "2026-01-05T09:00:00+05:30")
    client.hset(run.store.keys.cursor(1), mapping={"id": "1767600000000-9", "epoch": 1})
    for kind in snapshots.KINDS:
        snapshot(kind, run=run)
    after = read_manifest(run.folder)
    assert {name: entry.rows for name, entry in after.items()} == {
        name: entry.rows for name, entry in before.items()
    }
    assert problems(run.folder) == []


def test_pickles_have_the_date_of_their_session(run: Run) -> None:
    result = snapshot("pickle", day="2026-01-02", run=run)
    assert {"stock_data_02012026.pkl", "intraday_stock_data_02012026.pkl"} <= set(result["files"])
    assert "stock_data_05012026.pkl" not in result["files"]


class Killed(BaseException):
    """Not caught by any handler, like kill -9."""


@pytest.mark.parametrize("kind", snapshots.KINDS)
def test_kill_after_any_rename_leaves_files_that_match_the_manifest(
    client: redis.Redis, run: Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = atomic._sync_folder
    snapshot(kind, run=run)
    left = 0

    def deadly(folder: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(folder)

    monkeypatch.setattr(atomic, "_sync_folder", deadly)
    for renames in range(50):
        client.lset(run.store.keys.candles(INFY, "1m"), 5, row(OPEN_S + 240, 1500 + renames))
        client.lset(run.store.keys.candles(INFY, "day"), 0, row(OPEN_S - 4 * DAY_S, 1500 + renames))
        client.hset(run.store.keys.current(INFY), "day", row(OPEN_S, 1500 + renames))
        left = renames
        try:
            snapshot(kind, full=True, run=run)
        except Killed:
            assert problems(run.folder) == []
        else:
            break
    assert renames >= 3 and problems(run.folder) == []
    assert "coming" not in json.loads((run.folder / "manifest.json").read_text())


def test_listener_gets_the_progress_of_all_instruments(run: Run) -> None:
    for kind, passes in (("ticks", 1), ("pickle", 2), ("sqlite", 2), ("parquet", 2)):
        seen: list[tuple[int, int]] = []
        run.listener = lambda done, total, _, seen=seen: seen.append((done, total))  # type: ignore[misc]
        snapshot(kind, run=run)
        assert seen[-1] == (passes * len(MASTER), passes * len(MASTER)) and seen == sorted(seen), kind


def test_job_reports_its_progress_to_redis(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "get_current_job", lambda: SimpleNamespace(id="snapshot-1"))
    with open_run(run.settings, run.store) as job:
        snapshot("pickle", run=job)
    keys = run.store.keys
    assert read_progress(run.store.client, keys, "snapshot-1") == (2 * len(MASTER), 2 * len(MASTER))
    assert 0 < run.store.client.ttl(keys.job("snapshot-1")) <= 60  # type: ignore[operator]


@pytest.mark.parametrize("kind", snapshots.KINDS)
def test_unwritable_folder_is_a_one_line_error(run: Run, kind: str) -> None:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    run.folder.touch()
    with pytest.raises(FilesUnwritable, match=rf"{run.folder} cannot be written .*PKB_FILES_DIR"):
        snapshot(kind, run=run)


def test_commands_write_restore_and_check(client: redis.Redis, run: Run) -> None:
    env = settings_env(run.settings)
    done = run_pkb("snapshot", "parquet", "--json", env=env)
    assert done.returncode == 0 and json.loads(done.stdout)["instruments"] == 3, done.stderr
    client.flushall()
    done = run_pkb("snapshot", "restore", env=env)
    assert done.returncode == 0 and "63 rows" in done.stdout, done.stderr
    client.delete(run.store.keys.candles(INFY, "1m"))
    done = run_pkb("snapshot", "check", env=env)
    assert done.returncode == 1 and "NSE:INFY 1m: 0 rows, the snapshot has 31" in done.stdout
    for wrong, why in (
        (["excel"], "unknown snapshot"),
        (["ticks", "--enqueue", "--folder", "/tmp/x"], "--folder does not go with --enqueue"),
        (["restore", "--enqueue"], "--enqueue does not go with restore"),
    ):
        done = run_pkb("snapshot", *wrong, env=env)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and why in done.stderr
