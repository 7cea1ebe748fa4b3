"""One request to Kite's historical API: at the shared pace, tried again where that may help.

5xx, timeouts, no network    again after growing waits with jitter, ATTEMPTS times in all; so is an answer
                             without a list of candles
429                          everybody waits (`Limiter.back_off`), then again
403                          the session is renewed once, whoever of us makes the new one
anything else                raised: one line
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from pkbrokers_redis import logs
from pkbrokers_redis.core.errors import KiteThrottled, KiteUnavailable, PkbError, SessionExpired
from pkbrokers_redis.kite.history_rows import HistoryRow, KiteInterval, local_text, parse_rows
from pkbrokers_redis.kite.rest import Kite, open_kite
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.auth import Session
from pkbrokers_redis.store.limiter import Limiter

ATTEMPTS = 4  # of one request, over about 10 s
WAIT_SECONDS_MAX = 10.0
BACK_OFF_SECONDS = 2.0  # of everybody after a 429; twice as long after each further one

log = logs.get("history")


class SessionSource(Protocol):
    """Where the Kite session comes from, and who makes a new one after a 403 (`session.SessionKeeper`)."""

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
