"""Our rows against Kite's."""

from __future__ import annotations

from pkbrokers_redis.candles.model import Candle
from pkbrokers_redis.jobs.backfill import compare
from pkbrokers_redis.kite.history_api import HistoryRow


def candle(start: int, close: float = 100.0, volume: float = 5, flag: str = "") -> Candle:
    return Candle(start, 100.0, 101.0, 99.0, close, volume, None, 3, flag)


def history(start: int, close: float = 100.0, volume: int = 5) -> HistoryRow:
    return HistoryRow(start, 100.0, 101.0, 99.0, close, volume, 7)


def test_rows_are_compared_one_by_one() -> None:
    found = compare(
        [candle(60), candle(120, flag="gap"), candle(180, close=99.5), candle(240, volume=6), candle(360)],
        [history(60), history(120), history(180), history(240), history(300)],
    )
    assert found._asdict() == {
        "rows": 5, "matched": 2, "changed": 2, "missing": 1, "extra": 1, "marked": 1,
    }  # fmt: skip
    assert not found.is_clean
    assert compare([candle(60, flag="backfilled"), candle(360)], [history(60)]).is_clean
