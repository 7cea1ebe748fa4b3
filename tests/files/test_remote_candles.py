"""Candles shared through a libSQL database: rows are exchanged, and a failing remote only delays them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pkbrokers_redis.files import turso
from pkbrokers_redis.files.sqlite import LocalCandleDatabase
from pkbrokers_redis.settings import load_settings
from tests.files.fake_libsql import TOKEN, FakeLibsql

CANDLE = (100, 102, 99, 101, 1000)


@pytest.fixture
def remote() -> Iterator[FakeLibsql]:
    with FakeLibsql() as running:
        yield running


class Clock:
    """Machine time by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def shared(folder: Path, remote: FakeLibsql, clock: Clock, token: str = TOKEN) -> LocalCandleDatabase:
    settings = load_settings(turso_url=remote.url, turso_token=token, data_dir=folder)
    return LocalCandleDatabase(settings=settings, clock=clock)


def test_two_machines_share_their_rows(tmp_path: Path, remote: FakeLibsql) -> None:
    clock = Clock()
    with shared(tmp_path / "a", remote, clock) as one, shared(tmp_path / "b", remote, clock) as other:
        one.update_daily_candle("INFY", "2026-11-20", *CANDLE)
        one.update_intraday_candle("INFY", "2026-11-20T09:15:00", "1m", *CANDLE)
        assert one.sync_from_turso()
        assert other.get_daily_candles()["INFY"]["close"].to_list() == [101]
        assert len(other.get_intraday_candles()["INFY"]) == 1
        other.update_daily_candle("INFY", "2026-11-20", 100, 105, 99, 105, 2000)
        assert other.sync_from_turso() and one.sync_from_turso()
        assert one.get_daily_candles()["INFY"]["close"].to_list() == [105]
        assert one.get_stats()["remote"] == {"state": "in sync", "waiting": 0, "dropped": 0}


def test_a_row_in_the_outbox_is_not_overwritten_by_an_older_remote_row(
    tmp_path: Path, remote: FakeLibsql
) -> None:
    clock = Clock()
    with shared(tmp_path, remote, clock) as database:
        database.sync_from_turso()
        remote.run("INSERT INTO daily_candles VALUES ('INFY', '2026-11-20', 1, 1, 1, 1, 1, '2026-11-20')")
        remote.run("INSERT INTO daily_candles VALUES ('TCS', '2026-11-20', 2, 2, 2, 2, 2, '2026-11-20')")
        database.update_daily_candle("INFY", "2026-11-20", *CANDLE)
        assert database.remote is not None
        while database.remote._pull("daily_candles"):
            pass
        closes = {name: frame["close"].to_list() for name, frame in database.iter_daily()}
        assert closes == {"INFY": [101], "TCS": [2]}


@pytest.mark.parametrize("mode", ["blocked", "quota", "garbage", "broken"])
def test_while_the_remote_refuses_the_file_works_and_a_later_sync_catches_up(
    tmp_path: Path, remote: FakeLibsql, mode: str
) -> None:
    clock = Clock()
    with shared(tmp_path, remote, clock) as database:
        database.update_daily_candle("INFY", "2026-11-19", *CANDLE)
        assert database.sync_from_turso()
        remote.mode = mode
        database.update_daily_candle("INFY", "2026-11-20", *CANDLE)
        assert not database.sync_from_turso()
        assert len(database.get_daily_candles()["INFY"]) == 2
        stats = database.get_stats()["remote"]
        assert stats["waiting"] == 1 and "in sync" not in stats["state"]

        requests_before = remote.requests
        clock.now += 5  # within the pause: no request
        assert not database.sync_from_turso() and remote.requests == requests_before
        remote.mode = "ok"
        clock.now += turso.BLOCKED_SECONDS
        assert database.sync_from_turso()
        assert remote.rows("SELECT symbol, date, close FROM daily_candles ORDER BY date")[-1] == (
            "INFY",
            "2026-11-20",
            101,
        )
        assert database.get_stats()["remote"]["waiting"] == 0


def test_no_server_or_a_wrong_token_only_delays_rows(tmp_path: Path, remote: FakeLibsql) -> None:
    with shared(tmp_path / "a", remote, Clock(), token="wrong") as database:
        assert database.update_daily_candle("INFY", "2026-11-20", *CANDLE) and not database.sync_from_turso()
        assert "401" in database.get_stats()["remote"]["state"]
    settings = load_settings(turso_url="libsql://127.0.0.1:1", turso_token="t", data_dir=tmp_path / "b")
    with LocalCandleDatabase(settings=settings) as database:
        assert database.update_daily_candle("INFY", "2026-11-20", *CANDLE) and not database.sync_from_turso()
        assert database.get_daily_candles()["INFY"]["close"].to_list() == [101]


def test_the_outbox_survives_a_restart(tmp_path: Path, remote: FakeLibsql) -> None:
    remote.mode = "broken"
    with shared(tmp_path, remote, Clock()) as database:
        database.update_daily_candle("INFY", "2026-11-20", *CANDLE)
    remote.mode = "ok"
    with shared(tmp_path, remote, Clock()) as database:
        assert database.sync_from_turso()
    assert remote.rows("SELECT symbol, open, volume FROM daily_candles") == [("INFY", 100.0, 1000)]


def test_many_rows_are_exchanged_in_slices(
    tmp_path: Path, remote: FakeLibsql, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ROWS_A_PUSH", 250), ("ROWS_A_PULL", 90)):
        monkeypatch.setattr(turso, name, value)
    rows = [(f"S{i:04}", "2026-11-20", *CANDLE) for i in range(1000)]
    with shared(tmp_path / "a", remote, Clock()) as one, shared(tmp_path / "b", remote, Clock()) as other:
        assert one.write_daily(rows) == 1000 and one.sync_from_turso()
        assert other.sync_from_turso() and other.get_stats()["daily"]["records"] == 1000


def test_the_outbox_is_bounded(tmp_path: Path, remote: FakeLibsql, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turso, "OUTBOX_MAX", 100)
    remote.mode = "broken"
    with shared(tmp_path, remote, Clock()) as database:
        for _ in range(3):  # the same rows again and again wait once
            database.write_daily([(f"S{i:04}", "2026-11-20", *CANDLE) for i in range(60)])
        assert database.get_stats()["remote"]["waiting"] == 60
        database.write_daily([(f"T{i:04}", "2026-11-20", *CANDLE) for i in range(60)])
        assert database.get_stats()["remote"] == {"state": "not synced yet", "waiting": 100, "dropped": 20}


def test_a_half_failed_push_keeps_its_rows_in_the_outbox_and_is_repeated(
    tmp_path: Path, remote: FakeLibsql
) -> None:
    clock = Clock()
    with shared(tmp_path, remote, clock) as database:
        database.sync_from_turso()
        remote.run("CREATE TRIGGER no BEFORE INSERT ON intraday_candles BEGIN SELECT RAISE(ABORT, 'no'); END")
        database.update_daily_candle("INFY", "2026-11-20", *CANDLE)
        database.update_intraday_candle("INFY", "2026-11-20T09:15:00", "1m", *CANDLE)
        assert not database.sync_from_turso()
        assert database.get_stats()["remote"]["waiting"] == 2
        remote.run("DROP TRIGGER no")
        clock.now += turso.UNAVAILABLE_SECONDS
        assert database.sync_from_turso() and database.get_stats()["remote"]["waiting"] == 0
        assert remote.rows("SELECT symbol, close FROM daily_candles") == [("INFY", 101)]
        assert remote.rows("SELECT symbol, close FROM intraday_candles") == [("INFY", 101)]


def test_the_token_is_in_no_message(
    tmp_path: Path, remote: FakeLibsql, capfd: pytest.CaptureFixture[str]
) -> None:
    with shared(tmp_path, remote, Clock(), token="very-secret") as database:
        database.update_daily_candle("INFY", "2026-11-20", *CANDLE)
        database.sync_from_turso()
        shown = str(database.get_stats()) + repr(database.settings)
    captured = capfd.readouterr()
    assert "very-secret" not in shown + captured.out + captured.err


@pytest.mark.parametrize("mode", ["short", "cut chunk", "no gzip", "stall"])
def test_a_truncated_response_only_delays_rows(
    tmp_path: Path, remote: FakeLibsql, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turso, "TIMEOUT_SECONDS", (20.0, 0.2 if mode == "stall" else 20.0))
    remote.mode = mode
    database = shared(tmp_path, remote, Clock())
    database.update_daily_candle("INFY", "2026-11-20", *CANDLE)
    assert database.get_daily_candles()["INFY"]["close"].to_list() == [101]
    assert "does not respond" in database.get_stats()["remote"]["state"]
    database.close()
    database.close()


def test_invalid_rows_of_the_remote_are_refused_and_skipped(tmp_path: Path, remote: FakeLibsql) -> None:
    with shared(tmp_path, remote, Clock()) as database:
        assert database.sync_from_turso()
        remote.run(
            "INSERT INTO daily_candles VALUES "
            "('TCS', '2026-01-05', 'n/a', 2, 1, 2, 10, '2026-01-01'),"
            "('WIPRO', '2026-01-05', 5, 1, 9, 2, 10, '2026-01-02'),"
            "('HDFC', '2026-01-05', 1, 2, 1, 2, -10, '2026-01-03'),"
            "('ITC', '05/01/2026', 1, 2, 1, 2, 10, '2026-01-04'),"
            "('SBIN', '2026-01-05', NULL, NULL, NULL, NULL, NULL, '2026-01-05'),"
            "('INFY', '2026-01-05 00:00:00', 1, 2, 1, 2, 10, '2026-01-06')"
        )
        assert database.sync_from_turso() and database.rows_refused == 5
        assert [(name, frame["close"].to_list()) for name, frame in database.iter_daily()] == [("INFY", [2])]
        assert database.span() == ("2026-01-05", "2026-01-05")
        assert database.sync_from_turso() and database.rows_refused == 5
