"""Kite's historical API as data: intervals, spans, rows. Nothing here asks anybody."""

from __future__ import annotations

import json
import math
from datetime import date, datetime
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.errors import KiteUnavailable, UnknownInterval
from pkbrokers_redis.kite.history_api import (
    KITE_INTERVALS,
    Historical_Interval,
    epoch_of,
    kite_interval,
    parse_rows,
    spans,
)
from tests.support import SHARED_DATA

INFY = 408065


@given(st.integers(0, 4 * 10**9), st.integers(0, 10**9), st.sampled_from(sorted(KITE_INTERVALS)))
def test_spans_cover_a_request_once(from_s: int, length: int, name: str) -> None:
    interval = KITE_INTERVALS[name]
    pieces = list(islice(spans(interval, from_s, from_s + length), 1000))
    assert sum(ends - begins for begins, ends in pieces) == min(length, 1000 * interval.days_max * 86_400)
    assert all(0 < ends - begins <= interval.days_max * 86_400 for begins, ends in pieces)
    assert all(earlier[1] == later[0] for earlier, later in pairwise(pieces))


@pytest.mark.parametrize("name", ["1m", "minute", "1min", Historical_Interval.min_1, " Minute "])
def test_an_interval_has_our_name_kites_and_upstreams(name: Any) -> None:
    assert kite_interval(name).name == "minute"


@pytest.mark.parametrize("name", ["2m", "4m", "", "week", "1s", "day5"])
def test_an_interval_unknown_to_kite_is_one_line(name: str) -> None:
    with pytest.raises(UnknownInterval, match="use one of 1m 3m"):
        kite_interval(name)


# --- hostile answers


GOOD = ["2026-08-03T09:15:00+0530", 100.0, 101.5, 99.5, 100.5, 1200]


@pytest.mark.parametrize(
    "candle",
    [
        [],
        GOOD[:5],
        [*GOOD, 1, 2],
        "candle",
        None,
        {"date": GOOD[0]},
        [None, *GOOD[1:]],
        [1785728700, *GOOD[1:]],
        ["yesterday", *GOOD[1:]],
        ["9999-12-31T23:59:59-2359", *GOOD[1:]],
        [GOOD[0], "100", *GOOD[2:]],
        [GOOD[0], True, *GOOD[2:]],
        [GOOD[0], math.nan, *GOOD[2:]],
        [GOOD[0], math.inf, *GOOD[2:]],
        [GOOD[0], 100.0, 99.0, 99.5, 100.5, 1200],  # high below low
        [GOOD[0], 100.0, 100.2, 99.5, 100.5, 1200],  # close above high
        [GOOD[0], 100.0, 101.5, 99.5, 100.5, -1],
        [*GOOD[:5], 1e300],
        [*GOOD[:5], 10**400],
        [*GOOD, 10**400],
        [GOOD[0], 100.0, 10**400, 99.5, 100.5, 1],
    ],
)
def test_a_malformed_row_is_counted_and_valid_rows_are_kept(candle: Any) -> None:
    rows, refused, _ = parse_rows({"candles": [candle, GOOD]}, INFY)
    assert [row.close for row in rows] == [100.5]
    assert refused == 1


@pytest.mark.parametrize("data", [None, [], "x", {}, {"candles": None}, {"candles": {}}])
def test_a_response_without_a_list_of_candles_is_unavailable(data: Any) -> None:
    with pytest.raises(KiteUnavailable, match="no list of candles"):
        parse_rows(data, INFY)
    assert parse_rows({"candles": []}, INFY) == ([], 0, 0)


@pytest.mark.parametrize(
    ("prices", "expected"),
    [
        ((104.0, 103.0, 97.0, 102.75), (104.0, 104.0, 97.0, 102.75)),  # the pre-open's price as open
        ((96.0, 103.0, 97.0, 102.75), (96.0, 103.0, 96.0, 102.75)),
    ],
)
def test_an_open_outside_high_and_low_widens_them_and_costs_no_row(
    prices: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    rows, refused, widened = parse_rows({"candles": [[GOOD[0], *prices, 10]]}, INFY)
    assert [tuple(row[1:5]) for row in rows] == [expected]
    assert (refused, widened) == (0, 1)


def test_negative_prices_are_prices() -> None:
    rows, refused, widened = parse_rows({"candles": [[GOOD[0], -37.0, -30.0, -40.0, -37.6, 10]]}, INFY)
    assert [tuple(row[1:5]) for row in rows] == [(-37.0, -30.0, -40.0, -37.6)]
    assert (refused, widened) == (0, 0)


def test_rows_are_sorted_and_starts_are_unique() -> None:
    later = ["2026-08-03T09:16:00+0530", *GOOD[1:]]
    rows, refused, _ = parse_rows({"candles": [later, GOOD, [*later[:4], 101.0, 5]]}, INFY)
    assert [(row.start, row.close) for row in rows] == [(1785728700, 100.5), (1785728760, 101.0)]
    assert refused == 0


@pytest.mark.parametrize("file", ["historical.json", "historical_minute.json", "historical_oi.json"])
def test_kites_recorded_responses_are_parsed(file: str) -> None:
    path = SHARED_DATA / "rest" / file
    if not path.exists():
        pytest.skip("the recorded responses are absent")
    data = json.loads(path.read_text(encoding="utf-8-sig"))["data"]
    rows, refused, _ = parse_rows(data, 12_073_986)  # a future: with open interest where it is given
    assert len(rows) == len(data["candles"])
    assert refused == 0
    assert (rows[0].oi is not None) == (file == "historical_oi.json")
    assert rows[0].start % 60 == 0


def test_dates_are_indian_time() -> None:
    assert epoch_of("2026-08-03", end=False) == epoch_of(date(2026, 8, 3), end=False)
    assert epoch_of("2026-08-03", end=True) == epoch_of(datetime(2026, 8, 4), end=False)
    assert epoch_of("2026-08-03 09:15:00", end=True) == 1785728700
    assert epoch_of(datetime(2026, 8, 3, 9, 15, tzinfo=IST), end=False) == 1785728700
    assert epoch_of(None, end=True) is None
