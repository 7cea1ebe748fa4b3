"""History that was downloaded once: a SQLite file, so that years of minutes need not be asked for again.

    rows    token interval start open high low close volume oi      candles, by start
    spans   token interval from_s to_s                              what Kite was asked for and has answered

A piece of history and its span are written in one transaction: a download that is killed goes on where it
was. Only settled history is kept: Kite may still correct today's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from pkbrokers_redis.core.errors import PkbError
from pkbrokers_redis.kite.history_rows import HistoryRow

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
