"""What Kite's historical API speaks: intervals, spans a request may cover, rows. No I/O.

    GET /instruments/historical/408065/minute?from=2026-08-03 09:15:00&to=2026-08-03 09:29:59&oi=1
    → {"data": {"candles": [["2026-08-03T09:15:00+0530", open, high, low, close, volume(, oi)], …]}}

`from` and `to` are India's time, both inclusive, and name the starts of candles. Candles are stamped with
their start; the one still forming is among them. Source: https://kite.trade/docs/connect/v3/historical/
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from enum import Enum
from typing import Any, NamedTuple

from pkbrokers_redis.core.errors import KiteUnavailable, PkbError, UnknownInterval
from pkbrokers_redis.core.india import IST
from pkbrokers_redis.core.intervals import normalize
from pkbrokers_redis.core.model import SEGMENT_INDICES
from pkbrokers_redis.core.sessions import TIME_MS_MAX

DAY_SECONDS = 86_400
NUMBER_MAX = 2**53  # of a price or quantity: what a float holds to the unit
CASH_SEGMENTS = {1, 4, SEGMENT_INDICES}  # no open interest: Kite answers 0, our rows say null


class KiteInterval(NamedTuple):
    """One interval of Kite's: its name there, its length (0: a day), and the days one request may span."""

    name: str
    seconds: int
    days_max: int


# Ours → Kite's. 2m and 4m do not exist there. Days: Kite's forum and its own 400 answers.
KITE_INTERVALS: dict[str, KiteInterval] = {
    "1m": KiteInterval("minute", 60, 60),
    "3m": KiteInterval("3minute", 180, 100),
    "5m": KiteInterval("5minute", 300, 100),
    "10m": KiteInterval("10minute", 600, 100),
    "15m": KiteInterval("15minute", 900, 200),
    "30m": KiteInterval("30minute", 1800, 200),
    "60m": KiteInterval("60minute", 3600, 400),
    "day": KiteInterval("day", 0, 2000),
}


class Historical_Interval(Enum):  # noqa: N801  upstream's name
    """Upstream's names of the intervals; the values are Kite's."""

    day = "day"
    min_1 = "minute"
    min_3 = "3minute"
    min_5 = "5minute"
    min_10 = "10minute"
    min_15 = "15minute"
    min_30 = "30minute"
    min_60 = "60minute"


class BadRequest(PkbError, ValueError):
    """Raised when what is asked of the history cannot be: no token, no date, an end before its beginning."""


class HistoryRow(NamedTuple):
    """One candle of Kite's: `start` in epoch seconds, prices in rupees. `oi` is None for cash and indices."""

    start: int
    open: float
    high: float
    low: float
    close: float
    volume: int
    oi: int | None


def kite_interval(name: str | Enum) -> KiteInterval:
    """`5m`, `5minute`, `minute`, `1h`, `1d` or upstream's enum. Raises UnknownInterval."""
    text = str(name.value if isinstance(name, Enum) else name).strip().lower()
    for ours, interval in KITE_INTERVALS.items():
        if text == interval.name or normalize(text) == ours:
            return interval
    raise UnknownInterval(f"Kite has no {text!r} history", "use one of " + " ".join(KITE_INTERVALS))


def spans(interval: KiteInterval, from_s: int, to_s: int) -> Iterator[tuple[int, int]]:
    """[from_s, to_s) in pieces that one request may ask for, oldest first."""
    step = interval.days_max * DAY_SECONDS
    while from_s < to_s:
        yield from_s, min(from_s + step, to_s)
        from_s += step


def local_text(epoch_s: int) -> str:
    """Epoch seconds as Kite wants them in a query."""
    return datetime.fromtimestamp(epoch_s, IST).strftime("%Y-%m-%d %H:%M:%S")


def stamp(epoch_s: int) -> str:
    """Epoch seconds as Kite writes them: `2026-08-03T09:15:00+0530`."""
    return datetime.fromtimestamp(epoch_s, IST).strftime("%Y-%m-%dT%H:%M:%S%z")


def epoch_of(moment: str | date | None, *, end: bool) -> int | None:
    """A date or time (India's where it names no zone) → epoch seconds; None for nothing.

    A bare date is its midnight, as an `end` the next one, so that the whole day is in. Raises BadRequest.
    """
    if moment is None or moment == "":
        return None
    if isinstance(moment, str):
        text = moment.strip()
        try:
            moment = date.fromisoformat(text) if len(text) == 10 else datetime.fromisoformat(text)
        except ValueError:
            raise BadRequest(f"{text[:40]!r} is no date", "write 2026-08-03 or 2026-08-03 09:15:00") from None
    if not isinstance(moment, datetime):
        moment = datetime.combine(moment, time(), IST) + timedelta(days=end)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=IST)
    return int(moment.timestamp())


def parse_rows(data: Any, token: int) -> tuple[list[HistoryRow], int]:
    """Kite's `data` → rows in ascending order, each start once; and how many were no candles.

    A row is refused for a time or number that is none, negative volume, or a high below its low. Raises
    KiteUnavailable where there is no list of candles: "nothing was traded" is an empty one.
    """
    candles = data.get("candles") if isinstance(data, dict) else None
    if not isinstance(candles, list):
        raise KiteUnavailable("Kite's answer holds no list of candles", "try again later")
    has_oi = token & 0xFF not in CASH_SEGMENTS
    found: dict[int, HistoryRow] = {}
    refused = 0
    for candle in candles:
        row = _row(candle, has_oi)
        if row is None:
            refused += 1
        else:
            found[row.start] = row
    return [found[start] for start in sorted(found)], refused


def _row(candle: Any, has_oi: bool) -> HistoryRow | None:
    if not isinstance(candle, list) or not 6 <= len(candle) <= 7 or not isinstance(candle[0], str):
        return None
    numbers = candle[1:]
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in numbers):
        return None
    if not all(-NUMBER_MAX <= each <= NUMBER_MAX for each in numbers):  # false for nan
        return None
    open_, high, low, close, volume, *oi = numbers
    if not (0 <= low <= min(open_, close) and max(open_, close) <= high) or volume < 0:
        return None
    try:
        start = int(datetime.fromisoformat(candle[0]).timestamp())
    except (ValueError, OverflowError, OSError):
        return None
    if not 0 <= start * 1000 < TIME_MS_MAX:
        return None
    interest = int(oi[0]) if oi and has_oi else None
    return HistoryRow(start, float(open_), float(high), float(low), float(close), int(volume), interest)
