"""Resampling as the exchange and Kite do it: anchored to the open, never across days."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.errors import UnknownInterval
from pkbrokers_redis.files.resample import CandleAggregator

MCX_TOKEN = (1 << 8) | 7


def minutes(start: str, count: int, **columns: Any) -> pd.DataFrame:
    """One-minute candles: open i, high i + 1, low i - 1, close i + 0.5, volume 10."""
    index = pd.date_range(start, periods=count, freq="1min", tz="Asia/Kolkata", name="datetime")
    n = np.arange(count, dtype=float)
    table = {
        "open": n,
        "high": n + 1,
        "low": n - 1,
        "close": n + 0.5,
        "volume": np.full(count, 10),
        **columns,
    }
    return pd.DataFrame(table, index=index)


def clock(frame: pd.DataFrame) -> list[str]:
    return [moment.strftime("%d %H:%M") for moment in frame.index]


def test_hours_start_at_the_open_and_the_last_is_short() -> None:
    got = CandleAggregator.aggregate_candles(minutes("2026-11-20 09:15", 375), "60m")
    assert clock(got) == [f"20 {hour:02}:15" for hour in range(9, 16)]
    assert got["volume"].to_list() == [600] * 6 + [150] and got["volume"].dtype == np.int64
    assert got.iloc[0][["open", "high", "low", "close"]].to_list() == [0, 60, -1, 59.5]
    assert str(got.index.tz) == "Asia/Kolkata" and got.index.name == "datetime"


def test_buckets_restart_each_day() -> None:
    two_days = pd.concat([minutes("2026-11-19 15:20", 10), minutes("2026-11-20 09:15", 10)])
    got = CandleAggregator.aggregate_candles(two_days, "30m")
    assert clock(got) == ["19 15:15", "20 09:15"] and got["volume"].to_list() == [100, 100]


def test_days_are_stamped_with_midnight() -> None:
    two_days = pd.concat([minutes("2026-11-19 09:15", 375), minutes("2026-11-20 09:15", 10)])
    got = CandleAggregator.aggregate_candles(two_days, "1d")
    assert clock(got) == ["19 00:00", "20 00:00"] and got["volume"].to_list() == [3750, 100]


def test_other_segments_have_other_hours() -> None:
    got = CandleAggregator.aggregate_candles(minutes("2026-11-20 09:00", 120), "1h", token=MCX_TOKEN)
    assert clock(got) == ["20 09:00", "20 10:00"]
    always = load_sessions("always")
    got = CandleAggregator.aggregate_candles(minutes("2026-11-21 00:30", 60), "1h", sessions=always)
    assert clock(got) == ["21 00:00", "21 01:00"]


def test_a_closed_day_has_the_usual_anchor() -> None:
    got = CandleAggregator.aggregate_candles(minutes("2026-11-21 09:15", 60), "1h")  # a Saturday
    assert clock(got) == ["21 09:15"]


def test_empty_buckets_make_no_rows_and_other_columns_are_left_out() -> None:
    frame = minutes("2026-11-20 09:15", 1, Note="x", oi=7.0)
    got = CandleAggregator.aggregate_candles(pd.concat([frame, minutes("2026-11-20 10:00", 1, oi=9.0)]), "5m")
    assert clock(got) == ["20 09:15", "20 10:00"] and got.columns.to_list() == [
        "open", "high", "low", "close", "volume", "oi",
    ]  # fmt: skip


def test_rows_in_any_order_columns_in_any_case_and_a_time_column() -> None:
    frame = minutes("2026-11-20 09:15", 10).sample(frac=1, random_state=3).reset_index()
    frame.columns = [name.upper() for name in frame.columns]
    before = frame.copy()
    got = CandleAggregator.aggregate_candles(frame, "5minute", timestamp_column="DATETIME")
    assert got["open"].to_list() == [0, 5] and got["close"].to_list() == [4.5, 9.5]
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", dt.timezone(dt.timedelta(hours=5, minutes=30))])
def test_times_of_any_zone_are_converted_to_kolkata(zone: Any) -> None:
    frame = minutes("2026-11-20 09:15", 10)
    expected = CandleAggregator.aggregate_candles(frame, "5m")
    pd.testing.assert_frame_equal(CandleAggregator.aggregate_candles(frame.tz_convert(zone), "5m"), expected)


def test_naive_times_and_texts_are_kolkata_time() -> None:
    frame = minutes("2026-11-20 09:15", 10)
    expected = CandleAggregator.aggregate_candles(frame, "5m")
    naive = frame.tz_localize(None)
    pd.testing.assert_frame_equal(CandleAggregator.aggregate_candles(naive, "5m"), expected)
    naive.index = pd.Index([str(moment) for moment in naive.index], name="datetime")
    pd.testing.assert_frame_equal(CandleAggregator.aggregate_candles(naive, "5m"), expected)


def test_no_rows_give_an_empty_frame_and_a_missing_column_a_value_error() -> None:
    assert CandleAggregator.aggregate_candles(None, "5m").empty
    assert CandleAggregator.aggregate_candles(pd.DataFrame(), "5m").empty
    assert CandleAggregator.aggregate_ticks(None).empty
    with pytest.raises(ValueError, match="low"):
        CandleAggregator.aggregate_candles(minutes("2026-11-20 09:15", 2).drop(columns="low"), "5m")
    with pytest.raises(ValueError, match="moments"):
        CandleAggregator.aggregate_candles(minutes("2026-11-20 09:15", 2).reset_index(drop=True), "5m")


def ticks() -> pd.DataFrame:
    stamps = ["09:15:01", "09:15:30", "09:16:10", "09:15:59", "09:17:00"]
    return pd.DataFrame(
        {
            "timestamp": [f"2026-11-20 {stamp}" for stamp in stamps],
            "last_price": [100.0, 103, 99, 101, 105],
            "volume": [1000, 1010, 1030, 1020, 1025],
        }
    )


def test_ticks_become_candles_with_summed_volumes() -> None:
    got = CandleAggregator.aggregate_ticks(ticks(), "1m")
    assert clock(got) == ["20 09:15", "20 09:16", "20 09:17"]
    assert got.iloc[0].to_list() == [100, 103, 100, 101, 3030]
    assert got.columns.to_list() == ["open", "high", "low", "close", "volume"]


def test_cumulative_volumes_count_once_and_lower_copies_count_nothing() -> None:
    got = CandleAggregator.aggregate_ticks(ticks(), "1m", cumulative=True)
    assert got["volume"].to_list() == [20, 10, 0]


def test_the_price_column_may_have_another_name_but_must_exist() -> None:
    got = CandleAggregator.aggregate_ticks(ticks().rename(columns={"last_price": "LTP"}), "5m")
    assert got["close"].to_list() == [105]
    with pytest.raises(ValueError, match="price"):
        CandleAggregator.aggregate_ticks(ticks().drop(columns="last_price"))


def test_several_intervals_at_once_and_an_impossible_one_is_empty() -> None:
    got = CandleAggregator.resample_to_multiple_timeframes(minutes("2026-11-20 09:15", 60))
    assert {name: len(frame) for name, frame in got.items()} == {
        "1m": 60, "5m": 12, "15m": 4, "30m": 2, "1h": 1, "1d": 1,
    }  # fmt: skip
    got = CandleAggregator.resample_to_multiple_timeframes(minutes("2026-11-20 09:15", 60), ["5m", "soon"])
    assert len(got["5m"]) == 12 and got["soon"].empty


@pytest.mark.parametrize(
    ("spelt", "normal", "seconds"),
    [
        ("5minute", "5m", 300),
        (" 5MIN ", "5m", 300),
        ("60minute", "1h", 3600),
        ("day", "1d", 86_400),
        ("3m", "3m", 180),
        ("2h", "2h", 7200),
    ],
)
def test_intervals_have_several_spellings(spelt: str, normal: str, seconds: int) -> None:
    assert CandleAggregator.normalize_interval(spelt) == normal
    assert CandleAggregator.get_interval_seconds(spelt) == seconds


def test_an_unknown_interval_is_one_line() -> None:
    with pytest.raises(UnknownInterval):
        CandleAggregator.aggregate_candles(minutes("2026-11-20 09:15", 2), "soon")


def test_candles_are_valid_if_high_and_low_include_open_and_close() -> None:
    good = minutes("2026-11-20 09:15", 5)
    assert CandleAggregator.validate_ohlcv(good) and CandleAggregator.validate_ohlcv(
        good.rename(columns=str.upper)
    )
    assert not CandleAggregator.validate_ohlcv(None) and not CandleAggregator.validate_ohlcv(
        good[["open", "close"]]
    )
    for change in ({"high": -5.0}, {"low": 50.0}, {"close": np.nan}):
        assert not CandleAggregator.validate_ohlcv(good.assign(**change))
