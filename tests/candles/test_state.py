"""What a book takes from its calendar and from its state, whatever their size and version."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.model import parse_intervals
from pkbrokers_redis.candles.state import ShardState
from tests.candles.test_rules import DAY, Market

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
