"""Leases and membership: which worker may do what, and who is alive to share it with.

    P:{S}:lease    string, PX   the aggregator that owns shard S; taking it raises `epoch` in P:{S}:cursor
    P:feed:<n>     string, PX   the ingest worker that streams the n-th connection's instruments
    P:workers      zset         `<role> <worker id>` → when it last said that it lives, epoch ms of Redis

A lease only keeps two workers from doing the same work; it can run out while its owner sleeps. What keeps a
sleeper's late write out is the epoch: `pkb_commit` refuses every epoch but the cursor's. All times are taken
by Redis (`TIME`, `PX`), so that the hosts' clocks do not matter. Needs `load_functions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis.errors import PkbError, WrongKeyType
from pkbrokers_redis.keys import Keys

LEASE, RELEASE, HOLD = "pkb_lease", "pkb_release", "pkb_hold"
ANNOUNCE, MEMBERS = "pkb_announce", "pkb_members"


def try_lease(client: redis.Redis, key: str, owner: str, ttl_ms: int) -> bool:
    """Take a plain lease if it is free, renew it if it is ours. False: another holds it."""
    return int(client.fcall(HOLD, 1, key, owner, ttl_ms)) == 1


def release_lease(client: redis.Redis, key: str, owner: str) -> bool:
    """Let go of a lease, a shard's or a plain one. False: it was not ours (any more)."""
    return int(client.fcall(RELEASE, 1, key, owner)) == 1


@dataclass(frozen=True, slots=True)
class Survey:
    """Who lives and who holds what: ids of the role's workers, sorted; shard → the holder's id or None."""

    members: list[str]
    holders: list[str | None]


def survey(client: redis.Redis, keys: Keys, role: str, worker_id: str, alive_ms: int) -> Survey:
    """`announce`, `members` and the holder of every shard, in one round trip."""
    pipeline = client.pipeline(transaction=False)
    pipeline.fcall(ANNOUNCE, 1, keys.workers(), f"{role} {worker_id}")
    pipeline.fcall(MEMBERS, 1, keys.workers(), role, alive_ms)
    for shard in range(keys.shards):
        pipeline.get(keys.lease(shard))
    _, alive, *holders = pipeline.execute(raise_on_error=False)
    if isinstance(alive, Exception):
        if "WRONGTYPE" not in str(alive):
            raise alive
        alive = []  # somebody's key: each worker believes itself alone, and takes what is free
    for holder in holders:
        if isinstance(holder, Exception) and "WRONGTYPE" not in str(holder):
            raise holder
    return Survey(
        sorted(bytes(each).decode() for each in alive),
        [None if h is None or isinstance(h, Exception) else bytes(h).decode() for h in holders],
    )


def lease_shards(
    client: redis.Redis, keys: Keys, shards: Sequence[int], owner: str, ttl_ms: int
) -> tuple[dict[int, int], dict[int, PkbError]]:
    """Take or renew the leases of some shards, in one round trip.

    Returns shard → the epoch to commit with for those that are ours now, and shard → why for those whose
    lease or cursor a foreign hand filled. The epoch is a new one whenever the lease was not ours without
    interruption: then whatever we knew of the shard must be loaded again.
    """
    if not shards:
        return {}, {}
    pipeline = client.pipeline(transaction=False)
    for shard in shards:
        pipeline.fcall(LEASE, 2, keys.cursor(shard), keys.lease(shard), owner, ttl_ms)
    epochs: dict[int, int] = {}
    refused: dict[int, PkbError] = {}
    for shard, reply in zip(shards, pipeline.execute(raise_on_error=False), strict=True):
        if isinstance(reply, Exception):
            refused[shard] = _refusal(client, keys, shard, reply)
        elif reply:
            epochs[shard] = int(reply)
    return epochs, refused


def release_shards(client: redis.Redis, keys: Keys, shards: Sequence[int], owner: str) -> None:
    """Let go of the leases of some shards, where they are ours."""
    if not shards:
        return
    pipeline = client.pipeline(transaction=False)
    for shard in shards:
        pipeline.fcall(RELEASE, 1, keys.lease(shard), owner)
    pipeline.execute(raise_on_error=False)  # what is not released runs out


def _refusal(client: redis.Redis, keys: Keys, shard: int, error: Exception) -> PkbError:
    """What is wrong with a shard's lease or cursor; raises `error` when it is neither's fault."""
    if isinstance(error, ResponseError) and "WRONGTYPE" in str(error):
        for key, wanted in ((keys.lease(shard), "string"), (keys.cursor(shard), "hash")):
            found = bytes(client.type(key)).decode()  # type: ignore[arg-type]
            if found not in (wanted, "none"):
                return WrongKeyType(key, found, wanted)
    if isinstance(error, ResponseError) and "not an integer" in str(error):
        cursor = keys.cursor(shard)
        return PkbError(f"{cursor} holds no number in `epoch`", f"HDEL {cursor} epoch")
    raise error


def announce(client: redis.Redis, keys: Keys, role: str, worker_id: str) -> None:
    """Say that this worker lives. Call it at least every third of what `members` is asked with."""
    client.fcall(ANNOUNCE, 1, keys.workers(), f"{role} {worker_id}")


def members(client: redis.Redis, keys: Keys, role: str, alive_ms: int) -> list[str]:
    """The workers of a role that announced themselves within the last `alive_ms`, sorted by id."""
    try:
        found: Any = client.fcall_ro(MEMBERS, 1, keys.workers(), role, alive_ms)
    except ResponseError as error:
        if "Function not found" in str(error):
            return []  # no worker has ever started here
        raise
    return sorted(bytes(each).decode() for each in found)


def leave(client: redis.Redis, keys: Keys, role: str, worker_id: str) -> None:
    """Stop being a member, so that the others share our work at once."""
    client.zrem(keys.workers(), f"{role} {worker_id}")
