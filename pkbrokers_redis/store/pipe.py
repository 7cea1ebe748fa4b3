"""A pipeline for the hot paths: packed in one piece, sent with one write, replies read in order.

redis-py's own looks at every argument in Python and writes in pieces of 6 KB; for a commit of five thousand
arguments that took longer than Redis took to carry it out (docs/decisions/0004). Retries are the caller's.
"""

from __future__ import annotations

from typing import Any

import redis
from hiredis import pack_command
from redis.exceptions import ResponseError


class Pipe:
    """Collects commands for one server; `execute` sends them all. Arguments are bytes, str, int or float."""

    def __init__(self, client: redis.Redis) -> None:
        self._pool = client.connection_pool
        self._parts: list[bytes] = []

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, *command: Any) -> None:
        """Append a command: its name and arguments."""
        self._parts.append(pack_command(command))

    def execute(self) -> list[Any]:
        """Send everything and return the raw replies, errors of single commands as exceptions in the list.

        Raises redis.ConnectionError or TimeoutError when the connection failed: then nobody knows which
        commands were carried out.
        """
        parts, self._parts = self._parts, []
        if not parts:
            return []
        connection = self._pool.get_connection()
        try:
            connection.send_packed_command([b"".join(parts)])
            return [self._reply(connection) for _ in parts]
        except BaseException:
            connection.disconnect()  # unread replies must not meet the next caller
            raise
        finally:
            self._pool.release(connection)

    @staticmethod
    def _reply(connection: Any) -> Any:
        try:
            return connection.read_response()
        except redis.ConnectionError:
            raise
        except ResponseError as error:
            return error
