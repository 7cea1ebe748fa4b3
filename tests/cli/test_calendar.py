"""`pkb calendar`: the hours candles are cut by, for people and for programs."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from pkbrokers_redis.candles.calendar import load_sessions
from tests.cli.conftest import Pkb


def days_of(pkb: Pkb, *arguments: str) -> dict[str, dict[str, Any]]:
    """Schedule → its day."""
    ended = pkb("calendar", *arguments, "--json")
    assert ended.code == 0, ended.err
    return {each["schedule"]: each for each in json.loads(ended.out)["schedules"]}


def hours(about: dict[str, Any]) -> list[str]:
    return [f"{each['open'][11:16]}-{each['close'][11:16]}" for each in about["windows"]]


def test_a_trading_day_has_its_windows_and_neighbours(pkb: Pkb) -> None:
    days = days_of(pkb, "2026-08-03")
    assert hours(days["NSE_CASH_DERIVATIVES"]) == ["09:15-15:15", "15:15-15:35"]
    assert hours(days["NFO"]) == ["09:15-15:40"]
    assert hours(days["MCX"]) == ["09:00-23:30"]
    assert days["NSE_CASH"]["windows"][0]["open"] == "2026-08-03T09:15:00+05:30"
    assert (days["CDS"]["previous"], days["CDS"]["next"]) == ("2026-07-31", "2026-08-04")


def test_a_holiday_has_its_name_and_no_windows(pkb: Pkb) -> None:
    days = days_of(pkb, "2026-01-15")
    assert days["NSE_CASH"] | {"segments": []} == {
        "schedule": "NSE_CASH",
        "segments": [],
        "session": False,
        "why": "Municipal elections Maharashtra",
        "windows": [],
        "previous": "2026-01-14",
        "next": "2026-01-16",
    }
    assert hours(days["MCX"]) == ["17:00-23:55"]  # its evening session is held


def test_a_muhurat_session_is_named(pkb: Pkb) -> None:
    day = days_of(pkb, "2025-10-21", "--segment", "nse")["NSE_CASH"]
    assert day["windows"][0]["name"] == "muhurat"
    assert day["why"] == "Muhurat"


def test_a_weekend_is_called_one(pkb: Pkb) -> None:
    days = days_of(pkb, "2026-08-02")
    assert days.pop("UNKNOWN")["windows"]  # instruments of an unknown kind count as open all day
    assert {day["why"] for day in days.values()} == {"weekend"}


def test_without_a_date_it_is_the_markets_today(pkb: Pkb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKB_TIME_SHIFT", f"1785728700,{time.time()},1")
    ended = pkb("calendar", "--segment", "CDS", "--json")
    assert json.loads(ended.out)["date"] == "2026-08-03"


def test_a_segment_or_a_schedule_narrows_it(pkb: Pkb) -> None:
    assert list(days_of(pkb, "2026-08-03", "--segment", "NSE")) == ["NSE_CASH", "NSE_CASH_DERIVATIVES"]
    assert list(days_of(pkb, "2026-08-03", "--segment", "bse_cash")) == ["BSE_CASH"]


def test_a_year_lists_holidays_and_special_sessions(pkb: Pkb) -> None:
    ended = pkb("calendar", "2026", "--segment", "NSE", "--csv")
    lines = ended.out.splitlines()
    assert "2026-02-01,Sunday,all,09:15-15:30,Union Budget" in lines
    assert "2026-12-25,Friday,all,closed,Christmas" in lines
    assert len(lines) == 1 + 16 + 2  # a header, the circular's holidays, two Sundays


def test_the_users_own_calendar_is_applied(pkb: Pkb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"calendars": {"equity": {"holidays": {"2026-08-03": "A day of my own"}}}}')
    monkeypatch.setenv("PKB_CALENDAR", str(mine))
    assert days_of(pkb, "2026-08-03")["NSE_CASH"]["why"] == "A day of my own"


def test_a_market_that_is_always_open_says_so(pkb: Pkb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKB_SESSIONS", "always")
    day = days_of(pkb, "2026-01-26")["NSE_CASH"]
    assert [each["name"] for each in day["windows"]] == ["always"]


def test_the_calendars_of_the_documentation_are_calendars(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "calendar.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^    (\{.*?)\n\n", text, re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        mine = tmp_path / "mine.json"
        mine.write_text(block)
        assert load_sessions("market", path=mine).schedules[0] == "NSE_CASH"


@pytest.mark.parametrize(
    "arguments", [("soon",), ("2026-02-30",), ("1812-01-01",), ("1812",), ("2026-08-03", "--segment", "LSE")]
)
def test_a_mistake_is_one_line(pkb: Pkb, arguments: tuple[str, ...]) -> None:
    ended = pkb("calendar", *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("pkb: ") and ended.err.count("\n") == 1
