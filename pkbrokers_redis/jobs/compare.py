"""Our rows against Kite's, one by one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pkbrokers_redis.core.model import Candle
from pkbrokers_redis.kite.history_rows import HistoryRow

PRICE_EPSILON = 1e-7  # prices have at most seven decimals on the wire


class Comparison(NamedTuple):
    """How many rows: Kite's in all, equal, different, only Kite's, only ours; and equal ones of ours that are
    marked as not whole."""

    rows: int
    matched: int
    changed: int
    missing: int
    extra: int
    marked: int

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to send. Rows of ours that Kite lacks stay, whatever is sent."""
        return not (self.changed or self.missing or self.marked)


def compare(ours: Sequence[Candle], theirs: Sequence[HistoryRow]) -> Comparison:
    """Both of the same instrument, interval and span."""
    mine = {candle.start: candle for candle in ours}
    matched = changed = missing = marked = 0
    for row in theirs:
        candle = mine.pop(row.start, None)
        if candle is None:
            missing += 1
        elif is_equal(candle, row):
            matched += 1
            marked += candle.flag in ("gap", "partial")
        else:
            changed += 1
    return Comparison(len(theirs), matched, changed, missing, len(mine), marked)


def is_equal(candle: Candle, row: HistoryRow) -> bool:
    """Prices and volume; open interest changes without trades, and Kite samples it elsewhere."""
    return candle.volume == row.volume and all(
        abs(getattr(candle, name) - getattr(row, name)) < PRICE_EPSILON
        for name in ("open", "high", "low", "close")
    )
