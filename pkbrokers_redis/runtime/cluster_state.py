"""The state of a running pipeline as Redis shows it; `health.py` checks it.

It is read in a few round trips, without SCAN: `P:workers` names the workers, `P:meta` the shards, the
heartbeats of ingest the number of feeds. All ages are by Redis's clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.exceptions import NoPermissionError, ResponseError

from pkbrokers_redis.keys import Keys
from pkbrokers_redis.runtime.heartbeat import TTL_SECONDS, Shard, owners_of, read_shards
from pkbrokers_redis.store.cluster import cluster_of


@dataclass(frozen=True, slots=True)
class Server:
    """One Redis master (a cluster has several), from INFO."""

    name: str
    version: str
    used_bytes: int
    limit_bytes: int  # maxmemory; 0 for none
    eviction: str  # maxmemory-policy
    aof: bool
    saves: bool  # False if the last attempt to save failed: Redis then refuses writes
    forks: int = 0  # since its start: rewrites of the AOF and RDB snapshots
    up_seconds: int = 0


@dataclass(frozen=True, slots=True)
class Worker:
    """One member of `P:workers`. `age_ms` is the age of its heartbeat; None if that has expired."""

    id: str
    role: str
    age_ms: float | None
    skew_ms: float | None  # its clock against Redis's, ahead is positive
    fields: dict[str, str]

    def number(self, name: str) -> float:
        """Return a number of the heartbeat; 0 if it has none."""
        try:
            return float(self.fields.get(name, "") or 0)
        except ValueError:
            return 0.0

    def numbers(self, name: str) -> list[int]:
        """Return a comma list of the heartbeat: `shards`, `feeds`."""
        return [int(part) for part in self.fields.get(name, "").split(",") if part.isdecimal()]


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The pipeline at `at_ms`, epoch milliseconds of Redis's clock."""

    place: str
    at_ms: float
    host_skew_ms: float  # this host's clock against Redis's
    servers: list[Server] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    feeds: list[str | None] = field(default_factory=list)  # the reader of each feed

    def alive(self, role: str) -> list[Worker]:
        """Return the workers of a role whose heartbeat has not expired."""
        return [worker for worker in self.workers if worker.role == role and worker.age_ms is not None]


def read_cluster_state(
    client: redis.Redis,
    keys: Keys,
    place: str,
    *,
    stream_bytes: bool = False,
    clock: Callable[[], float] = time.time,
) -> ClusterState:
    """Read the state once. Raises redis.RedisError."""
    before = clock() * 1000
    try:
        seconds, micros = call_one_master(client, "time")
        at_ms = seconds * 1000 + micros / 1000
    except NoPermissionError:  # a reader's user: use this host's clock
        at_ms = before
    skew_ms = (before + clock() * 1000) / 2 - at_ms
    workers = read_workers(client, keys, at_ms)
    feeds_total = max((int(worker.number("feeds_total")) for worker in workers), default=0)
    return ClusterState(
        place,
        at_ms,
        skew_ms,
        read_servers(client),
        workers,
        read_shards(client, keys, range(keys.shards), at_ms, stream_bytes=stream_bytes),
        owners_of(client, [keys.feed(number) for number in range(feeds_total)]),
    )


def call_each_master(client: redis.Redis, method: str, *arguments: Any) -> dict[str, Any]:
    """Call a method of redis-py, for a command without a key, on every master; return node → reply."""
    cluster: Any = cluster_of(client)  # redis-py's cluster has no types
    if cluster is None:
        return {"": getattr(client, method)(*arguments)}
    nodes = sorted(cluster.get_primaries(), key=lambda node: str(node.name))
    # A node's own client: not all of redis-py's methods take `target_nodes`.
    return {node.name: getattr(cluster.get_redis_connection(node), method)(*arguments) for node in nodes}


def call_one_master(client: redis.Redis, method: str) -> Any:
    """Call a method of redis-py, for a command without a key, on one master."""
    cluster: Any = cluster_of(client)
    if cluster is None:
        return getattr(client, method)()
    return getattr(cluster, method)(target_nodes=cluster.get_primaries()[0])


def read_servers(client: redis.Redis) -> list[Server]:
    """Return the masters of the store; none if the user has no permission for INFO."""
    try:
        replies = call_each_master(client, "info")
    except ResponseError:
        return []
    return [_server(name, info) for name, info in replies.items()]


def _server(name: str, info: dict[str, Any]) -> Server:
    software = "valkey" if "valkey_version" in info else "redis"
    return Server(
        name,
        f"{software} {info.get('valkey_version') or info.get('redis_version', '?')}",
        int(info.get("used_memory", 0)),
        int(info.get("maxmemory", 0)),
        str(info.get("maxmemory_policy", "")),
        bool(info.get("aof_enabled")),
        info.get("aof_last_write_status", "ok") == "ok" and info.get("rdb_last_bgsave_status", "ok") == "ok",
        int(info.get("total_forks", 0)),
        int(info.get("uptime_in_seconds", 0)),
    )


def read_workers(client: redis.Redis, keys: Keys, at_ms: float) -> list[Worker]:
    """Return all members of `P:workers` by role and id, with their heartbeats."""
    members: Any = client.zrange(keys.workers(), 0, -1)
    names = sorted(tuple(bytes(member).decode(errors="replace").partition(" ")[::2]) for member in members)
    pipeline = client.pipeline(transaction=False)
    for _, worker_id in names:
        pipeline.hgetall(keys.worker(worker_id))
        pipeline.pttl(keys.worker(worker_id))
    replies = pipeline.execute(raise_on_error=False) if names else []
    workers: list[Worker] = []
    for (role, worker_id), found, ttl_ms in zip(names, replies[::2], replies[1::2], strict=True):
        fields: dict[str, str] = {}
        if isinstance(found, dict):
            fields = {name.decode(): value.decode(errors="replace") for name, value in found.items()}
        age_ms = skew_ms = None
        if fields and isinstance(ttl_ms, int) and ttl_ms > 0:
            age_ms = max(0.0, TTL_SECONDS * 1000.0 - ttl_ms)
            at = fields.get("at", "")
            skew_ms = float(at) - (at_ms - age_ms) if at.isdecimal() else None
        workers.append(Worker(worker_id, role, age_ms, skew_ms, fields))
    return workers
