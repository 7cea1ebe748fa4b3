"""The rules of a candle, one by one, and as properties. A book is driven directly: no Redis, no clock."""

from __future__ import annotations

import math
import random
from typing import Any, Self

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.candles import codec
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.columns import WINDOW_MAX
from pkbrokers_redis.candles.model import parse_intervals
from pkbrokers_redis.candles.open_candles import close_candles
from pkbrokers_redis.candles.rules import apply_ticks
from pkbrokers_redis.candles.state import ShardState

TOKEN = 408065  # NSE:INFY
IST = 19_800  # seconds ahead of UTC
DAY = 1_784_505_600 - IST + 86_400 * 2  # a Wednesday's midnight in India: 2026-07-22
OPEN = DAY + 9 * 3600 + 15 * 60  # 09:15
INTERVALS = parse_intervals("1m,5m,60m,day")
Rows = dict[tuple[int, str], dict[int, list[Any]]]


def tick(
    second: float, price: float, volume: float | None, *, token: int = TOKEN, at: float | None = None,
    day: tuple[float, float, float] | None = None, oi: float | None = None,
) -> list[float]:  # fmt: skip
    """A tick `second` seconds after 09:15; full mode (a trade time) unless `at` equals it."""
    time_ms = (OPEN + second) * 1000
    low_high = (math.nan,) * 3 if day is None else day
    return [
        token, price, 1, math.nan if volume is None else volume, math.nan if oi is None else oi,
        *low_high, time_ms, time_ms + 300 if at is None else (OPEN + at) * 1000,
    ]  # fmt: skip


class Market:
    """A book, and what Redis would hold after its commits."""

    def __init__(
        self,
        mode: str = "market",
        grace: float = 2.0,
        intervals: str = "1m,5m,60m,day",
        derivatives: tuple[int, ...] = (),
    ) -> None:
        sessions = load_sessions(mode)  # type: ignore[arg-type]
        sessions.derivatives = frozenset(derivatives)
        self.book = ShardState(
            parse_intervals(intervals),
            sessions,
            grace_seconds=grace,
            event_clock=True,
        )
        self.lists: Rows = {}
        self.current: dict[int, dict[str, list[Any]]] = {}
        self.closed: list[tuple[str, int, int]] = []  # interval, start, rev
        self.state: dict[str, bytes] = {}

    def take(self, *ticks: list[float], batch: int | None = None) -> Self:
        array = np.array(ticks, float)
        size = batch or len(ticks)
        for first in range(0, len(ticks), size):
            part = array[first : first + size]
            assert apply_ticks(self.book, part, 0, np.array([len(part)]), 10_000) == len(part)
            self.commit()
        return self

    def close(self, second: float) -> Self:
        """The wall clock says `second` seconds after 09:15."""
        self.book.event_clock = False
        close_candles(self.book, (OPEN + second) * 1000, 10_000)
        self.book.event_clock = True
        self.commit(close=False)
        return self

    def commit(self, close: bool = True) -> None:
        if close:
            close_candles(self.book, 0, 10_000)
        changes = self.book.collect()
        for kind, i, k, first, last, rev in changes.ops:
            token = int(self.book.tokens[i])
            name = self.book.intervals[k].name
            text = changes.text[first:last]
            if kind == codec.PUT:
                row = msgspec.json.decode(text)
                rows = self.lists.setdefault((token, name), {})
                rows[row[0]] = row
            elif kind == codec.CURRENT:
                self.current.setdefault(token, {})[name] = msgspec.json.decode(text)
            elif kind == codec.DROP:
                del self.current[token][name]
            elif kind == codec.CLOSED:
                self.closed.append((name, msgspec.json.decode(text)[0], rev))
            elif kind == codec.INST_STATE:
                self.state[str(token)] = text
            elif kind == codec.CANDLES_STATE:
                self.state[f"{token}:candles"] = text

    def rows(self, interval: str, token: int = TOKEN) -> list[list[Any]]:
        """Completed rows by start, then the current one: what a reader sees."""
        rows = dict(self.lists.get((token, interval), {}))
        if interval in self.current.get(token, {}):
            row = self.current[token][interval]
            assert row[0] not in rows, "a candle is in the list and current at once"
            rows[row[0]] = row
        return [rows[start] for start in sorted(rows)]

    def all_rows(self) -> dict[str, list[list[Any]]]:
        return {interval.name: self.rows(interval.name) for interval in self.book.intervals}


def row(second: float, *rest: Any) -> list[Any]:
    return [int(OPEN + second), *rest]


def test_the_first_sight_is_the_baseline_and_makes_no_candle() -> None:
    market = Market().take(tick(10, 100, 5_000))
    assert market.rows("1m") == []
    assert market.rows("day") == []


def test_a_new_day_extreme_in_the_second_of_a_first_tick_without_trade_time_is_included() -> None:
    market = Market().take(tick(10.9, 100, 5_000, at=10.9, day=(100, 105, 95)))
    market.take(tick(10, 101, 5_010, at=10.95, day=(100, 106, 95)))
    assert market.rows("1m") == [row(0, 101, 106, 101, 101, 10, None, 1, "partial")]


def test_open_is_the_earliest_close_the_latest_high_and_low_the_extremes() -> None:
    market = Market().take(
        tick(-60, 99, 1_000),
        tick(1, 100, 1_010),
        tick(20, 104, 1_020),
        tick(30, 97, 1_030),
        tick(59, 101, 1_050),
    )
    assert market.rows("1m") == [row(0, 100, 104, 97, 101, 50, None, 4)]


def test_a_repeat_and_a_depth_only_packet_change_nothing() -> None:
    market = Market().take(tick(-60, 99, 1_000), tick(1, 100, 1_010))
    before = market.all_rows()
    market.take(tick(1, 100, 1_010), tick(1, 100, 1_010, at=30))
    assert market.all_rows() == before


def test_a_late_copy_with_a_lower_volume_takes_nothing_away() -> None:
    market = Market().take(
        tick(-60, 99, 1_000), tick(1, 100, 1_010), tick(2, 101, 1_020), tick(3, 102, 1_030)
    )
    before = market.all_rows()
    assert market.take(tick(2, 101, 1_020)).all_rows() == before


def test_without_a_trade_time_only_a_risen_volume_is_news() -> None:
    market = Market().take(tick(-60, 99, 1_000), tick(1, 100, 1_010, at=1), tick(5, 150, 1_010, at=5))
    assert market.rows("1m") == [row(0, 100, 100, 100, 100, 10, None, 1)]


def test_a_stale_packet_without_a_trade_time_is_no_news() -> None:
    market = Market().take(tick(-60, 99, 1_000), tick(1, 100, 1_010), tick(9, 101, 1_030))
    before = market.all_rows()
    assert market.take(tick(7.25, 100, 1_020, at=7.25)).all_rows() == before


def test_without_volume_a_new_price_or_time_is_news() -> None:
    index = 256265
    market = Market().take(
        tick(-60, 99, None, token=index), tick(1, 100, None, token=index), tick(1, 100, None, token=index),
        tick(1, 101, None, token=index), tick(2, 101, None, token=index),
    )  # fmt: skip
    assert market.rows("1m", index) == [row(0, 100, 101, 100, 101, 0, None, 3)]


def test_volume_traded_before_the_first_tick_is_in_no_candle() -> None:
    market = Market().take(tick(10_000, 100, 900_000), tick(10_030, 101, 900_025))
    (candle,) = market.rows("1m")
    assert candle[5] == 25


def test_a_new_trade_date_starts_from_zero() -> None:
    market = Market().take(
        tick(0, 100, 1_000), tick(5, 100, 2_000), tick(86_400, 110, 700), tick(86_460, 111, 900)
    )
    assert [each[5] for each in market.rows("1m")] == [1_000, 700, 200]


def test_the_pre_open_raises_the_baseline_only() -> None:
    market = Market().take(tick(-900, 100, 1_000), tick(-400, 101, 4_000), tick(3, 102, 4_100))
    assert market.rows("1m") == [row(0, 102, 102, 102, 102, 100, None, 1)]


def test_a_day_extreme_between_two_ticks_of_one_candle_is_included() -> None:
    market = Market().take(
        tick(-60, 99, 1_000, day=(99, 100, 98)),
        tick(1, 100, 1_010, day=(99, 100, 98)),
        tick(20, 101, 1_020, day=(99, 107, 93)),
    )
    assert market.rows("1m") == [row(0, 100, 107, 93, 101, 20, None, 2)]


def test_a_day_extreme_between_ticks_of_two_candles_belongs_to_neither() -> None:
    market = Market().take(
        tick(-60, 99, 1_000, day=(99, 100, 98)),
        tick(50, 100, 1_010, day=(99, 100, 98)),
        tick(70, 101, 1_020, day=(99, 107, 93)),
    )
    assert market.rows("1m") == [
        row(0, 100, 100, 100, 100, 10, None, 1),
        row(60, 101, 101, 101, 101, 10, None, 1),
    ]
    assert market.rows("5m") == [row(0, 100, 107, 93, 101, 20, None, 2)]


def test_the_day_candle_takes_the_packets_own_day_fields() -> None:
    noon = 10_000
    market = Market().take(
        tick(noon, 100, 900_000, day=(90, 120, 80)), tick(noon + 5, 101, 900_010, day=(90, 120, 80))
    )
    assert market.rows("day") == [row(0, 90, 120, 80, 101, 900_010, None, 1)]


def test_a_newer_candle_moves_the_old_one_to_the_list_in_the_same_commit() -> None:
    market = Market().take(tick(-60, 99, 1_000), tick(1, 100, 1_010), tick(61, 101, 1_020))
    assert list(market.lists[TOKEN, "1m"].values()) == [row(0, 100, 100, 100, 100, 10, None, 1)]
    assert market.current[TOKEN]["1m"] == row(60, 101, 101, 101, 101, 10, None, 1)


def test_a_candle_is_announced_once_when_end_and_grace_have_passed() -> None:
    market = Market().take(tick(-60, 99, 1_000), tick(1, 100, 1_010), tick(61, 101, 1_020))
    assert market.closed == []
    market.take(tick(62, 101, 1_030))
    assert market.closed == [("1m", int(OPEN), 0)]
    market.take(tick(63, 101, 1_040))
    assert market.closed == [("1m", int(OPEN), 0)]


def test_the_wall_clock_closes_an_illiquid_stocks_candle_without_another_tick() -> None:
    market = Market().take(tick(-60, 99, 1_000), tick(250, 100, 1_010)).close(301.9)
    assert market.closed == []
    market.close(302)
    assert market.closed == [("1m", int(OPEN + 240), 0), ("5m", int(OPEN), 0)]
    assert "1m" not in market.current[TOKEN]
    assert market.lists[TOKEN, "1m"][int(OPEN + 240)][5] == 10


def test_a_late_tick_within_the_grace_amends_without_an_announcement() -> None:
    market = Market().take(
        tick(-60, 99, 1_000), tick(1, 100, 1_010), tick(61, 101, 1_030), tick(59, 99, 1_020)
    )
    assert market.rows("1m") == [
        row(0, 100, 100, 99, 99, 20, None, 2),
        row(60, 101, 101, 101, 101, 10, None, 1),
    ]
    assert market.closed == []


def test_a_late_tick_amends_its_candle_and_announces_it_again_with_a_raised_rev() -> None:
    market = Market().take(tick(-60, 99, 1_000), tick(1, 100, 1_010), tick(70, 101, 1_030))
    assert market.closed == [("1m", int(OPEN), 0)]
    market.take(tick(58, 90, 1_020)).take(tick(59, 95, 1_025))
    assert market.closed == [("1m", int(OPEN), 0), ("1m", int(OPEN), 1), ("1m", int(OPEN), 2)]
    assert market.rows("1m") == [
        row(0, 100, 100, 90, 95, 25, None, 3),
        row(60, 101, 101, 101, 101, 5, None, 1),
    ]


def test_a_late_tick_of_a_missing_candle_inserts_it_between_its_neighbours() -> None:
    market = Market().take(
        tick(-60, 99, 1_000), tick(1, 100, 1_010), tick(130, 101, 1_050), tick(70, 98, 1_030)
    )
    assert market.rows("1m") == [
        row(0, 100, 100, 100, 100, 10, None, 1),
        row(60, 98, 98, 98, 98, 20, None, 1),
        row(120, 101, 101, 101, 101, 20, None, 1),
    ]


def test_a_candle_that_we_began_to_watch_inside_is_partial() -> None:
    market = Market().take(tick(90, 100, 1_000), tick(100, 101, 1_010), tick(121, 101, 1_020))
    assert market.rows("1m") == [
        row(60, 101, 101, 101, 101, 10, None, 1, "partial"),
        row(120, 101, 101, 101, 101, 10, None, 1),
    ]
    assert market.rows("5m")[0][-1] == "partial"


def test_a_price_of_0_before_the_first_trade_is_a_known_baseline_of_0() -> None:
    nothing = [tick(second, 0, 0, at=second) for second in (10, 11, 12)]
    market = Market().take(*nothing, tick(20, 100, 50), tick(70, 101, 60))
    assert market.rows("1m") == [
        row(0, 100, 100, 100, 100, 50, None, 1),
        row(60, 101, 101, 101, 101, 10, None, 1),
    ]
    assert market.book.counts()["invalid"] == 0


def test_a_price_of_0_with_a_volume_is_invalid_and_later_ones_change_nothing() -> None:
    market = Market().take(tick(1, 0, 7), tick(2, 100, 50), tick(20, 101, 60), tick(30, 0, 0))
    assert market.rows("1m") == [row(0, 101, 101, 101, 101, 10, None, 1, "partial")]
    assert market.book.counts()["invalid"] == 1


@pytest.mark.parametrize(
    ("second", "traded"), [(-1, False), (0, True), (22_499, True), (22_500, False), (30_000, False)]
)
def test_trades_outside_the_session_make_no_candle(second: int, traded: bool) -> None:
    market = Market().take(tick(-600, 99, 1_000), tick(second, 100, 1_010))
    assert bool(market.rows("1m")) is traded


def test_open_interest_is_the_latest_ticks() -> None:
    future = 2 + 256 * 50_000
    market = Market().take(
        tick(-60, 99, 1_000, token=future, oi=10),
        tick(1, 100, 1_010, token=future, oi=11),
        tick(2, 100, 1_020, token=future, oi=12),
    )
    assert market.rows("1m", future)[0][6] == 12


def test_open_interest_survives_a_newer_tick_of_a_mode_without_it() -> None:
    future = 2 + 256 * 50_000
    market = Market().take(
        tick(-60, 99, 1_000, token=future, oi=10),
        tick(1, 100, 1_010, token=future, oi=11),
        tick(3.5, 101, 1_030, token=future, at=3.5),
        tick(3, 101, 1_020, token=future, oi=12),
        tick(2, 101, 1_015, token=future, oi=13),
    )
    assert market.rows("1m", future)[0][4:7] == [101, 30, 12]


def test_invalid_ticks_are_counted_and_change_nothing() -> None:
    good = tick(-60, 99, 1_000), tick(1, 100, 1_010)
    bad = [
        tick(2, 0, 1_020),
        tick(2, math.nan, 1_020),
        tick(2, math.inf, 1_020),
        tick(2, 100, -5),
        tick(2, 100, 1e300),
        tick(2, 100, 1_020, token=0),
        tick(2, 100, 1_020, token=2**32),
        tick(-1e12, 100, 1_020),
        tick(1e12, 100, 1_020),
    ]
    market = Market().take(good[0], *bad, good[1], *bad)
    assert market.book.counts()["invalid"] == 2 * len(bad)
    assert market.rows("1m") == [row(0, 100, 100, 100, 100, 10, None, 1)]


def test_a_trade_time_far_ahead_of_its_receipt_counts_at_the_receipt() -> None:
    market = Market(mode="always")
    market.book.event_clock = False
    market.take(tick(-60, 99, 1_000), tick(9_000, 100, 1_010, at=30))
    assert market.book.counts()["future_clamped"] == 1
    assert [each[0] for each in market.rows("1m")] == [OPEN]


def test_buckets_are_anchored_at_the_open_for_every_interval() -> None:
    names = "1m,2m,3m,4m,5m,10m,15m,30m,60m,2h,day"
    market = Market(intervals=names).take(
        tick(-60, 99, 1_000), *(tick(s, 100, 1_000 + s) for s in range(1, 22_500, 7))
    )
    for interval in market.book.intervals:
        length = interval.seconds or 22_500
        starts = [each[0] - OPEN for each in market.rows(interval.name)]
        assert starts == list(range(0, 22_500, length))


def test_a_state_that_grows_beyond_its_arrays_keeps_every_instrument() -> None:
    market = Market()
    market.book = ShardState(INTERVALS, load_sessions("market"), event_clock=True, instruments=4)
    tokens = [256 * n + 1 for n in range(1, 10)]
    market.take(
        *(tick(-30, 100, 1_000, token=each) for each in tokens),
        *(tick(1, 100 + n, 1_010, token=each) for n, each in enumerate(tokens)),
    )
    assert len(market.book) == 9
    assert [market.rows("1m", each)[0][1] for each in tokens] == [100 + n for n in range(9)]


def test_many_candles_in_one_batch_all_reach_the_list_in_order() -> None:
    minutes = 375
    market = Market(intervals="1m,day").take(
        tick(-60, 99, 1_000), *(tick(60 * n, 100, 1_010 + n) for n in range(minutes))
    )
    assert [each[0] - OPEN for each in market.rows("1m")] == [60 * n for n in range(minutes)]
    assert [each[1] for each in market.closed] == sorted(each[1] for each in market.closed)


# -- properties ------------------------------------------------------------------------------------


@st.composite
def _trades(draw: st.DrawFn) -> list[list[float]]:
    """A baseline and up to forty trades in order, seconds apart, over a few minutes."""
    second, volume = 0, 1_000
    ticks = [tick(-30, 100, volume, day=(100, 100, 100))]
    high, low = 100.0, 100.0
    for _ in range(draw(st.integers(1, 40))):
        second += draw(st.sampled_from([0, 1, 1, 2, 7, 45, 130]))
        volume += draw(st.integers(1, 500))
        price = draw(st.integers(1_900, 2_100)) / 20
        hidden = draw(st.sampled_from([0.0, 0.0, 0.0, 3.0]))
        high, low = max(high, price + hidden), min(low, price - hidden)
        ticks.append(tick(second, price, volume, day=(100, high, low)))
    return ticks


@given(_trades(), st.integers(1, 7))
def test_batches_change_nothing(ticks: list[list[float]], batch: int) -> None:
    assert Market().take(*ticks, batch=batch).all_rows() == Market().take(*ticks).all_rows()


@given(_trades(), st.data())
def test_repeats_change_nothing(ticks: list[list[float]], data: st.DataObject) -> None:
    noisy = [ticks[0]]
    for n, each in enumerate(ticks[1:], 1):
        noisy.append(each)
        back = data.draw(st.integers(0, 3))
        noisy += [ticks[max(0, n - back)]] * data.draw(st.integers(0, 2))
    assert Market().take(*noisy).all_rows() == Market().take(*ticks).all_rows()


@given(_trades(), st.integers(0, 2**32), st.integers(1, 5))
def test_order_within_the_grace_changes_nothing(ticks: list[list[float]], seed: int, batch: int) -> None:
    rng = random.Random(seed)
    delayed = sorted(ticks[1:], key=lambda each: each[8] + rng.uniform(0, 2_000))
    # The book tells a straggler from a repeat among the last WINDOW_MAX ticks of an instrument.
    kept = [
        each
        for n, each in enumerate(delayed)
        if sum((other[8], other[3]) > (each[8], each[3]) for other in delayed[:n]) < WINDOW_MAX
    ]
    in_order = sorted(kept, key=lambda each: (each[8], each[3]))
    assert (
        Market().take(ticks[0], *kept, batch=batch).all_rows()
        == Market().take(ticks[0], *in_order).all_rows()
    )


@given(_trades())
def test_the_sum_of_volumes_is_last_minus_baseline(ticks: list[list[float]]) -> None:
    market = Market(intervals="1m,3m,60m").take(*ticks)
    for name in ("1m", "3m", "60m"):
        assert sum(each[5] for each in market.rows(name)) == ticks[-1][3] - ticks[0][3]


@given(_trades())
def test_every_row_has_its_open_and_close_between_low_and_high(ticks: list[list[float]]) -> None:
    for rows in Market().take(*ticks).all_rows().values():
        assert rows
        for _, opened, high, low, closed, volume, *_ in rows:
            assert low <= opened <= high
            assert low <= closed <= high
            assert volume >= 0


@given(_trades(), st.integers(0, 40))
def test_a_restored_state_continues_like_one_that_never_stopped(ticks: list[list[float]], cut: int) -> None:
    whole = Market().take(*ticks, batch=3)
    first = Market().take(*ticks[: cut + 1], batch=3)
    second = Market()
    second.lists, second.current, second.closed = first.lists, first.current, first.closed
    texts = {name: msgspec.json.encode(each) for name, each in first.current.get(TOKEN, {}).items()}
    second.book.restore(TOKEN, first.state[str(TOKEN)], first.state.get(f"{TOKEN}:candles"), texts)
    if ticks[cut + 1 :]:
        second.take(*ticks[cut + 1 :], batch=3)
    assert second.all_rows() == whole.all_rows()


def _oracle(ticks: list[list[float]], seconds: int) -> list[list[Any]]:
    """The rules again, naively: all ticks at hand, sorted, grouped; nothing shared with the kernels."""
    rows: dict[int, list[Any]] = {}
    last = ticks[0]
    seen = {(each[8], each[3]) for each in ticks[:1]}
    for each in sorted(ticks[1:], key=lambda t: (t[8], t[3])):
        if (each[8], each[3]) in seen:
            continue
        seen.add((each[8], each[3]))
        second = int(each[8] // 1000 - OPEN)
        start = int(OPEN + second // seconds * seconds)
        price = each[1]
        high, low = [price], [price]
        if (last[8] // 1000 - OPEN) // seconds == second // seconds:
            high += [each[6]] if each[6] > last[6] else []
            low += [each[7]] if each[7] < last[7] else []
        found = rows.setdefault(start, [start, price, price, price, price, 0, None, 0])
        found[2], found[3], found[4] = max(found[2], *high), min(found[3], *low), price
        found[5] += each[3] - last[3]
        found[7] += 1
        last = each
    return [rows[start] for start in sorted(rows)]


@given(_trades())
def test_rows_equal_a_naive_reading_of_the_rules(ticks: list[list[float]]) -> None:
    market = Market().take(*ticks, batch=4)
    for name, seconds in (("1m", 60), ("5m", 300), ("60m", 3600)):
        assert market.rows(name) == _oracle(ticks, seconds)


@pytest.mark.parametrize("has_derivatives", [False, True])
def test_after_august_2026_a_stock_with_derivatives_trades_on_in_the_closing_auction(
    has_derivatives: bool,
) -> None:
    other, later = 341249, 16 * 86_400  # 2026-08-07, a Friday
    market = Market(derivatives=(other, TOKEN) if has_derivatives else (other,))
    market.take(
        tick(later, 100, 1_000),
        tick(later + 3600 * 6 - 60, 101, 1_010),  # 15:14
        tick(later + 3600 * 6 + 18 * 60, 102, 1_030),  # 15:33, only in the auction's window
    )
    volumes = [each[5] for each in market.rows("1m")]
    assert volumes == ([10, 20] if has_derivatives else [10])


def test_a_first_sight_before_the_open_may_be_yesterdays_last_tick() -> None:
    # Kite resends it after the subscribe, in quote mode: without a trade time it looks as if of today.
    market = Market().take(
        tick(-1400.5, 99.0, 295_739, at=-1400.5),
        tick(10, 100.0, 40),
        tick(20, 101.0, 55),
        tick(70, 102.0, 60),
    )
    assert [row[5] for row in market.rows("1m")] == [55, 5]


def test_the_pre_opens_volume_is_the_baseline_even_when_yesterdays_was_seen_first() -> None:
    market = Market().take(
        tick(-1400.5, 99.0, 295_739, at=-1400.5),
        tick(-600, 99.5, 30),
        tick(10, 100.0, 40),
    )
    assert [row[5] for row in market.rows("1m")] == [10]


def test_a_late_tick_with_less_volume_starts_no_new_day() -> None:
    market = Market().take(
        tick(-1400.5, 99.0, 10), tick(10, 100.0, 40), tick(20, 101.0, 55), tick(15, 100.5, 45)
    )
    assert [row[5] for row in market.rows("1m")] == [45]
