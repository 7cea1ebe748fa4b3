"""The calendar file against pandas_market_calendars, a second opinion that others keep.

Every difference is listed here with its reason: one that appears or goes away fails and wants to be read.
"""

from __future__ import annotations

from datetime import date, timedelta

import pytest

from pkbrokers_redis.candles.calendar import load_sessions

calendars = pytest.importorskip("pandas_market_calendars")

SESSIONS = load_sessions("market")
FIRST, LAST = date(2024, 1, 1), date(2026, 12, 31)
EVERY_DAY = [FIRST + timedelta(days=number) for number in range((LAST - FIRST).days + 1)]

# Special sessions by circular, which a calendar of holidays does not know.
WEEKEND_SESSIONS = {
    "2024-01-20": "Saturday in place of the holiday of 2024-01-22",
    "2024-03-02": "disaster recovery drill on a Saturday",
    "2024-05-18": "disaster recovery drill on a Saturday",
    "2025-02-01": "Union Budget on a Saturday",
    "2026-02-01": "Union Budget on a Sunday",
    "2026-11-08": "Muhurat on a Sunday",
}
# Muhurat on a weekday: an hour of trade on a holiday. pandas' NSE counts it as a day, its BSE does not.
WEEKDAY_MUHURATS = {
    "2024-11-01": "Muhurat 18:00-19:00 on Diwali Laxmi Pujan",
    "2025-10-21": "Muhurat 13:45-14:45 on Diwali Laxmi Pujan",
}
DIFFERENCES = {
    "NSE": WEEKEND_SESSIONS,
    "BSE": WEEKEND_SESSIONS | WEEKDAY_MUHURATS,
    "XBOM": WEEKEND_SESSIONS | WEEKDAY_MUHURATS,
}


def our_days(schedule: str) -> set[str]:
    index = SESSIONS.schedules.index(schedule)
    return {str(day) for day in EVERY_DAY if SESSIONS.on_date(index, day).windows}


@pytest.mark.parametrize(
    "schedule", ["NSE_CASH", "NSE_CASH_DERIVATIVES", "BSE_CASH", "NFO", "BFO", "INDICES"]
)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_days_differ_only_where_the_reason_is_known(name: str, schedule: str) -> None:
    reference = {str(day.date()) for day in calendars.get_calendar(name).schedule(FIRST, LAST).index}
    shipped = our_days(schedule)
    assert reference - shipped == set()
    assert shipped - reference == set(DIFFERENCES[name])


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_hours_of_a_cash_day_are_the_same(name: str) -> None:
    index = SESSIONS.schedules.index("NSE_CASH")
    compared = 0
    for day, hours in calendars.get_calendar(name).schedule(FIRST, LAST).iterrows():
        if (windows := SESSIONS.on_date(index, day.date()).windows) and len(windows) == 1:
            reference = hours["market_open"].timestamp() * 1000, hours["market_close"].timestamp() * 1000
            assert windows[0] == reference, day
            compared += 1
    assert compared > 700


def test_currency_trades_on_the_equity_markets_weekdays() -> None:
    reference = {str(day.date()) for day in calendars.get_calendar("NSE").schedule(FIRST, LAST).index}
    # RBI's own holidays are not distinguished (the file says so); the only special session is Muhurat.
    assert our_days("CDS") - reference == {"2026-11-08"}
    assert reference - our_days("CDS") == set()
