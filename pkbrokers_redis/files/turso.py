"""libSQL (Turso) over HTTP: the pipeline API, with requests and nothing native.

    POST <url>/v2/pipeline   Authorization: Bearer <token>
    {"requests": [{"type": "execute", "stmt": {"sql": "…", "args": [{"type": "text", "value": "INFY"}]}},
                  {"type": "batch", "batch": {"steps": [{"stmt": …, "condition": {"type": "ok", "step": 0}}]}}
                  {"type": "close"}]}
    {"results": [{"type": "ok", "response": {"type": "execute", "result": {"cols": […], "rows": [[…]]}}} |
                 {"type": "ok", "response": {"type": "batch", "result": {"step_results", "step_errors"}}} |
                 {"type": "error", "error": {"message": "…", "code": "…"}}]}

A 64-bit integer travels as text. Source: libSQL's HRANA_3_SPEC and Turso's "SQL over HTTP" reference.

A libSQL (Turso) database that several machines share, beside the local file that each of them keeps.

Writes go to the local file and, as keys, to its outbox; `sync` sends the outbox and fetches what others sent.
Reads are the local file's. So a remote that is blocked, over its quota or away costs nothing but freshness:
the outbox waits, and the next sync after it came back catches up.

Rows are stamped by the remote's clock when they arrive, so `updated_at` rises in the order of arrival and a
fetch goes on where the last one ended. A row that waits in the outbox is newer than any remote copy of it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import requests
import urllib3

from pkbrokers_redis import logs
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.files.candle_file import CandleFile, set_mark

TIMEOUT_SECONDS = (5.0, 30.0)  # to connect, to read
ANSWER_BYTES_MAX = 64 << 20

Value = str | int | float | None
Statement = tuple[str, Sequence[Value]]
Row = list[Value]

_BLOCKED = ("blocked", "quota", "limit exceeded", "upgrade your plan", "payment")


class RemoteDown(PkbError):
    """Raised when the remote database does not answer, or not as it should: work on with the local file."""


class RemoteBlocked(RemoteDown):
    """Raised when the remote database refuses: over its quota, blocked, or the token is not accepted."""


class LibsqlClient:
    """Statements to one database. Not for sharing between threads."""

    def __init__(self, url: str, token: str = "") -> None:
        scheme, _, rest = url.partition("://")
        host = rest.rstrip("/").removesuffix("/v2/pipeline")
        self._endpoint = f"{'http' if scheme in ('http', 'ws') else 'https'}://{host}/v2/pipeline"
        self._http = requests.Session()
        if token:
            self._http.headers["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        """Give the connection back."""
        self._http.close()

    def query(self, sql: str, arguments: Sequence[Value] = ()) -> list[Row]:
        """The rows of one statement. Raises RemoteDown, RemoteBlocked."""
        result = self._ask({"type": "execute", "stmt": _statement(sql, arguments)})
        return _rows_of(result)

    def execute(self, statements: Sequence[Statement]) -> None:
        """Run statements in order in one transaction: all of them, or none and RemoteDown."""
        wrapped: list[Statement] = [("BEGIN", ()), *statements, ("COMMIT", ())]
        steps: list[dict[str, Any]] = [{"stmt": _statement(*statement)} for statement in wrapped]
        for i in range(1, len(steps)):  # a step runs only if the one before did
            steps[i]["condition"] = {"type": "ok", "step": i - 1}
        failed = {"type": "not", "cond": {"type": "ok", "step": len(steps) - 1}}
        steps.append({"stmt": _statement("ROLLBACK", ()), "condition": failed})
        result = self._ask({"type": "batch", "batch": {"steps": steps}})
        errors = result.get("step_errors") if isinstance(result, dict) else None
        if not isinstance(errors, list):
            raise RemoteDown("the remote database answers with odd results", _MEND)
        for error in errors[: len(wrapped)]:
            if error is not None:
                raise _refusal(error)

    def _ask(self, request: dict[str, Any]) -> Any:
        """The result of one request."""
        answer = self._post([request, {"type": "close"}])[0]
        if not isinstance(answer, dict) or answer.get("type") != "ok":
            raise _refusal(answer.get("error") if isinstance(answer, dict) else None)
        response = answer.get("response")
        return response.get("result") if isinstance(response, dict) else None

    def _post(self, steps: list[dict[str, Any]]) -> list[Any]:
        try:
            with self._http.post(
                self._endpoint, json={"requests": steps}, timeout=TIMEOUT_SECONDS, stream=True
            ) as answer:
                body = answer.raw.read(ANSWER_BYTES_MAX + 1, decode_content=True)
                status = answer.status_code
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise RemoteDown(
                f"the remote database does not answer ({type(error).__name__})", _MEND
            ) from error
        text = body[:300].decode(errors="replace")
        if status in (401, 402, 403, 429) or (status >= 400 and _is_blocked(text)):
            raise RemoteBlocked(f"the remote database refuses (HTTP {status})", _MEND)
        if status != 200 or len(body) > ANSWER_BYTES_MAX:
            raise RemoteDown(f"the remote database answers HTTP {status}", _MEND)
        try:
            results = json.loads(body)["results"]
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteDown("the remote database does not speak libSQL's protocol", _MEND) from error
        if not isinstance(results, list) or len(results) < len(steps) - 1:
            raise RemoteDown("the remote database left statements unanswered", _MEND)
        return results


_MEND = "the local file goes on; check PKB_TURSO_URL, PKB_TURSO_TOKEN and the plan"


def _statement(sql: str, arguments: Sequence[Value]) -> dict[str, Any]:
    return {"sql": sql, "args": [_typed(value) for value in arguments]}


def _typed(value: Value) -> dict[str, Any]:
    if value is None:
        return {"type": "null"}
    if isinstance(value, int):
        return {"type": "integer", "value": str(value)}
    if isinstance(value, float):
        return {"type": "float", "value": value}
    return {"type": "text", "value": value}


def _refusal(error: Any) -> RemoteDown:
    message = str(error.get("message", "") if isinstance(error, dict) else "")[:120]
    kind = RemoteBlocked if _is_blocked(message) else RemoteDown
    return kind(f"the remote database refuses a statement ({message})", _MEND)


def _rows_of(result: Any) -> list[Row]:
    try:
        return [[_plain(cell) for cell in row] for row in result["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RemoteDown("the remote database answers with odd rows", _MEND) from error


def _plain(cell: dict[str, Any]) -> Value:
    kind = cell["type"]
    if kind == "integer":
        return int(cell["value"])
    if kind == "float":
        return float(cell["value"])
    return None if kind == "null" else str(cell.get("value", ""))


def _is_blocked(text: str) -> bool:
    return any(word in text.lower() for word in _BLOCKED)


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
