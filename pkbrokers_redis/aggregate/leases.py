"""Which shards this aggregator owns: equal shares among the running aggregators, held by leases.

    lease    runs 0.6 × PKB_LEASE_SECONDS and is renewed every 0.2 ×, so that two renewals may fail
    renewal  reads members and holders; renews, takes free shards up to the share, releases what is above it
    share    shards / members; the remainder goes to the first members by id

The shards of a dead aggregator therefore move within 0.8 × PKB_LEASE_SECONDS. An aggregator that was
suspended longer than its leases run notices it by its own clock before a commit, or by Redis's refusal
(FENCED).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.leases import lease_shards, leave, read_membership, release_shards

log = logs.get("shards")

ROLE = "aggregate"
TTL_PART = 0.6  # of PKB_LEASE_SECONDS
RENEWAL_PART = 0.2
NEVER = float("-inf")


def fair_share(members: Sequence[str], owner: str, shards: int) -> tuple[int, int]:
    """Return how many shards `owner` may hold and the first it prefers; all shares add up to `shards`."""
    ids = sorted({*members, owner})
    rank, whole, rest = ids.index(owner), shards // len(ids), shards % len(ids)
    return whole + (rank < rest), rank * whole + min(rank, rest)


class ShardLeases:
    """The leases of one aggregator. `epochs` maps each shard it holds to the lease's epoch."""

    def __init__(
        self, keys: Keys, owner: str, lease_seconds: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.owner = owner
        self.epochs: dict[int, int] = {}
        self.refused: dict[int, PkbError] = {}  # shards whose lease or cursor key is malformed
        self.members: list[str] = []
        self.closing = False  # renew, but take no further shard
        self._keys = keys
        self._ttl_seconds = TTL_PART * lease_seconds
        self._renewal_seconds = RENEWAL_PART * lease_seconds
        self._monotonic = monotonic
        self._renewed_at = self._due_at = NEVER

    @property
    def due_seconds(self) -> float:
        """Seconds until the next renewal; 0 or less if it is due."""
        return self._due_at - self._monotonic()

    def may_have_expired(self) -> bool:
        """Return whether the leases may have run out since the last renewal."""
        return self._monotonic() - self._renewed_at >= self._ttl_seconds

    def renew_now(self) -> None:
        """Make the next renewal due at once: the state in Redis is not the expected one."""
        self._due_at = NEVER

    def invalidate(self) -> None:
        """Forget the epochs: after an outage of Redis they may be wrong."""
        self.epochs.clear()
        self.renew_now()

    def renew(self, client: redis.Redis) -> None:
        """Renew the leases, take free shards within the share, release those above it.

        A shard whose epoch has changed must be loaded again: its lease was lost in between.
        """
        started = self._monotonic()
        ttl_ms = int(self._ttl_seconds * 1000)
        found = read_membership(client, self._keys, ROLE, self.owner, ttl_ms)
        share, first = fair_share(found.members, self.owner, self._keys.shards)

        def preference(shard: int) -> tuple[bool, bool, int]:
            """Usable shards, then those held until now, then from an own start, so that few collide."""
            return shard in self.refused, shard not in self.epochs, (shard - first) % self._keys.shards

        held = sorted((s for s, holder in enumerate(found.holders) if holder == self.owner), key=preference)
        free = sorted((s for s, holder in enumerate(found.holders) if holder is None), key=preference)
        excess: list[int] = []
        if self.closing:
            free = [shard for shard in free if shard in self.epochs]
        else:
            held, excess = held[:share], held[share:]
        release_shards(client, self._keys, excess, self.owner)
        requested = held + free[: max(0, share - len(held))]
        epochs, self.refused = lease_shards(client, self._keys, requested, self.owner, ttl_ms)
        if set(epochs) != set(self.epochs) or found.members != self.members:
            owned = ",".join(map(str, sorted(epochs)))
            log.info("shards_assigned", owned=owned, share=share, aggregators=len(found.members))
        self.epochs, self.members = epochs, found.members
        self._renewed_at, self._due_at = started, started + self._renewal_seconds

    def leave(self, client: redis.Redis) -> None:
        """Release everything, so that another aggregator need not wait for the leases to run out."""
        release_shards(client, self._keys, list(self.epochs), self.owner)
        leave(client, self._keys, ROLE, self.owner)
        self.epochs.clear()
