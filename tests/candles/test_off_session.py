"""Trades outside the windows raise the baseline only, in whatever order they and the windows' own come."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from pkbrokers_redis.candles import columns as col
from tests.candles.test_repair import Repaired
from tests.candles.test_rules import OPEN, TOKEN, Market, row, tick

YESTERDAY = tick(-86_400 + 21_900, 90, 70_000)
CLOSE = 22_500  # 15:30
DRILL = -872 * 86_400  # Saturday 2024-03-02: 09:15 to 10:00, and 11:30 to 12:30
PRE_OPEN = tick(-450, 100, 400), tick(-449, 100, 500_000)
FIRST = tick(3, 101, 500_010)


def volumes(market: Market) -> list[float]:
    return [each[5] for each in market.rows("1m")]


def adds_up(market: Market) -> bool:
    """Rule 2 for a market of one day."""
    inst = market.book.arrays.inst[market.book.index(TOKEN)]
    return bool(sum(volumes(market)) == inst[col.CUM_VOLUME] - inst[col.BASELINE])


@pytest.mark.parametrize("known", [True, False])
def test_a_stale_copy_of_a_pre_open_tick_adds_no_pre_open_volume_to_a_minute(known: bool) -> None:
    before = (YESTERDAY,) if known else (tick(-900, 99, 300),)
    for order in itertools.permutations((*PRE_OPEN, PRE_OPEN[0])):
        market = Market().take(*before, *order, FIRST)
        assert market.rows("1m") == [row(0, 101, 101, 101, 101, 10, None, 1)]
        assert adds_up(market)


def test_a_volume_below_the_pre_opens_is_another_days_only_before_the_open() -> None:
    copy = tick(-1200.5, 90, 70_000, at=-1200.5)  # quote mode: yesterday's last tick, as if of today
    assert volumes(Market().take(YESTERDAY, copy, tick(3, 101, 40), tick(5, 101, 55))) == [55]
    late = tick(4, 101, 90, day=(90, 101, 90))
    assert volumes(Market().take(YESTERDAY, *PRE_OPEN, FIRST, late)) == [10]


def test_a_late_tick_of_the_session_after_a_post_close_tick_keeps_its_volume() -> None:
    in_order = tick(CLOSE - 2, 100, 2_000), tick(CLOSE - 1, 101, 9_000), tick(CLOSE + 60, 101, 9_500)
    for known, first in ((0, -60), (2_000 - 1, CLOSE - 3)):
        ticks = (tick(first, 100, known), *in_order)
        late = (*ticks[:2], ticks[3], ticks[2])
        markets = [Market().take(*each) for each in (ticks, late, (ticks[0], *late[2:]))]
        assert markets[0].rows("1m")[-1][5] == 9_000 - known
        assert markets[1].rows("1m") == markets[0].rows("1m")
        assert volumes(markets[2]) == [9_000 - known]  # the minute's only tick comes late
        assert all(adds_up(each) for each in markets)


def test_a_late_tick_of_the_first_window_received_between_windows_keeps_its_volume() -> None:
    a, b, between, c = (
        tick(DRILL + second, 100, volume)
        for second, volume in ((10, 1_000), (2_699, 1_500), (2_701, 1_600), (8_105, 1_700))
    )
    for order in ((a, b, between, c), (a, between, b, c)):
        market = Market().take(tick(DRILL - 60, 99, 900), *order)
        assert volumes(market) == [100, 500, 100]
        assert adds_up(market)


def test_a_late_tick_of_the_first_window_counts_from_the_pre_open_volume() -> None:
    market = Market().take(YESTERDAY, *PRE_OPEN, tick(CLOSE + 5, 101, 500_020), tick(CLOSE - 1, 101, 500_015))
    assert volumes(market) == [15]


def test_history_of_a_minute_before_a_trade_between_two_windows_tells_its_volume_once() -> None:
    market = Repaired().take(
        tick(DRILL - 300, 100, 0), tick(DRILL + 2_580, 100, 1_000), tick(DRILL + 2_701, 100, 1_600)
    )
    market.outage(DRILL + 2_640, DRILL + 2_760)
    lost = [OPEN + DRILL + 2_640, 100, 100, 100, 100, 500, None]
    market.backfill(DRILL + 2_640, DRILL + 2_760, lost, now=DRILL + 2_770)
    market.take(tick(DRILL + 8_105, 101, 1_700), tick(DRILL + 8_165, 101, 2_300))
    assert volumes(market) == [1_000, 500, 100, 600]
    assert market.adds_up()


def test_history_of_the_open_counts_on_from_the_pre_open() -> None:
    market = Repaired().take(YESTERDAY, *PRE_OPEN)
    market.backfill(0, 60, [OPEN, 100, 102, 99, 101, 700, None])
    market.take(tick(65, 101, 500_800))
    assert volumes(market) == [700, 100]
    assert [each[5] for each in market.rows("60m")] == [800]


def test_the_off_session_tick_survives_a_restart() -> None:
    market = Repaired().take(YESTERDAY, *PRE_OPEN)
    hot = msgspec.json.decode(market.state[str(TOKEN)])
    assert hot[col.OFF_SESSION_TIME : col.WINDOW_SIZE] == [(OPEN - 449) * 1000, 500_000]
    market.change_hands()
    market.take(PRE_OPEN[0], FIRST)
    assert volumes(market) == [10]
    assert market.inst[col.OFF_SESSION_TIME] == 0  # it is in the baseline now


def test_without_volumes_what_trades_outside_is_nothing() -> None:
    market = Market().take(tick(-60, 99, None), tick(-50, 100, None), tick(3, 101, None))
    assert volumes(market) == [0]
    market = Market().take(tick(-60, 99, 100), tick(-50, 100, 400), tick(3, 101, None), tick(4, 101, 410))
    assert volumes(market) == [10]
