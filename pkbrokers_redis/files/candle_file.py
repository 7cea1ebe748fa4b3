"""The SQLite file of `LocalCandleDatabase`: its tables, their migrations, and the check of each row.

    daily_candles     symbol, date "2026-11-20", open, high, low, close, volume, updated_at
    intraday_candles  symbol, timestamp "2026-11-20T09:15:00+05:30", interval "1m", open, …, updated_at
    outbox            keys of rows that the remote database does not have yet
    marks             name → text: how far a process has advanced

Both candle tables are WITHOUT ROWID: the rows of a symbol are adjacent. The one index, interval and time, is
for reading the last minutes of all symbols. It makes the file a third larger.
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

NAME = "candles.db"
BUSY_SECONDS = 10.0  # how long a writer waits for another process's commit
CACHE_KB = 65_536
KEYS_OF = {"daily_candles": ("symbol", "date"), "intraday_candles": ("symbol", "timestamp", "interval")}

# user_version n means that the first n are applied. Never edit a released one; append the next.
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


def checked(record: Sequence[Any], keys: int) -> list[Any]:
    """Return a candle record with its symbol, time and interval in the file's form.

    Args:
        record: Symbol, date or timestamp, (interval,) open, high, low, close, volume.
        keys: 2 for a daily record, 3 for an intraday one.

    Raises:
        ValueError: A cell is invalid. TypeError and OverflowError likewise.
    """
    if len(record) != keys + 5:
        raise ValueError("not the cells of a candle")
    symbol, moment = record[0], record[1]
    if not is_symbol(symbol):
        raise ValueError("invalid symbol")
    key: list[Any] = [symbol, day_text(moment) if keys == 2 else moment_text(moment)]
    if keys == 3:
        interval = normalize(str(record[2]))
        if interval == DAY or not (
            interval[:-1].isdecimal() and interval[-1:] in "mh" and len(interval) <= 5
        ):
            raise ValueError("no intraday interval")
        key.append(interval)
    open_, high, low, close, volume = (float(cell) for cell in record[keys:])
    if not all(map(math.isfinite, (open_, high, low, close, volume))) or volume < 0:
        raise ValueError("no number")
    if not low <= min(open_, close) <= max(open_, close) <= high:
        raise ValueError("open or close is outside of low to high")
    return [*key, open_, high, low, close, int(volume) if volume == int(volume) else volume]


def day_text(moment: Any) -> str:
    """Return `2026-11-20` of a date, a time or a text of either. Raise ValueError for anything else."""
    if isinstance(moment, str) and len(moment) == 10:
        return dt.date.fromisoformat(moment).isoformat()
    return str(_timestamp(moment).date().isoformat())


def moment_text(moment: Any, end: bool = False) -> str:
    """Return `2026-11-20T09:15:00+05:30`. A date is its first second, or with `end` its last one."""
    if isinstance(moment, str) and len(moment) == 10:
        return dt.date.fromisoformat(moment).isoformat() + ("T23:59:59+05:30" if end else "T00:00:00+05:30")
    if isinstance(moment, str) and len(moment) == 25 and moment.endswith("+05:30") and moment[10] == "T":
        dt.datetime.fromisoformat(moment)
        return moment
    return iso_texts(pd.DatetimeIndex([_timestamp(moment)]))[0]


def _timestamp(moment: Any) -> pd.Timestamp:
    if isinstance(moment, bool) or moment is None:
        raise ValueError("no moment")
    if isinstance(moment, int | float | np.number):
        return kolkata(np.array([int(moment)]))[0]
    moments = moments_of(pd.Index([moment], dtype=object))
    if moments.hasnans:
        raise ValueError("no moment")
    return moments[0]


class CandleFile:
    """One connection to the file. Threads of a process share it, one at a time; processes have their own.

    Args:
        path: The file; it is made if it is missing.

    Raises:
        CandleFileError: The file cannot be opened, read or written. Every method raises it.
    """

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
        with self.writing():  # two processes may open a new file at once
            version = self._version(connection)
            for migration in MIGRATIONS[version:]:
                for statement in filter(str.strip, migration.split(";")):
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _version(self, connection: sqlite3.Connection) -> int:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise CandleFileError(
                f"{self.path} was written by a later release (version {version})", "update pkbrokers-redis"
            )
        return version

    @contextmanager
    def using(self) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread."""
        with self._lock:
            try:
                yield self._connection
            except sqlite3.DatabaseError as error:
                if "not a database" in str(error) or "malformed" in str(error):
                    hint = "move it away; a new one is filled from the store"
                else:
                    hint = "check the disk, and other processes that use the file"
                raise CandleFileError(f"{self.path}: {error}", hint) from error

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for one transaction, which an exception rolls back."""
        with self.using() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def progress(self, name: str) -> str | None:
        """Return the text that `set_progress` stored under a name."""
        with self.using() as connection:
            row = connection.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def close(self) -> None:
        """Close the connection. A second call does nothing."""
        with self._lock:
            self._connection.close()

    @property
    def bytes_on_disk(self) -> int:
        """The size of the file and its write-ahead log."""
        files = [self.path, self.path.with_name(self.path.name + "-wal")]
        return sum(file.stat().st_size for file in files if file.exists())


def set_progress(connection: sqlite3.Connection, name: str, value: str) -> None:
    """Store a text under a name, in the caller's transaction."""
    connection.execute(
        "INSERT INTO marks VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (name, value)
    )
