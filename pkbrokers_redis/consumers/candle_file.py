"""The SQLite file behind `LocalCandleDatabase`: its tables, its migrations, its settings.

    daily_candles     symbol, date "2026-11-20", open, high, low, close, volume, updated_at
    intraday_candles  symbol, timestamp "2026-11-20T09:15:00+05:30", interval "1m", open, …, updated_at
    outbox            keys of rows that the remote database does not have yet
    marks             name → text: how far something has come

Both candle tables are their primary key (WITHOUT ROWID): reading a symbol is one run of pages. The one
index, interval and time, is for reading the last minutes of all symbols; it makes the file a third larger.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pkbrokers_redis.core.errors import CandleFileError

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
                    mend = "move it away; a new one is filled from the store"
                else:
                    mend = "check the disk, and who else holds the file"
                raise CandleFileError(f"{self.path}: {error}", mend) from error

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
