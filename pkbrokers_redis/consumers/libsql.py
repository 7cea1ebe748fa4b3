"""libSQL (Turso) over HTTP: the pipeline API, with requests and nothing native.

    POST <url>/v2/pipeline   Authorization: Bearer <token>
    {"requests": [{"type": "execute", "stmt": {"sql": "…", "args": [{"type": "text", "value": "INFY"}]}},
                  {"type": "batch", "batch": {"steps": [{"stmt": …, "condition": {"type": "ok", "step": 0}}]}}
                  {"type": "close"}]}
    {"results": [{"type": "ok", "response": {"type": "execute", "result": {"cols": […], "rows": [[…]]}}} |
                 {"type": "ok", "response": {"type": "batch", "result": {"step_results", "step_errors"}}} |
                 {"type": "error", "error": {"message": "…", "code": "…"}}]}

A 64-bit integer travels as text. Source: libSQL's HRANA_3_SPEC and Turso's "SQL over HTTP" reference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import requests
import urllib3

from pkbrokers_redis.core.errors import PkbError

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
