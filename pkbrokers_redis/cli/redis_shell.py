"""The shell behind `pkb redis-cli` where no redis-cli is installed: one reply per command, printed like its.

On a terminal replies look like `1) "INFY"` and `(integer) 3`; in a pipe they are the bare values.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import Any

import redis

from pkbrokers_redis.store.cluster import cluster_of, master_pool

STATUSES = {b"OK", b"PONG", b"QUEUED"}
STREAMING = {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "MONITOR", "SYNC", "PSYNC"}


def run_shell(client: redis.Redis, words: list[str]) -> int:
    """One command and its exit code; without words, commands from stdin until its end or `quit`."""
    pool = _pool_of(client, words)
    connection = pool.get_connection()
    try:
        if words:
            return _run(connection, words)
        code = 0
        for line in _lines():
            try:
                words = shlex.split(line)
            except ValueError:
                print("Invalid argument(s)")
                continue
            if words and words[0].lower() in ("quit", "exit"):
                return 0
            if words:
                code = _run(connection, words)
        return code
    finally:
        pool.release(connection)


def _pool_of(client: redis.Redis, words: list[str]) -> Any:
    """Where a command goes; on a cluster to the master of its key, a session to one master for good."""
    cluster = cluster_of(client)
    if cluster is None:
        return client.connection_pool
    return master_pool(cluster, words[1] if len(words) > 1 else "")


def _lines() -> Any:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  what makes input() remember and edit lines
    while True:
        try:
            yield input("redis> ")
        except EOFError:
            print()
            return


def _run(connection: Any, words: list[str]) -> int:
    if words[0].upper() in STREAMING:
        print(f"(error) {words[0].upper()} streams: install redis-cli for it")
        return 1
    try:
        connection.send_command(*words)
        reply = connection.read_response()
    except redis.ResponseError as error:
        print(f"(error) {error}" if sys.stdout.isatty() else str(error))
        return 1
    print(pretty(reply) if sys.stdout.isatty() else raw(reply))
    return 0


def pretty(reply: Any, indent: str = "") -> str:
    """A reply as redis-cli shows it to people."""
    if reply is None:
        return "(nil)"
    if isinstance(reply, int):
        return f"(integer) {reply}"
    if isinstance(reply, Exception):
        return f"(error) {reply}"
    if isinstance(reply, list):
        if not reply:
            return "(empty array)"
        width = len(str(len(reply)))
        inner = indent + " " * (width + 2)
        shown = [f"{n:>{width}}) {pretty(item, inner)}" for n, item in enumerate(reply, 1)]
        return f"\n{indent}".join(shown)
    return reply.decode() if reply in STATUSES else _quoted(bytes(reply))


def raw(reply: Any) -> str:
    """A reply for pipes: bare values, one per line."""
    if reply is None:
        return ""
    if isinstance(reply, list):
        return "\n".join(map(raw, reply))
    return reply.decode(errors="surrogateescape") if isinstance(reply, bytes) else str(reply)


def _quoted(value: bytes) -> str:
    escapes = {34: '\\"', 92: "\\\\", 10: "\\n", 13: "\\r", 9: "\\t"}
    return '"' + "".join(escapes.get(c) or (chr(c) if 32 <= c < 127 else f"\\x{c:02x}") for c in value) + '"'
