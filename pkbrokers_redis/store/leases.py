"""Leases and membership: which worker may do what, and which workers are alive to share the work.

    P:{S}:lease    string, PX   the aggregator that owns shard S; acquiring it raises `epoch` in P:{S}:cursor
    P:feed:<n>     string, PX   the ingest worker that reads feed n
    P:workers      zset         `<role> <worker id>` → its last sign of life, epoch ms of Redis

A lease keeps two workers from doing the same work. It can expire while its owner is suspended. Then the epoch
protects a shard: `pkb_commit` refuses every epoch but the cursor's. Work behind a `LeaderLease` needs no such
fence, because it may be done twice without harm.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.errors import PkbError, WrongKeyType
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.errors import is_function_missing, is_wrong_type, type_of
from pkbrokers_redis.store.functions import fcall, fcall_read_only, queue_fcall

RENEWALS_PER_TTL = 3

log = logs.get("store")


class LeaseTaken(PkbError):
    """Raised when another process holds a lease. `.holder` is its owner id, "" when it has just ended."""

    def __init__(self, key: str, holder: str) -> None:
        super().__init__(f"{key} is held by {holder or 'a process that has just ended'}", "wait for its end")
        self.key = key
        self.holder = holder


class LeaderLease:
    """A lease on one key, so that one process at a time is the leader: a bot, a login, a job of a kind.

    Not thread-safe, except that `hold` renews from a thread of its own.
    """

    def __init__(self, client: redis.Redis, key: str, owner: str, ttl_seconds: float) -> None:
        """Describe a lease; nothing is acquired yet."""
        self._client = client
        self._key = key
        self._owner = owner
        self._ttl_seconds = ttl_seconds
        self._renewed_at = float("-inf")

    @property
    def remaining_seconds(self) -> float:
        """Return how long the lease is certainly held without a renewal; negative: it may be another's."""
        return self._renewed_at + self._ttl_seconds - time.monotonic()

    def acquire(self) -> bool:
        """Acquire the lease, or renew it. Return False when another owner holds it."""
        started = time.monotonic()  # before the command: Redis counts the TTL from a later moment
        is_held = (
            int(fcall(self._client, "hold", [self._key], self._owner, int(self._ttl_seconds * 1000))) == 1
        )
        if is_held:
            self._renewed_at = started
        return is_held

    def release(self) -> bool:
        """Give up the lease. Return False when this owner did not hold it."""
        self._renewed_at = float("-inf")
        return int(fcall(self._client, "release", [self._key], self._owner)) == 1

    def holder(self) -> str:
        """Return the owner id that holds the lease now, "" when it is free."""
        found: Any = self._client.get(self._key)
        return found.decode(errors="replace") if found else ""

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lease within the block, renewed by a thread. Raise LeaseTaken at once when it is taken."""
        if not self.acquire():
            raise LeaseTaken(self._key, self.holder())
        is_over = threading.Event()

        def renew() -> None:
            while not is_over.wait(self._ttl_seconds / RENEWALS_PER_TTL):
                try:
                    if not self.acquire():
                        log.warning("lease_lost", key=self._key)
                        return
                except redis.RedisError:
                    pass  # the next attempt may succeed, and the TTL bounds how long another process waits

        thread = threading.Thread(target=renew, name=f"lease-{self._key}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            with suppress(redis.RedisError):  # then the lease expires
                self.release()


@dataclass(frozen=True, slots=True)
class Membership:
    """The living workers of a role, sorted by id; and shard → the id that holds its lease, or None."""

    members: list[str]
    holders: list[str | None]


def read_membership(client: redis.Redis, keys: Keys, role: str, worker_id: str, alive_ms: int) -> Membership:
    """Announce this worker, and read the role's members and the holder of every shard, in one round trip."""
    pipeline = client.pipeline(transaction=False)
    queue_fcall(pipeline, "announce", [keys.workers()], f"{role} {worker_id}")
    queue_fcall(pipeline, "members", [keys.workers()], role, alive_ms)
    for shard in range(keys.shards):
        pipeline.get(keys.lease(shard))
    _, alive, *holders = pipeline.execute(raise_on_error=False)
    if is_wrong_type(alive):
        alive = []  # then each worker believes itself alone, and acquires what is free
    for reply in (alive, *holders):
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    return Membership(
        sorted(bytes(member).decode() for member in alive),
        [None if h is None or isinstance(h, Exception) else bytes(h).decode() for h in holders],
    )


def lease_shards(
    client: redis.Redis, keys: Keys, shards: Sequence[int], owner: str, ttl_ms: int
) -> tuple[dict[int, int], dict[int, PkbError]]:
    """Acquire or renew leases in one round trip; return shard → epoch of those held, shard → error.

    A new epoch means that the lease was lost in between: load the shard again.
    """
    if not shards:
        return {}, {}
    pipeline = client.pipeline(transaction=False)
    for shard in shards:
        queue_fcall(pipeline, "lease", [keys.cursor(shard), keys.lease(shard)], owner, ttl_ms)
    epochs: dict[int, int] = {}
    refused: dict[int, PkbError] = {}
    for shard, reply in zip(shards, pipeline.execute(raise_on_error=False), strict=True):
        if isinstance(reply, Exception):
            refused[shard] = _explain_refusal(client, keys, shard, reply)
        elif reply:
            epochs[shard] = int(reply)
    return epochs, refused


def release_shards(client: redis.Redis, keys: Keys, shards: Sequence[int], owner: str) -> None:
    """Give up the leases of some shards where this owner holds them."""
    if not shards:
        return
    pipeline = client.pipeline(transaction=False)
    for shard in shards:
        queue_fcall(pipeline, "release", [keys.lease(shard)], owner)
    pipeline.execute(raise_on_error=False)  # a lease that is not released expires


def _explain_refusal(client: redis.Redis, keys: Keys, shard: int, error: Exception) -> PkbError:
    """Return what is wrong with a shard's lease or cursor; raise `error` when they are not its cause."""
    cursor = keys.cursor(shard)
    if is_wrong_type(error):
        for key, expected in ((keys.lease(shard), "string"), (cursor, "hash")):
            found = type_of(client, key)
            if found not in (expected, "none"):
                return WrongKeyType(key, found, expected)
    if isinstance(error, ResponseError) and "not an integer" in str(error):
        return PkbError(f"{cursor} holds no number in `epoch`", f"HDEL {cursor} epoch")
    raise error


def announce(client: redis.Redis, keys: Keys, role: str, worker_id: str, *, may_load: bool = True) -> None:
    """Record that this worker is alive. Call it at least three times within the `alive_ms` of `members`."""
    fcall(client, "announce", [keys.workers()], f"{role} {worker_id}", may_load=may_load)


def members(client: redis.Redis, keys: Keys, role: str, alive_ms: int) -> list[str]:
    """Return the workers of a role that were announced within the last `alive_ms`, sorted by id."""
    try:
        found: Any = fcall_read_only(client, "members", [keys.workers()], role, alive_ms)
    except ResponseError as error:
        if is_function_missing(error):
            return []  # no worker has ever started here
        raise
    return sorted(bytes(member).decode() for member in found)


def leave(client: redis.Redis, keys: Keys, role: str, worker_id: str) -> None:
    """End this worker's membership, so that the other workers share its work at once."""
    client.zrem(keys.workers(), f"{role} {worker_id}")
