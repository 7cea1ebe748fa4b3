"""The only module that touches redis-py's private parts: clusters, packed pipelines, pinned connections.

redis-py's cluster client reports a part that is unavailable or migrating in many ways: MOVED, ASK, TRYAGAIN,
CLUSTERDOWN, and exceptions that are not even RedisErrors. `ClusterClient` turns all of them into
`redis.ConnectionError`, after which a worker loads its state again and resumes.

    one server                          a cluster
    a command                           the same; redis-py follows MOVED and ASK
    pipeline(transaction=False)         commands of many slots; those of one node are sent together
    pipeline(transaction=True)          keys of one slot only (a shard's, or one key)
    XREAD of several shards' streams    `streams.StreamReader`
    performance-critical pipelines      `Pipe`
    FUNCTION LOAD, SCAN                 redis-py asks every master
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import redis
from hiredis import pack_command
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterError,
    CrossSlotTransactionError,
    RedisClusterException,
    ResponseError,
    TryAgainError,
)

# MovedError is an AskError. After these the command was not executed, or its outcome is unknown.
CLUSTER_ERRORS = (RedisClusterException, ClusterError, AskError, TryAgainError)


class ClusterClient(redis.RedisCluster):
    """`redis.RedisCluster` that raises redis.ConnectionError wherever a later attempt may succeed."""

    def __init__(self, **arguments: Any) -> None:
        initialize: Any = super().__init__
        initialize(**arguments)
        self.commands_parser: Any = _KeyFinder(self.commands_parser)

    def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """Execute as redis-py does. Raise redis.ConnectionError for a cluster in change."""
        execute: Any = super().execute_command  # Any: redis-py's cluster has no types
        with connection_errors():
            return execute(*args, **kwargs)

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> Any:
        """Return a pipeline as redis-py does, which also repeats commands whose slot has moved.

        A command that no node answered raises redis.ConnectionError, whatever `raise_on_error` states: its
        missing reply must not be mistaken for an empty key.
        """
        make: Any = super().pipeline
        pipeline = make(transaction or None, shard_hint)
        execute, execute_command = pipeline.execute, pipeline.execute_command
        commands: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record_command(*args: Any, **options: Any) -> Any:
            commands.append((args, dict(options)))
            return execute_command(*args, **options)

        def execute_all(raise_on_error: bool = True) -> list[Any]:
            recorded = commands[:]
            commands.clear()
            with connection_errors():
                # redis-py does not follow redirections in a pipeline, so its first error must not end it.
                replies: list[Any] = execute(False)
                for n, (reply, (args, options)) in enumerate(zip(replies, recorded, strict=True)):
                    if isinstance(reply, (AskError, TryAgainError)) and not transaction:
                        replies[n] = self.execute_command(*args, **options)
                    elif isinstance(reply, (*CLUSTER_ERRORS, redis.ConnectionError, redis.TimeoutError)):
                        refresh_topology(self)
                        raise reply
                    elif isinstance(reply, Exception) and raise_on_error:
                        raise reply
                    elif transaction:
                        replies[n] = self._shape(args[0], options, reply)
                return replies

        pipeline.execute, pipeline.execute_command = execute_all, record_command
        for name in ("delete", "unlink", "exists"):  # redis-py does not pass these to `execute_command`
            word = "DEL" if name == "delete" else name.upper()
            setattr(pipeline, name, functools.partial(record_command, word))
        return pipeline

    def _shape(self, name: str, options: dict[str, Any], reply: Any) -> Any:
        """Convert a reply as redis-py does. Its cluster client leaves transactions raw."""
        node: Any = self.nodes_manager.default_node
        callback: Any = dict.get(self.get_redis_connection(node).response_callbacks, name)
        if callback is None or isinstance(reply, Exception):
            return reply
        options.pop("keys", None)  # an option of redis-py's client cache
        return callback(reply, **options)


class _KeyFinder:
    """redis-py's command parser, without the round trip that asks the server for the keys of an FCALL."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def get_keys(self, connection: Any, *command: Any) -> Any:
        if command[0] in ("FCALL", "FCALL_RO"):
            return list(command[3 : 3 + int(command[2])])
        return self._parser.get_keys(connection, *command)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


def cluster_of(client: Any) -> redis.RedisCluster | None:
    """Return the client as a RedisCluster when it is one, else None. (`connect` types all as redis.Redis.)"""
    return client if isinstance(client, redis.RedisCluster) else None


@contextlib.contextmanager
def connection_errors() -> Iterator[None]:
    """Turn a cluster's errors into redis.ConnectionError, with the cause chained."""
    try:
        yield
    except CrossSlotTransactionError:
        raise  # a bug: another attempt would not help
    except CLUSTER_ERRORS as error:
        raise redis.ConnectionError(f"the cluster is changing or a part is unavailable ({error})") from error


def master_pool(client: redis.RedisCluster, key: bytes | str) -> Any:
    """Return the connection pool of the master that holds this key. Raise redis.ConnectionError."""
    with connection_errors():
        name = key.encode() if isinstance(key, str) else key
        node = client.nodes_manager.get_node_from_slot(key_slot(name))
        return client.get_redis_connection(node).connection_pool


def refresh_topology(client: redis.RedisCluster) -> None:
    """Ask for the topology again. Without an answer nothing changes, and the next command raises."""
    with contextlib.suppress(redis.RedisError, RedisClusterException, OSError):
        client.nodes_manager.initialize()


def new_connection(pool: Any) -> Any:
    """Return a connection with the options of a pool, which the pool does not own."""
    return pool.connection_class(**pool.connection_kwargs)


def socket_of(connection: Any) -> Any:
    """Return the socket of a connected connection."""
    return connection._sock


def connection_options(pool: Any) -> dict[str, Any]:
    """Return the options that a pool makes its connections with, as a copy."""
    return dict(pool.connection_kwargs)


def use_raw_replies(client: redis.Redis) -> None:
    """Set bytes and RESP2 for all connections of a client. Raise TypeError for an unknown option."""
    pool = client.connection_pool
    pool.connection_kwargs.update(decode_responses=False, protocol=2)
    new_connection(pool)


# Index of a command's (first) key, 1 by default. XREAD is `XREAD COUNT n STREAMS key id`.
_KEY_AT = {"FCALL": 3, "FCALL_RO": 3, "XGROUP": 2, "XINFO": 2, "XREAD": 4}


class Pipe:
    """Collects commands, and sends them in one piece; the replies are raw and in the order of the commands.

    redis-py's own pipeline looks at every argument in Python and writes in pieces of 6 KB. For a commit of
    five thousand arguments that took longer than Redis took to execute it (docs/decisions/0004). On a
    cluster the commands go to the masters of their keys, one write per master. Retries are the caller's.

    A command's key follows its name, or stands where `_KEY_AT` states. Between MULTI and EXEC all keys must
    be of one slot.
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
        """Return whether the commands go to a cluster."""
        return self._cluster is not None

    def add(self, *command: Any) -> None:
        """Append a command: its name, then bytes, str, int or float arguments."""
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
        """Send everything and return the raw replies, errors of single commands as exceptions in the list."""
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
        """Send the commands added so far without waiting for replies, so that the server can begin.

        `execute` must follow. On a cluster nothing is sent before `execute`.
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


def execute_all(client: redis.Redis, commands: Iterable[tuple[Any, ...]], at_once: int) -> Iterator[Any]:
    """Execute any number of commands, `at_once` per round trip, and yield the raw replies."""
    pipe = Pipe(client)
    source = iter(commands)
    while chunk := list(islice(source, at_once)):
        for command in chunk:
            pipe.add(*command)
        yield from pipe.execute()


def _execute_on_masters(cluster: redis.RedisCluster, parts: list[bytes], keys: list[Any]) -> list[Any]:
    groups: dict[Any, list[int]] = {}  # pool of a master → numbers of its commands
    pools: dict[Any, Any] = {}
    replies: list[Any] = [None] * len(parts)
    used: list[tuple[Any, Any, list[int]]] = []
    try:
        for n, key in enumerate(keys):
            if key not in pools:
                pools[key] = master_pool(cluster, key)
            groups.setdefault(pools[key], []).append(n)
        for pool, numbers in groups.items():
            used.append((pool, pool.get_connection(), numbers))
        for _, connection, numbers in used:
            connection.send_packed_command([b"".join([parts[n] for n in numbers])])
        for _, connection, numbers in used:
            for n in numbers:
                replies[n] = _reply(connection)
    except BaseException as error:
        for _, connection, _ in used:
            connection.disconnect()  # unread replies must not meet the next caller
        if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
            refresh_topology(cluster)
        raise
    finally:
        for pool, connection, _ in used:
            pool.release(connection)
    moved = next((reply for reply in replies if isinstance(reply, CLUSTER_ERRORS)), None)
    if moved is not None:
        refresh_topology(cluster)
        raise redis.ConnectionError(f"the cluster is changing or a part is unavailable ({moved})") from moved
    return replies


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ConnectionError:
        raise
    except ResponseError as error:
        return error


class PinnedConnections:
    """Keeps a client on its present connections: after `pin` an attempt to open one raises an error.

    redis-py replaces a lost connection silently, and Sentinel, a cluster or a moved address may put another
    server behind the new one, a replica that lags for instance. What is sent next would follow a gap, and the
    aggregator would take the entries that fill the gap later for repeats. So the tick writer opens its
    connections, pins them, asks what that Redis holds, and only then sends; a lost connection is an error.
    """

    def __init__(self, client: redis.Redis, socket_timeout_seconds: float) -> None:
        """Replace the client's connections by ones that can be pinned."""
        self._is_pinned = False
        nodes = getattr(client, "nodes_manager", None)  # of a RedisCluster
        if nodes is None:
            self._install(client.connection_pool.connection_kwargs, socket_timeout_seconds)
            self._reset(client)
            return
        self._install(nodes.connection_kwargs, socket_timeout_seconds)  # of nodes that are discovered later
        for node in nodes.nodes_cache.values():
            if node.redis_connection is not None:
                pool = node.redis_connection.connection_pool
                self._install(pool.connection_kwargs, socket_timeout_seconds)
                self._reset(node.redis_connection)

    def _install(self, options: dict[str, Any], socket_timeout_seconds: float) -> None:
        on_connect = options.get("redis_connect_func")

        def connected(connection: Any) -> None:
            if self._is_pinned:
                raise redis.ConnectionError("the connection was lost")
            if on_connect is None:
                connection.on_connect()
            else:
                on_connect(connection)

        options.update(redis_connect_func=connected, socket_timeout=socket_timeout_seconds)

    @staticmethod
    def _reset(client: redis.Redis) -> None:
        client.connection_pool.disconnect()
        client.connection_pool.reset()

    def pin(self) -> None:
        """Make every later attempt to connect raise redis.ConnectionError."""
        self._is_pinned = True
