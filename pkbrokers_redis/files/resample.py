"""`CandleAggregator`: makes longer candles of short ones or of ticks, with upstream's names and arguments.

Buckets are anchored to each day's open: `60m` of NSE begins at 09:15, as on Kite and in the store.
Results are tz-aware in Asia/Kolkata; day candles are stamped with midnight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from pkbrokers_redis.candles.calendar import Sessions, load_sessions
from pkbrokers_redis.candles.model import ALIASES, DEFAULT_INTERVALS, parse_intervals
from pkbrokers_redis.errors import PkbError, UnknownInterval
from pkbrokers_redis.files.frames import kolkata, midnights, moments_of

DAY_SECONDS = 86_400
NSE_SEGMENT = 1  # its hours are the default
STANDARD_INTERVALS = ("1m", "5m", "15m", "30m", "1h", "1d")
PRICE_COLUMNS = ("price", "ltp", "last_price", "close")

Ints = npt.NDArray[np.int64]

_SPELLINGS = {
    **{f"{n}{unit}": f"{n}m" for n in (1, 2, 3, 4, 5, 10, 15, 30) for unit in ("minute", "min")},
    **dict.fromkeys(("hour", "1hour", "60minute", "60min"), "1h"),
    **dict.fromkeys(("day", "d", "1day"), "1d"),
    "minute": "1m",
}


@cache
def nse_sessions() -> Sessions:
    """Return the package's calendar."""
    return load_sessions("market")


class CandleAggregator:
    """Upstream's aggregator. All methods are static.

    `token` is an instrument whose trading hours apply; None: those of NSE's cash market.

    Example:
        >>> CandleAggregator.normalize_interval("5minute"), CandleAggregator.get_interval_seconds("1h")
        ('5m', 3600)
    """

    INTERVALS: ClassVar[dict[str, int]] = {
        **{interval.name: interval.seconds or DAY_SECONDS for interval in DEFAULT_INTERVALS},
        "1h": 3600,
        "1d": DAY_SECONDS,
    }

    @staticmethod
    def normalize_interval(interval: str) -> str:
        """Return `5m` for `5minute` and `5min`, `1h` for `60minute`, `1d` for `day`; others in lower case."""
        name = interval.strip().lower()
        return _SPELLINGS.get(name, name)

    @staticmethod
    def get_interval_seconds(interval: str) -> int:
        """Return the seconds of an interval, 86,400 for a day. Raise UnknownInterval."""
        name = CandleAggregator.normalize_interval(interval)
        known = CandleAggregator.INTERVALS.get(name)
        if known is not None:
            return known
        try:
            return parse_intervals(ALIASES.get(name, name))[0].seconds or DAY_SECONDS
        except PkbError as error:
            raise UnknownInterval(f"unknown interval {interval!r}", "write 5m, 2h or 1d") from error

    @staticmethod
    def aggregate_candles(
        df: pd.DataFrame | None,
        target_interval: str,
        timestamp_column: str | None = None,
        *,
        token: int | None = None,
        sessions: Sessions | None = None,
    ) -> pd.DataFrame:
        """Merge candles into longer ones. Empty buckets make no row.

        Args:
            df: Columns open, high, low, close, and optionally volume and oi, in any case. It is not changed.
            target_interval: `5m`, `1h`, `1d`, …
            timestamp_column: The column of times; None: the index. Naive times are Indian time.
            token: See the class.
            sessions: Another calendar than the package's.

        Raises:
            ValueError: A column is missing, or a time is invalid.
            UnknownInterval: The interval is unknown.
        """
        if df is None or df.empty:
            return pd.DataFrame()
        seconds = CandleAggregator.get_interval_seconds(target_interval)
        frame = df.rename(columns=lambda name: str(name).lower())
        _require(frame, ("open", "high", "low", "close"))
        starts = _starts_of(frame, timestamp_column)
        rules = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum", "oi": "last"}
        rules = {name: rule for name, rule in rules.items() if name in frame.columns}
        return _grouped(
            frame[list(rules)], starts, seconds, rules, token, sessions, timestamp_column or df.index.name
        )

    @staticmethod
    def aggregate_ticks(
        ticks_df: pd.DataFrame | None,
        target_interval: str = "1m",
        price_column: str = "last_price",
        volume_column: str = "volume",
        timestamp_column: str = "timestamp",
        *,
        cumulative: bool = False,
        token: int | None = None,
        sessions: Sessions | None = None,
    ) -> pd.DataFrame:
        """Merge ticks into candles.

        Args:
            ticks_df: One row a tick. It is not changed.
            target_interval: `1m`, `1h`, `1d`, …
            price_column: If it is missing, the first of `price ltp last_price close`.
            volume_column: The traded volume.
            timestamp_column: If it is missing, the index has the times. Naive times are Indian time.
            cumulative: Whether volumes are the day's so far, as Kite sends them. A candle's volume is then
                the highest in it minus the highest before it; volume before the first tick is not counted.
            token: See the class.
            sessions: Another calendar than the package's.

        Raises:
            ValueError: There is no price, or a time is invalid.
            UnknownInterval: The interval is unknown.
        """
        if ticks_df is None or ticks_df.empty:
            return pd.DataFrame()
        seconds = CandleAggregator.get_interval_seconds(target_interval)
        frame = ticks_df.rename(columns=lambda name: str(name).lower())
        price = next((name for name in (price_column.lower(), *PRICE_COLUMNS) if name in frame.columns), None)
        if price is None:
            raise ValueError(f"no price column among {list(frame.columns)}")
        moments = timestamp_column.lower()
        starts = _starts_of(frame, moments if moments in frame.columns else None)
        order = np.argsort(starts, kind="stable")
        prices = frame[price].to_numpy()[order]
        ticks = pd.DataFrame(dict.fromkeys(("open", "high", "low", "close"), prices))
        rules = {"open": "first", "high": "max", "low": "min", "close": "last"}
        volume = volume_column.lower()
        if volume in frame.columns:
            traded = frame[volume].to_numpy()[order]
            ticks["volume"] = _increments(traded, midnights(starts[order])) if cumulative else traded
            rules["volume"] = "sum"
        return _grouped(ticks, starts[order], seconds, rules, token, sessions, moments)

    @staticmethod
    def resample_to_multiple_timeframes(
        df: pd.DataFrame | None, intervals: Sequence[str] | None = None, *, token: int | None = None
    ) -> dict[str, pd.DataFrame]:
        """Return candles by interval, as given; default: `1m 5m 15m 30m 1h 1d`.

        An interval that cannot be made has an empty frame.
        """
        results: dict[str, pd.DataFrame] = {}
        for interval in intervals or STANDARD_INTERVALS:
            try:
                results[interval] = CandleAggregator.aggregate_candles(df, interval, token=token)
            except (ValueError, PkbError):
                results[interval] = pd.DataFrame()
        return results

    @staticmethod
    def validate_ohlcv(df: pd.DataFrame | None) -> bool:
        """Return whether there are rows, and `low` is the lowest, `high` the highest price of each."""
        if df is None or df.empty:
            return False
        frame = df.rename(columns=lambda name: str(name).lower())
        if not {"open", "high", "low", "close"} <= set(frame.columns):
            return False
        open_, high, low, close = (frame[name].to_numpy() for name in ("open", "high", "low", "close"))
        lowest, highest = np.minimum(open_, close), np.maximum(open_, close)
        return bool(((low <= lowest) & (highest <= high)).all())  # a NaN fails every comparison


def _require(frame: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if name not in frame.columns:
            raise ValueError(f"Missing required column: {name}")


def _starts_of(frame: pd.DataFrame, column: str | None) -> Ints:
    """Return the rows' times in epoch seconds. Raise ValueError if one is invalid."""
    named = column is not None and column.lower() in frame.columns
    index = moments_of(pd.Index(frame[str(column).lower()]) if named else frame.index)
    if index.hasnans:
        raise ValueError("a row without a moment")
    return index.asi8 // 1_000_000_000


def bucket_starts_of(starts: Ints, seconds: int, token: int | None, sessions: Sessions | None) -> Ints:
    """Return the bucket of each time, epoch seconds: anchored to the day's open; a day's is midnight."""
    days = midnights(starts)
    if seconds == DAY_SECONDS:
        return days
    calendar = sessions or nse_sessions()
    schedule = calendar.schedule_of(NSE_SEGMENT if token is None else token)
    distinct, which = np.unique(days, return_inverse=True)
    anchors = np.array([_anchor_s(calendar, schedule, int(day)) for day in distinct], np.int64)[which]
    return anchors + (starts - anchors) // seconds * seconds


def _anchor_s(calendar: Sessions, schedule: int, midnight_s: int) -> int:
    """Return the day's open; on a closed day (an unknown special session) the time of the next open."""
    day = calendar.day(schedule, midnight_s * 1000)
    if day.windows:
        return day.anchor_ms // 1000
    opens_ms = calendar.next_open(schedule, day.day_start_ms)
    if opens_ms is None:
        return midnight_s
    return midnight_s + (opens_ms - calendar.day(schedule, opens_ms).day_start_ms) // 1000


def _grouped(
    frame: pd.DataFrame,
    starts: Ints,
    seconds: int,
    rules: dict[str, Any],
    token: int | None,
    sessions: Sessions | None,
    name: Any,
) -> pd.DataFrame:
    buckets = bucket_starts_of(starts, seconds, token, sessions)
    order = np.argsort(starts, kind="stable")
    result = frame.iloc[order].groupby(buckets[order], sort=True).agg(rules)
    result = result.dropna(subset=["open", "high", "low", "close"])
    result.index = kolkata(result.index.to_numpy(np.int64), name)
    return result


def _increments(traded: npt.NDArray[Any], days: Ints) -> npt.NDArray[Any]:
    """Return what each cumulative volume added. Repeats and late copies add 0; each day starts from 0."""
    series = pd.Series(traded).fillna(0)
    highest = series.groupby(days).cummax()
    return highest.groupby(days).diff().fillna(0).astype(series.dtype).to_numpy()
