"""Heartbeats of workers, and the state of a running pipeline as Redis shows it; `health.py` checks it.

    P:worker:<id>   hash, TTL 10 s: role host pid started_at shards ticks_total ticks_per_second lag_ms …

A heartbeat is written every two seconds. Membership (`P:workers`) is separate: it goes with the leases. The
state is read in a few round trips, without SCAN: `P:workers` names the workers, `P:meta` the shards, the
heartbeats of ingest the number of feeds. All ages are by Redis's clock.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec
import redis
from redis.exceptions import NoPermissionError, ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.errors import WrongKeyType
from pkbrokers_redis.keys import AGGREGATOR_GROUP, KEY_TABLE, Keys
from pkbrokers_redis.store.cluster import cluster_of
from pkbrokers_redis.store.errors import is_wrong_type
from pkbrokers_redis.store.streams import id_order

log = logs.get("heartbeat")

Level = Literal["ok", "warn", "fail"]

SHARDS_AT_ONCE = 256  # a pipeline's bound


class Finding(NamedTuple):
    """One line of a health check: what was checked, what was found, how to fix it."""

    check: str
    level: Level
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tick stream, and the position of its aggregator."""

    number: int
    owner: str | None
    entries: int  # in the stream
    position: str  # the last id committed
    lag_entries: int  # not committed yet
    lag_ms: float  # age of the oldest of them
    stream_bytes: int | None = None  # None unless requested


def read_shards(
    client: redis.Redis, keys: Keys, shards: Sequence[int], at_ms: float, *, stream_bytes: bool = False
) -> list[Shard]:
    """Return stream, owner and lag of shards; ages are relative to `at_ms`, epoch milliseconds."""
    if len(shards) > SHARDS_AT_ONCE:
        first, rest = shards[:SHARDS_AT_ONCE], shards[SHARDS_AT_ONCE:]
        return [
            *read_shards(client, keys, first, at_ms, stream_bytes=stream_bytes),
            *read_shards(client, keys, rest, at_ms, stream_bytes=stream_bytes),
        ]
    pipeline = client.pipeline(transaction=False)
    for shard in shards:
        pipeline.xlen(keys.ticks(shard))
        pipeline.xinfo_groups(keys.ticks(shard))
    sizes = pipeline.execute(raise_on_error=False)
    groups = [_group(reply) for reply in sizes[1::2]]
    # Then the oldest entry behind that position.
    for shard, (position, _) in zip(shards, groups, strict=True):
        pipeline.xrange(keys.ticks(shard), f"({position}", "+", count=1)
    waiting = pipeline.execute(raise_on_error=False)
    usage: list[Any] = [None] * len(shards)
    if stream_bytes:
        for shard in shards:
            pipeline.memory_usage(keys.ticks(shard))
        usage = pipeline.execute(raise_on_error=False)
    owners = owners_of(client, [keys.lease(shard) for shard in shards])
    result: list[Shard] = []
    for n, shard in enumerate(shards):
        entries = sizes[2 * n] if isinstance(sizes[2 * n], int) else 0
        position, lag = groups[n]
        oldest = waiting[n][0][0].decode() if isinstance(waiting[n], list) and waiting[n] else None
        result.append(
            Shard(
                shard,
                owners[n],
                entries,
                position,
                0 if oldest is None else max(1, entries if lag is None else lag),
                0.0 if oldest is None else max(0.0, at_ms - id_order(oldest)[0]),
                usage[n] if isinstance(usage[n], int) else None,
            )
        )
    return result


def _group(reply: Any) -> tuple[str, int | None]:
    """Return position and lag of the aggregators' group; no lag after an entry was deleted by hand."""
    for group in reply if isinstance(reply, list) else ():
        if group["name"] == AGGREGATOR_GROUP.encode():
            return group["last-delivered-id"].decode(), group["lag"]
    return "0-0", None


def owners_of(client: redis.Redis, leases: Sequence[str]) -> list[str | None]:
    """Return the owner of each lease, of shards or of feeds; None if it is free."""
    pipeline = client.pipeline(transaction=False)
    for key in leases:
        pipeline.get(key)
    replies = pipeline.execute(raise_on_error=False) if leases else []
    return [reply.decode(errors="replace") if isinstance(reply, bytes) else None for reply in replies]


def lag_figures(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return the lag fields of a heartbeat: `lag_entries` in all, `lag_ms` of the worst, `lags` by shard."""
    return {
        "lag_entries": sum(shard.lag_entries for shard in shards),
        "lag_ms": round(max((shard.lag_ms for shard in shards), default=0.0)),
        "lags": msgspec.json.encode(
            {str(shard.number): [shard.lag_entries, round(shard.lag_ms)] for shard in shards}
        ),
    }


EVERY_MS = 2_000
TTL_SECONDS = 10


class Heartbeat:
    """Writes one worker's hash every two seconds. A refusal of Redis is logged once, an outage not at all."""

    def __init__(self, keys: Keys, role: str, worker_id: str, now_ms: float) -> None:
        self._keys = keys
        self.key = keys.worker(worker_id)
        self._fixed = {
            "role": role,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="seconds"),
        }
        self._last_ms = now_ms
        self._next_ms = now_ms
        self._last_ticks = 0
        self._refused = False  # by Redis, and logged

    def due(self, now_ms: float) -> bool:
        """Return whether a heartbeat is due: two seconds have passed, or the clock was set back."""
        return not self._last_ms <= now_ms < self._next_ms

    def beat(
        self,
        client: redis.Redis,
        now_ms: float,
        ticks_total: int,
        figures: Mapping[str, Any],
        shards: Sequence[int] = (),
    ) -> None:
        """Write the hash with `figures`, the rate since the last heartbeat, and the lag of `shards`."""
        passed_ms = now_ms - self._last_ms if now_ms >= self._last_ms else EVERY_MS
        seconds = max(passed_ms / 1000, 0.001)
        rate = (ticks_total - self._last_ticks) / seconds
        self._last_ms, self._next_ms, self._last_ticks = now_ms, now_ms + EVERY_MS, ticks_total
        fields: dict[Any, Any] = {
            **self._fixed,
            **figures,
            "ticks_total": ticks_total,
            "ticks_per_second": round(rate, 1),
            "at": int(now_ms),
        }
        try:
            if shards:
                fields |= lag_figures(read_shards(client, self._keys, shards, now_ms))
            pipeline = client.pipeline(transaction=True)
            pipeline.hset(self.key, mapping=fields)
            pipeline.expire(self.key, TTL_SECONDS)
            pipeline.execute()
        except (redis.ConnectionError, redis.TimeoutError):
            pass  # the role itself reports an outage, and a missing heartbeat shows it
        except redis.RedisError as error:
            if not self._refused:  # no permission, another type, out of memory
                hint = f"look at it with `TYPE {self.key}`; the user needs HSET and EXPIRE (docs/acl.conf)"
                log.warning("heartbeat_refused", key=self.key, reason=str(error)[:200], hint=hint)
            self._refused = True

    def end(self, client: redis.Redis) -> None:
        """Delete the hash: the worker has stopped cleanly."""
        with contextlib.suppress(redis.RedisError):  # it expires by itself
            client.delete(self.key)


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
    evicted: int = 0  # keys that it deleted for want of memory, since its start
    is_replica: bool = False


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
    wrong_keys: list[WrongKeyType] = field(default_factory=list)  # keys that hold another Redis type

    def names(self, field: str) -> list[str]:
        """Return the names in a comma list of the living ingest workers' heartbeats, each once."""
        texts = (worker.fields.get(field, "") for worker in self.alive("ingest"))
        return sorted({name for text in texts for name in text.split(",") if name})

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
        find_wrong_keys(client, keys),
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
        int(info.get("evicted_keys", 0)),
        info.get("role") == "slave",
    )


def find_wrong_keys(client: redis.Redis, keys: Keys) -> list[WrongKeyType]:
    """Return the store's own keys that hold another Redis type: another program wrote them, or a person."""
    wanted: list[tuple[str, str]] = []
    for name, kind, *_ in KEY_TABLE:
        if "<" not in name and "{bot}" not in name:
            shards = range(keys.shards) if "{S}" in name else (0,)
            wanted += [(f"{keys.prefix}{name[1:]}".replace("{S}", f"{{{n}}}"), kind) for n in shards]
    pipeline = client.pipeline(transaction=False)
    for key, _ in wanted:
        pipeline.type(key)
    replies = pipeline.execute(raise_on_error=False)
    return [
        WrongKeyType(key, found, kind)
        for (key, kind), reply in zip(wanted, replies, strict=True)
        if isinstance(reply, bytes) and (found := reply.decode()) not in ("none", kind)
    ]


def read_workers(client: redis.Redis, keys: Keys, at_ms: float) -> list[Worker]:
    """Return all members of `P:workers` by role and id, with their heartbeats."""
    members: Any = []
    try:
        members = client.zrange(keys.workers(), 0, -1)
    except ResponseError as error:
        if not is_wrong_type(error):
            raise
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
