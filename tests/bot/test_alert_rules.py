"""When an alert fires, tick by tick."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.bot.alerts.rules import (
    FORMS,
    USAGE,
    Alert,
    Kind,
    Watch,
    first_state,
    parse,
)
from pkbrokers_redis.errors import PkbError

NAN = math.nan
T0 = 1_767_584_700_000  # 2026-01-05 09:15 in Kolkata
MINUTE = 60_000


def alert(kind: Kind, value: float = 0.0, once: bool = False) -> Alert:
    return Alert(3, 1, 1, 408065, "NSE:INFY", kind, value, once, 0.0)


def prices(watch: Watch, *values: float, start: int = 0) -> list[bool]:
    """Whether each price fires, a tick a second."""
    return [
        watch.tick(price, 100.0 + start + n, NAN, NAN, T0 + (start + n) * 1000) is not None
        for n, price in enumerate(values)
    ]


# --- parsing


@pytest.mark.parametrize(
    ("text", "symbol", "kind", "value", "once"),
    [
        ("INFY above 1600", "INFY", "above", 1600.0, False),
        ("INFY > 1,600.50", "INFY", "above", 1600.5, False),
        ("INFY >1600", "INFY", "above", 1600.0, False),
        ("INFY below 1500 once", "INFY", "below", 1500.0, True),
        ("NIFTY 50 above 24500", "NIFTY 50", "above", 24500.0, False),
        ("NIFTY 50 24500", "NIFTY 50", "cross", 24500.0, False),
        ("INFY 1550", "INFY", "cross", 1550.0, False),
        ("INFY move 2%", "INFY", "move", 2.0, False),
        ("INFY 2%", "INFY", "move", 2.0, False),
        ("INFY -2%", "INFY", "move", 2.0, False),
        ("INFY volume 5x", "INFY", "volume", 5.0, False),
        ("INFY high", "INFY", "high", 0.0, False),
        ("infy LOW once", "infy", "low", 0.0, True),
        ("feed", "", "feed", 30.0, False),
        ("feed 45s", "", "feed", 45.0, False),
    ],
)
def test_an_alert_is_parsed(text: str, symbol: str, kind: str, value: float, once: bool) -> None:
    parsed = parse(text.split())
    assert (parsed.symbol, parsed.kind, parsed.value, parsed.once) == (symbol, kind, value, once)


@pytest.mark.parametrize(
    "text",
    ["", "INFY", "once", "INFY above", "INFY above x", "INFY above nan", "INFY above -5", "INFY above inf",
     "INFY move 0%", "INFY volume 1x", "feed 1", "feed 99999", "INFY above 1e99"],
)  # fmt: skip
def test_an_invalid_alert_is_refused_with_the_usage(text: str) -> None:
    with pytest.raises(PkbError) as caught:
        parse(text.split())
    assert "above 1600" in caught.value.hint


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_has_words_a_rule_and_a_line_in_the_docs(kind: Kind) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bot.md").read_text(encoding="utf-8")
    alerts = page.partition("## Alerts")[2].partition("Alerts are evaluated")[0]
    typed = {"1550"} if kind == "cross" else {*FORMS[kind].words}  # a bare price is crossed
    number = f" {FORMS[kind].minimum}" if FORMS[kind].maximum else ""
    symbol = "" if kind == "feed" else "INFY "
    assert parse(f"{symbol}{FORMS[kind].words[0]}{number}".split()).kind == kind
    for text in (USAGE, alerts):
        assert typed & set(re.findall(r"[\w.]+", text)), f"{kind} is not explained"


# --- levels


def test_above_fires_once_per_crossing_from_below() -> None:
    watch = Watch(alert("above", 100))
    assert prices(watch, 105, 99, 99.95, 100, 101, 100, 99.95, 100.05) == [
        False, False, False, True, False, False, False, True,
    ]  # fmt: skip


def test_above_does_not_fire_when_the_price_touches_the_level_from_above() -> None:
    assert prices(Watch(alert("above", 100)), 101, 100, 101) == [False, False, False]


def test_below_fires_once_per_crossing_from_above() -> None:
    assert prices(Watch(alert("below", 100)), 99, 101, 100, 99, 101, 99) == [
        False, False, True, False, False, True,
    ]  # fmt: skip


def test_cross_fires_in_both_directions() -> None:
    assert prices(Watch(alert("cross", 100)), 99, 101, 99, 100, 99, 98) == [
        False, True, True, True, False, False,
    ]  # fmt: skip


def test_the_first_price_fires_nothing() -> None:
    assert prices(Watch(alert("above", 100)), 150, 160) == [False, False]


def test_a_gap_overnight_is_a_crossing() -> None:
    watch = Watch(alert("above", 100))
    watch.tick(99, 5_000_000, NAN, NAN, T0)
    assert watch.tick(104, 10, NAN, NAN, T0 + 86_400_000), "a new day's volume is small, its time is not"


def test_a_tick_older_than_the_last_one_is_skipped() -> None:
    watch = Watch(alert("above", 100))
    assert prices(watch, 99, 101) == [False, True]
    assert watch.tick(99, 100, NAN, NAN, T0) is None, "a producer's repeat"
    assert watch.tick(101.5, 101, NAN, NAN, T0 + 1000) is None, "would be another crossing, had 99 counted"


def test_ticks_of_one_second_are_ordered_by_volume() -> None:
    watch = Watch(alert("above", 100))
    watch.tick(99, 10, NAN, NAN, T0)
    assert watch.tick(98, 9, NAN, NAN, T0) is None
    assert watch.tick(100, 11, NAN, NAN, T0)


def test_an_index_without_volume_fires() -> None:
    watch = Watch(alert("above", 100))
    watch.tick(99, NAN, NAN, NAN, T0)
    assert watch.tick(100, NAN, NAN, NAN, T0)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.integers(0, 59))
def test_saving_and_restoring_at_any_tick_changes_nothing(steps: list[int], saved_at: int) -> None:
    values = [100.0 + step for step in steps]
    for kind in ("above", "below", "cross", "move", "high", "low"):
        made = alert(kind, 1.0 if kind == "move" else 100.0)  # type: ignore[arg-type]
        whole = prices(Watch(made), *values)
        first = Watch(made)
        before = prices(first, *values[:saved_at])
        second = Watch(made, first.state() if values[:saved_at] else ())
        # What was read since the last commit is read again, and leads to the same.
        assert before + prices(second, *values[saved_at:], start=saved_at) == whole


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=60))
def test_above_fires_exactly_at_crossings_from_below(steps: list[int]) -> None:
    values = [100.0 + step for step in steps]
    expected = [False] + [a < 100 <= b for a, b in itertools.pairwise(values)]
    assert prices(Watch(alert("above", 100)), *values) == expected


# --- moves, extremes, volume


def test_a_move_is_measured_from_the_price_of_the_last_one() -> None:
    assert prices(Watch(alert("move", 2)), 100, 101.95, 102, 103, 104.04, 101, 101.95) == [
        False, False, True, False, True, True, False,
    ]  # fmt: skip


def test_a_new_high_is_relative_to_the_days_high_and_fires_once_per_run() -> None:
    watch = Watch(alert("high"))
    fired = [
        watch.tick(price, n, high, 90, T0 + n * 1000) is not None
        for n, (price, high) in enumerate(
            [(100, 110), (109, 110), (108, 111), (112, 112), (110, 112), (113, 113)]
        )
    ]
    assert fired == [False, False, True, False, False, True]  # the third between two ticks; then a pullback


def test_a_new_day_has_its_own_low() -> None:
    watch = Watch(alert("low"))
    assert prices(watch, 100, 90, 95) == [False, True, False]
    assert watch.tick(80, 1, NAN, 80, T0 + 86_400_000) is None, "the first tick of a day is its low"
    assert watch.tick(79, 2, NAN, 79, T0 + 86_401_000)


def minute_of(watch: Watch, number: int, base: float, *parts: float) -> list[bool]:
    fired, volume = [], base
    for n, part in enumerate(parts):
        volume += part
        fired.append(watch.tick(100, volume, NAN, NAN, T0 + number * MINUTE + n * 1000) is not None)
    return fired


def test_a_minute_with_many_times_the_average_volume_fires_once() -> None:
    watch = Watch(alert("volume", 5))
    volume = 0.0
    for number in range(8):
        assert minute_of(watch, number, volume, 5, 5) == [False, False]
        volume += 10
    # The first minute began with our first tick: its 5 are not in the average.
    assert minute_of(watch, 8, volume, 40, 20, 500) == [False, True, False]
    assert minute_of(watch, 9, volume + 560, 900) == [False], "the spike goes on"
    assert minute_of(watch, 10, volume + 1460, 1) == [False]
    assert minute_of(watch, 11, volume + 1461, 5000) == [True], "after a calm minute"


def test_a_new_days_volume_starts_at_0() -> None:
    watch = Watch(alert("volume", 5), [T0, 1e6, T0 // MINUTE, 999_990.0, False, [10.0] * 20])
    tomorrow = T0 + 86_400_000
    assert watch.tick(100, 30, NAN, NAN, tomorrow) is None
    assert watch.tick(100, 60_000, NAN, NAN, tomorrow + 1000)


def test_the_current_quote_is_an_alerts_first_tick() -> None:
    quote = {"last_price": 99.0, "volume": 5, "last_trade_time": "2026-01-05T09:15:00+05:30"}
    state = first_state(alert("above", 100), quote, [])
    assert Watch(alert("above", 100), state).tick(100, 6, NAN, NAN, T0)
    assert first_state(alert("above", 100), {}, []) == []
    assert first_state(alert("above", 100), {"last_price": "x", "volume": "y"}, []) == []
    volume = first_state(alert("volume", 5), quote, [10.0] * 30)
    assert Watch(alert("volume", 5), volume).tick(100, 60, NAN, NAN, T0 + 1000)


def test_a_quote_without_a_trade_time_counts_at_its_receive_time() -> None:
    received = {"received_at": "2026-01-05T09:15:00.250+05:30"}
    for more in ({"mode": "ltp"}, {"mode": "quote", "volume": 5}, {"last_trade_time": None, "volume": 5}):
        state = first_state(alert("above", 100), {"last_price": 99.0, **received, **more}, [])
        assert Watch(alert("above", 100), state).tick(100, 6, NAN, NAN, T0 + 300), more


@pytest.mark.parametrize("stated", ["2027-02-09T10:00:00+05:30", "2500-01-01T00:00:00+05:30"])
def test_a_quote_with_a_future_trade_time_counts_at_its_receive_time(stated: str) -> None:
    quote = {"last_price": 99.0, "last_trade_time": stated, "received_at": "2026-01-05T09:15:00.250+05:30"}
    state = first_state(alert("above", 100), quote, [])
    assert Watch(alert("above", 100), state).tick(100, 6, NAN, NAN, T0 + 300)


def test_a_malformed_state_starts_fresh() -> None:
    for state in ([1], [1, 2], ["x", "y", 1, 2], [None, None, None], [1, 2, "a"]):
        for kind in ("above", "move", "volume", "high"):
            watch = Watch(alert(kind, 5), state)  # type: ignore[arg-type]
            fresh = Watch(alert(kind, 5))
            assert watch.tick(100, 1, NAN, NAN, T0) == fresh.tick(100, 1, NAN, NAN, T0)
            assert watch.state() == fresh.state()
