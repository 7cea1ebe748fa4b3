"""A libSQL (Turso) database that several machines share, beside the local file that each of them keeps.

Writes go to the local file and, as keys, to its outbox; `sync` sends the outbox and fetches what others sent.
Reads are the local file's. So a remote that is blocked, over its quota or away costs nothing but freshness:
the outbox waits, and the next sync after it came back catches up.

Rows are stamped by the remote's clock when they arrive, so `updated_at` rises in the order of arrival and a
fetch goes on where the last one ended. A row that waits in the outbox is newer than any remote copy of it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from pkbrokers_redis import logs
from pkbrokers_redis.consumers.candle_file import CandleFile, set_mark
from pkbrokers_redis.consumers.libsql import LibsqlClient, RemoteBlocked, RemoteDown, Row

OUTBOX_MAX = 1_000_000  # keys, ~100 MB of file; then the oldest are given up, counted and logged
ROWS_A_STATEMENT = 100  # 800 arguments; SQLite takes 32,766
ROWS_A_PUSH = 5_000
ROWS_A_PULL = 5_000
AWAY_SECONDS = 30.0  # until the next attempt after no answer
BLOCKED_SECONDS = 600.0  # after a refusal: quotas do not come back within minutes
DAILY = ""  # a daily candle's `interval` in the outbox

log = logs.get("remote candles")

_STAMP = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
_REMOTE_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS daily_candles (symbol TEXT NOT NULL, date TEXT NOT NULL, "
    "open REAL, high REAL, low REAL, close REAL, volume INTEGER, updated_at TEXT, "
    "PRIMARY KEY (symbol, date))",
    "CREATE TABLE IF NOT EXISTS intraday_candles (symbol TEXT NOT NULL, timestamp TEXT NOT NULL, "
    "interval TEXT NOT NULL, open REAL, high REAL, low REAL, close REAL, volume INTEGER, updated_at TEXT, "
    "PRIMARY KEY (symbol, timestamp, interval))",
    "CREATE INDEX IF NOT EXISTS daily_by_arrival ON daily_candles (updated_at, symbol, date)",
    "CREATE INDEX IF NOT EXISTS intraday_by_arrival "
    "ON intraday_candles (updated_at, symbol, timestamp, interval)",
)
_TABLES = {"daily_candles": ("symbol", "date"), "intraday_candles": ("symbol", "timestamp", "interval")}
_CELLS = ("open", "high", "low", "close", "volume")


class RemoteCandles:
    """The remote half of a LocalCandleDatabase. `clock` is machine time in seconds, for the pauses.

    `good` takes records and how many of their cells are keys, and gives those that are candles.
    """

    def __init__(
        self,
        file: CandleFile,
        client: LibsqlClient,
        good: Callable[[Iterable[Sequence[Any]], int], Iterator[list[Any]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = "not asked yet"
        self.outbox_dropped = 0
        self._file = file
        self._client = client
        self._good = good
        self._clock = clock
        self._quiet_until = 0.0
        self._has_schema = False

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()

    def note(self, connection: sqlite3.Connection, keys: Iterable[tuple[str, str, str]]) -> None:
        """Put `(symbol, moment, interval)` of rows just written into the outbox; same transaction."""
        connection.executemany("INSERT INTO outbox (symbol, moment, interval) VALUES (?, ?, ?)", keys)
        first, last = connection.execute("SELECT min(seq), max(seq) FROM outbox").fetchone()
        if first is None or last - first < OUTBOX_MAX:
            return
        count = connection.execute("SELECT count(*) FROM outbox").fetchone()[0]
        if count > OUTBOX_MAX:
            oldest = "SELECT seq FROM outbox ORDER BY seq LIMIT ?"
            connection.execute(f"DELETE FROM outbox WHERE seq IN ({oldest})", (count - OUTBOX_MAX,))  # noqa: S608
            self.outbox_dropped += count - OUTBOX_MAX
            log.warning("outbox is full: the remote misses rows", dropped=count - OUTBOX_MAX)

    @property
    def waiting(self) -> int:
        """Rows in the outbox."""
        with self._file.using() as connection:
            return int(connection.execute("SELECT count(*) FROM outbox").fetchone()[0])

    def sync(self) -> bool:
        """Send what waits, fetch what is new. False, and a reason in `state`, when it is not to be had."""
        if self._clock() < self._quiet_until:
            return False
        try:
            if not self._has_schema:
                self._client.execute([(statement, ()) for statement in _REMOTE_SCHEMA])
                self._has_schema = True
            while self._push():
                pass
            for table in _TABLES:
                while self._pull(table):
                    pass
        except RemoteDown as error:
            pause = BLOCKED_SECONDS if isinstance(error, RemoteBlocked) else AWAY_SECONDS
            self._quiet_until = self._clock() + pause
            if self.state != error.message:
                log.warning("remote database left out", reason=error.message, again_in_seconds=pause)
            self.state = error.message
            return False
        if self.state != "in sync":
            log.info("remote database in sync")
        self.state = "in sync"
        return True

    def _push(self) -> bool:
        """Send one slice of the outbox; whether there may be more."""
        with self._file.using() as connection:
            keys = connection.execute(
                "SELECT seq, symbol, moment, interval FROM outbox ORDER BY seq LIMIT ?", (ROWS_A_PUSH,)
            ).fetchall()
            rows: dict[str, list[Row]] = {table: [] for table in _TABLES}
            for _, symbol, moment, interval in keys:
                table = "intraday_candles" if interval else "daily_candles"
                found = connection.execute(_one_row(table), (symbol, moment, interval)[: len(_TABLES[table])])
                rows[table] += [list(row) for row in found]
        if not keys:
            return False
        statements = []
        for table, found_rows in rows.items():
            source = iter(found_rows)
            while some := list(islice(source, ROWS_A_STATEMENT)):
                statements.append((_upsert(table, len(some)), [cell for row in some for cell in row]))
        if statements:
            self._client.execute(statements)
        with self._file.writing() as connection:
            # By seq: a row written again meanwhile has a new one and stays.
            connection.executemany("DELETE FROM outbox WHERE seq = ?", [(seq,) for seq, *_ in keys])
        return len(keys) == ROWS_A_PUSH

    def _pull(self, table: str) -> bool:
        """Fetch one slice of what arrived at the remote since the last; whether there may be more."""
        names = _TABLES[table]
        mark = f"pulled {table}"
        position = (self._file.mark(mark) or "").split("\t")
        if len(position) != len(names) + 1:
            position = [""] * (len(names) + 1)
        columns = ", ".join(("updated_at", *names))
        rows = self._client.query(
            f"SELECT {columns}, {', '.join(_CELLS)} FROM {table} "  # noqa: S608 - names are ours
            f"WHERE ({columns}) > ({', '.join('?' * len(position))}) ORDER BY {columns} LIMIT {ROWS_A_PULL}",
            position,
        )
        size = len(position) + len(_CELLS)
        keyed = [row for row in rows if len(row) == size and all(type(key) is str for key in row[:-5])]
        if not keyed:
            return False
        taken = [[*cells, row[0]] for row in keyed for cells in self._good([row[1:]], len(names))]
        with self._file.writing() as connection:
            connection.executemany(_take_over(table), taken)
            set_mark(connection, mark, "\t".join(str(key) for key in keyed[-1][: len(position)]))
        return len(rows) == ROWS_A_PULL


def _one_row(table: str) -> str:
    names = _TABLES[table]
    wanted = " AND ".join(f"{name} = ?" for name in names)
    return f"SELECT {', '.join((*names, *_CELLS))} FROM {table} WHERE {wanted}"  # noqa: S608 - names are ours


def _upsert(table: str, count: int) -> str:
    names = (*_TABLES[table], *_CELLS)
    row = f"({', '.join('?' * len(names))}, {_STAMP})"
    updates = ", ".join(f"{name} = excluded.{name}" for name in (*_CELLS, "updated_at"))
    return (
        f"INSERT INTO {table} ({', '.join(names)}, updated_at) VALUES {', '.join([row] * count)} "  # noqa: S608
        f"ON CONFLICT DO UPDATE SET {updates}"
    )


def _take_over(table: str) -> str:
    """A remote row into the local table, unless a newer one of ours waits in the outbox."""
    names = _TABLES[table]
    numbered = [f"?{i + 1}" for i in range(len(names) + 6)]
    key = (*numbered[: len(names)], "''")[:3]
    updates = ", ".join(f"{name} = excluded.{name}" for name in (*_CELLS, "updated_at"))
    return (
        f"INSERT INTO {table} ({', '.join((*names, *_CELLS, 'updated_at'))}) SELECT {', '.join(numbered)} "  # noqa: S608
        f"WHERE NOT EXISTS (SELECT 1 FROM outbox WHERE (symbol, moment, interval) = ({', '.join(key)})) "
        f"ON CONFLICT DO UPDATE SET {updates}"
    )
