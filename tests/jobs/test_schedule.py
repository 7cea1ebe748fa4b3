"""The trading day's table on the calendar: pure, no clock, no Redis."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from itertools import pairwise

import pytest

from pkbrokers_redis.candles.calendar import IST, Sessions, load_sessions
from pkbrokers_redis.clock import Clock
from pkbrokers_redis.jobs.cron import DAY, Plan, Row, next_runs, step_seconds
from pkbrokers_redis.store.queue import JOBS

NSE, MCX = 1, 7  # segments
WEDNESDAY, SUNDAY, HOLIDAY, MUHURAT = (
    date(2026, 8, 5), date(2026, 8, 9), date(2026, 1, 26), date(2026, 11, 8)
)  # fmt: skip


@pytest.fixture(scope="module")
def sessions() -> Sessions:
    return load_sessions("market")


@pytest.fixture
def plan(sessions: Sessions) -> Plan:
    return Plan(sessions, [sessions.schedule_of(NSE)])


def ms(day: date, clock: str) -> float:
    return datetime.fromisoformat(f"{day}T{clock}").replace(tzinfo=IST).timestamp() * 1000


def clock_times(plan: Plan, day: date) -> dict[str, list[str]]:
    return {
        row.name: [datetime.fromtimestamp(at / 1000, IST).strftime("%H:%M:%S") for at in plan.times(row, day)]
        for row in plan.table
    }


def test_ordinary_day_has_every_row_at_its_time(plan: Plan) -> None:
    times = clock_times(plan, WEDNESDAY)
    assert times["login"] == ["08:30:00"] and times["capacity"] == ["08:50:00"]
    assert times["open"] == ["09:16:00"]
    assert (times["ticks"][0], times["ticks"][-1], len(times["ticks"])) == ("09:16:05", "15:30:05", 375)
    assert times["close"] == ["15:31:00"] and times["final_candles"] == ["15:40:00"]
    assert all(len(found) == 1 for name, found in times.items() if name != "ticks")


@pytest.mark.parametrize("day", [SUNDAY, HOLIDAY, date(2026, 8, 8)])
def test_closed_day_has_no_runs(plan: Plan, day: date) -> None:
    assert list(plan.day_of(day)) == []


def test_muhurat_sessions_have_runs_and_the_pause_has_none(plan: Plan) -> None:
    times = clock_times(plan, MUHURAT)
    windows = plan.windows(MUHURAT)
    assert MUHURAT.isoweekday() == 7 and windows
    opened = datetime.fromtimestamp(windows[0][0] / 1000, IST)
    assert times["login"] == [(opened - timedelta(minutes=45)).strftime("%H:%M:%S")]
    minutes = sum(closed - opened for opened, closed in windows) // 60_000
    assert len(times["ticks"]) == minutes
    closed = datetime.fromtimestamp(windows[-1][1] / 1000, IST)
    assert times["close"] == [(closed + timedelta(minutes=1)).strftime("%H:%M:%S")]


def test_sunday_session_has_all_runs(plan: Plan) -> None:
    assert clock_times(plan, date(2026, 2, 1))["final_candles"] == ["15:40:00"]


def test_day_spans_first_open_to_last_close_of_streamed_segments(
    sessions: Sessions,
) -> None:
    both = Plan(sessions, [sessions.schedule_of(NSE), sessions.schedule_of(MCX)])
    times = clock_times(both, WEDNESDAY)
    assert times["open"] == ["09:01:00"] and times["close"] == ["23:31:00"]
    assert len(times["ticks"]) == 14 * 60 + 30
    late = ms(date(2026, 8, 6), "00:05:00")
    final = both.last(next(row for row in DAY if row.name == "final_candles"), late)
    assert final is not None and final.day == WEDNESDAY  # after midnight it is still that session's


def test_due_is_the_latest_run_within_its_grace_time(plan: Plan) -> None:
    at = ms(WEDNESDAY, "10:07:30")
    due = {run.row.name: run for run in plan.due(at)}
    assert due["ticks"].arguments["at"] == "2026-08-05T10:07:05+05:30"
    assert "login" in due and "open" not in due and "final_candles" not in due
    assert {run.row.name for run in plan.due(ms(WEDNESDAY, "12:00:00"))} == {"ticks"}
    assert plan.due(ms(WEDNESDAY, "08:29:59")) == []


def test_job_id_of_a_run_is_deterministic_and_unique(plan: Plan, sessions: Sessions) -> None:
    again = Plan(load_sessions("market"), [sessions.schedule_of(NSE)])
    runs = list(plan.day_of(WEDNESDAY))
    assert [run.job_id for run in runs] == [run.job_id for run in again.day_of(WEDNESDAY)]
    assert len({run.job_id for run in runs}) == len(runs)
    assert all(one.at_ms <= other.at_ms for one, other in pairwise(runs))


def test_rows_wait_for_the_rows_they_need(plan: Plan) -> None:
    runs = {run.row.name: run for run in plan.day_of(WEDNESDAY) if run.row.anchor == "close"}
    assert runs["pickle"].arguments["after"] == [runs["final_candles"].job_id]
    wanted = [runs[name].job_id for name in ("pickle", "sqlite", "parquet")]
    assert runs["sync"].arguments["after"] == wanted


def test_every_row_names_an_existing_job_and_earlier_rows() -> None:
    seen: set[str] = set()
    for row in DAY:
        assert row.job in JOBS and set(row.needs) <= seen
        seen.add(row.name)


def test_next_times_skip_weekends_and_holidays(plan: Plan) -> None:
    shown = {row["row"]: row for row in next_runs(plan, ms(date(2026, 8, 7), "16:00:00"))}  # a Friday
    assert shown["login"]["next"] == "2026-08-10T08:30:00+05:30"
    assert shown["ticks"]["when"] == "every minute + 5 s"
    assert shown["sync"]["when"] == "close + 12 min, after pickle sqlite parquet"


def test_always_open_feed_has_minute_runs_all_day() -> None:
    always = load_sessions("always")
    plan = Plan(
        always, [0], [Row("ticks", "minute", 5, "day_snapshot", "ticks.json", 300, {"kind": "ticks"})]
    )
    assert len(plan.times(plan.table[0], SUNDAY)) == 24 * 60


def test_rows_before_a_midnight_open_are_due_the_evening_before() -> None:
    plan = Plan(load_sessions("always"), [0])
    shown = {row["row"]: row["next"] for row in next_runs(plan, ms(WEDNESDAY, "23:00:00"))}
    assert shown["login"] == "2026-08-05T23:15:00+05:30"
    before = {run.row.name: run for run in plan.due(ms(WEDNESDAY, "23:14:59"))}
    after = {run.row.name: run for run in plan.due(ms(WEDNESDAY, "23:20:30"))}
    assert "login" not in before and not {"calendar", "capacity"} & after.keys()
    assert after["login"].arguments == {"at": shown["login"], "day": "2026-08-06"}
    midnight = {run.row.name: run for run in plan.due(ms(date(2026, 8, 6), "00:00:30"))}
    assert midnight["login"].job_id == after["login"].job_id


def test_cron_steps_often_enough_in_accelerated_time() -> None:
    assert step_seconds(Clock()) == 1.0
    assert step_seconds(Clock(0, 0, 60)) == pytest.approx(0.25)
    assert step_seconds(Clock(0, 0, 10_000)) == 0.05


def test_every_job_has_retries_for_a_dead_worker() -> None:
    """RQ gives up an abandoned job that has no try left."""
    assert [name for name, spec in JOBS.items() if not spec.retry_seconds] == []
