"""Rule 5: a candle that the clock closes although its feed was not heard to its end."""

from __future__ import annotations

from typing import Any

import numpy as np

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.amend import Outage, flag_outage
from pkbrokers_redis.candles.open_candles import UNHEARD_WAIT_MS, clear_heard, close_candles
from pkbrokers_redis.candles.rules import apply_ticks
from tests.candles.test_rules import OPEN, TOKEN, Market, tick

WAIT_S = UNHEARD_WAIT_MS / 1000


class Heard(Market):
    """A market by the wall clock whose feed was heard to a known second."""

    def heard(self, second: float) -> Heard:
        self.book.arrays.inst[self.book.index(TOKEN), col.HEARD] = (OPEN + second) * 1000
        if self.book.unheard:
            clear_heard(self.book)
        self.commit(close=False)
        return self

    def flags(self, interval: str = "1m") -> list[Any]:
        return [row[8] if len(row) > 8 else "" for row in self.rows(interval)]


def traded() -> Heard:
    """09:15 holds trades to 09:15:48; nothing is announced yet."""
    market = Heard(intervals="1m,5m,day")
    market.book.event_clock = False
    ticks = np.array([tick(-5, 100, 1_000), tick(5, 101, 1_010), tick(48, 102, 1_020)])
    apply_ticks(market.book, ticks, 0, np.array([3]), 1_000)
    market.commit(close=False)
    return market


def test_a_candle_whose_feed_was_heard_to_its_end_closes_at_once_and_is_whole() -> None:
    market = traded().heard(60.1).close(62)
    assert (market.closed, market.flags()) == ([("1m", OPEN, 0)], [""])


def test_a_candle_of_a_feed_that_died_in_it_carries_gap_from_its_first_announcement() -> None:
    market = traded().heard(50).close(62)
    assert market.closed == []  # it waits for the feed's progress
    assert market.book.next_due_ms <= (OPEN + 62 + WAIT_S) * 1000
    market.close(62 + WAIT_S)
    assert (market.closed, market.flags()) == ([("1m", OPEN, 0)], ["gap"])
    assert market.book.counts()["closed_unheard"] == 1


def test_progress_that_comes_within_the_wait_closes_a_whole_candle() -> None:
    market = traded().heard(50).close(62).heard(61).close(62.2)
    assert (market.closed, market.flags()) == ([("1m", OPEN, 0)], [""])


def test_the_flag_goes_when_the_feed_was_heard_after_all() -> None:
    market = traded().heard(50).close(62 + WAIT_S).heard(59.9)
    assert market.flags() == ["gap"]
    market.heard(60)
    assert (market.closed, market.flags()) == ([("1m", OPEN, 0), ("1m", OPEN, 1)], [""])
    assert market.book.unheard == 0


def test_a_late_tick_of_the_minute_does_not_remove_the_flag() -> None:
    market = traded().heard(50).close(62 + WAIT_S).take(tick(55, 103, 1_030, at=70))
    assert market.flags()[0] == "gap"
    assert market.rows("1m")[0][4:6] == [103, 30]


def test_an_outage_keeps_the_flag_when_the_feed_is_back() -> None:
    market = traded().heard(50).close(62 + WAIT_S)
    flag_outage(market.book, Outage([TOKEN], (OPEN + 50) * 1000, (OPEN + 80) * 1000))
    market.heard(85)
    assert market.flags() == ["gap"]
    assert market.closed == [("1m", OPEN, 0)]


def test_trades_far_beyond_the_feeds_progress_came_from_another_source() -> None:
    market = traded().heard(48 - WAIT_S - 1).close(62)
    assert (market.closed, market.flags()) == ([("1m", OPEN, 0)], [""])


def test_an_instrument_of_no_feed_and_the_day_candle_wait_for_nothing() -> None:
    market = traded().close(62)
    assert (market.closed, market.flags()) == ([("1m", OPEN, 0)], [""])
    market = traded().heard(50).close(6.5 * 3600)
    assert market.flags("day") == [""]
    assert ("day", OPEN, 0) in market.closed


def test_event_time_waits_for_no_feed() -> None:
    market = traded().heard(50)
    market.book.event_clock = True
    apply_ticks(market.book, np.array([tick(63, 103, 1_030)]), 0, np.array([1]), 1_000)
    close_candles(market.book, 0, 1_000)
    market.commit()
    assert market.flags()[0] == ""


def test_the_wait_is_machine_time_at_any_speed_of_a_rehearsal() -> None:
    market = traded().heard(50)
    close_candles(market.book, (OPEN + 62 + 10 * WAIT_S) * 1000, 1_000, speed=60)
    market.commit(close=False)
    assert market.closed == []
    close_candles(market.book, (OPEN + 62 + 60 * WAIT_S) * 1000, 1_000, speed=60)
    market.commit(close=False)
    assert market.flags() == ["gap"]


def test_the_flag_survives_a_restart() -> None:
    market = traded().heard(50).close(62 + WAIT_S)
    restored = Heard(intervals="1m,5m,day")
    name = str(TOKEN)
    current = {
        "5m": b"[%d,101,102,101,102,20,null,2]" % OPEN,
        "day": b"[%d,101,102,101,102,20,null,2]" % OPEN,
    }
    restored.book.restore(TOKEN, market.state[name], market.state[f"{name}:candles"], current)
    restored.lists = dict(market.lists)
    restored.take(tick(55, 103, 1_030, at=70))
    assert restored.flags()[0] == "gap"
