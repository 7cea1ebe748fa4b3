"""Redis Cluster behind the manners of one server.

redis-py's cluster client says in many ways that a part of the cluster is away or on the move: MOVED, ASK,
TRYAGAIN, CLUSTERDOWN, and exceptions that are not even RedisErrors. Workers know one word for all of that,
`redis.ConnectionError`: load again and go on. `ClusterClient` speaks it.

    one server                          a cluster
    a command                           the same; redis-py follows MOVED and ASK
    pipeline(transaction=False)         commands of many slots; a node's go out together
    pipeline(transaction=True)          keys of one slot only (a shard's, or one key)
    XREAD of several shards' streams    `store.streams.StreamReader`
    hot pipelines                       `store.pipe.Pipe`
    FUNCTION LOAD, SCAN                 redis-py asks every master
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import redis
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterError,
    CrossSlotTransactionError,
    RedisClusterException,
    TryAgainError,
)

# MovedError is an AskError. None of these commands was carried out, or nobody knows.
AWAY = (RedisClusterException, ClusterError, AskError, TryAgainError)


class ClusterClient(redis.RedisCluster):
    """`redis.RedisCluster` that raises redis.ConnectionError wherever trying again is the answer."""

    def __init__(self, **arguments: Any) -> None:
        initialize: Any = super().__init__
        initialize(**arguments)
        self.commands_parser: Any = _KeyFinder(self.commands_parser)

    def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """As redis-py's; a cluster in trouble raises redis.ConnectionError."""
        execute: Any = super().execute_command  # Any: redis-py's cluster has no types
        with connection_errors():
            return execute(*args, **kwargs)

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> Any:
        """As redis-py's; and commands whose slot moved are sent again to where it is now. One that no node
        answered raises redis.ConnectionError, whatever `raise_on_error` says: it must not be taken for an
        empty key."""
        make: Any = super().pipeline
        pipeline = make(transaction or None, shard_hint)
        execute, execute_command = pipeline.execute, pipeline.execute_command
        commands: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note_command(*args: Any, **options: Any) -> Any:
            commands.append((args, dict(options)))
            return execute_command(*args, **options)

        def execute_all(raise_on_error: bool = True) -> list[Any]:
            noted = commands[:]
            commands.clear()
            with connection_errors():
                # redis-py follows no redirection in a pipeline, so its first error must not end it here.
                replies: list[Any] = execute(False)
                for n, (reply, (args, options)) in enumerate(zip(replies, noted, strict=True)):
                    if isinstance(reply, (AskError, TryAgainError)) and not transaction:
                        replies[n] = self.execute_command(*args, **options)
                    elif isinstance(reply, (*AWAY, redis.ConnectionError, redis.TimeoutError)):
                        refresh(self)
                        raise reply
                    elif isinstance(reply, Exception) and raise_on_error:
                        raise reply
                    elif transaction:
                        replies[n] = self._shape(args[0], options, reply)
                return replies

        pipeline.execute, pipeline.execute_command = execute_all, note_command
        for name in ("delete", "unlink", "exists"):  # redis-py hands these past `execute_command`
            word = "DEL" if name == "delete" else name.upper()
            setattr(pipeline, name, functools.partial(note_command, word))
        return pipeline

    def _shape(self, name: str, options: dict[str, Any], reply: Any) -> Any:
        """A reply as redis-py gives it: its cluster leaves those of transactions raw (HGETALL a list)."""
        node: Any = self.nodes_manager.default_node
        callback: Any = dict.get(self.get_redis_connection(node).response_callbacks, name)
        if callback is None or isinstance(reply, Exception):
            return reply
        options.pop("keys", None)  # redis-py's note for its cache
        return callback(reply, **options)


class _KeyFinder:
    """redis-py's parser, which asks the server for the keys of each FCALL: a round trip more. We need not."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def get_keys(self, connection: Any, *command: Any) -> Any:
        if command[0] in ("FCALL", "FCALL_RO"):
            return list(command[3 : 3 + int(command[2])])
        return self._parser.get_keys(connection, *command)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


def cluster_of(client: Any) -> redis.RedisCluster | None:
    """The client as what it is on a cluster, else None. (`connect` says redis.Redis of all.)"""
    return client if isinstance(client, redis.RedisCluster) else None


@contextlib.contextmanager
def connection_errors() -> Iterator[None]:
    """Turns a cluster's troubles into redis.ConnectionError, with the cause chained."""
    try:
        yield
    except CrossSlotTransactionError:
        raise  # our mistake: trying again would not help
    except AWAY as error:
        raise redis.ConnectionError(f"the cluster is changing or a part is away ({error})") from error


def master_pool(client: redis.RedisCluster, key: bytes | str) -> Any:
    """The connection pool of the master that has this key. Raises redis.ConnectionError."""
    with connection_errors():
        name = key.encode() if isinstance(key, str) else key
        node = client.nodes_manager.get_node_from_slot(key_slot(name))
        return client.get_redis_connection(node).connection_pool


def refresh(client: redis.RedisCluster) -> None:
    """Ask for the topology anew; in vain while no node answers, which the next command will say."""
    with contextlib.suppress(redis.RedisError, RedisClusterException, OSError):
        client.nodes_manager.initialize()
