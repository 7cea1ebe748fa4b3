"""When each instrument last ticked: who is lively, who is silent, and what was missed meanwhile."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import pytest

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.model import BATCH_WIDTH, LAST_PRICE, LAST_QUANTITY, TOKEN, VOLUME
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.ingest.watchdog import CANARY_TICKS_MIN, Return, TickActivity

INFY, TCS, ITC, NIFTY, GOLD = 408065, 2953217, 424961, 256265, 58839 << 8 | 7
SESSIONS = load_sessions("market")


def ticks(*tokens: int) -> Any:
    found = np.full((len(tokens), BATCH_WIDTH), np.nan)
    found[:, TOKEN] = tokens
    return found


def traded(token: int, price: float, quantity: float = np.nan, volume: float = np.nan) -> Any:
    found = ticks(token)
    found[:, [LAST_PRICE, LAST_QUANTITY, VOLUME]] = price, quantity, volume
    return found


def ms(text: str) -> int:
    return int(datetime.fromisoformat(f"2026-01-05 {text}+05:30").timestamp() * 1000)


OPEN = [float(ms("09:15:00"))] * len(SESSIONS.schedules)
START = ms("10:00:00")


def activity_of(*feeds: tuple[int, ...]) -> TickActivity:
    activity = TickActivity(SESSIONS.schedule_of)
    activity.follow([Feed(n, 0, tuple(sorted(tokens))) for n, tokens in enumerate(feeds)])
    return activity


def beat(activity: TickActivity, tokens: tuple[int, ...], from_s: int, to_s: int, every_s: int = 1) -> None:
    for n in range(from_s, to_s, every_s):
        activity.note(ticks(*tokens), START + n * 1000)


def test_lively_instruments_are_canaries_and_seldom_ones_are_not() -> None:
    activity = activity_of((INFY, TCS, ITC, NIFTY))
    for n in range(100):
        activity.note(ticks(INFY, NIFTY, *([ITC] if n % 10 == 0 else [])), START + n * 1000)
    silence = activity.silence(0, OPEN, START, 15_000, 60_000)
    assert silence.canaries == 2 and silence.silent == () and silence.illiquid == (TCS,)
    beat(activity, (INFY,), 100, 120)
    assert activity.silence(0, OPEN, START, 15_000, 60_000).silent == ((NIFTY, START + 99_000.0),)
    assert activity.silence(0, OPEN, START + 110_000, 15_000, 60_000).silent == ()  # just connected anew
    assert activity.silence(0, OPEN, START, 25_000, 60_000).silent == ()
    assert activity.silence(7, OPEN, START, 15_000, 60_000).canaries == 0


def test_an_instrument_is_no_canary_before_its_way_is_known() -> None:
    activity = activity_of((INFY, NIFTY))
    beat(activity, (INFY, NIFTY), 0, CANARY_TICKS_MIN - 1)
    assert activity.silence(0, OPEN, START, 15_000, 60_000).canaries == 0
    beat(activity, (INFY,), CANARY_TICKS_MIN - 1, 100)
    silence = activity.silence(0, OPEN, START, 15_000, 60_000)
    assert silence.canaries == 1 and silence.silent == () and silence.illiquid == (NIFTY,)


def test_when_nothing_comes_at_all_nobody_is_partly_silent() -> None:
    """The feed's own newest tick is the clock: a writer that waits for Redis alarms nobody."""
    activity = activity_of((INFY, NIFTY), (TCS,))
    beat(activity, (INFY, NIFTY), 0, 100)
    beat(activity, (TCS,), 100, 200)
    assert activity.silence(0, OPEN, START, 15_000, 60_000).silent == ()


def test_closed_markets_have_no_canaries_and_an_opening_is_no_silence() -> None:
    activity = activity_of((INFY, GOLD))
    beat(activity, (INFY, GOLD), 0, 100)
    beat(activity, (GOLD,), 100, 200)
    opened: list[float | None] = list(OPEN)
    opened[SESSIONS.schedule_of(INFY)] = None
    assert activity.silence(0, opened, START, 15_000, 60_000).silent == ()
    opened[SESSIONS.schedule_of(INFY)] = START + 195_000.0
    assert activity.silence(0, opened, START, 15_000, 60_000).silent == ()


def test_instruments_that_stay_keep_their_pulse_when_the_list_changes() -> None:
    activity = activity_of((INFY, TCS), (NIFTY,))
    beat(activity, (INFY, TCS, NIFTY, 999), 0, 50)
    activity.follow([Feed(0, 0, (TCS,)), Feed(1, 0, (NIFTY, ITC))])
    assert activity.last_ms(TCS) == activity.last_ms(NIFTY) == START + 49_000
    assert activity.last_ms(INFY) == activity.last_ms(ITC) == activity.last_ms(999) == 0
    assert activity.silence(0, OPEN, START, 15_000, 60_000).canaries == 1
    activity.follow([])
    activity.note(ticks(TCS), START)
    assert activity.last_ms(TCS) == 0 and activity.schedules(0) == frozenset()


def test_a_clock_set_back_makes_nobody_lively() -> None:
    activity = activity_of((INFY, NIFTY))
    beat(activity, (INFY,), 0, 30 * CANARY_TICKS_MIN, every_s=30)
    beat(activity, (INFY,), -18_000, -17_999)
    assert activity.silence(0, OPEN, START - 20_000_000, 15_000, 60_000).canaries == 0


@pytest.mark.parametrize(
    ("before", "back", "missed"),
    [
        (traded(INFY, 100, 5, 1_000), traded(INFY, 100, 5, 1_000), False),  # the last tick, sent again
        (traded(INFY, 100, 5, 1_000), traded(INFY, 101, 7, 1_007), False),  # the next trade
        (traded(INFY, 100, 5, 1_000), traded(INFY, 101, 7, 1_050), True),
        (traded(NIFTY, 24_000), traded(NIFTY, 24_000), False),  # an index has no volume
        (traded(NIFTY, 24_000), traded(NIFTY, 24_010), True),
    ],
)
def test_the_first_tick_again_tells_whether_something_was_missed(
    before: Any, back: Any, missed: bool
) -> None:
    activity, token = activity_of((INFY, NIFTY)), int(before[0, TOKEN])
    activity.note(before, START)
    activity.watch({token})
    assert activity.take_return(token) is None
    activity.note(ticks(TCS, ITC), START + 10_000)  # others, and strangers
    activity.note(back, START + 20_000)
    activity.note(traded(token, 1, 1, 9_999), START + 21_000)
    assert activity.take_return(token) == Return(START + 20_000, missed)
    assert activity.take_return(token) is None


def test_who_is_watched_again_has_not_come_back_yet() -> None:
    activity = activity_of((INFY, NIFTY))
    activity.watch({INFY})
    activity.note(ticks(INFY), START)
    activity.watch(())
    activity.note(ticks(INFY), START + 1_000)
    activity.watch({INFY})
    assert activity.take_return(INFY) is None
