"""What Kite's historical API speaks: intervals, spans a request may cover, rows. No I/O.

    GET /instruments/historical/408065/minute?from=2026-08-03 09:15:00&to=2026-08-03 09:29:59&oi=1
    → {"data": {"candles": [["2026-08-03T09:15:00+0530", open, high, low, close, volume(, oi)], …]}}

`from` and `to` are India's time, both inclusive, and name the starts of candles. Candles are stamped with
their start; the one still forming is among them. Source: https://kite.trade/docs/connect/v3/historical/

One request to Kite's historical API: at the shared pace, tried again where that may help.

5xx, timeouts, no network    again after growing waits with jitter, ATTEMPTS times in all; so is an answer
                             without a list of candles
429                          everybody waits (`Limiter.back_off`), then again
403                          the session is renewed once, whoever of us makes the new one
anything else                raised: one line
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


ATTEMPTS = 4  # of one request, over about 10 s
WAIT_SECONDS_MAX = 10.0
BACK_OFF_SECONDS = 2.0  # of everybody after a 429; twice as long after each further one

log = logs.get("history")


class SessionSource(Protocol):
    """Where the Kite session comes from, and who makes a new one after a 403 (`session.SessionManager`)."""

    def current(self) -> Session: ...

    def renew(self, failed: Session, stop: threading.Event) -> Session: ...


class FixedSession:
    """A session that was handed in: nobody can renew it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def current(self) -> Session:
        return self._session

    def renew(self, failed: Session, stop: threading.Event) -> Session:
        raise SessionExpired(
            "Kite refuses the session that was given", "log in again and hand in the new one"
        )


class HistoryRequests:
    """Asks Kite. One thread at a time; the limit is shared by all. `stop` ends waits with a PkbError."""

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
        """The candles that begin in [from_s, to_s), oldest first, and how many of Kite's rows were none.

        The span is one that a request may have. Raises KiteError and its kin, and what redis-py raises.
        """
        query = {
            "from": local_text(from_s),
            "to": local_text(to_s - 1),  # Kite takes both ends in
            "interval": interval.name,
            "continuous": int(continuous),
            "oi": int(oi),
        }
        rows, refused = self._ask(token, interval.name, query)
        if refused:
            self.rows_refused += refused
            log.warning("odd_history", token=token, interval=interval.name, refused=refused, rows=len(rows))
        return [row for row in rows if from_s <= row.start < to_s], refused

    def _ask(self, token: int, interval: str, query: dict[str, Any]) -> tuple[list[HistoryRow], int]:
        retrying = Retrying(
            retry=retry_if_exception_type((KiteUnavailable, KiteThrottled)),
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(multiplier=0.5, max=WAIT_SECONDS_MAX),
            sleep=self._sleep,
            before_sleep=self._before_retry,
            reraise=True,
        )
        return retrying(self._ask_once, token, interval, query)

    def _ask_once(self, token: int, interval: str, query: dict[str, Any]) -> tuple[list[HistoryRow], int]:
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

    def _get(
        self, kite: Kite, token: int, interval: str, query: dict[str, Any]
    ) -> tuple[list[HistoryRow], int]:
        if self._stop.is_set():
            raise PkbError("stopped before the history was complete", "run it again: it goes on from here")
        self._limiter.wait(self._stop)
        self.requests += 1
        # What KiteConnect.historical_data does, without its parsing: that takes 50 µs a candle, and one odd
        # candle loses all of them.
        path = {"instrument_token": token, "interval": interval}
        return parse_rows(kite._get("market.historical", url_args=path, params=query), token)

    def _before_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, KiteThrottled):
            self._limiter.back_off(BACK_OFF_SECONDS * 2 ** (state.attempt_number - 1))
        log.warning("history_retried", attempt=state.attempt_number, why=getattr(error, "message", ""))

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)
