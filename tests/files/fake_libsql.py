"""A libSQL server on loopback: its HTTP pipeline API over a SQLite in memory, and its failures."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from typing import Any

from aiohttp import web

TOKEN = "secret-token"
BREAKS = {
    "short": "Content-Length: 5000",
    "cut chunk": "Transfer-Encoding: chunked",
    "no gzip": "Content-Encoding: gzip\r\nContent-Length: 5",
    "stall": "Content-Length: 5000",
}


class FakeLibsql:
    """`with FakeLibsql() as remote:` its `url`; `mode` is `ok`, `blocked`, `quota`, `garbage`, `broken`,
    or a way in which its answer breaks off."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.requests = 0
        self._database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Return rows that it has."""
        return self._database.execute(sql).fetchall()

    def run(self, sql: str) -> None:
        """Write a row as another machine."""
        self._database.execute(sql)

    def __enter__(self) -> FakeLibsql:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._database.close()

    def _run(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v2/pipeline", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": "unauthorized"}, status=401)
        if self.mode == "quota":
            return web.json_response({"error": "too many requests"}, status=429)
        if self.mode == "garbage":
            return web.Response(text="<html>Bad gateway</html>")
        if self.mode == "broken":
            return web.Response(status=502, text="no")
        if self.mode in BREAKS:
            return await self._break_off(request, BREAKS[self.mode])
        document = await request.json()
        return web.json_response(
            {"baton": None, "base_url": None, "results": [self._respond(one) for one in document["requests"]]}
        )

    async def _break_off(self, request: web.Request, headers: str) -> web.StreamResponse:
        """Send a body that contradicts its headers."""
        await request.read()
        transport = request.transport
        assert isinstance(transport, asyncio.Transport)
        transport.write(f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode() + b"10\r\n{")
        if self.mode != "stall":
            transport.close()
        return web.StreamResponse()

    def _respond(self, request: dict[str, Any]) -> dict[str, Any]:
        kind = request["type"]
        if kind == "close":
            return {"type": "ok", "response": {"type": "close"}}
        assert kind == "execute"
        try:
            result = self._execute(request["stmt"])
        except sqlite3.Error as error:
            return {"type": "error", "error": {"message": str(error), "code": "SQLITE_ERROR"}}
        return {"type": "ok", "response": {"type": kind, "result": result}}

    def _execute(self, statement: dict[str, Any]) -> dict[str, Any]:
        if self.mode == "blocked":
            raise sqlite3.OperationalError(
                "Operation was blocked: SQL read operations are forbidden (reads are blocked)"
            )
        arguments = [_plain(argument) for argument in statement.get("args", [])]
        cursor = self._database.execute(statement["sql"], arguments)
        rows = [[_typed(cell) for cell in row] for row in cursor.fetchall()]
        return {"cols": [], "rows": rows, "affected_row_count": max(cursor.rowcount, 0)}


def _plain(value: dict[str, Any]) -> Any:
    kind = value["type"]
    assert kind in ("null", "integer", "float", "text")
    assert kind != "integer" or isinstance(value["value"], str), "integers travel as text"
    return None if kind == "null" else int(value["value"]) if kind == "integer" else value["value"]


def _typed(cell: Any) -> dict[str, Any]:
    if cell is None:
        return {"type": "null"}
    if isinstance(cell, int):
        return {"type": "integer", "value": str(cell)}
    return {"type": "float", "value": cell} if isinstance(cell, float) else {"type": "text", "value": cell}
