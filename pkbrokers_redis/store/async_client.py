"""An asyncio client of the same store as a client that is there: one server, Sentinel or Cluster.

`connect` has read the URL, probed the server and explained what was wrong with it; what it found is taken
from its client, so that there is one way from settings to a server.
"""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
import redis.asyncio.connection
import redis.asyncio.sentinel
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from pkbrokers_redis.store.cluster import cluster_of

RETRIES = 3

AsyncClient = Any  # redis.asyncio.Redis or redis.asyncio.RedisCluster, which share no base class

# What a connection is made of; all else among redis-py's arguments is its own machinery, sync or async.
_SHARED = {
    "client_name",
    "credential_provider",
    "db",
    "health_check_interval",
    "host",
    "password",
    "path",
    "port",
    "protocol",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_timeout",
    "username",
}
_SCHEMES: dict[type, type] = {
    redis.connection.UnixDomainSocketConnection: redis.asyncio.UnixDomainSocketConnection,
    redis.connection.SSLConnection: redis.asyncio.SSLConnection,
}


def async_client_of(client: redis.Redis) -> AsyncClient:
    """A new asyncio client of the client's store; it connects with its first command. `aclose` it."""
    cluster = cluster_of(client)
    if cluster is not None:
        return _of_cluster(cluster)
    pool: Any = client.connection_pool
    if isinstance(pool, redis.sentinel.SentinelConnectionPool):
        return _of_sentinel(pool)
    kind = next(
        (async_ for sync, async_ in _SCHEMES.items() if issubclass(pool.connection_class, sync)),
        redis.asyncio.Connection,
    )
    arguments = {**_shared(pool.connection_kwargs), "retry": _retry()}
    return redis.asyncio.Redis(
        connection_pool=redis.asyncio.ConnectionPool(connection_class=kind, **arguments)
    )


def _of_cluster(cluster: Any) -> AsyncClient:
    manager = cluster.nodes_manager
    nodes = [
        redis.asyncio.cluster.ClusterNode(node.host, node.port)
        for node in (*manager.nodes_cache.values(), *manager.startup_nodes.values())
    ]
    arguments = _shared(manager.connection_kwargs)
    for of_a_node in ("host", "port", "path", "db"):
        arguments.pop(of_a_node, None)
    if manager.connection_kwargs.get("ssl"):
        arguments["ssl"] = True
    return redis.asyncio.RedisCluster(startup_nodes=nodes, retry=_retry(), **arguments)


def _of_sentinel(pool: Any) -> AsyncClient:
    manager = pool.sentinel_manager
    hosts = [
        (each.connection_pool.connection_kwargs["host"], each.connection_pool.connection_kwargs["port"])
        for each in manager.sentinels
    ]
    sentinel_kwargs = _shared(manager.sentinel_kwargs)
    make: Any = redis.asyncio.sentinel.Sentinel  # redis-py's has no types
    sentinel = make(hosts, sentinel_kwargs={**sentinel_kwargs, "retry": _retry()})
    arguments = _shared(pool.connection_kwargs)
    if issubclass(pool.connection_class, redis.connection.SSLConnection):
        arguments["ssl"] = True
    return sentinel.master_for(pool.service_name, **arguments, retry=_retry())


def _shared(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in arguments.items()
        if (name in _SHARED or name.startswith("ssl_")) and value is not None
    }


def _retry() -> Retry:
    return Retry(ExponentialBackoff(cap=1.0, base=0.05), RETRIES)
