"""What may go into a candle file: symbols, moments in one form, numbers that are a candle.

The SQLite file behind `LocalCandleDatabase`: its tables, its migrations, its settings.

    daily_candles     symbol, date "2026-11-20", open, high, low, close, volume, updated_at
    intraday_candles  symbol, timestamp "2026-11-20T09:15:00+05:30", interval "1m", open, …, updated_at
    outbox            keys of rows that the remote database does not have yet
    marks             name → text: how far something has come

Both candle tables are their primary key (WITHOUT ROWID): reading a symbol is one run of pages. The one
index, interval and time, is for reading the last minutes of all symbols; it makes the file a third larger.
"""

from __future__ import annotations

import datetime as dt
import math
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pkbrokers_redis.candles.model import DAY, normalize
from pkbrokers_redis.errors import CandleFileError
from pkbrokers_redis.files.frames import is_symbol, iso_texts, kolkata, moments_of


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


NAME = "candles.db"
BUSY_SECONDS = 10.0  # how long a writer waits for another process's commit
CACHE_KB = 65_536

# user_version n means the first n are applied. Never edit one that was released; add the next.
MIGRATIONS = (
    """
    CREATE TABLE daily_candles (
        symbol TEXT NOT NULL, date TEXT NOT NULL,
        open REAL, high REAL, low REAL, close REAL, volume INTEGER, updated_at TEXT,
        PRIMARY KEY (symbol, date)
    ) WITHOUT ROWID;
    CREATE TABLE intraday_candles (
        symbol TEXT NOT NULL, timestamp TEXT NOT NULL, interval TEXT NOT NULL,
        open REAL, high REAL, low REAL, close REAL, volume INTEGER, updated_at TEXT,
        PRIMARY KEY (symbol, timestamp, interval)
    ) WITHOUT ROWID;
    CREATE INDEX intraday_by_time ON intraday_candles (interval, timestamp);
    CREATE TABLE marks (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    """,
    """
    CREATE TABLE outbox (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        symbol TEXT NOT NULL, moment TEXT NOT NULL, interval TEXT NOT NULL,
        UNIQUE (symbol, moment, interval) ON CONFLICT REPLACE
    );
    """,
)


class CandleFile:
    """One connection, shared by the threads of a process one at a time. Other processes have their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise CandleFileError(
                f"cannot open {path} ({error})", "check the folder and its rights"
            ) from error
        try:
            with self.using() as connection:
                connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for writers
                connection.execute(
                    "PRAGMA synchronous = NORMAL"
                )  # a commit survives kill -9, not a power cut
                connection.execute(f"PRAGMA cache_size = -{CACHE_KB}")
                self._migrate(connection)
        except CandleFileError:
            self._connection.close()
            raise

    def _migrate(self, connection: sqlite3.Connection) -> None:
        if self._version(connection) == len(MIGRATIONS):
            return
        connection.execute("BEGIN IMMEDIATE")  # two processes may open a new file at once
        try:
            version = self._version(connection)
            for step in MIGRATIONS[version:]:
                for statement in filter(str.strip, step.split(";")):
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise

    def _version(self, connection: sqlite3.Connection) -> int:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise CandleFileError(
                f"{self.path} was written by a later release (version {version})", "update pkbrokers-redis"
            )
        return version

    @contextmanager
    def using(self) -> Iterator[sqlite3.Connection]:
        """The connection, to one thread at a time. sqlite3's errors become CandleFileError."""
        with self._lock:
            try:
                yield self._connection
            except sqlite3.DatabaseError as error:
                if "not a database" in str(error) or "malformed" in str(error):
                    hint = "move it away; a new one is filled from the store"
                else:
                    hint = "check the disk, and who else holds the file"
                raise CandleFileError(f"{self.path}: {error}", hint) from error

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the block or nothing."""
        with self.using() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def mark(self, name: str) -> str | None:
        """What was noted under that name."""
        with self.using() as connection:
            found = connection.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def close(self) -> None:
        """Close the connection. Again is no error."""
        with self._lock:
            self._connection.close()

    @property
    def bytes_on_disk(self) -> int:
        """The file and its write-ahead log."""
        files = [self.path, self.path.with_name(self.path.name + "-wal")]
        return sum(file.stat().st_size for file in files if file.exists())


def set_mark(connection: sqlite3.Connection, name: str, value: str) -> None:
    """Note a value; part of the caller's transaction."""
    connection.execute(
        "INSERT INTO marks VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (name, value)
    )
