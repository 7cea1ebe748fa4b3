"""Every Redis key, in one file. `docs/keys.md` is tested against `KEY_TABLE`.

`P` is the prefix and `{S}` the shard in braces, so that all keys of a shard share one Redis
Cluster slot and one commit can span them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of all keys of a store. KEY_TABLE says each key's type, owner and lifetime.

    Args:
        prefix: PKB_PREFIX.
        shards: The number of shards the store was made with, as in `P:meta`.

    Example:
        >>> Keys().candles(408065, "5m")
        'pkb:{2}:candles:408065:5m'
    """

    prefix: str = "pkb"
    shards: int = 8

    def shard_of(self, token: int) -> int:
        """Return the shard of an instrument. The low byte of its token, its segment, takes no part."""
        return (token >> 8) % self.shards

    def meta(self) -> str:
        """Return the key that holds what the store was made with (`store/meta.py`)."""
        return f"{self.prefix}:meta"

    def symbols(self) -> str:
        """Return the key that holds `NSE:INFY` → token."""
        return f"{self.prefix}:symbols"

    def instrument(self, token: int) -> str:
        """Return the key that holds the row of the instrument master."""
        return f"{self.prefix}:instrument:{token}"

    def worker(self, worker_id: str) -> str:
        """Return the key that holds the heartbeat of a worker."""
        return f"{self.prefix}:worker:{worker_id}"

    def workers(self) -> str:
        """Return the key that holds `<role> <id>` → time of the last heartbeat, epoch ms."""
        return f"{self.prefix}:workers"

    def feed(self, number: int) -> str:
        """Return the key that holds the ingest worker that streams the n-th part of the instruments."""
        return f"{self.prefix}:feed:{number}"

    def feeds(self) -> str:
        """Return the key that holds version → the instruments of each feed, as JSON."""
        return f"{self.prefix}:feeds"

    def feed_progress(self) -> str:
        """Return the key that holds feed → receive time up to which its frames are in Redis, epoch ms."""
        return f"{self.prefix}:feed_progress"

    def job_outbox(self) -> str:
        """Return the key that holds job id → a job that RQ does not have yet, as JSON."""
        return f"{self.prefix}:job_outbox"

    def auth(self) -> str:
        """Return the key that holds the shared Kite session."""
        return f"{self.prefix}:auth"

    def login(self) -> str:
        """Return the key that holds results of past logins: attempts, a refusal, the last TOTP."""
        return f"{self.prefix}:login"

    def login_lock(self) -> str:
        """Return the key that holds the worker that logs in while the others wait."""
        return f"{self.prefix}:login:lock"

    def master(self) -> str:
        """Return the key that holds when the instrument master was loaded, its row count and digest."""
        return f"{self.prefix}:master"

    def derivatives(self) -> str:
        """Return the key that holds `NSE:RELIANCE`: stocks that have futures or options."""
        return f"{self.prefix}:derivatives"

    def expired(self) -> str:
        """Return the key that holds token → the expired contract that had it last."""
        return f"{self.prefix}:expired"

    def watch(self) -> str:
        """Return the key that holds `NSE:INFY` → `add` or `remove`: live changes to PKB_INSTRUMENTS."""
        return f"{self.prefix}:watch"

    def limit(self, name: str) -> str:
        """Return the key that holds when the next request of a kind may be sent to Kite."""
        return f"{self.prefix}:limit:{name}"

    def job(self, job_id: str) -> str:
        """Return the key that holds the progress of a job."""
        return f"{self.prefix}:job:{job_id}"

    def job_lock(self, name: str) -> str:
        """Return the key that holds the running job of a kind."""
        return f"{self.prefix}:job:lock:{name}"

    def restart(self, role: str) -> str:
        """Return the key that holds when the workers of a role were last asked to restart."""
        return f"{self.prefix}:restart:{role}"

    def bot_lease(self) -> str:
        """Return the key that holds the bot process that polls Telegram."""
        return f"{self.prefix}:{{bot}}:lease"

    def bot_update(self, update_id: str) -> str:
        """Return the key that holds a Telegram update that was handled."""
        return f"{self.prefix}:{{bot}}:update:{update_id}"

    def bot_alerts(self) -> str:
        """Return the key that holds alert id → alert."""
        return f"{self.prefix}:{{bot}}:alerts"

    def bot_alert_state(self) -> str:
        """Return the key that holds alert id → what the alert remembers of the ticks it saw."""
        return f"{self.prefix}:{{bot}}:alert_state"

    def bot_position(self) -> str:
        """Return the key that holds shard → the last tick entry that the alerts have seen."""
        return f"{self.prefix}:{{bot}}:position"

    def bot_outbox(self) -> str:
        """Return the key that holds messages to be sent."""
        return f"{self.prefix}:{{bot}}:outbox"

    def bot_troubles(self) -> str:
        """Return the key that holds check → a problem the operators were notified of."""
        return f"{self.prefix}:{{bot}}:troubles"

    def ticks(self, shard: int) -> str:
        """Return the key that holds one entry per websocket frame and shard."""
        return f"{self.prefix}:{{{shard}}}:ticks"

    def closed(self, shard: int) -> str:
        """Return the key that holds every completed or amended candle."""
        return f"{self.prefix}:{{{shard}}}:closed"

    def repairs(self, shard: int) -> str:
        """Return the key that holds outages and rows of history for the aggregator to apply."""
        return f"{self.prefix}:{{{shard}}}:repairs"

    def cursor(self, shard: int) -> str:
        """Return the key that holds what the aggregator has durably applied."""
        return f"{self.prefix}:{{{shard}}}:cursor"

    def state(self, shard: int) -> str:
        """Return the key that holds token → what the aggregator needs besides the rows to resume."""
        return f"{self.prefix}:{{{shard}}}:state"

    def lease(self, shard: int) -> str:
        """Return the key that holds the id of the owning aggregator."""
        return f"{self.prefix}:{{{shard}}}:lease"

    def quote(self, token: int) -> str:
        """Return the key that holds the latest full quote."""
        return f"{self.prefix}:{{{self.shard_of(token)}}}:quote:{token}"

    def current(self, token: int) -> str:
        """Return the key that holds interval → row of the candle being formed."""
        return f"{self.prefix}:{{{self.shard_of(token)}}}:current:{token}"

    def candles(self, token: int, interval: str) -> str:
        """Return the key that holds completed rows, oldest first."""
        return f"{self.prefix}:{{{self.shard_of(token)}}}:candles:{token}:{interval}"


AGGREGATOR_GROUP = "aggregator"  # consumer group of every tick stream
JOB_QUEUE = "pkb"  # name of the RQ queue; its keys are `rq:…:pkb`

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
    ("P:feed_progress", "hash", "ingest", "permanent"),
    ("P:job_outbox", "hash", "ingest", "permanent"),
    ("P:auth", "hash", "login", "TTL"),
    ("P:login", "hash", "login", "permanent"),
    ("P:login:lock", "string", "login", "TTL"),
    ("P:master", "hash", "instrument sync", "permanent"),
    ("P:derivatives", "set", "instrument sync", "permanent"),
    ("P:expired", "hash", "instrument sync", "permanent"),
    ("P:watch", "hash", "operator", "permanent"),
    ("P:limit:<name>", "hash", "callers of Kite", "TTL"),
    ("P:job:<job>", "hash", "that job", "TTL"),
    ("P:job:lock:<name>", "string", "that job", "TTL"),
    ("P:restart:<role>", "string", "bot", "TTL"),
    ("P:{bot}:lease", "string", "bot", "TTL"),
    ("P:{bot}:update:<id>", "string", "bot", "TTL"),
    ("P:{bot}:alerts", "hash", "bot", "permanent"),
    ("P:{bot}:alert_state", "hash", "bot", "permanent"),
    ("P:{bot}:position", "hash", "bot", "permanent"),
    ("P:{bot}:outbox", "stream", "bot", "capped"),
    ("P:{bot}:troubles", "hash", "bot", "permanent"),
)
