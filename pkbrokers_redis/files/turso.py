"""Candles shared by several machines through a libSQL (Turso) database.

Every machine keeps its local file. A write goes to the file and, as a key, to the file's outbox; `sync` sends
the rows of the outbox and fetches the rows of other machines. Reads use the file only. So a remote that is
blocked, over its quota or unreachable delays new rows and costs nothing else: the outbox keeps the keys, and
the next successful sync sends them.

The remote's clock stamps arriving rows, so `updated_at` rises in the order of arrival and a fetch resumes
where the last one ended. A row in the outbox is newer than any remote copy of it.

The requests are libSQL's HTTP pipeline (its HRANA_3_SPEC, Turso's "SQL over HTTP"). docs/decisions/0022 says
why the `libsql` package is not used.

    POST <url>/v2/pipeline   Authorization: Bearer <token>
    {"requests": [{"type": "execute", "stmt": {"sql": "…", "args": [{"type": "text", "value": "INFY"}]}},
                  {"type": "close"}]}
    {"results": [{"type": "ok", "response": {"type": "execute", "result": {"rows": [[…]]}}} |
                 {"type": "error", "error": {"message": "…"}}]}
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import requests
import urllib3

from pkbrokers_redis import logs
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.files.candle_file import KEYS_OF, CandleFile, set_progress

TIMEOUT_SECONDS = (5.0, 30.0)  # to connect, to read
RESPONSE_BYTES_MAX = 64 << 20
OUTBOX_MAX = 1_000_000  # keys, ~100 MB of file; beyond it the oldest are dropped, counted and logged
ROWS_A_PUSH = 5_000
ROWS_A_PULL = 5_000
UNAVAILABLE_SECONDS = 30.0  # pause after a failed request
BLOCKED_SECONDS = 600.0  # pause after a refusal: a quota does not recover within minutes
DAILY = ""  # the `interval` of a daily candle in the outbox

Row = list[str | int | float | None]

_HINT = "the local file stays in use; check PKB_TURSO_URL, PKB_TURSO_TOKEN and the plan"
_BLOCKED_WORDS = ("blocked", "quota", "limit exceeded", "upgrade your plan", "payment")
_CELLS = ("open", "high", "low", "close", "volume")
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

log = logs.get("turso")


class RemoteUnavailable(PkbError):
    """Raised when the remote database does not respond, or not with valid results."""


class RemoteBlocked(RemoteUnavailable):
    """Raised when the remote database refuses: quota, plan, or token."""


class LibsqlClient:
    """Runs statements on one database over HTTP. Not for sharing between threads.

    Args:
        url: `libsql://…`, `https://…` or `http://…`.
        token: The database's token; "": none.
    """

    def __init__(self, url: str, token: str = "") -> None:
        scheme, _, rest = url.partition("://")
        host = rest.rstrip("/").removesuffix("/v2/pipeline")
        self._endpoint = f"{'http' if scheme in ('http', 'ws') else 'https'}://{host}/v2/pipeline"
        self._http = requests.Session()
        if token:
            self._http.headers["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def run(self, sql: str, arguments: Sequence[str] = ()) -> list[Row]:
        """Run one statement with text arguments and return its rows.

        Raises:
            RemoteBlocked: The database refuses.
            RemoteUnavailable: There is no response, or an invalid one.
        """
        statement = {"sql": sql, "args": [{"type": "text", "value": value} for value in arguments]}
        document = self._post({"requests": [{"type": "execute", "stmt": statement}, {"type": "close"}]})
        try:
            result = document["results"][0]
            if result["type"] == "ok":
                return [[_value(cell) for cell in row] for row in result["response"]["result"]["rows"]]
            message = str(result["error"]["message"])[:120]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RemoteUnavailable("the remote database sent invalid results", _HINT) from error
        kind = RemoteBlocked if _is_blocked(message) else RemoteUnavailable
        raise kind(f"the remote database refuses a statement ({message})", _HINT)

    def _post(self, document: dict[str, Any]) -> Any:
        try:
            with self._http.post(
                self._endpoint, json=document, timeout=TIMEOUT_SECONDS, stream=True
            ) as response:
                body = response.raw.read(RESPONSE_BYTES_MAX + 1, decode_content=True)
                status = response.status_code
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise RemoteUnavailable(
                f"the remote database does not respond ({type(error).__name__})", _HINT
            ) from error
        text = body[:300].decode(errors="replace")
        if status in (401, 402, 403, 429) or (status >= 400 and _is_blocked(text)):
            raise RemoteBlocked(f"the remote database refuses (HTTP {status})", _HINT)
        if status != 200 or len(body) > RESPONSE_BYTES_MAX:
            raise RemoteUnavailable(f"the remote database responds with HTTP {status}", _HINT)
        try:
            return json.loads(body)
        except ValueError as error:
            raise RemoteUnavailable("the remote database does not speak libSQL's protocol", _HINT) from error


def _value(cell: dict[str, Any]) -> str | int | float | None:
    kind = cell["type"]
    if kind == "integer":  # 64-bit integers are sent as text
        return int(cell["value"])
    if kind == "float":
        return float(cell["value"])
    return None if kind == "null" else str(cell.get("value", ""))


def _is_blocked(text: str) -> bool:
    return any(word in text.lower() for word in _BLOCKED_WORDS)


class RemoteCandles:
    """Exchanges the rows of a `CandleFile` with a remote database.

    Args:
        file: The local file.
        client: The remote database.
        validated: Takes records and the number of their keys; yields the valid ones.
        clock: Machine time in seconds, for the pauses.

    Attributes:
        state: `in sync`, or why it is not.
        outbox_dropped: Keys dropped because the outbox was full.
    """

    def __init__(
        self,
        file: CandleFile,
        client: LibsqlClient,
        validated: Callable[[Iterable[Sequence[Any]], int], Iterator[list[Any]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = "not synced yet"
        self.outbox_dropped = 0
        self._file = file
        self._client = client
        self._validated = validated
        self._clock = clock
        self._paused_until = 0.0
        self._has_schema = False

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def add_to_outbox(self, connection: sqlite3.Connection, keys: Iterable[tuple[str, str, str]]) -> None:
        """Add `(symbol, moment, interval)` of rows just written, in the same transaction."""
        connection.executemany("INSERT INTO outbox (symbol, moment, interval) VALUES (?, ?, ?)", keys)
        first, last = connection.execute("SELECT min(seq), max(seq) FROM outbox").fetchone()
        if first is None or last - first < OUTBOX_MAX:
            return
        surplus = connection.execute("SELECT count(*) FROM outbox").fetchone()[0] - OUTBOX_MAX
        if surplus > 0:
            oldest = "SELECT seq FROM outbox ORDER BY seq LIMIT ?"
            connection.execute(f"DELETE FROM outbox WHERE seq IN ({oldest})", (surplus,))  # noqa: S608
            self.outbox_dropped += surplus
            log.warning("outbox_full", dropped=surplus, hint="the remote lacks these rows")

    @property
    def waiting(self) -> int:
        """The number of rows in the outbox."""
        with self._file.using() as connection:
            return int(connection.execute("SELECT count(*) FROM outbox").fetchone()[0])

    def sync(self) -> bool:
        """Send the outbox and fetch new rows. Return False, with the reason in `state`, if it failed."""
        if self._clock() < self._paused_until:
            return False
        try:
            if not self._has_schema:
                for statement in _REMOTE_SCHEMA:
                    self._client.run(statement)
                self._has_schema = True
            while self._push():
                pass
            for table in KEYS_OF:
                while self._pull(table):
                    pass
        except RemoteUnavailable as error:
            pause = BLOCKED_SECONDS if isinstance(error, RemoteBlocked) else UNAVAILABLE_SECONDS
            self._paused_until = self._clock() + pause
            if self.state != error.message:
                log.warning("remote_unavailable", reason=error.message, retry_seconds=pause)
            self.state = error.message
            return False
        if self.state != "in sync":
            log.info("remote_synced")
        self.state = "in sync"
        return True

    def _push(self) -> bool:
        """Send one slice of the outbox. Return whether there may be more."""
        rows: dict[str, list[Any]] = {table: [] for table in KEYS_OF}
        with self._file.using() as connection:
            outbox = connection.execute(
                "SELECT seq, symbol, moment, interval FROM outbox ORDER BY seq LIMIT ?", (ROWS_A_PUSH,)
            ).fetchall()
            for _, *key in outbox:
                table = "daily_candles" if key[2] == DAILY else "intraday_candles"
                rows[table] += connection.execute(_select_row(table), key[: len(KEYS_OF[table])])
        for table, found in rows.items():
            if found:  # as one JSON argument: SQLite limits the number of arguments
                self._client.run(_remote_upsert(table), [json.dumps(found)])
        if outbox:
            with self._file.writing() as connection:
                # By seq: a row that was written again meanwhile has a new seq and stays.
                connection.executemany("DELETE FROM outbox WHERE seq = ?", [(seq,) for seq, *_ in outbox])
        return len(outbox) == ROWS_A_PUSH

    def _pull(self, table: str) -> bool:
        """Fetch one slice of rows that arrived since the last one. Return whether there may be more."""
        keys = KEYS_OF[table]
        name = f"pulled {table}"
        position = (self._file.progress(name) or "").split("\t")
        if len(position) != len(keys) + 1:
            position = [""] * (len(keys) + 1)
        order = ", ".join(("updated_at", *keys))
        rows = self._client.run(
            f"SELECT {order}, {', '.join(_CELLS)} FROM {table} "  # noqa: S608 - constant names
            f"WHERE ({order}) > ({', '.join('?' * len(position))}) ORDER BY {order} LIMIT {ROWS_A_PULL}",
            position,
        )
        size = len(position) + len(_CELLS)
        keyed = [row for row in rows if len(row) == size and all(type(key) is str for key in row[:-5])]
        if not keyed:
            return False
        valid = [[*cells, row[0]] for row in keyed for cells in self._validated([row[1:]], len(keys))]
        with self._file.writing() as connection:
            connection.executemany(_local_upsert(table), valid)
            set_progress(connection, name, "\t".join(str(key) for key in keyed[-1][: len(position)]))
        return len(rows) == ROWS_A_PULL


def _select_row(table: str) -> str:
    keys = KEYS_OF[table]
    where = " AND ".join(f"{key} = ?" for key in keys)
    return f"SELECT {', '.join((*keys, *_CELLS))} FROM {table} WHERE {where}"  # noqa: S608 - constant names


def _upsert(table: str, source: str) -> str:
    columns = (*_CELLS, "updated_at")
    updates = ", ".join(f"{name} = excluded.{name}" for name in columns)
    return (
        f"INSERT INTO {table} ({', '.join((*KEYS_OF[table], *columns))}) {source} "
        f"ON CONFLICT DO UPDATE SET {updates}"
    )


def _remote_upsert(table: str) -> str:
    """Return the statement that writes rows given as one JSON array of arrays."""
    cells = ", ".join(f"value ->> {i}" for i in range(len(KEYS_OF[table]) + len(_CELLS)))
    return _upsert(table, f"SELECT {cells}, {_STAMP} FROM json_each(?) WHERE true")  # noqa: S608


def _local_upsert(table: str) -> str:
    """Return the statement that writes a remote row, unless the outbox has a newer one."""
    count = len(KEYS_OF[table])
    numbered = [f"?{i + 1}" for i in range(count + len(_CELLS) + 1)]
    key = (*numbered[:count], f"'{DAILY}'")[:3]
    newer = f"SELECT 1 FROM outbox WHERE (symbol, moment, interval) = ({', '.join(key)})"  # noqa: S608
    return _upsert(table, f"SELECT {', '.join(numbered)} WHERE NOT EXISTS ({newer})")
