"""Where one trade date ends and another begins: volumes from 0 again, ticks of yesterday that come today."""

from __future__ import annotations

import pytest

from tests.candles.test_rules import OPEN, Market, row, tick

DAY_S = 86_400
MIDNIGHT = -(9 * 3600 + 15 * 60)  # in seconds after 09:15
BASELINE = MIDNIGHT - 0.001  # where a trade file's first tick stands, the day before its first trade


@pytest.mark.parametrize("days", [1, 2, 3])
def test_a_replay_of_another_day_leaves_the_days_before_as_they_are(days: int) -> None:
    first = (tick(BASELINE, 100, 0), tick(3_600, 100, 5), tick(3_700, 105, 9), tick(3_800, 103, 12))
    later = (tick(3_600 + days * DAY_S, 150, 5), tick(3_700 + days * DAY_S, 155, 9))
    market = Market(mode="always").take(*first)
    before = {name: market.rows(name) for name in ("1m", "5m", "60m", "day")}
    market.take(tick(BASELINE + days * DAY_S, 150, 0), *later)
    for name, rows in before.items():
        assert market.rows(name)[: len(rows)] == rows
    assert [each[5] for each in market.rows("1m")][3:] == [5, 4]
    midnight = MIDNIGHT + days * DAY_S
    assert market.rows("day")[1:] == [row(midnight, 150, 155, 150, 155, 9, None, 2)]


def test_the_same_trades_again_change_nothing() -> None:
    trades = (tick(BASELINE, 100, 0), tick(3_600, 100, 5), tick(3_700, 105, 9))
    market = Market(mode="always").take(*trades)
    before = market.all_rows()
    assert market.take(*trades).all_rows() == before


@pytest.mark.parametrize("second", [DAY_S - 1_200.5, DAY_S + 5.5])
def test_a_packet_of_a_day_without_a_trade_yet_is_no_trade(second: float) -> None:
    # Before the first trade Kite sends volume 0 with yesterday's last price, and in full mode its time.
    trades = tick(22_440, 100, 1_000), tick(22_498, 100, 2_000), tick(22_499, 101, 2_500)
    market = Market().take(tick(-60, 99, 0), *trades).close(22_600)
    before, announced = market.all_rows(), len(market.closed)
    market.take(tick(22_499, 101, 0, at=second), tick(second, 101, 0, at=second))
    market.take(tick(22_499, 101, 0, at=second), tick(22_560, 101, 0, at=second))
    assert market.all_rows() == before
    assert len(market.closed) == announced
    assert market.book.counts()["repeats"] >= 2
    market.take(tick(DAY_S + 10, 102, 40))
    assert market.rows("1m")[-1] == row(DAY_S, 102, 102, 102, 102, 40, None, 1)


def test_volume_0_before_the_open_takes_back_what_was_another_days() -> None:
    copy = tick(-1400.5, 99, 295_739, at=-1400.5)  # quote mode: yesterday's last tick, as if of today
    none_yet = tick(-900.5, 99, 0, at=-900.5)
    busier = tick(20, 100, 300_000)
    for before in ((copy,), (tick(-DAY_S, 99, 200_000), copy)):
        assert Market().take(*before, none_yet, busier).rows("1m")[-1][5] == 300_000


def test_an_instrument_without_any_volume_has_candles_all_the_same() -> None:
    market = Market().take(*(tick(day * DAY_S + s, 100 + s, 0) for day in (0, 1) for s in (1, 61, 121)))
    assert [each[0] for each in market.rows("1m")] == [OPEN + DAY_S + s for s in (0, 60, 120)]


def test_late_ticks_of_yesterday_that_come_one_after_the_other_have_their_own_volumes() -> None:
    yesterday = [tick(60 * n, 100 + n, 1_000 + 100 * n * n) for n in range(6)]
    today = tick(DAY_S + 5, 110, 700)
    market = Market(intervals="1m,5m,60m").take(*yesterday[:3], today, *yesterday[3:])
    in_order = Market(intervals="1m,5m,60m").take(*yesterday, today)
    assert [each[5] for each in market.rows("1m")] == [100, 300, 500, 700, 900, 700]
    for name in ("1m", "5m", "60m"):
        assert market.rows(name) == in_order.rows(name)
