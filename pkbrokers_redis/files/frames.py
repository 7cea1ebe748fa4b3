"""One form for the candles of a symbol from any file or source.

A *frame* here is a DataFrame `open high low close volume` (float64, volume int64 where it is whole) under a
tz-aware `DatetimeIndex` in Asia/Kolkata named `datetime`, ascending, each moment once. Day candles are
stamped with the day's midnight, as Kite's history stamps them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pkbrokers_redis.candles.calendar import MARKET_TIMEZONE
from pkbrokers_redis.candles.model import SEGMENT_INDICES

Floats = npt.NDArray[np.float64]
Frames = dict[str, pd.DataFrame]

COLUMNS = ("open", "high", "low", "close", "volume")
KOLKATA_SECONDS = 19_800  # +05:30, no daylight saving time
DAY_SECONDS = 86_400
SYMBOL_LENGTH_MAX = 100


def file_symbol(token: int, symbol: str) -> str:
    """Return an instrument's name in files: `INFY` for `NSE:INFY`, `NIFTY 50` for an index.

    Other exchanges keep their prefix, so that `BSE:INFY` and `NSE:INFY` stay apart.
    """
    exchange, colon, name = symbol.partition(":")
    return name if colon and (exchange == "NSE" or token & 0xFF == SEGMENT_INDICES) else symbol


def is_symbol(text: Any) -> bool:
    """Return whether a file's key can be a symbol: printable, and 1 to 100 characters long."""
    return isinstance(text, str) and 0 < len(text) <= SYMBOL_LENGTH_MAX and text.isprintable()


def midnights(starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the midnights in Kolkata of these moments, both in epoch seconds."""
    return (starts + KOLKATA_SECONDS) // DAY_SECONDS * DAY_SECONDS - KOLKATA_SECONDS


def kolkata(starts: npt.NDArray[np.int64], name: str | None = "datetime") -> pd.DatetimeIndex:
    """Return an index of nanoseconds, which pandas 2 and 3 both read, from epoch seconds."""
    moments = pd.DatetimeIndex(starts.astype("datetime64[s]").astype("datetime64[ns]"), name=name)
    return moments.tz_localize("UTC").tz_convert(MARKET_TIMEZONE)


def kolkata_ns(moments: npt.NDArray[np.int64]) -> pd.DatetimeIndex:
    """Return the frame's index of these epoch nanoseconds."""
    index = pd.DatetimeIndex(moments.view("datetime64[ns]"), name="datetime")
    return index.tz_localize("UTC").tz_convert(MARKET_TIMEZONE)


def rows_frame(rows: Floats, daily: bool) -> pd.DataFrame:
    """Return the frame of float64[n, 8] with the columns of CANDLE_FIELDS."""
    starts = rows[:, 0].astype(np.int64)
    frame = pd.DataFrame({name: rows[:, i + 1] for i, name in enumerate(COLUMNS)}, copy=False)
    frame["volume"] = whole(frame["volume"])
    frame.index = kolkata(midnights(starts) if daily else starts)
    return frame


def whole(values: pd.Series[Any]) -> pd.Series[Any]:
    """Return whole numbers as int64, and other numbers (fractions of a unit) unchanged."""
    numbers = values.to_numpy(np.float64)
    return values.astype(np.int64) if is_whole(numbers) else values


def is_whole(numbers: Floats) -> bool:
    """Return whether int64 represents all numbers exactly."""
    return bool((np.abs(numbers) < 2**53).all() and np.array_equal(numbers, np.floor(numbers)))


def tidy(table: Any) -> pd.DataFrame:
    """Return the frame of a symbol's candles in any spelling that upstream's files use.

    Args:
        table: A DataFrame, `{"data", "columns", "index"}`, or `{moment: {"open": …}}`. Column names in either
            case, further columns (`Adj Close`) are dropped, a missing volume is 0. Moments are text, dates or
            times; naive ones are in Kolkata's zone. Rows without a price are dropped.

    Raises:
        ValueError: The table is none of these.
    """
    return frame_of(*tidy_rows(table))


def tidy_rows(table: Any) -> tuple[pd.DatetimeIndex, Floats]:
    """Return the index and the float64[n, 5] of `tidy`. `table` may also be (column → cells, moments)."""
    columns, moments = table if isinstance(table, tuple) else _parts(table)
    missing = [name for name in COLUMNS[:4] if name not in columns]
    if missing:
        raise ValueError(f"no column {missing[0]}")
    index = moments_of(moments)
    zeros = np.zeros(len(index))
    numbers = np.column_stack([_floats(columns.get(name, zeros)) for name in COLUMNS])
    numbers[:, 4] = np.nan_to_num(numbers[:, 4], posinf=0, neginf=0)
    if len(numbers) != len(index):
        raise ValueError(f"{len(index)} moments for {len(numbers)} rows")
    is_complete = np.isfinite(numbers).all(axis=1) & ~np.asarray(index.isna())
    if not is_complete.all():
        numbers, index = numbers[is_complete], index[is_complete]
    if not (index.is_monotonic_increasing and index.is_unique):
        order = np.argsort(index.asi8, kind="stable")
        numbers, index = numbers[order], index[order]
        last = ~np.asarray(index.duplicated(keep="last"))
        numbers, index = numbers[last], index[last]
    return index, numbers


def frame_of(index: pd.DatetimeIndex, numbers: Floats) -> pd.DataFrame:
    """Return the frame of float64[n, 5] `open high low close volume`."""
    columns: dict[str, Any] = {name: numbers[:, i] for i, name in enumerate(COLUMNS)}
    if is_whole(numbers[:, 4]):
        columns["volume"] = numbers[:, 4].astype(np.int64)
    return pd.DataFrame(columns, index=index)


def _parts(table: Any) -> tuple[dict[str, Any], Any]:
    """Return (column name in lower case → its cells, moments) of a table in any spelling."""
    if isinstance(table, Mapping) and {"data", "columns", "index"} <= set(table):
        rows, names = table["data"], [str(name).strip().lower() for name in table["columns"]]
        try:
            cells = np.array(rows, np.float64).reshape(-1, len(names))
        except (ValueError, TypeError):
            cells = np.array(rows, object).reshape(-1, len(names))
        return {name: cells[:, i] for i, name in enumerate(names)}, table["index"]
    if isinstance(table, Mapping) and table and all(isinstance(row, Mapping) for row in table.values()):
        plain = {str(moment): dict(row) for moment, row in table.items()}
        table = pd.DataFrame.from_dict(plain, orient="index")
    if not isinstance(table, pd.DataFrame):
        raise ValueError("no table of candles")
    columns: dict[str, Any] = {}
    for i, name in enumerate(table.columns):
        columns.setdefault(str(name).strip().lower(), table.iloc[:, i].array)
    return columns, table.index


def _floats(cells: Any) -> Floats:
    try:
        return np.asarray(cells, np.float64)
    except (ValueError, TypeError):
        return pd.to_numeric(pd.Series(cells), errors="coerce").to_numpy(np.float64, na_value=np.nan)


def moments_of(index: Any) -> pd.DatetimeIndex:
    """Return an index in Kolkata from texts, dates or times; naive ones are in its zone, invalid ones NaT."""
    if not isinstance(index, pd.DatetimeIndex):
        if pd.api.types.is_numeric_dtype(index):
            raise ValueError("an index of numbers instead of moments")
        index = _parsed(list(index))
    if index.tz is None:
        index = index.tz_localize(MARKET_TIMEZONE, ambiguous="NaT", nonexistent="NaT")
    made: pd.DatetimeIndex = index.tz_convert(MARKET_TIMEZONE).as_unit("ns")
    return made if made.name == "datetime" else made.rename("datetime")


def _parsed(moments: list[Any]) -> pd.DatetimeIndex:
    if any(isinstance(moment, bool | int | float) and moment == moment for moment in moments):
        raise ValueError("numbers instead of moments")
    try:
        text = all(isinstance(moment, str) for moment in moments)
        return pd.DatetimeIndex(pd.to_datetime(moments, format="ISO8601" if text else None))
    except (ValueError, TypeError, OverflowError):
        # Naive and aware moments are mixed.
        return pd.DatetimeIndex([_moment(value) for value in moments], tz=MARKET_TIMEZONE)


def _moment(value: Any) -> Any:
    try:
        moment = pd.Timestamp(value)
        is_naive = moment.tz is None
        return moment.tz_localize(MARKET_TIMEZONE) if is_naive else moment.tz_convert(MARKET_TIMEZONE)
    except (ValueError, TypeError, OverflowError):
        return pd.NaT


def cut(frame: pd.DataFrame, start: dt.date | None, end: dt.date | None) -> pd.DataFrame:
    """Return the rows of the days from `start` to `end`, both included, both optional, in Kolkata."""
    if start is not None:
        frame = frame[frame.index >= pd.Timestamp(start, tz=MARKET_TIMEZONE)]
    if end is not None:
        frame = frame[frame.index < pd.Timestamp(end, tz=MARKET_TIMEZONE) + pd.Timedelta(days=1)]
    return frame


def iso_texts(index: pd.DatetimeIndex) -> list[str]:
    """Return each moment as `2026-11-20T09:15:00+05:30`."""
    return [text + "+05:30" for text in _local_texts(index.as_unit("s").asi8)]


def date_texts(starts: npt.NDArray[np.int64]) -> list[str]:
    """Return each moment (epoch seconds) as `2026-11-20`."""
    return [text[:10] for text in _local_texts(starts)]


def _local_texts(starts: npt.NDArray[np.int64]) -> list[str]:
    local = (starts + KOLKATA_SECONDS).astype("datetime64[s]")
    texts: list[str] = np.datetime_as_string(local, unit="s").tolist()  # ten times as fast as strftime
    return texts
