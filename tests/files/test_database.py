"""The candle file: upstream's methods on one SQLite file, and the remote database it may share."""

from __future__ import annotations

import datetime as dt
import pickle
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import redis

from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import CandleFileError
from pkbrokers_redis.files.candle_file import MIGRATIONS, NAME
from pkbrokers_redis.files.pickles import read_frames
from pkbrokers_redis.files.sqlite import LocalCandleDatabase
from pkbrokers_redis.settings import Settings
from tests.client.contract import INFY, NIFTY, OPEN_S, push, row, write_master

CANDLE = (100.0, 102.0, 99.0, 101.0, 1000)
AT_1000 = f"{OPEN_S + 45 * 60},{{now}},1"  # market time 10:00 on 2026-01-05


@pytest.fixture(params=["valkey"])
def server_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[LocalCandleDatabase]:
    with LocalCandleDatabase(tmp_path) as opened:
        yield opened


def test_days_are_read_with_kolkata_midnights(database: LocalCandleDatabase) -> None:
    assert database.update_daily_candle("INFY", "2026-11-20", *CANDLE)
    assert database.update_daily_candle("INFY", "2026-11-19", *CANDLE)
    frame = database.get_daily_candles("INFY")["INFY"]
    assert frame.index.to_list() == [pd.Timestamp(f"2026-11-{day}", tz="Asia/Kolkata") for day in (19, 20)]
    assert frame.index.name == "date" and frame.columns.to_list() == [
        "open",
        "high",
        "low",
        "close",
        "volume",
    ]
    assert frame.iloc[0].to_list() == list(CANDLE) and frame["volume"].dtype == "int64"


def test_a_second_write_replaces_the_row(database: LocalCandleDatabase) -> None:
    database.update_daily_candle("INFY", "2026-11-20", *CANDLE)
    database.update_daily_candle("INFY", "2026-11-20", 100, 103, 99, 103, 2000)
    assert database.get_daily_candles()["INFY"]["close"].to_list() == [103]
    assert database.get_stats()["daily"]["records"] == 1


def test_a_time_in_any_form_is_one_row(database: LocalCandleDatabase) -> None:
    spellings = [
        "2026-11-20T09:15:00+05:30", "2026-11-20 09:15:00", "2026-11-20T03:45:00Z",
        dt.datetime(2026, 11, 20, 9, 15),
        pd.Timestamp("2026-11-20 09:15", tz="Asia/Kolkata"), 1_795_146_300, "2026-11-20T09:15",
    ]  # fmt: skip
    for spelling in spellings:
        assert database.update_intraday_candle("INFY", spelling, "1m", *CANDLE), spelling
    frame = database.get_intraday_candles()["INFY"]
    assert frame.index.to_list() == [pd.Timestamp("2026-11-20 09:15", tz="Asia/Kolkata")]


def test_ranges_include_both_ends_and_whole_days(database: LocalCandleDatabase) -> None:
    for day in (18, 19, 20):
        database.update_daily_candle("INFY", f"2026-11-{day}", *CANDLE)
        for minute in (15, 16):
            database.update_intraday_candle("INFY", f"2026-11-{day}T09:{minute}:00", "1m", *CANDLE)
    assert len(database.get_daily_candles(start_date="2026-11-19", end_date="2026-11-20")["INFY"]) == 2
    assert len(database.get_intraday_candles("INFY", "1m", "2026-11-19", "2026-11-19")["INFY"]) == 2
    assert (
        len(database.get_intraday_candles("INFY", "1m", "2026-11-19T09:16", "2026-11-20T09:15")["INFY"]) == 2
    )
    assert database.get_intraday_candles("INFY", "5m") == {} == database.get_daily_candles("TCS")


def test_intervals_may_have_kites_names(database: LocalCandleDatabase) -> None:
    assert database.update_intraday_candle("INFY", "2026-11-20T09:15:00", "1h", *CANDLE)
    assert len(database.get_intraday_candles("INFY", "60m")["INFY"]) == 1


HOSTILE = ["'; DROP TABLE daily_candles; --", '" OR 1=1 --', "%", "INFY' --", "é₹", "a" * 100, "NSE:M&M-BE"]


def test_hostile_symbols_are_plain_data(database: LocalCandleDatabase) -> None:
    for symbol in HOSTILE:
        assert database.update_daily_candle(symbol, "2026-11-20", *CANDLE)
        assert list(database.get_daily_candles(symbol)) == [symbol]
        assert database.get_intraday_candles(symbol, interval=symbol) == {}
    assert database.get_stats()["daily"]["symbols"] == len(HOSTILE)


@pytest.mark.parametrize("symbol", ["", "a" * 101, "nul\0", "line\nbreak", None, 7, "\ud800"])
def test_an_invalid_symbol_is_refused_and_counted(database: LocalCandleDatabase, symbol: Any) -> None:
    assert not database.update_daily_candle(symbol, "2026-11-20", *CANDLE)
    assert not database.update_intraday_candle(symbol, "2026-11-20T09:15:00", "1m", *CANDLE)
    assert database.rows_refused == 2 and database.get_stats()["daily"]["records"] == 0


@pytest.mark.parametrize(
    "cells",
    [(100, 99, 98, 100, 1), (1, 2, 0.5, float("nan"), 1), (1, 2, 0.5, 1, -1), (None, 2, 1, 1, 1),
     ("x", 2, 1, 1, 1),
     (1, float("inf"), 0.5, 1, 1)],
)  # fmt: skip
def test_an_invalid_candle_is_refused(database: LocalCandleDatabase, cells: Any) -> None:
    assert not database.update_daily_candle("INFY", "2026-11-20", *cells)


@pytest.mark.parametrize(
    "moment", ["", "soon", "2026-13-01", None, "2026-11-20T25:00:00", float("nan"), [], True]
)
def test_an_invalid_time_is_refused(database: LocalCandleDatabase, moment: Any) -> None:
    assert not database.update_daily_candle("INFY", moment, *CANDLE)
    assert not database.update_intraday_candle("INFY", moment, "1m", *CANDLE)


@pytest.mark.parametrize("interval", ["", "day", "soon", "1x", None, "m"])
def test_an_invalid_interval_is_refused(database: LocalCandleDatabase, interval: Any) -> None:
    assert not database.update_intraday_candle("INFY", "2026-11-20T09:15:00", interval, *CANDLE)


def test_one_invalid_row_does_not_affect_the_rest(database: LocalCandleDatabase) -> None:
    rows: list[Any] = [
        ("INFY", "2026-11-20", *CANDLE),
        ("TCS", "never", *CANDLE),
        (),
        ("SBIN", "2026-11-20", *CANDLE),
    ]
    assert database.write_daily(rows) == 2 and database.rows_refused == 2


def test_an_exported_pickle_can_be_read(database: LocalCandleDatabase, tmp_path: Path) -> None:
    for day in range(1, 29):
        for month in range(1, 13):
            database.update_daily_candle("INFY", f"2026-{month:02}-{day:02}", *CANDLE)
    database.update_intraday_candle("INFY", "2026-11-20T09:15:00", "1m", *CANDLE)
    daily, minutes = database.export_to_pickle(tmp_path / "out")
    assert Path(daily).name.startswith("stock_data_") and Path(minutes).name.startswith(
        "intraday_stock_data_"
    )
    assert len(read_frames(Path(daily)).frames["INFY"]) == 251
    pickled = pickle.loads(Path(minutes).read_bytes())["INFY"]
    assert pickled["index"] == ["2026-11-20T09:15:00+05:30"] and pickled["data"] == [list(CANDLE)]


def test_trim_deletes_old_minutes(settings: Settings, tmp_path: Path) -> None:
    with LocalCandleDatabase(tmp_path, settings) as database:
        now = dt.datetime.now(dt.UTC)
        for days in (0, 29, 31):
            database.update_intraday_candle("INFY", now - dt.timedelta(days=days), "1m", *CANDLE)
        assert database.trim(30) == 1 and len(database.get_intraday_candles()["INFY"]) == 2


def test_two_openers_and_threads_share_the_file(tmp_path: Path) -> None:
    with LocalCandleDatabase(tmp_path) as one, LocalCandleDatabase(tmp_path) as other:

        def write(database: LocalCandleDatabase, symbol: str) -> None:
            for day in range(1, 21):
                assert database.update_daily_candle(symbol, f"2026-11-{day:02}", *CANDLE)

        threads = [threading.Thread(target=write, args=(one if i % 2 else other, f"S{i}")) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {name: len(frame) for name, frame in one.get_daily_candles().items()} == {
            f"S{i}": 20 for i in range(4)
        }


def test_a_file_of_the_first_version_is_migrated(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / NAME) as old:
        old.executescript(MIGRATIONS[0])
        old.execute("INSERT INTO daily_candles VALUES ('INFY', '2026-11-20', 1, 2, 0.5, 1.5, 9, 'x')")
        old.execute("PRAGMA user_version = 1")
    with LocalCandleDatabase(tmp_path) as database:
        assert database.get_daily_candles()["INFY"]["close"].to_list() == [1.5]
    with sqlite3.connect(tmp_path / NAME) as now:
        assert now.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
        assert now.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_later_or_damaged_file_is_a_one_line_error(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / NAME) as later:
        later.execute("PRAGMA user_version = 99")
    with pytest.raises(CandleFileError, match="later release"):
        LocalCandleDatabase(tmp_path)
    (tmp_path / NAME).write_bytes(b"no database at all" * 100)
    with pytest.raises(CandleFileError, match="not a database"):
        LocalCandleDatabase(tmp_path)


def test_queries_use_the_key_or_the_time_index(tmp_path: Path) -> None:
    LocalCandleDatabase(tmp_path).close()
    with sqlite3.connect(tmp_path / NAME) as connection:

        def plan(sql: str) -> str:
            return str(connection.execute("EXPLAIN QUERY PLAN " + sql).fetchall())

        assert "PRIMARY KEY" in plan("SELECT * FROM intraday_candles WHERE symbol = 'x' AND timestamp >= 'y'")
        assert "intraday_by_time" in plan(
            "SELECT * FROM intraday_candles WHERE interval = '1m' AND timestamp >= 'y'"
        )


# From the store


def test_days_and_minutes_are_copied_from_redis(
    client: redis.Redis, make_settings: Any, tmp_path: Path
) -> None:
    now = dt.datetime.now(dt.UTC).timestamp()
    settings = make_settings(time_shift=f"{OPEN_S + 2700},{now},1")
    write_master(client, settings.keys)
    push(client, settings.keys, INFY, "1m", [row(OPEN_S + 60 * i, 100 + i) for i in range(40)])
    push(client, settings.keys, INFY, "day", [row(OPEN_S - 86_400 * 3, 99)])
    client.hset(settings.keys.current(INFY), "day", row(OPEN_S, 139, 400))
    push(client, settings.keys, NIFTY, "1m", [row(OPEN_S)])
    with LocalCandleDatabase(tmp_path, settings) as database, CandleStore(settings, client) as store:
        assert database.update_from_ticks(store)
        frame = database.get_daily_candles("INFY")["INFY"]
        assert frame["close"].to_list() == [99, 139] and str(frame.index[1].date()) == "2026-01-05"
        assert len(database.get_intraday_candles("INFY")["INFY"]) == 40
        assert list(database.get_intraday_candles()) == ["INFY", "NIFTY 50"]
        assert database.last_update_ms() is not None

        # Amended and new minutes come with the next update, old ones only with a full one.
        client.lset(settings.keys.candles(INFY, "1m"), 0, row(OPEN_S, 77))
        client.lset(settings.keys.candles(INFY, "1m"), 39, row(OPEN_S + 60 * 39, 88))
        push(client, settings.keys, INFY, "1m", [row(OPEN_S + 2400, 55)])
        assert database.update_from_ticks(store)
        closes = database.get_intraday_candles("INFY")["INFY"]["close"].to_list()
        assert closes[0] == 100 and closes[39:] == [88, 55]
        assert database.update_from_ticks(store, full=True)
        assert database.get_intraday_candles("INFY")["INFY"]["close"].to_list()[0] == 77


def test_an_empty_or_missing_store_returns_false(
    client: redis.Redis, settings: Settings, tmp_path: Path
) -> None:
    with LocalCandleDatabase(tmp_path, settings) as database, CandleStore(settings, client) as store:
        assert not database.update_from_ticks(None) and not database.update_from_ticks(store)


def test_a_store_with_upstreams_methods_is_accepted(database: LocalCandleDatabase) -> None:
    class Upstream:
        def get_all_symbols(self) -> list[str]:
            return ["INFY"]

        def get_current_candle(self, **_: Any) -> dict[str, Any]:
            return {"timestamp": OPEN_S, "open": 1, "high": 2, "low": 0.5, "close": 1.5, "volume": 9}

        def get_candles(self, **_: Any) -> list[dict[str, Any]]:
            return [{"timestamp": OPEN_S + 60, "open": 1, "high": 2, "low": 0.5, "close": 1.5, "volume": 9}]

    assert database.update_from_ticks(Upstream())
    assert database.get_daily_candles()["INFY"]["close"].to_list() == [1.5]
    assert str(database.get_intraday_candles()["INFY"].index[0]) == "2026-01-05 09:16:00+05:30"
