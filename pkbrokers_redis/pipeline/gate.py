"""A gate on a client's connections: none is opened, once it is shut, without our noticing.

redis-py replaces a lost connection silently, and Sentinel, a cluster or a moved address may put another
server behind the new one: a replica that lags, say. What we sent next would then follow a gap, and the
aggregator would take what fills the gap later for repeats. So the writer opens its connections, shuts the
gate, asks what that Redis has, and only then sends; whatever needs a new connection fails, and starts over.
"""

from __future__ import annotations

from typing import Any

import redis


class Gate:
    """Installed on a client that has just been made; its first connections are dropped for gated ones.

    `socket_timeout_seconds` bounds how long a reply is waited for: a writer never blocks on purpose.
    """

    def __init__(self, client: redis.Redis, socket_timeout_seconds: float) -> None:
        self._shut = False
        nodes = getattr(client, "nodes_manager", None)  # of a RedisCluster
        if nodes is None:
            self._install(client.connection_pool.connection_kwargs, socket_timeout_seconds)
            self._restart(client)
            return
        self._install(nodes.connection_kwargs, socket_timeout_seconds)  # of connections to nodes to come
        for node in nodes.nodes_cache.values():
            if node.redis_connection is not None:
                pool = node.redis_connection.connection_pool
                self._install(pool.connection_kwargs, socket_timeout_seconds)
                self._restart(node.redis_connection)

    def _install(self, options: dict[str, Any], socket_timeout_seconds: float) -> None:
        on_connect = options.get("redis_connect_func")

        def connected(connection: Any) -> None:
            if self._shut:
                raise redis.ConnectionError("the connection was lost")
            if on_connect is None:
                connection.on_connect()
            else:
                on_connect(connection)

        options.update(redis_connect_func=connected, socket_timeout=socket_timeout_seconds)

    @staticmethod
    def _restart(client: redis.Redis) -> None:
        client.connection_pool.disconnect()
        client.connection_pool.reset()

    def shut(self) -> None:
        """From now on every attempt to connect raises redis.ConnectionError."""
        self._shut = True
