"""Rule 2 when the exchange takes volume back: three agreeing packets are believed, and the sums add up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.rules import apply_ticks
from tests.candles.test_rules import TOKEN, Market, row, tick

SPIKE = 1_200_000


def quote(second: float, price: float, volume: float) -> list[float]:
    """A packet of quote mode: it has no trade time, but the time received."""
    return tick(second, price, volume, at=second)


def adds_up(market: Market, interval: str) -> bool:
    inst = market.book.arrays.inst[market.book.index(TOKEN)]
    return sum(each[5] for each in market.rows(interval)) == inst[col.CUM_VOLUME] - inst[col.BASELINE]


@pytest.mark.parametrize("packet", [tick, quote])
def test_a_wrong_volume_is_taken_back_after_three_packets(packet) -> None:  # type: ignore[no-untyped-def]
    market = Market().take(packet(-60.25, 99, 100_000), packet(1.25, 100, 100_010), batch=1)
    market.take(packet(5.25, 101, SPIKE), batch=1)
    for n, volume in enumerate((100_200, 100_250, 100_300, 100_400)):
        market.take(packet(6.25 + n, 102 + n, volume))
    assert market.rows("1m") == [row(0, 100, 105, 100, 105, 400, None, 6)]
    market.take(packet(65.25, 107, 100_500), packet(130.25, 108, 100_600), batch=1)
    assert [each[5] for each in market.rows("1m")] == [400, 100, 100]
    assert all(adds_up(market, name) for name in ("1m", "5m", "60m"))
    assert market.rows("day")[0][5] == 100_600
    assert market.book.counts()["volumes_taken_back"] == 1


@pytest.mark.parametrize("packet", [tick, quote])
def test_prices_are_news_before_the_lower_volume_is_believed(packet) -> None:  # type: ignore[no-untyped-def]
    market = Market().take(packet(-60.25, 99, 100_000), packet(1.25, 100, SPIKE), batch=1)
    market.take(packet(2.25, 90, 100_100), packet(3.25, 110, 100_150), batch=1)
    assert market.rows("1m")[0][1:5] == [100, 110, 90, 110]


def test_a_correction_across_a_minutes_end_gives_each_minute_its_own_volume() -> None:
    market = Market().take(tick(-60, 99, 100_000), tick(50, 100, 100_010), tick(59, 101, SPIKE), batch=1)
    market.take(tick(60, 102, 100_030), tick(61, 102, 100_040), tick(62, 103, 100_050), batch=1)
    assert [each[5] for each in market.rows("1m")] == [10, 40]
    assert adds_up(market, "1m")
    assert adds_up(market, "5m")


def test_a_surplus_that_left_memory_stays_in_its_row_and_the_sums_still_add_up() -> None:
    market = Market().take(tick(-60, 99, 100_000), tick(5, 100, SPIKE), batch=1)
    market.take(*[tick(60.0 * n + 5, 100, SPIKE + 10 * n) for n in range(1, 8)], batch=1)
    market.take(*[tick(500 + n, 101, 100_500 + 10 * n) for n in range(4)], batch=1)
    assert market.rows("1m")[0][5] == SPIKE - 100_000
    assert all(adds_up(market, name) for name in ("1m", "5m", "60m"))
    market.take(tick(600, 101, 100_600))
    assert market.rows("1m")[-1][5] == 70
    assert all(adds_up(market, name) for name in ("1m", "5m", "60m"))
    assert market.rows("day")[0][5] == 100_600


def test_a_wrong_first_volume_of_the_day_is_corrected_too() -> None:
    market = Market().take(tick(-60, 99, SPIKE), tick(1, 100, 100_010), tick(2, 101, 100_020), batch=1)
    market.take(tick(3, 102, 100_030), tick(4, 103, 100_050), batch=1)
    assert market.rows("1m")[-1][4] == 103
    assert adds_up(market, "1m")


def test_a_volume_that_returns_to_the_old_one_without_a_trade_is_believed_when_depth_packets_agree() -> None:
    market = Market().take(tick(-60, 99, 100_000), tick(1, 100, 100_010), tick(2, 100, SPIKE), batch=1)
    market.take(*[tick(3, 100, 100_010, at=3.5 + n) for n in range(3)], batch=1)
    assert market.book.arrays.inst[0, col.CUM_VOLUME] == 100_010
    assert market.rows("1m")[0][5] == 10


@pytest.mark.parametrize(
    "later",
    [
        [tick(1.5, 100, 100_015, at=6 + n) for n in range(4)],  # late: older trades
        [tick(6, 100, 100_015, at=6.3) for _ in range(4)],  # one packet, sent again and again
        [
            tick(6 + n, 100, volume) for n, volume in enumerate((90_000, 80_000, 70_000, 60_000))
        ],  # no two agree
        [tick(6 + n, 100, 0) for n in range(4)],  # no volume is no trade yet
        [tick(6 + n, 100, math.nan) for n in range(4)],
    ],
    ids=["late", "repeated", "disagreeing", "zero", "unknown"],
)
def test_what_is_no_correction_changes_no_volume(later: list[list[float]]) -> None:
    market = Market().take(tick(-60, 99, 100_000), tick(1, 100, 100_010), tick(5, 101, 101_000), batch=1)
    market.take(*later, batch=1)
    assert market.rows("1m")[0][5] == 1_000
    assert market.book.counts()["volumes_taken_back"] == 0


def test_packets_in_between_with_the_higher_volume_start_the_count_again() -> None:
    market = Market().take(tick(-60, 99, 100_000), tick(1, 100, 101_000), batch=1)
    for n in range(4):
        market.take(tick(2 + 2 * n, 100, 100_500 + n), tick(3 + 2 * n, 100, 101_001 + n), batch=1)
    assert market.book.counts()["volumes_taken_back"] == 0


def test_a_lagging_copy_of_another_producer_without_trade_times_is_no_evidence() -> None:
    market = Market()
    mine, other = np.array([7]), np.array([8])
    for each in (quote(-60.25, 99, 100_000), quote(1.25, 100, 101_000)):
        apply_ticks(market.book, np.array([each]), 0, np.array([1]), 100, mine)
    for n in range(5):
        late = np.array([quote(2.25 + n, 100 + n, 100_500 + n)])
        apply_ticks(market.book, late, 0, np.array([1]), 100, other)
    market.commit()
    assert market.rows("1m")[0][4:6] == [100, 1_000]
    for n in range(5):
        again = np.array([quote(8.25 + n, 100 + n, 100_500 + n)])
        apply_ticks(market.book, again, 0, np.array([1]), 100, mine)
    market.commit()
    assert market.rows("1m")[0][4:6] == [104, 504]


def test_a_new_day_begins_without_what_was_counted_before() -> None:
    market = Market().take(tick(-60, 99, 100_000), tick(1, 100, SPIKE), batch=1)
    market.take(tick(2, 100, 100_100), tick(3, 100, 100_150), batch=1)
    market.take(*[tick(86_400 + n, 100, 10 * n) for n in range(1, 5)], batch=1)
    assert market.rows("1m")[-1][5] == 40
    assert market.book.counts()["volumes_taken_back"] == 0
