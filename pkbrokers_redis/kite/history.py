"""History that was downloaded once: a SQLite file, so that years of minutes need not be asked for again.

    rows    token interval start open high low close volume oi      candles, by start
    spans   token interval from_s to_s                              what Kite was asked for and has answered

A piece of history and its span are written in one transaction: a download that is killed goes on where it
was. Only settled history is kept: Kite may still correct today's.

Kite's candles of the past: all intervals, any span, at three requests a second shared by all processes.

    history = KiteTickerHistory()                       # settings, session and limit from the store
    history.rows(408065, "1m", from_s, to_s)            # [(start, open, high, low, close, volume, oi), …]
    history.frame(408065, "5m", "2026-08-01", "2026-08-20")      # pandas, index in India's time
    history.get_historical_data(408065, "2026-08-01", "2026-08-20", "5minute")     # as upstream's

A long span is asked for in pieces of what Kite allows in one request. 5xx and timeouts are tried again with
growing waits, a 429 makes everybody wait, a dead session is renewed once. What is settled is kept in a file
(`history_cache.py`) by `frame` and upstream's methods, so that an interrupted download goes on where it was.
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
    HistoryRequests,
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

BUSY_SECONDS_MAX = 30.0  # another process writes

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
    """The file at `path`, made where it is missing. Each call opens it: processes and threads share it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, token: int, interval: str, from_s: int, to_s: int) -> list[HistoryRow]:
        """The rows of [from_s, to_s) in ascending order, as far as they are known."""
        with self._open() as database:
            found = database.execute(
                "SELECT start, open, high, low, close, volume, oi FROM rows"
                " WHERE token = ? AND interval = ? AND start >= ? AND start < ? ORDER BY start",
                (token, interval, from_s, to_s),
            )
            return [HistoryRow(*row) for row in found]

    def missing(self, token: int, interval: str, from_s: int, to_s: int) -> list[tuple[int, int]]:
        """The parts of [from_s, to_s) that have not been asked for, oldest first."""
        with self._open() as database:
            known = database.execute(
                "SELECT from_s, to_s FROM spans WHERE token = ? AND interval = ? AND from_s < ? AND to_s > ?"
                " ORDER BY from_s",
                (token, interval, to_s, from_s),
            ).fetchall()
        gaps: list[tuple[int, int]] = []
        for begins, ends in known:
            if begins > from_s:
                gaps.append((from_s, begins))
            from_s = max(from_s, ends)
        return [*gaps, (from_s, to_s)] if from_s < to_s else gaps

    def add(self, token: int, interval: str, rows: Sequence[HistoryRow]) -> None:
        """Rows of an answer that is not whole: its span stays to be asked for."""
        with self._open() as database, database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany(
                "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(token, interval, *row) for row in rows],
            )

    def put(self, token: int, interval: str, from_s: int, to_s: int, rows: Sequence[HistoryRow]) -> None:
        """Kite's whole answer for [from_s, to_s): what stood there before is replaced."""
        inside = [row for row in rows if from_s <= row.start < to_s]
        with self._open() as database, database:
            database.execute("BEGIN IMMEDIATE")
            database.execute(
                "DELETE FROM rows WHERE token = ? AND interval = ? AND start >= ? AND start < ?",
                (token, interval, from_s, to_s),
            )
            database.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(token, interval, *row) for row in inside],
            )
            # Neighbours become one span, so that years of daily requests do not make thousands of them.
            touching = database.execute(
                "SELECT min(from_s), max(to_s) FROM spans"
                " WHERE token = ? AND interval = ? AND from_s <= ? AND to_s >= ?",
                (token, interval, to_s, from_s),
            ).fetchone()
            begins, ends = min(from_s, touching[0] or from_s), max(to_s, touching[1] or to_s)
            database.execute(
                "DELETE FROM spans WHERE token = ? AND interval = ? AND from_s >= ? AND to_s <= ?",
                (token, interval, begins, ends),
            )
            database.execute("INSERT INTO spans VALUES (?, ?, ?, ?)", (token, interval, begins, ends))

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


__all__ = ["Historical_Interval", "HistoryRow", "KiteTickerHistory", "SessionSource"]

CANDLES_DEFAULT = 365  # upstream's: how far back a request without a beginning goes
CACHE_FILE = "history.db"  # in PKB_DATA_DIR


class KiteTickerHistory:
    """Upstream's class. Its first three arguments are upstream's: an enctoken of a web login, or none.

    `settings`, `client`, `limiter`, `sessions` and `cache` are made from the environment where they are not
    given. One thread at a time may use it; its errors are KiteErrors, UnknownInterval and BadRequest, a line
    each. `failed_tokens` are the instruments that `get_multiple_instruments_history` got nothing for.
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
        self._requests = HistoryRequests(
            self.settings,
            sessions or self._keeper(),
            limiter or Limiter(self._client, self.settings.keys, "history"),
            stop or threading.Event(),
            attempts,
        )
        self._cache = cache or HistoryCache(self.settings.data_dir / CACHE_FILE)
        self._now_ms = now_ms or market_clock(self.settings)
        self.failed_tokens: list[int] = []

    @property
    def requests(self) -> int:
        """How many requests were made."""
        return self._requests.requests

    @property
    def rows_refused(self) -> int:
        """How many candles of Kite's were none."""
        return self._requests.rows_refused

    # --- ours

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
        """The candles that begin in [from_s, to_s), epoch seconds, straight from Kite, oldest first.

        The candle still forming is among them where the span reaches the present. All there are: raises
        KiteError where one of Kite's rows is no candle.
        """
        found, refused = self._rows(
            token, kite_interval(interval), from_s, to_s, oi=oi, continuous=continuous
        )
        if refused:
            raise KiteError(
                f"{refused} rows of Kite's history of {token} are no candles",
                "try again later; settled_rows() gives the others",
            )
        return found

    def _rows(
        self, token: int, interval: KiteInterval, from_s: int, to_s: int, **options: bool
    ) -> tuple[list[HistoryRow], int]:
        found: list[HistoryRow] = []
        refused = 0
        for piece in spans(interval, from_s, to_s):
            rows, odd = self._requests.rows(token, interval, *piece, **options)
            found += rows
            refused += odd
        return found, refused

    def settled_rows(
        self, token: int, interval: str | Enum, from_s: int, to_s: int, *, fresh: bool = False
    ) -> list[HistoryRow]:
        """The same through the file: only what was never downloaded is asked for, and today.

        `fresh` asks for everything again. Killed in between, it goes on with the piece it was at. Rows of
        Kite's that are no candles are left out, and asked for again the next time.
        """
        for _ in self.download(token, interval, from_s, to_s, fresh=fresh):
            pass
        chosen, settled = kite_interval(interval), self._settled_until()
        found = self._cache.get(token, chosen.name, from_s, min(to_s, settled))
        if to_s > settled:
            found += self._rows(token, chosen, max(from_s, settled), to_s)[0]
        return found

    def download(
        self, token: int, interval: str | Enum, from_s: int, to_s: int, *, fresh: bool = False
    ) -> Iterator[tuple[int, int]]:
        """Fill the file for [from_s, to_s) up to yesterday, piece by piece; yields each span it has added."""
        chosen = kite_interval(interval)
        to_s = min(to_s, self._settled_until())
        missing = [(from_s, to_s)] if fresh else self._cache.missing(token, chosen.name, from_s, to_s)
        for gap in missing:
            for piece in spans(chosen, *gap):
                rows, refused = self._requests.rows(token, chosen, *piece)
                if refused:
                    self._cache.add(token, chosen.name, rows)
                    continue
                self._cache.put(token, chosen.name, *piece, rows)
                yield piece

    def frame(
        self,
        token: int,
        interval: str | Enum,
        from_date: str | date | None = None,
        to_date: str | date | None = None,
        *,
        fresh: bool = False,
    ) -> pd.DataFrame:
        """Columns open high low close volume oi; a tz-aware index `datetime` in India's time, ascending."""
        import pandas as pd  # only who wants a frame waits for it

        from_s, to_s = self._span(from_date, to_date, kite_interval(interval))
        rows = self.settled_rows(token, interval, from_s, to_s, fresh=fresh)
        table = pd.DataFrame(rows, columns=list(HistoryRow._fields))
        index = pd.to_datetime(table.pop("start"), unit="s", utc=True).dt.tz_convert("Asia/Kolkata")
        return table.set_index(pd.DatetimeIndex(index, name="datetime"))

    def close(self) -> None:
        """Let go of the store, where we opened it."""
        if self._own_client is not None:
            self._own_client.close()

    def __enter__(self) -> KiteTickerHistory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- upstream's

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
        """`{"status": "success", "data": {"candles": [[time, open, high, low, close, volume, oi], …], …}}`

        Times are Kite's text. Dates are India's; a `to_date` without a time is that whole day, a missing one
        now, a missing `from_date` 365 candles earlier. `source` is `database` where Kite was not asked.
        `forceFetch` asks for everything again, `insertOnly` fills the file and returns no candles. Raises
        BadRequest (a ValueError) without a token.
        """
        token = _token(instrument_token)
        self._requests.attempts = max(1, max_retries)
        from_s, to_s = self._span(from_date, to_date, kite_interval(interval))
        asked_before = self.requests
        rows: list[HistoryRow] = []
        if continuous:  # another series than the instrument's own: it must not get into the file
            chosen = kite_interval(interval)
            rows, _ = self._rows(token, chosen, from_s, to_s, oi=oi, continuous=True)
        elif insertOnly:
            for _ in self.download(token, interval, from_s, to_s, fresh=forceFetch):
                pass
        else:
            rows = self.settled_rows(token, interval, from_s, to_s, fresh=forceFetch)
        candles = [[stamp(row.start), *row[1:6], *([row.oi or 0] if oi else [])] for row in rows]
        source = "api" if self.requests > asked_before else "database"
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
        """Token → what `get_historical_data` gives, or `{"status": "failed", "error": one line}`.

        `batch_size` and `delay` are upstream's and have no effect: the shared limit sets the pace.
        `past_offset` days further back. Raises BadRequest for an empty list, and what would fail for every
        instrument: no session, no store.
        """
        if not instruments:
            raise BadRequest("there are no instruments to ask for", "give a list of tokens")
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

    # --- how

    def _keeper(self) -> SessionSource:
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
            raise BadRequest("the history asked for ends before it begins", "swap from_date and to_date")
        return from_s, to_s

    def _settled_until(self) -> int:
        """Midnight in India: what lies before it does not change any more."""
        today = datetime.fromtimestamp(self._now_ms() / 1000, IST)
        return int(today.replace(hour=0, minute=0, second=0, microsecond=0).timestamp())


def _token(instrument_token: Any) -> int:
    text = str(instrument_token or "")
    if not (text.isascii() and text.isdecimal()):
        raise BadRequest("instrument_token is required", "give Kite's number of the instrument")
    return int(text)
