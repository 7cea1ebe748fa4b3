"""The shard state: days with many windows, and closing in several calls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.codec import CLOSED
from pkbrokers_redis.candles.model import parse_intervals
from pkbrokers_redis.candles.open_candles import close_candles
from pkbrokers_redis.candles.rules import apply_ticks
from pkbrokers_redis.candles.state import ShardState
from tests.candles.test_rules import DAY, OPEN, Market

HOURS = {
    "first_night": ["00:00", "02:30"], "morning": ["09:00", "10:15"], "noon": ["10:30", "11:30"],
    "afternoon": ["13:30", "15:00"], "second_night": ["21:00", "24:00"],
}  # fmt: skip


def test_a_day_has_as_many_windows_as_its_calendar_says(tmp_path: Path) -> None:
    file = tmp_path / "calendar.json"
    schedule = {"calendar": "open", "hours": [{"from": "2009-01-03", "windows": HOURS}]}
    file.write_text(
        json.dumps(
            {
                "schedules": {"SHFE": schedule},
                "calendars": {"open": {}},
                "segments": {"77": {"schedule": "SHFE"}},
            }
        )
    )
    market = Market()
    market.book = ShardState(
        parse_intervals("60m,day"), load_sessions("market", path=file), event_clock=True, instruments=4
    )
    token = 600 << 8 | 77
    hours = (0.5, 9.5, 11, 12, 14, 16, 22, 23)  # 12 and 16 o'clock lie between windows
    for n, hour in enumerate((*hours, *(24 * day + 22 for day in range(1, 20)))):
        second = (DAY + hour * 3600) * 1000
        market.take([token, 100, 1, 10 * n + 10, *[np.nan] * 4, second, second])
    starts = [round((each[0] - DAY) / 3600) for each in market.rows("60m", token)]
    assert starts == [9, 11, 14, 22, 23, *(24 * day + 22 for day in range(1, 20))]
    assert market.book.counts()["off_session"] == 2


def test_closing_resumes_where_the_last_call_stopped_and_visits_every_instrument_once() -> None:
    """A pass over many instruments takes several calls, none of which starts again at the first one."""
    state = ShardState(parse_intervals("1m"), load_sessions("market"), instruments=100)
    tokens = [408065 + 256 * n for n in range(100)]
    for second, volume in ((-10, 0), (5, 10)):
        at = (OPEN + second) * 1000
        rows = [[token, 100, 1, volume, *[np.nan] * 4, at, at] for token in tokens]
        ticks = np.array(rows, float)
        assert apply_ticks(state, ticks, 0, np.array([100]), 1000) == 100
    state.collect()
    now_ms, closed = (OPEN + 63) * 1000.0, []
    while not close_candles(state, now_ms, 32):
        assert state.next_due_ms == 0.0
        closed.append([op[1] for op in state.collect().ops if op[0] == CLOSED])
    closed.append([op[1] for op in state.collect().ops if op[0] == CLOSED])
    assert [len(part) for part in closed] == [32, 32, 32, 4]
    assert [i for part in closed for i in part] == list(range(100))
    assert state.next_due_ms == np.inf
