"""A pipeline for the hot paths: packed in one piece, sent with one write, replies read in order.

redis-py's own looks at every argument in Python and writes in pieces of 6 KB; for a commit of five thousand
arguments that took longer than Redis took to carry it out (docs/decisions/0004). Retries are the caller's.

On a cluster the commands go to the masters that have their keys, one write a master, and all masters work
at once; the replies come back in the order of the commands.
"""

from __future__ import annotations

from typing import Any

import redis
from hiredis import pack_command
from redis.exceptions import ResponseError

from pkbrokers_redis.store.cluster import AWAY, cluster_of, master_pool, refresh

# Where a command has its (first) key; 1 for those that are not here. XREAD is `XREAD COUNT n STREAMS key id`.
_KEY_AT = {"FCALL": 3, "FCALL_RO": 3, "XGROUP": 2, "XINFO": 2, "XREAD": 4}


class Pipe:
    """Collects commands; `execute` sends them all. Arguments are bytes, str, int or float.

    A command's key stands behind its name, or where `_KEY_AT` says. Between MULTI and EXEC all keys must be
    of one slot.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._cluster = cluster_of(client)
        self._pool: Any = None if self._cluster else client.connection_pool
        self._connection: Any = None  # held from the first flush to execute
        self._sent = 0
        self._parts: list[bytes] = []
        self._keys: list[Any] = []  # cluster only: the key that says where each part goes

    def __len__(self) -> int:
        return self._sent + len(self._parts)

    @property
    def is_clustered(self) -> bool:
        """Whether the commands go to a cluster."""
        return self._cluster is not None

    def add(self, *command: Any) -> None:
        """Append a command: its name and arguments."""
        self._parts.append(pack_command(command))
        if self._cluster is not None:
            self._note_key(command)

    def _note_key(self, command: tuple[Any, ...]) -> None:
        if command[0] == "MULTI":
            self._keys.append(None)  # goes where the next command goes
            return
        key = self._keys[-1] if command[0] == "EXEC" else command[_KEY_AT.get(command[0], 1)]
        if self._keys and self._keys[-1] is None:
            self._keys[-1] = key
        self._keys.append(key)

    def execute(self) -> list[Any]:
        """Send everything and return the raw replies, errors of single commands as exceptions in the list.

        Raises redis.ConnectionError or TimeoutError when a connection failed, or when a cluster's slots are
        elsewhere by now: then nobody knows which commands were carried out.
        """
        if self._cluster is not None:
            parts, self._parts = self._parts, []
            keys, self._keys = self._keys, []
            return _execute_on_masters(self._cluster, parts, keys) if parts else []
        self.flush()
        connection, self._connection = self._connection, None
        sent, self._sent = self._sent, 0
        if connection is None:
            return []
        try:
            return [_reply(connection) for _ in range(sent)]
        except BaseException:
            connection.disconnect()  # unread replies must not meet the next caller
            raise
        finally:
            self._pool.release(connection)

    def flush(self) -> None:
        """Send what was added so far without waiting for replies, so that the server can begin.

        Then `execute` must follow. On a cluster nothing happens before `execute`.
        """
        if self._cluster is not None or not self._parts:
            return
        parts, self._parts = self._parts, []
        if self._connection is None:
            self._connection = self._pool.get_connection()
        try:
            self._connection.send_packed_command([b"".join(parts)])
        except BaseException:
            connection, self._connection, self._sent = self._connection, None, 0
            connection.disconnect()
            self._pool.release(connection)
            raise
        self._sent += len(parts)


def _execute_on_masters(cluster: redis.RedisCluster, parts: list[bytes], keys: list[Any]) -> list[Any]:
    groups: dict[Any, list[int]] = {}  # pool of a master → numbers of its commands
    pools: dict[Any, Any] = {}
    replies: list[Any] = [None] * len(parts)
    taken: list[tuple[Any, Any, list[int]]] = []
    try:
        for n, key in enumerate(keys):
            if key not in pools:
                pools[key] = master_pool(cluster, key)
            groups.setdefault(pools[key], []).append(n)
        for pool, numbers in groups.items():
            taken.append((pool, pool.get_connection(), numbers))
        for _, connection, numbers in taken:
            connection.send_packed_command([b"".join([parts[n] for n in numbers])])
        for _, connection, numbers in taken:
            for n in numbers:
                replies[n] = _reply(connection)
    except BaseException as error:
        for _, connection, _ in taken:
            connection.disconnect()  # unread replies must not meet the next caller
        if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
            refresh(cluster)
        raise
    finally:
        for pool, connection, _ in taken:
            pool.release(connection)
    moved = next((reply for reply in replies if isinstance(reply, AWAY)), None)
    if moved is not None:
        refresh(cluster)
        raise redis.ConnectionError(f"the cluster is changing or a part is away ({moved})") from moved
    return replies


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ConnectionError:
        raise
    except ResponseError as error:
        return error
