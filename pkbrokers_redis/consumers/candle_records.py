"""What may go into a candle file: symbols, moments in one form, numbers that are a candle."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pkbrokers_redis.consumers.files.frames import is_symbol, iso_texts, kolkata, moments_of
from pkbrokers_redis.core.intervals import DAY, normalize


def checked(record: Sequence[Any], keys: int) -> list[Any]:
    """`(symbol, date, …)` with two keys or `(symbol, timestamp, interval, …)` with three, then open high low
    close volume → the same in the one form. Raises ValueError, TypeError or OverflowError."""
    if len(record) != keys + 5:
        raise ValueError("not the cells of a candle")
    symbol, moment = record[0], record[1]
    if not is_symbol(symbol):
        raise ValueError("no symbol")
    told: list[Any] = [symbol, day_text(moment) if keys == 2 else moment_text(moment)]
    if keys == 3:
        told.append(_interval(record[2]))
    open_, high, low, close, volume = (float(cell) for cell in record[keys:])
    if not all(map(math.isfinite, (open_, high, low, close, volume))) or volume < 0:
        raise ValueError("no number")
    if not low <= min(open_, close) <= max(open_, close) <= high:
        raise ValueError("high and low do not hold open and close")
    return [*told, open_, high, low, close, int(volume) if volume == int(volume) else volume]


def _interval(name: Any) -> str:
    known = normalize(str(name))
    if known == DAY or not (known[:-1].isdecimal() and known[-1:] in ("m", "h") and len(known) <= 5):
        raise ValueError("no intraday interval")
    return known


def day_text(moment: Any) -> str:
    """`2026-11-20` of a date, a time or a text of either. Raises ValueError."""
    if isinstance(moment, str) and len(moment) == 10:
        return dt.date.fromisoformat(moment).isoformat()
    return str(_stamp(moment).date().isoformat())


def moment_text(moment: Any, end: bool = False) -> str:
    """`2026-11-20T09:15:00+05:30`; a date alone is its first moment, or with `end` its last second."""
    if isinstance(moment, str) and len(moment) == 10:
        return dt.date.fromisoformat(moment).isoformat() + ("T23:59:59+05:30" if end else "T00:00:00+05:30")
    if isinstance(moment, str) and len(moment) == 25 and moment.endswith("+05:30") and moment[10] == "T":
        dt.datetime.fromisoformat(moment)
        return moment
    return iso_texts(pd.DatetimeIndex([_stamp(moment)]))[0]


def _stamp(moment: Any) -> pd.Timestamp:
    if isinstance(moment, bool) or moment is None:
        raise ValueError("no moment")
    if isinstance(moment, int | float | np.number):
        return kolkata(np.array([int(moment)]))[0]
    stamps = moments_of(pd.Index([moment], dtype=object))
    if stamps.hasnans:
        raise ValueError("no moment")
    return stamps[0]
