"""Kite's historical API: intervals, spans of a request, rows, and requests at the shared pace.

    GET /instruments/historical/408065/minute?from=2026-08-03 09:15:00&to=2026-08-03 09:29:59&oi=1
    → {"data": {"candles": [["2026-08-03T09:15:00+0530", open, high, low, close, volume(, oi)], …]}}

`from` and `to` are Indian time, both inclusive, and name starts of candles. Candles are stamped with their
start. The current candle is included. Source: https://kite.trade/docs/connect/v3/historical/

    5xx, timeouts, no network    repeated after growing waits with jitter, ATTEMPTS times in all; a response
                                 without a list of candles likewise
    429                          all processes pause (`Limiter.back_off`), then repeated
    403                          the session is renewed once
    anything else                raised
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from enum import Enum
from typing import Any, NamedTuple, Protocol

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import IST, TIME_MS_MAX
from pkbrokers_redis.candles.model import SEGMENT_INDICES, normalize
from pkbrokers_redis.errors import KiteThrottled, KiteUnavailable, PkbError, SessionExpired, UnknownInterval
from pkbrokers_redis.kite.rest import Kite, open_kite
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.auth import Session
from pkbrokers_redis.store.rate_limit import Limiter

DAY_SECONDS = 86_400
NUMBER_MAX = 2**53  # of a price or quantity: integers up to here are exact in a float
CASH_SEGMENTS = {1, 4, SEGMENT_INDICES}  # no open interest: Kite sends 0, HistoryRow has None
ATTEMPTS = 4  # of one request, over about 10 s
WAIT_SECONDS_MAX = 10.0
BACK_OFF_SECONDS = 2.0  # pause of all processes after a 429; doubled with each further one

log = logs.get("history")


class KiteInterval(NamedTuple):
    """An interval of Kite: its name, its seconds (0: a day), and the days that one request may span."""

    name: str
    seconds: int
    days_max: int


# By our name. Kite has no 2m and 4m. The days are from Kite's forum and its 400 responses.
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
    """Upstream's names of the intervals; the values are Kite's names."""

    day = "day"
    min_1 = "minute"
    min_3 = "3minute"
    min_5 = "5minute"
    min_10 = "10minute"
    min_15 = "15minute"
    min_30 = "30minute"
    min_60 = "60minute"


class BadRequest(PkbError, ValueError):
    """Raised when a history request is invalid: no token, no date, an end before its beginning."""


class HistoryRow(NamedTuple):
    """A candle of Kite: `start` in epoch seconds, prices in rupees. `oi` is None for cash and indices."""

    start: int
    open: float
    high: float
    low: float
    close: float
    volume: int
    oi: int | None


def kite_interval(name: str | Enum) -> KiteInterval:
    """Return the interval of `5m`, `5minute`, `1h`, `1d` or upstream's enum. Raise UnknownInterval."""
    text = str(name.value if isinstance(name, Enum) else name).strip().lower()
    for our_name, interval in KITE_INTERVALS.items():
        if text == interval.name or normalize(text) == our_name:
            return interval
    raise UnknownInterval(f"Kite has no {text!r} history", "use one of " + " ".join(KITE_INTERVALS))


def spans(interval: KiteInterval, from_s: int, to_s: int) -> Iterator[tuple[int, int]]:
    """Split [from_s, to_s), epoch seconds, into spans that one request may cover, oldest first."""
    step = interval.days_max * DAY_SECONDS
    while from_s < to_s:
        yield from_s, min(from_s + step, to_s)
        from_s += step


def local_text(epoch_s: int) -> str:
    """Return Indian time as `2026-08-03 09:15:00`: Kite's form in queries, quotes and sessions."""
    return datetime.fromtimestamp(epoch_s, IST).strftime("%Y-%m-%d %H:%M:%S")


def stamp(epoch_s: int) -> str:
    """Return Indian time as `2026-08-03T09:15:00+0530`: Kite's form in candles."""
    return datetime.fromtimestamp(epoch_s, IST).strftime("%Y-%m-%dT%H:%M:%S%z")


def epoch_of(moment: str | date | None, *, end: bool) -> int | None:
    """Return epoch seconds of a date or time.

    Args:
        moment: Without a zone: Indian time. A date is its midnight.
        end: Whether a date is the next midnight instead, so that the whole day is included.

    Returns:
        None for None and "".

    Raises:
        BadRequest: The text is no date.
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


class ParsedRows(NamedTuple):
    """The rows of a response in ascending order, each start once, and how many were irregular."""

    rows: list[HistoryRow]
    refused: int = 0  # no candles
    widened: int = 0  # their open was outside their high and low


def parse_rows(data: Any, token: int) -> ParsedRows:
    """Parse the `data` of a response.

    A row is refused for an invalid time or number, a negative volume, or a close outside its high and low. An
    open outside them widens them: Kite puts the pre-open's price into the open of the day's first candle.
    Prices may be negative (crude oil in April 2020, spreads).

    Raises:
        KiteUnavailable: There is no list of candles. (Without trades Kite sends an empty one.)
    """
    candles = data.get("candles") if isinstance(data, dict) else None
    if not isinstance(candles, list):
        raise KiteUnavailable("Kite's response holds no list of candles", "try again later")
    has_oi = token & 0xFF not in CASH_SEGMENTS
    found: dict[int, HistoryRow] = {}
    refused = widened = 0
    for candle in candles:
        row = _row(candle, has_oi)
        if row is None:
            refused += 1
            continue
        widened += not candle[3] <= row.open <= candle[2]
        found[row.start] = row
    return ParsedRows([found[start] for start in sorted(found)], refused, widened)


def _row(candle: Any, has_oi: bool) -> HistoryRow | None:
    if not isinstance(candle, list) or not 6 <= len(candle) <= 7 or not isinstance(candle[0], str):
        return None
    numbers = candle[1:]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        return None
    if not all(-NUMBER_MAX <= number <= NUMBER_MAX for number in numbers):  # false for NaN
        return None
    open_, high, low, close, volume, *oi = numbers
    if not low <= close <= high or volume < 0:
        return None
    high, low = max(high, open_), min(low, open_)
    try:
        start = int(datetime.fromisoformat(candle[0]).timestamp())
    except (ValueError, OverflowError, OSError):
        return None
    if not 0 <= start * 1000 < TIME_MS_MAX:
        return None
    interest = int(oi[0]) if oi and has_oi else None
    return HistoryRow(start, float(open_), float(high), float(low), float(close), int(volume), interest)


class SessionSource(Protocol):
    """Gives the Kite session, and a new one after a 403: a `session.SessionManager`."""

    def current(self) -> Session:
        """Return the session to use now."""

    def renew(self, failed: Session, stop: threading.Event) -> Session:
        """Return another session than `failed`."""


class FixedSession:
    """A SessionSource of a session that was given. It cannot be renewed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def current(self) -> Session:
        """Return the session."""
        return self._session

    def renew(self, failed: Session, stop: threading.Event) -> Session:
        """Raise SessionExpired."""
        raise SessionExpired("Kite refuses the session that was given", "log in again and give the new one")


class HistoryApi:
    """Requests history of Kite. One thread at a time may use it; all processes share the limit.

    Args:
        settings: Kite's addresses.
        sessions: Gives the session.
        limiter: The shared limit.
        stop: Ends waits, with a PkbError.
        attempts: Of each request.

    Attributes:
        requests: The number of requests.
        rows_refused: The number of rows that were no candles.
    """

    def __init__(
        self,
        settings: Settings,
        sessions: SessionSource,
        limiter: Limiter,
        stop: threading.Event,
        attempts: int = ATTEMPTS,
    ) -> None:
        self._settings, self._sessions, self._limiter, self._stop = settings, sessions, limiter, stop
        self._kite: Kite | None = None
        self.attempts = attempts
        self.requests = 0
        self.rows_refused = 0

    def rows(
        self,
        token: int,
        interval: KiteInterval,
        from_s: int,
        to_s: int,
        *,
        oi: bool = True,
        continuous: bool = False,
    ) -> tuple[list[HistoryRow], int]:
        """Return the candles that start in [from_s, to_s), oldest first, and the number of refused rows.

        Args:
            token: The instrument.
            interval: Kite's interval.
            from_s: Epoch seconds.
            to_s: Epoch seconds, exclusive. One request must be able to cover the span.
            oi: Whether to request open interest.
            continuous: Whether to chain expired futures (day candles only).

        Raises:
            KiteError: Kite refuses the request, or does not respond after all attempts.
            redis.RedisError: The limit cannot be read.
        """
        query = {
            "from": local_text(from_s),
            "to": local_text(to_s - 1),  # Kite includes both ends
            "interval": interval.name,
            "continuous": int(continuous),
            "oi": int(oi),
        }
        retrying = Retrying(
            retry=retry_if_exception_type((KiteUnavailable, KiteThrottled)),
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(multiplier=0.5, max=WAIT_SECONDS_MAX),
            sleep=self._sleep,
            before_sleep=self._before_retry,
            reraise=True,
        )
        rows, refused, widened = retrying(self._request, token, interval.name, query)
        self.rows_refused += refused
        if refused or widened:
            log.warning(
                "history_rows_irregular", token=token, interval=interval.name, rows=len(rows),
                refused=refused, widened=widened,
            )  # fmt: skip
        return [row for row in rows if from_s <= row.start < to_s], refused

    def _request(self, token: int, interval: str, query: dict[str, Any]) -> ParsedRows:
        if self._kite is None:
            self._kite = open_kite(self._settings, self._sessions.current())
        kite = self._kite
        try:
            return self._get(kite, token, interval, query)
        except SessionExpired:
            if kite.session is None:
                raise
            self._kite = open_kite(self._settings, self._sessions.renew(kite.session, self._stop))
            return self._get(self._kite, token, interval, query)  # a second refusal is an error

    def _get(self, kite: Kite, token: int, interval: str, query: dict[str, Any]) -> ParsedRows:
        if self._stop.is_set():
            raise PkbError("stopped before the history was complete", "run it again: it resumes")
        self._limiter.wait(self._stop)
        self.requests += 1
        # As KiteConnect.historical_data, without its parsing: that takes 50 µs a candle, and one malformed
        # candle loses all of them.
        path = {"instrument_token": token, "interval": interval}
        return parse_rows(kite._get("market.historical", url_args=path, params=query), token)

    def _before_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, KiteThrottled):
            self._limiter.back_off(BACK_OFF_SECONDS * 2 ** (state.attempt_number - 1))
        log.warning("history_retried", attempt=state.attempt_number, reason=getattr(error, "message", ""))

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)
