"""`CandleAggregator`: short candles or ticks → longer candles, with upstream's names and arguments.

Buckets are the exchange's, not the clock's: `60m` of NSE begin at 09:15 and each day begins anew, so they
equal Kite's own and this store's. Results are tz-aware in Asia/Kolkata; day candles stand at midnight.
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
NSE_SEGMENT = 1  # whose hours are taken where nobody says otherwise
STANDARD_INTERVALS = ("1m", "5m", "15m", "30m", "1h", "1d")
PRICE_COLUMNS = ("price", "ltp", "last_price", "close")

Ints = npt.NDArray[np.int64]

_SPELLINGS = {
    "minute": "1m",
    "hour": "1h",
    "60minute": "1h",
    "day": "1d",
    "d": "1d",
    **{f"{n}{unit}": f"{n}m" for n in (1, 2, 3, 4, 5, 10, 15, 30) for unit in ("minute", "min")},
    "60min": "1h",
    "1hour": "1h",
    "1day": "1d",
}


@cache
def nse_sessions() -> Sessions:
    """The shipped calendar."""
    return load_sessions("market")


class CandleAggregator:
    """All methods are static. `token` is an instrument whose trading hours count; None: NSE's cash market."""

    INTERVALS: ClassVar[dict[str, int]] = {
        **{each.name: each.seconds or DAY_SECONDS for each in DEFAULT_INTERVALS},
        "1h": 3600,
        "1d": DAY_SECONDS,
    }

    @staticmethod
    def normalize_interval(interval: str) -> str:
        """`5minute`, `5min` → `5m`; `60minute` → `1h`; `day` → `1d`. Others come back in lower case."""
        name = interval.strip().lower()
        return _SPELLINGS.get(name, name)

    @staticmethod
    def get_interval_seconds(interval: str) -> int:
        """Seconds of an interval, 86,400 for a day. Raises UnknownInterval."""
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
        """Candles (`open high low close`, perhaps `volume oi`, any case) → longer ones; no empty buckets.

        Moments are the index, or `timestamp_column`; naive ones are Kolkata's. The frame is left as it is.
        Raises ValueError for a missing column or moments that are none, UnknownInterval.
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
        """Ticks → candles. Volumes are added up; with `cumulative` they are the day's so far, as Kite sends
        them: a candle's is the highest in it less the highest before it; the first tick's counts for nothing.

        Without `price_column` one of `price ltp last_price close` is taken, without `timestamp_column` the
        index. Raises ValueError where there is no price, UnknownInterval.
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
        """Interval as asked for → candles, of `1m 5m 15m 30m 1h 1d` if none are named.

        An empty frame for one that cannot be made.
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
        """Whether there are rows, and `low` is the lowest, `high` the highest price of each."""
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
    """The rows' moments in epoch seconds. Raises ValueError where one is none."""
    named = column is not None and column.lower() in frame.columns
    index = moments_of(pd.Index(frame[str(column).lower()]) if named else frame.index)
    if index.hasnans:
        raise ValueError("a row without a moment")
    return index.asi8 // 1_000_000_000


def bucket_starts_of(starts: Ints, seconds: int, token: int | None, sessions: Sessions | None) -> Ints:
    """The start of each moment's bucket, epoch seconds, anchored to the day's open; a day's is midnight."""
    days = midnights(starts)
    if seconds == DAY_SECONDS:
        return days
    calendar = sessions or nse_sessions()
    schedule = calendar.schedule_of(NSE_SEGMENT if token is None else token)
    each, which = np.unique(days, return_inverse=True)
    # On a closed day (a special session the calendar does not know) the usual open is better than midnight.
    anchors = np.array([_anchor_s(calendar, schedule, int(day)) for day in each], np.int64)[which]
    return anchors + (starts - anchors) // seconds * seconds


def _anchor_s(calendar: Sessions, schedule: int, midnight_s: int) -> int:
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
    """Cumulative volumes → what each added; repeats and late copies add nothing, each day begins anew."""
    series = pd.Series(traded).fillna(0)
    highest = series.groupby(days).cummax()
    return highest.groupby(days).diff().fillna(0).astype(series.dtype).to_numpy()
