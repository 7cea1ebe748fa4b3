"""Kite's historical candles: all intervals, any span, at three requests a second over all processes.

    history = KiteTickerHistory()                       # settings, session and limit from the store
    history.rows(408065, "1m", from_s, to_s)            # [(start, open, high, low, close, volume, oi), …]
    history.frame(408065, "5m", "2026-08-01", "2026-08-20")      # pandas, index in Indian time
    history.get_historical_data(408065, "2026-08-01", "2026-08-20", "5minute")     # upstream's

A call is split into spans that Kite allows in one request (`history_api.py`). `frame` and upstream's methods
keep the days before today in a SQLite file, `HistoryCache`, so that an interrupted download resumes and years
of minutes are requested once. Today is always requested: Kite may still correct it.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from pydantic import SecretStr

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import KiteError, PkbError, SessionExpired
from pkbrokers_redis.kite.history_api import (
    ATTEMPTS,
    DAY_SECONDS,
    BadRequest,
    FixedSession,
    Historical_Interval,
    HistoryApi,
    HistoryRow,
    KiteInterval,
    SessionSource,
    epoch_of,
    kite_interval,
    spans,
    stamp,
)
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.auth import Session
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.rate_limit import LIMITS_PER_SECOND, Limiter

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Historical_Interval", "HistoryCache", "HistoryRow", "KiteTickerHistory", "SessionSource"]

BUSY_SECONDS_MAX = 30.0  # how long to wait for another process's transaction
CANDLES_DEFAULT = 365  # upstream's: the length of a request without a beginning
CACHE_FILE = "history.db"  # in PKB_DATA_DIR

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    token INTEGER, interval TEXT, start INTEGER,
    open REAL, high REAL, low REAL, close REAL, volume INTEGER, oi INTEGER,
    PRIMARY KEY (token, interval, start)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spans (
    token INTEGER, interval TEXT, from_s INTEGER, to_s INTEGER,
    PRIMARY KEY (token, interval, from_s)
) WITHOUT ROWID;
"""


class HistoryCache:
    """Downloaded history in a SQLite file. Each call opens it: processes and threads share it.

        rows    token interval start open high low close volume oi      candles, by start
        spans   token interval from_s to_s                              what was downloaded

    Rows and their span are written in one transaction.

    Args:
        path: The file; it is made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, token: int, interval: str, from_s: int, to_s: int) -> list[HistoryRow]:
        """Return the known rows of [from_s, to_s), epoch seconds, in ascending order."""
        with self._open() as database:
            rows = database.execute(
                "SELECT start, open, high, low, close, volume, oi FROM rows"
                " WHERE token = ? AND interval = ? AND start >= ? AND start < ? ORDER BY start",
                (token, interval, from_s, to_s),
            )
            return [HistoryRow(*row) for row in rows]

    def missing(self, token: int, interval: str, from_s: int, to_s: int) -> list[tuple[int, int]]:
        """Return the parts of [from_s, to_s) that were not downloaded, oldest first."""
        with self._open() as database:
            known = database.execute(
                "SELECT from_s, to_s FROM spans WHERE token = ? AND interval = ? AND from_s < ? AND to_s > ?"
                " ORDER BY from_s",
                (token, interval, to_s, from_s),
            ).fetchall()
        gaps: list[tuple[int, int]] = []
        for known_from, known_to in known:
            if known_from > from_s:
                gaps.append((from_s, known_from))
            from_s = max(from_s, known_to)
        return [*gaps, (from_s, to_s)] if from_s < to_s else gaps

    def add(self, token: int, interval: str, rows: Sequence[HistoryRow]) -> None:
        """Store rows of an incomplete response. Their span stays missing."""
        with self._open() as database, database:
            database.execute("BEGIN IMMEDIATE")
            _insert(database, token, interval, rows)

    def replace(self, token: int, interval: str, from_s: int, to_s: int, rows: Sequence[HistoryRow]) -> None:
        """Store a complete response for [from_s, to_s). It replaces the rows of that span."""
        with self._open() as database, database:
            database.execute("BEGIN IMMEDIATE")
            database.execute(
                "DELETE FROM rows WHERE token = ? AND interval = ? AND start >= ? AND start < ?",
                (token, interval, from_s, to_s),
            )
            _insert(database, token, interval, [row for row in rows if from_s <= row.start < to_s])
            # Adjacent spans become one, so that years of daily requests do not make thousands of them.
            first, last = database.execute(
                "SELECT min(from_s), max(to_s) FROM spans"
                " WHERE token = ? AND interval = ? AND from_s <= ? AND to_s >= ?",
                (token, interval, to_s, from_s),
            ).fetchone()
            from_s, to_s = min(from_s, first or from_s), max(to_s, last or to_s)
            database.execute(
                "DELETE FROM spans WHERE token = ? AND interval = ? AND from_s >= ? AND to_s <= ?",
                (token, interval, from_s, to_s),
            )
            database.execute("INSERT INTO spans VALUES (?, ?, ?, ?)", (token, interval, from_s, to_s))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(
                sqlite3.connect(self._path, timeout=BUSY_SECONDS_MAX, isolation_level=None)
            ) as database:
                database.executescript(_SCHEMA)
                yield database
        except (sqlite3.Error, OSError) as error:
            raise PkbError(
                f"the history in {self._path} cannot be used ({error})",
                "delete the file: it is only a copy of Kite's",
            ) from error


def _insert(database: sqlite3.Connection, token: int, interval: str, rows: Sequence[HistoryRow]) -> None:
    database.executemany(
        "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(token, interval, *row) for row in rows],
    )


class KiteTickerHistory:
    """Kite's history, with upstream's methods. One thread at a time may use it.

    Its errors are KiteErrors, UnknownInterval and BadRequest.

    Args:
        enctoken: Upstream's: the token of a web login; None: the shared session.
        user_id: Upstream's.
        access_token_response: Upstream's; without effect.
        settings: Default: the environment's.
        client: The store; default: a connection of its own.
        limiter: Default: the shared limit in the store.
        sessions: Default: the shared session.
        cache: Default: `history.db` in PKB_DATA_DIR.
        now_ms: Market time, epoch ms.
        stop: Ends waits, with a PkbError.
        attempts: Of each request.

    Attributes:
        failed_tokens: Instruments for which `get_multiple_instruments_history` got nothing.

    Example:
        >>> with KiteTickerHistory() as history:                                # doctest: +SKIP
        ...     history.frame(408065, "5m", "2026-08-01", "2026-08-20")["close"].iloc[-1]
        1500.0
    """

    RATE_LIMIT = int(LIMITS_PER_SECOND["history"])
    RATE_LIMIT_WINDOW = 1.0

    def __init__(
        self,
        enctoken: str | None = None,
        user_id: str | None = None,
        access_token_response: Any = None,
        *,
        settings: Settings | None = None,
        client: redis.Redis | None = None,
        limiter: Limiter | None = None,
        sessions: SessionSource | None = None,
        cache: HistoryCache | None = None,
        now_ms: Callable[[], float] | None = None,
        stop: threading.Event | None = None,
        attempts: int = ATTEMPTS,
    ) -> None:
        self.settings = settings or load_settings()
        self.user_id = user_id or self.settings.kite_user_id or ""
        self._own_client = connect(self.settings) if client is None else None
        self._client: redis.Redis = client or self._own_client  # type: ignore[assignment]
        if enctoken:
            sessions = FixedSession(Session(user_id=self.user_id, enctoken=SecretStr(enctoken)))
        self._api = HistoryApi(
            self.settings,
            sessions or self._session_manager(),
            limiter or Limiter(self._client, self.settings.keys, "history"),
            stop or threading.Event(),
            attempts,
        )
        self._cache = cache or HistoryCache(self.settings.data_dir / CACHE_FILE)
        self._now_ms = now_ms or market_clock(self.settings)
        self.failed_tokens: list[int] = []

    @property
    def requests(self) -> int:
        """The number of requests made."""
        return self._api.requests

    @property
    def rows_refused(self) -> int:
        """The number of Kite's rows that were no candles."""
        return self._api.rows_refused

    def rows(
        self,
        token: int,
        interval: str | Enum,
        from_s: int,
        to_s: int,
        *,
        oi: bool = True,
        continuous: bool = False,
    ) -> list[HistoryRow]:
        """Request the candles that start in [from_s, to_s) from Kite, without the cache.

        Args:
            token: The instrument.
            interval: `5m`, `5minute`, `day`, …
            from_s: Epoch seconds.
            to_s: Epoch seconds, exclusive.
            oi: Whether to request open interest.
            continuous: Whether to chain expired futures (day candles only).

        Returns:
            All candles, oldest first, the current one included. Rows of Kite that are no candles are left out
            and counted in `rows_refused`.

        Raises:
            KiteError: Kite refuses the request, or does not respond.
        """
        options = {"oi": oi, "continuous": continuous}
        return self._request(token, kite_interval(interval), from_s, to_s, **options)[0]

    def cached_rows(
        self, token: int, interval: str | Enum, from_s: int, to_s: int, *, fresh: bool = False
    ) -> list[HistoryRow]:
        """Return the candles of `rows` through the cache: only missing spans and today are requested.

        Rows of Kite that are no candles are left out, and requested again the next time. With `fresh`
        everything is requested again.
        """
        for _ in self.download(token, interval, from_s, to_s, fresh=fresh):
            pass
        chosen, today_s = kite_interval(interval), self._today_s()
        rows = self._cache.get(token, chosen.name, from_s, min(to_s, today_s))
        if to_s > today_s:
            rows += self._request(token, chosen, max(from_s, today_s), to_s)[0]
        return rows

    settled_rows = cached_rows  # its name in the previous release

    def download(
        self, token: int, interval: str | Enum, from_s: int, to_s: int, *, fresh: bool = False
    ) -> Iterator[tuple[int, int]]:
        """Fill the cache for [from_s, to_s) up to yesterday. Yield each span that it adds."""
        chosen = kite_interval(interval)
        to_s = min(to_s, self._today_s())
        missing = [(from_s, to_s)] if fresh else self._cache.missing(token, chosen.name, from_s, to_s)
        for gap in missing:
            for span in spans(chosen, *gap):
                rows, refused = self._api.rows(token, chosen, *span)
                if refused:
                    self._cache.add(token, chosen.name, rows)
                    continue
                self._cache.replace(token, chosen.name, *span, rows)
                yield span

    def frame(
        self,
        token: int,
        interval: str | Enum,
        from_date: str | date | None = None,
        to_date: str | date | None = None,
        *,
        fresh: bool = False,
    ) -> pd.DataFrame:
        """Return the candles of `cached_rows` as a DataFrame.

        Args:
            token: The instrument.
            interval: `5m`, `5minute`, `day`, …
            from_date: Indian time; None: 365 candles before the end.
            to_date: Indian time; a date is included whole; None: now.
            fresh: Whether to request everything again.

        Returns:
            Columns open, high, low, close, volume, oi; an ascending index `datetime` in Asia/Kolkata.
        """
        import pandas as pd  # takes half a second, so only here

        from_s, to_s = self._span(from_date, to_date, kite_interval(interval))
        rows = self.cached_rows(token, interval, from_s, to_s, fresh=fresh)
        table = pd.DataFrame(rows, columns=list(HistoryRow._fields))
        index = pd.to_datetime(table.pop("start"), unit="s", utc=True).dt.tz_convert("Asia/Kolkata")
        return table.set_index(pd.DatetimeIndex(index, name="datetime"))

    def close(self) -> None:
        """Close the connection to the store, if this object opened it."""
        if self._own_client is not None:
            self._own_client.close()

    def __enter__(self) -> KiteTickerHistory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- upstream's methods --------------------------------------------------------------------------

    def get_historical_data(
        self,
        instrument_token: int,
        from_date: str | date | None = None,
        to_date: str | date | None = None,
        interval: str | Enum = "day",
        oi: bool = True,
        continuous: bool = False,
        max_retries: int = ATTEMPTS,
        forceFetch: bool = False,  # noqa: N803  upstream's name
        insertOnly: bool = False,  # noqa: N803
    ) -> dict[str, Any]:
        """Return candles in upstream's form.

        Args:
            instrument_token: The instrument.
            from_date: As in `frame`, `to_date` likewise.
            interval: `5m`, `5minute`, `day`, …
            oi: Whether rows end with open interest.
            continuous: Whether to chain expired futures; such candles are not cached.
            max_retries: Attempts of each request.
            forceFetch: Whether to request everything again.
            insertOnly: Whether to fill the cache and return no candles.

        Returns:
            `{"status": "success", "data": {"candles": [[time, open, high, low, close, volume, oi], …],
            "source": "api" or "database"}}` with Kite's texts as times; `database` if nothing was requested.

        Raises:
            BadRequest: There is no token (a ValueError).
        """
        token = _token(instrument_token)
        self._api.attempts = max(1, max_retries)
        chosen = kite_interval(interval)
        from_s, to_s = self._span(from_date, to_date, chosen)
        requests_before = self.requests
        rows: list[HistoryRow] = []
        if continuous:  # a chained series: the cache holds the instrument's own
            rows, _ = self._request(token, chosen, from_s, to_s, oi=oi, continuous=True)
        elif insertOnly:
            for _ in self.download(token, interval, from_s, to_s, fresh=forceFetch):
                pass
        else:
            rows = self.cached_rows(token, interval, from_s, to_s, fresh=forceFetch)
        candles = [[stamp(row.start), *row[1:6], *([row.oi or 0] if oi else [])] for row in rows]
        source = "api" if self.requests > requests_before else "database"
        return {"status": "success", "data": {"candles": candles, "source": source}}

    def get_multiple_instruments_history(
        self,
        instruments: Sequence[int],
        from_date: str | date | None = None,
        to_date: str | date | None = None,
        interval: str | Enum = "day",
        oi: bool = True,
        batch_size: int = 3,
        max_retries: int = ATTEMPTS,
        delay: float = 1.0,
        forceFetch: bool = False,  # noqa: N803
        insertOnly: bool = False,  # noqa: N803
        past_offset: int = 0,
    ) -> dict[int, dict[str, Any]]:
        """Return `get_historical_data` of several instruments, by token.

        The shared limit sets the pace: `batch_size` and `delay` have no effect. `past_offset` moves the
        beginning that many days back. A failed instrument is `{"status": "failed", "error": one line}`.

        Raises:
            BadRequest: There are no instruments, or a date is invalid.
            SessionExpired: There is no session.
        """
        if not instruments:
            raise BadRequest("no instruments were given", "give a list of tokens")
        chosen = kite_interval(interval)
        if from_date is None and past_offset:
            from_s, _ = self._span(None, to_date, chosen)
            from_date = datetime.fromtimestamp(from_s - past_offset * DAY_SECONDS, IST)
        results: dict[int, dict[str, Any]] = {}
        for instrument in instruments:
            try:
                results[instrument] = self.get_historical_data(
                    instrument, from_date, to_date, interval, oi, False, max_retries, forceFetch, insertOnly
                )
            except (SessionExpired, BadRequest):
                raise
            except KiteError as error:
                self.failed_tokens.append(instrument)
                results[instrument] = {"status": "failed", "error": str(error)}
        return results

    # --- helpers -------------------------------------------------------------------------------------

    def _request(
        self, token: int, interval: KiteInterval, from_s: int, to_s: int, **options: bool
    ) -> tuple[list[HistoryRow], int]:
        """Request [from_s, to_s) in spans. Return the rows and the number of refused ones."""
        parts = [self._api.rows(token, interval, *span, **options) for span in spans(interval, from_s, to_s)]
        return [row for rows, _ in parts for row in rows], sum(refused for _, refused in parts)

    def _session_manager(self) -> SessionSource:
        from pkbrokers_redis.kite.session import SessionManager

        return SessionManager(self.settings, lambda: self._client)

    def _span(
        self, from_date: str | date | None, to_date: str | date | None, interval: KiteInterval
    ) -> tuple[int, int]:
        to_s = epoch_of(to_date, end=True)
        to_s = int(self._now_ms() / 1000) + 1 if to_s is None else to_s
        from_s = epoch_of(from_date, end=False)
        if from_s is None:
            from_s = to_s - CANDLES_DEFAULT * (interval.seconds or DAY_SECONDS)
        if from_s >= to_s:
            raise BadRequest("the history ends before it begins", "swap from_date and to_date")
        return from_s, to_s

    def _today_s(self) -> int:
        """Return today's midnight in India, epoch seconds. Kite no longer changes earlier candles."""
        today = datetime.fromtimestamp(self._now_ms() / 1000, IST)
        return int(today.replace(hour=0, minute=0, second=0, microsecond=0).timestamp())


def _token(instrument_token: Any) -> int:
    text = str(instrument_token or "")
    if not (text.isascii() and text.isdecimal()):
        raise BadRequest("instrument_token is required", "give Kite's number of the instrument")
    return int(text)
