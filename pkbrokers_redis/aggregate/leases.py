"""Which shards are ours: equal shares of those aggregators that live, kept by leases (`store.leases`).

    lease    runs 0.6 × PKB_LEASE_SECONDS, renewed every 0.2 ×: two looks may fail
    look     every 0.2 ×: who lives, who holds what; renew ours, take free ones up to our share
    share    shards / members, the remainder to the first by id; who holds more gives the excess up

So the shards of a dead aggregator are another's after at most 0.8 × PKB_LEASE_SECONDS, and what a new one
gets is without an owner for one look. Whoever was away longer than its leases run finds them gone, by its own
clock before a commit, or by Redis's refusal (FENCED).
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
LOOK_PART = 0.2


def fair_share(members: Sequence[str], owner: str, shards: int) -> tuple[int, int]:
    """How many shards are `owner`'s, and the first it prefers. The shares of all add up to `shards`."""
    ids = sorted({*members, owner})
    rank, whole, rest = ids.index(owner), shards // len(ids), shards % len(ids)
    return whole + (rank < rest), rank * whole + min(rank, rest)


class ShardLeases:
    """The leases of one aggregator. `epochs` is shard → epoch of what is ours, as far as we know."""

    def __init__(
        self, keys: Keys, owner: str, lease_seconds: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.owner = owner
        self.epochs: dict[int, int] = {}
        self.refused: dict[int, PkbError] = {}  # shards whose lease or cursor a foreign hand filled
        self.members: list[str] = []
        self.closing = False  # renew, but take nothing more
        self._keys = keys
        self._ttl_seconds = TTL_PART * lease_seconds
        self._look_seconds = LOOK_PART * lease_seconds
        self._monotonic = monotonic
        self._renewed = self._next = float("-inf")

    @property
    def due_seconds(self) -> float:
        """How long until the next look; 0 or less: now."""
        return self._next - self._monotonic()

    def may_be_gone(self) -> bool:
        """Whether our leases may have run out since the last look: we slept, or a round took too long."""
        return self._monotonic() - self._renewed >= self._ttl_seconds

    def hurry(self) -> None:
        """Look again at once: something is not as we believed."""
        self._next = float("-inf")

    def forget(self) -> None:
        """Redis was away: what we believed may not be so."""
        self.epochs.clear()
        self.hurry()

    def look(self, client: redis.Redis) -> None:
        """Renew what is ours, take what is free within our share, give up what is above it.

        A shard whose epoch is another than before must be loaded again.
        """
        began = self._monotonic()
        ttl_ms = int(self._ttl_seconds * 1000)
        found = read_membership(client, self._keys, ROLE, self.owner, ttl_ms)
        share, first = fair_share(found.members, self.owner, self._keys.shards)
        held = [shard for shard, holder in enumerate(found.holders) if holder == self.owner]
        free = [shard for shard, holder in enumerate(found.holders) if holder is None]

        def preference(shard: int) -> tuple[bool, bool, int]:
            """Usable ones, ours of a moment ago, then from a place of our own on, so that few collide."""
            return shard in self.refused, shard not in self.epochs, (shard - first) % self._keys.shards

        held.sort(key=preference)
        excess = held[share:] if not self.closing else []
        if self.closing:
            free = [shard for shard in free if shard in self.epochs]
        wanted = held[: len(held) - len(excess)]
        wanted += sorted(free, key=preference)[: max(0, share - len(wanted))]
        release_shards(client, self._keys, excess, self.owner)
        epochs, self.refused = lease_shards(client, self._keys, wanted, self.owner, ttl_ms)
        if set(epochs) != set(self.epochs) or found.members != self.members:
            owned = ",".join(map(str, sorted(epochs)))
            log.info("shards", owned=owned, share=share, aggregators=len(found.members))
        self.epochs, self.members = epochs, found.members
        self._renewed, self._next = began, began + self._look_seconds

    def leave(self, client: redis.Redis) -> None:
        """Give everything up at once, so that another takes over without waiting for the leases' end."""
        release_shards(client, self._keys, list(self.epochs), self.owner)
        leave(client, self._keys, ROLE, self.owner)
        self.epochs.clear()
