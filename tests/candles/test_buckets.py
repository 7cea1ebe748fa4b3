"""Buckets are anchored to the session's open and partition the session."""

from datetime import datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.model import (
    DEFAULT_INTERVALS,
    Interval,
    bucket_end_s,
    bucket_start_s,
    bucket_starts,
)

KOLKATA = ZoneInfo("Asia/Kolkata")
MARKET = load_sessions("market")
ALWAYS = {zone: load_sessions("always", zone) for zone in ("Asia/Kolkata", "America/New_York")}
CASH = MARKET.schedules.index("NSE_CASH")
SECONDS = st.sampled_from([*(interval.seconds for interval in DEFAULT_INTERVALS), 7 * 60, 7200, 43_200])
TIMES = st.integers(1_700_000_000_000, 1_800_000_000_000)
SCHEDULES = st.integers(0, len(MARKET.schedules) - 1)


def at(text: str) -> int:
    """`2026-01-14 09:15` in India → epoch seconds."""
    return int(datetime.fromisoformat(text).replace(tzinfo=KOLKATA).timestamp())


def clock(epoch_s: int) -> str:
    return f"{datetime.fromtimestamp(epoch_s, KOLKATA):%H:%M}"


def test_hourly_candles_of_nse_begin_at_a_quarter_past_as_on_kite() -> None:
    starts = bucket_starts(MARKET, CASH, 3600, at("2026-01-14 00:00"), at("2026-01-14 23:59"))
    assert [clock(start) for start in starts] == [
        "09:15",
        "10:15",
        "11:15",
        "12:15",
        "13:15",
        "14:15",
        "15:15",
    ]


@pytest.mark.parametrize("interval", DEFAULT_INTERVALS, ids=lambda interval: interval.name)
def test_every_interval_is_anchored_at_the_open(interval: Interval) -> None:
    day = MARKET.day(CASH, at("2026-01-14 12:00") * 1000)
    assert bucket_start_s(day, interval.seconds, at("2026-01-14 09:15") * 1000) == at("2026-01-14 09:15")
    session_seconds = 375 * 60
    starts = bucket_starts(MARKET, CASH, interval.seconds, at("2026-01-14 00:00"), at("2026-01-14 23:59"))
    assert len(starts) == -(-session_seconds // (interval.seconds or session_seconds))
    assert starts[0] == at("2026-01-14 09:15")


def test_last_candle_ends_with_the_session() -> None:
    day = MARKET.day(CASH, at("2026-01-14 12:00") * 1000)
    assert clock(bucket_end_s(day, 3600, at("2026-01-14 15:15"))) == "15:30"
    assert clock(bucket_end_s(day, 0, at("2026-01-14 09:15"))) == "15:30"


def test_a_bucket_may_span_the_end_of_continuous_trading() -> None:
    schedule = MARKET.schedules.index("NSE_CASH_DERIVATIVES")
    starts = bucket_starts(MARKET, schedule, 600, at("2026-08-03 15:05"), at("2026-08-03 23:59"))
    assert [clock(start) for start in starts] == ["15:05", "15:15", "15:25"]
    starts = bucket_starts(MARKET, schedule, 1800, at("2026-08-03 14:00"), at("2026-08-03 23:59"))
    assert [clock(start) for start in starts] == ["14:15", "14:45", "15:15"]
    day = MARKET.day(schedule, at("2026-08-03 12:00") * 1000)
    assert clock(bucket_end_s(day, 1800, starts[-1])) == "15:35"


def test_a_bucket_that_lies_in_a_break_is_none() -> None:
    starts = bucket_starts(MARKET, CASH, 1800, at("2024-03-02 00:00"), at("2024-03-02 23:59"))
    assert [clock(start) for start in starts] == ["09:15", "09:45", "11:15", "11:45", "12:15"]


def test_starts_go_on_across_nights_weekends_and_holidays() -> None:
    starts = bucket_starts(MARKET, CASH, 0, at("2026-01-23 00:00"), at("2026-02-02 09:15"))
    days = [f"{datetime.fromtimestamp(start, KOLKATA):%d}" for start in starts]
    assert days == ["23", "27", "28", "29", "30", "01", "02"]  # a weekend, Republic Day, the Budget's Sunday


def test_both_ends_of_the_range_count() -> None:
    assert bucket_starts(MARKET, CASH, 60, at("2026-01-14 09:16"), at("2026-01-14 09:18")) == [
        at("2026-01-14 09:16"),
        at("2026-01-14 09:17"),
        at("2026-01-14 09:18"),
    ]
    assert bucket_starts(MARKET, CASH, 60, at("2026-01-14 09:18"), at("2026-01-14 09:16")) == []


def test_more_buckets_than_a_reader_can_mean_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1,000,000 candles"):
        bucket_starts(ALWAYS["Asia/Kolkata"], 0, 60, at("2020-01-01 00:00"), at("2030-01-01 00:00"))


@given(TIMES, SECONDS, SCHEDULES)
def test_a_bucket_contains_its_time_and_lies_in_its_session(
    time_ms: int, seconds: int, schedule: int
) -> None:
    day = MARKET.day(schedule, time_ms)
    if not MARKET.is_open(schedule, time_ms):
        return
    start_s = bucket_start_s(day, seconds, time_ms)
    end_s = bucket_end_s(day, seconds, start_s)
    assert start_s * 1000 <= time_ms < end_s * 1000
    assert day.anchor_ms <= start_s * 1000
    assert end_s * 1000 <= day.windows[-1][1]
    assert seconds == 0 or end_s - start_s <= seconds


@given(TIMES, SECONDS, SCHEDULES)
def test_the_starts_of_a_day_are_just_the_buckets_of_its_seconds(
    time_ms: int, seconds: int, schedule: int
) -> None:
    day = MARKET.day(schedule, time_ms)
    listed = bucket_starts(MARKET, schedule, seconds, day.day_start_ms // 1000, day.day_end_ms // 1000 - 1)
    by_time = {
        bucket_start_s(day, seconds, each_ms)
        for opened, closed in day.windows
        for each_ms in (*range(opened, closed, 60_000), closed - 1)
    }
    assert listed == sorted(by_time)
    for start, following in pairwise(listed):
        assert bucket_end_s(day, seconds, start) <= following


@given(TIMES, SECONDS, st.sampled_from(sorted(ALWAYS)))
def test_buckets_of_a_day_without_session_filter_partition_it(time_ms: int, seconds: int, zone: str) -> None:
    sessions = ALWAYS[zone]
    day = sessions.day(0, time_ms)
    starts = bucket_starts(sessions, 0, seconds, day.day_start_ms // 1000, day.day_end_ms // 1000 - 1)
    ends = [bucket_end_s(day, seconds, start) for start in starts]
    assert [day.day_start_ms // 1000, *ends[:-1]] == starts
    assert ends[-1] == day.day_end_ms // 1000
