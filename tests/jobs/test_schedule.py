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


def test_an_ordinary_day_has_every_row_at_its_time(plan: Plan) -> None:
    times = clock_times(plan, WEDNESDAY)
    assert times["login"] == ["08:30:00"] and times["capacity"] == ["08:50:00"]
    assert times["open"] == ["09:16:00"]
    assert (times["ticks"][0], times["ticks"][-1], len(times["ticks"])) == ("09:16:05", "15:30:05", 375)
    assert times["close"] == ["15:31:00"] and times["settle"] == ["15:40:00"]
    assert all(len(found) == 1 for name, found in times.items() if name != "ticks")


@pytest.mark.parametrize("day", [SUNDAY, HOLIDAY, date(2026, 8, 8)])
def test_a_closed_day_has_none(plan: Plan, day: date) -> None:
    assert list(plan.day_of(day)) == []


def test_the_muhurat_sessions_are_served_and_the_pause_between_them_is_not(plan: Plan) -> None:
    times = clock_times(plan, MUHURAT)
    windows = plan.windows(MUHURAT)
    assert MUHURAT.isoweekday() == 7 and windows
    opened = datetime.fromtimestamp(windows[0][0] / 1000, IST)
    assert times["login"] == [(opened - timedelta(minutes=45)).strftime("%H:%M:%S")]
    minutes = sum(closed - opened for opened, closed in windows) // 60_000
    assert len(times["ticks"]) == minutes
    closed = datetime.fromtimestamp(windows[-1][1] / 1000, IST)
    assert times["close"] == [(closed + timedelta(minutes=1)).strftime("%H:%M:%S")]


def test_a_sunday_session_is_a_day_like_another(plan: Plan) -> None:
    assert clock_times(plan, date(2026, 2, 1))["settle"] == ["15:40:00"]


def test_the_day_reaches_from_the_first_open_to_the_last_close_of_what_is_streamed(
    sessions: Sessions,
) -> None:
    both = Plan(sessions, [sessions.schedule_of(NSE), sessions.schedule_of(MCX)])
    times = clock_times(both, WEDNESDAY)
    assert times["open"] == ["09:01:00"] and times["close"] == ["23:31:00"]
    assert len(times["ticks"]) == 14 * 60 + 30
    late = ms(date(2026, 8, 6), "00:05:00")
    settled = both.last(next(row for row in DAY if row.name == "settle"), late)
    assert settled is not None and settled.day == WEDNESDAY  # after midnight it is still that session's


def test_what_is_due_is_the_latest_run_and_only_while_it_is_of_use(plan: Plan) -> None:
    at = ms(WEDNESDAY, "10:07:30")
    due = {run.row.name: run for run in plan.due(at)}
    assert due["ticks"].arguments["at"] == "2026-08-05T10:07:05+05:30"
    assert "login" in due and "open" not in due and "settle" not in due
    assert {run.row.name for run in plan.due(ms(WEDNESDAY, "12:00:00"))} == {"ticks"}
    assert plan.due(ms(WEDNESDAY, "08:29:59")) == []


def test_a_run_has_the_same_id_whoever_plans_it_and_no_other_run_has_it(
    plan: Plan, sessions: Sessions
) -> None:
    again = Plan(load_sessions("market"), [sessions.schedule_of(NSE)])
    runs = list(plan.day_of(WEDNESDAY))
    assert [run.job_id for run in runs] == [run.job_id for run in again.day_of(WEDNESDAY)]
    assert len({run.job_id for run in runs}) == len(runs)
    assert all(one.at_ms <= other.at_ms for one, other in pairwise(runs))


def test_rows_wait_for_the_rows_they_name(plan: Plan) -> None:
    runs = {run.row.name: run for run in plan.day_of(WEDNESDAY) if run.row.anchor == "close"}
    assert runs["pickle"].arguments["after"] == [runs["settle"].job_id]
    wanted = [runs[name].job_id for name in ("pickle", "sqlite", "parquet")]
    assert runs["sync"].arguments["after"] == wanted


def test_every_row_names_a_job_and_rows_before_it() -> None:
    seen: set[str] = set()
    for row in DAY:
        assert row.job in JOBS and set(row.needs) <= seen
        seen.add(row.name)


def test_next_times_skip_weekends_and_holidays(plan: Plan) -> None:
    shown = {row["row"]: row for row in next_runs(plan, ms(date(2026, 8, 7), "16:00:00"))}  # a Friday
    assert shown["login"]["next"] == "2026-08-10T08:30:00+05:30"
    assert shown["ticks"]["when"] == "every minute + 5 s"
    assert shown["sync"]["when"] == "close + 12 min, after pickle sqlite parquet"


def test_a_feed_that_never_closes_has_a_minute_row_all_day() -> None:
    always = load_sessions("always")
    plan = Plan(
        always, [0], [Row("ticks", "minute", 5, "day_snapshot", "ticks.json", 300, {"kind": "ticks"})]
    )
    assert len(plan.times(plan.table[0], SUNDAY)) == 24 * 60


def test_what_comes_before_midnight_of_a_feed_that_opens_then_is_due_then() -> None:
    plan = Plan(load_sessions("always"), [0])
    shown = {row["row"]: row["next"] for row in next_runs(plan, ms(WEDNESDAY, "23:00:00"))}
    assert shown["login"] == "2026-08-05T23:15:00+05:30"
    before = {run.row.name: run for run in plan.due(ms(WEDNESDAY, "23:14:59"))}
    after = {run.row.name: run for run in plan.due(ms(WEDNESDAY, "23:20:30"))}
    assert "login" not in before and not {"calendar", "capacity"} & after.keys()
    assert after["login"].arguments == {"at": shown["login"], "day": "2026-08-06"}
    midnight = {run.row.name: run for run in plan.due(ms(date(2026, 8, 6), "00:00:30"))}
    assert midnight["login"].job_id == after["login"].job_id


def test_it_looks_often_enough_to_meet_every_minute_of_a_rehearsal() -> None:
    assert step_seconds(Clock()) == 1.0
    assert step_seconds(Clock(0, 0, 60)) == pytest.approx(0.25)
    assert step_seconds(Clock(0, 0, 10_000)) == 0.05


def test_every_job_is_given_to_another_worker_when_its_own_dies() -> None:
    """RQ gives up an abandoned job that has no try left."""
    assert [name for name, spec in JOBS.items() if not spec.retry_seconds] == []
