"""Market time in a rehearsal: the same in every process, at any speed."""

from __future__ import annotations

import time

import pytest

from pkbrokers_redis.clock import Clock, market_clock
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.settings import load_settings


def test_without_a_shift_market_time_is_the_wall_clock() -> None:
    before = time.time() * 1000
    now = market_clock(load_settings())()
    assert before <= now <= time.time() * 1000


def test_a_shifted_clock_starts_where_it_is_told_and_runs_at_its_speed() -> None:
    real = time.time() - 10  # ten seconds ago the market stood at 1,000,000 s
    clock = Clock(1_000_000.0, real, 60.0)
    elapsed_ms = clock() - 1_000_000_000
    assert elapsed_ms >= 600_000
    assert clock.real_seconds(60_000) == 1.0


def test_two_processes_with_the_same_shift_keep_the_same_time() -> None:
    one = Clock(1_795_000_000.0, time.time(), 60.0)
    other = market_clock(load_settings(time_shift=one.shift_text))
    assert other == one


@pytest.mark.parametrize("text", ["1", "1,2", "a,b,c", "1,2,0", "nan,1,1", "1,2,inf", "-5,1,1"])
def test_a_shift_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(SettingsError, match="PKB_TIME_SHIFT is not"):
        load_settings(time_shift=text)
