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

    def feeds(self) -> str:
        """hash version → the instruments of each feed, as JSON · ingest · permanent."""
        return f"{self.prefix}:feeds"

    def heard(self) -> str:
        """hash feed → until when what it said is in Redis, epoch ms · the feed's reader · permanent."""
        return f"{self.prefix}:heard"

    def wanted_jobs(self) -> str:
        """hash job id → a job that RQ does not have yet, as JSON · ingest · permanent."""
        return f"{self.prefix}:wanted-jobs"

    def auth(self) -> str:
        """hash, the shared Kite session · login · TTL."""
        return f"{self.prefix}:auth"

    def login(self) -> str:
        """hash, what logins taught us: attempts, a refusal, the TOTP used last · login · permanent."""
        return f"{self.prefix}:login"

    def login_lock(self) -> str:
        """string, the worker that logs in, while the others wait · that worker · TTL."""
        return f"{self.prefix}:login:lock"

    def master(self) -> str:
        """hash, when the instrument master came, its rows, their digest · instrument sync · permanent."""
        return f"{self.prefix}:master"

    def derivatives(self) -> str:
        """set of `NSE:RELIANCE`: stocks that have futures or options · instrument sync · permanent."""
        return f"{self.prefix}:derivatives"

    def expired(self) -> str:
        """hash token → the contract that had it last and is gone · instrument sync · permanent."""
        return f"{self.prefix}:expired"

    def watch(self) -> str:
        """hash `NSE:INFY` → add or remove, live changes to PKB_INSTRUMENTS · operator · permanent."""
        return f"{self.prefix}:watch"

    def limit(self, name: str) -> str:
        """hash, when the next request of a kind may be made at Kite · who asks Kite · TTL."""
        return f"{self.prefix}:limit:{name}"

    def job(self, job_id: str) -> str:
        """hash, how far a job has come · that job · TTL."""
        return f"{self.prefix}:job:{job_id}"

    def job_lock(self, name: str) -> str:
        """string, the job of a kind that is at work · that job · TTL."""
        return f"{self.prefix}:job:lock:{name}"

    def restart(self, role: str) -> str:
        """string, when the workers of a role were last asked to begin anew · bot · TTL."""
        return f"{self.prefix}:restart:{role}"

    def bot_lease(self) -> str:
        """string, the bot process that answers · that process · TTL."""
        return f"{self.prefix}:{{bot}}:lease"

    def bot_update(self, update_id: str) -> str:
        """string, an update of Telegram's that was taken · bot · TTL."""
        return f"{self.prefix}:{{bot}}:update:{update_id}"

    def bot_confirm(self, nonce: str) -> str:
        """string, an admin command that waits for its button · bot · TTL."""
        return f"{self.prefix}:{{bot}}:confirm:{nonce}"

    def bot_alerts(self) -> str:
        """hash id → alert · bot · permanent."""
        return f"{self.prefix}:{{bot}}:alerts"

    def bot_armed(self) -> str:
        """hash id → what an alert remembers of the ticks it saw · bot · permanent."""
        return f"{self.prefix}:{{bot}}:armed"

    def bot_position(self) -> str:
        """hash shard → the last tick entry that the alerts were asked about · bot · permanent."""
        return f"{self.prefix}:{{bot}}:position"

    def bot_outbox(self) -> str:
        """stream of messages that are to be sent · bot · capped."""
        return f"{self.prefix}:{{bot}}:outbox"

    def bot_troubles(self) -> str:
        """hash check → a trouble the operators were told of · bot · permanent."""
        return f"{self.prefix}:{{bot}}:troubles"

    def ticks(self, shard: int) -> str:
        """stream, one entry per websocket frame and shard · ingest · trimmed."""
        return f"{self.prefix}:{{{shard}}}:ticks"

    def closed(self, shard: int) -> str:
        """stream of completed and amended candles · aggregator · capped."""
        return f"{self.prefix}:{{{shard}}}:closed"

    def repairs(self, shard: int) -> str:
        """stream, outages and history's rows for the aggregator to apply · ingest and jobs · trimmed."""
        return f"{self.prefix}:{{{shard}}}:repairs"

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
    ("P:{S}:repairs", "stream", "ingest and jobs", "trimmed"),
    ("P:{S}:cursor", "hash", "aggregator", "permanent"),
    ("P:{S}:state", "hash", "aggregator", "permanent"),
    ("P:{S}:lease", "string", "aggregator", "TTL"),
    ("P:worker:<id>", "hash", "each worker", "TTL"),
    ("P:workers", "zset", "each worker", "permanent"),
    ("P:feed:<n>", "string", "ingest", "TTL"),
    ("P:feeds", "hash", "ingest", "permanent"),
    ("P:heard", "hash", "ingest", "permanent"),
    ("P:wanted-jobs", "hash", "ingest", "permanent"),
    ("P:auth", "hash", "login", "TTL"),
    ("P:login", "hash", "login", "permanent"),
    ("P:login:lock", "string", "login", "TTL"),
    ("P:master", "hash", "instrument sync", "permanent"),
    ("P:derivatives", "set", "instrument sync", "permanent"),
    ("P:expired", "hash", "instrument sync", "permanent"),
    ("P:watch", "hash", "operator", "permanent"),
    ("P:limit:<name>", "hash", "who asks Kite", "TTL"),
    ("P:job:<job>", "hash", "that job", "TTL"),
    ("P:job:lock:<name>", "string", "that job", "TTL"),
    ("P:restart:<role>", "string", "bot", "TTL"),
    ("P:{bot}:lease", "string", "bot", "TTL"),
    ("P:{bot}:update:<id>", "string", "bot", "TTL"),
    ("P:{bot}:confirm:<id>", "string", "bot", "TTL"),
    ("P:{bot}:alerts", "hash", "bot", "permanent"),
    ("P:{bot}:armed", "hash", "bot", "permanent"),
    ("P:{bot}:position", "hash", "bot", "permanent"),
    ("P:{bot}:outbox", "stream", "bot", "capped"),
    ("P:{bot}:troubles", "hash", "bot", "permanent"),
)
