"""Every Redis key, in one file. `docs/keys.md` is tested against `KEY_TABLE`.

`P` is the prefix and `{S}` the shard in braces, so that all keys of a shard share one Redis
Cluster slot and one commit can span them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """Builds key names. `shards` must be the store's own number (`P:meta` holds it)."""

    prefix: str = "pkb"
    shards: int = 8

    def shard_of(self, token: int) -> int:
        """The shard of an instrument: the low byte of a Kite token is its segment and takes no part."""
        return (token >> 8) % self.shards

    def meta(self) -> str:
        """hash · written once by the first worker · permanent."""
        return f"{self.prefix}:meta"

    def symbols(self) -> str:
        """hash `NSE:INFY` → token · instrument sync · permanent."""
        return f"{self.prefix}:symbols"

    def instrument(self, token: int) -> str:
        """hash, the instrument master row · instrument sync · permanent."""
        return f"{self.prefix}:instrument:{token}"

    def worker(self, worker_id: str) -> str:
        """hash, heartbeat · that worker · TTL."""
        return f"{self.prefix}:worker:{worker_id}"

    def workers(self) -> str:
        """zset `<role> <id>` → when that worker last gave a sign of life · each worker · permanent."""
        return f"{self.prefix}:workers"

    def feed(self, number: int) -> str:
        """string, the ingest worker that streams the n-th part of the instruments · that worker · TTL."""
        return f"{self.prefix}:feed:{number}"

    def auth(self) -> str:
        """hash, the shared Kite session · login · TTL."""
        return f"{self.prefix}:auth"

    def ticks(self, shard: int) -> str:
        """stream, one entry a websocket frame and shard · ingest · trimmed."""
        return f"{self.prefix}:{{{shard}}}:ticks"

    def closed(self, shard: int) -> str:
        """stream of completed and amended candles · aggregator · capped."""
        return f"{self.prefix}:{{{shard}}}:closed"

    def cursor(self, shard: int) -> str:
        """hash, what is durably applied · aggregator · permanent."""
        return f"{self.prefix}:{{{shard}}}:cursor"

    def state(self, shard: int) -> str:
        """hash token → what the aggregator remembers beside the rows · aggregator · permanent."""
        return f"{self.prefix}:{{{shard}}}:state"

    def lease(self, shard: int) -> str:
        """string, the owning aggregator's id · that aggregator · TTL."""
        return f"{self.prefix}:{{{shard}}}:lease"

    def quote(self, token: int) -> str:
        """hash, the latest full quote · ingest · permanent."""
        return f"{self.prefix}:{{{self.shard_of(token)}}}:quote:{token}"

    def current(self, token: int) -> str:
        """hash interval → row of the candle being formed · aggregator · permanent."""
        return f"{self.prefix}:{{{self.shard_of(token)}}}:current:{token}"

    def candles(self, token: int, interval: str) -> str:
        """list of completed rows, oldest first · aggregator · capped."""
        return f"{self.prefix}:{{{self.shard_of(token)}}}:candles:{token}:{interval}"


AGGREGATOR_GROUP = "aggregator"

# name as in the docs, Redis type, owner, lifetime
KEY_TABLE: tuple[tuple[str, str, str, str], ...] = (
    ("P:meta", "hash", "first worker", "permanent"),
    ("P:symbols", "hash", "instrument sync", "permanent"),
    ("P:instrument:<token>", "hash", "instrument sync", "permanent"),
    ("P:{S}:ticks", "stream", "ingest", "trimmed"),
    ("P:{S}:quote:<token>", "hash", "ingest", "permanent"),
    ("P:{S}:current:<token>", "hash", "aggregator", "permanent"),
    ("P:{S}:candles:<token>:<interval>", "list", "aggregator", "capped"),
    ("P:{S}:closed", "stream", "aggregator", "capped"),
    ("P:{S}:cursor", "hash", "aggregator", "permanent"),
    ("P:{S}:state", "hash", "aggregator", "permanent"),
    ("P:{S}:lease", "string", "aggregator", "TTL"),
    ("P:worker:<id>", "hash", "each worker", "TTL"),
    ("P:workers", "zset", "each worker", "permanent"),
    ("P:feed:<n>", "string", "ingest", "TTL"),
    ("P:auth", "hash", "login", "TTL"),
)
