"""Every Redis key, in one file. `docs/keys.md` is tested against `KEY_TABLE`.

`P` is the prefix and `{S}` the shard in braces, so that all keys of a shard share one Redis
Cluster slot and one commit can span them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _fixed(name: str) -> Callable[[Keys], str]:
    """Return a method of `Keys` for `P:name`."""
    return lambda keys: f"{keys.prefix}:{name}"


def _of_shard(name: str) -> Callable[[Keys, int], str]:
    """Return a method of `Keys` for `P:{S}:name`; its argument is the shard."""
    return lambda keys, shard: f"{keys.prefix}:{{{shard}}}:{name}"


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

    meta = _fixed("meta")  # what the store was made with
    symbols = _fixed("symbols")  # `NSE:INFY` → token
    workers = _fixed("workers")  # `<role> <id>` → time of the last heartbeat, epoch ms
    feeds = _fixed("feeds")  # version → the instruments of each feed, as JSON
    feed_progress = _fixed("feed_progress")  # feed → until when (epoch ms) its frames are in Redis
    job_outbox = _fixed("job_outbox")  # job id → a job that RQ does not have yet, as JSON
    auth = _fixed("auth")  # the shared Kite session
    login = _fixed("login")  # results of past logins: attempts, a refusal, the last TOTP
    login_lock = _fixed("login:lock")  # the worker that logs in while the others wait
    master = _fixed("master")  # when the instrument master was loaded, its row count and digest
    derivatives = _fixed("derivatives")  # `NSE:RELIANCE`: stocks that have futures or options
    exchanges = _fixed("exchanges")  # token → exchange, of instruments whose token says another one
    expired = _fixed("expired")  # token → the expired contract that had it last
    renamed = _fixed("renamed")  # the old name of a renamed share or index → token
    watch = _fixed("watch")  # `NSE:INFY` → `add` or `remove`: live changes to PKB_INSTRUMENTS
    bot_lease = _fixed("{bot}:lease")  # the bot process that polls Telegram
    bot_alerts = _fixed("{bot}:alerts")  # alert id → alert
    bot_alert_state = _fixed("{bot}:alert_state")  # alert id → what the alert remembers of the ticks it saw
    bot_position = _fixed("{bot}:position")  # shard → the last tick entry that the alerts have seen
    bot_outbox = _fixed("{bot}:outbox")  # messages to be sent
    bot_troubles = _fixed("{bot}:troubles")  # check → a problem the operators were notified of

    ticks = _of_shard("ticks")  # one entry per websocket frame and shard
    closed = _of_shard("closed")  # every completed or amended candle
    repairs = _of_shard("repairs")  # outages and rows of history for the aggregator to apply
    cursor = _of_shard("cursor")  # what the aggregator has durably applied
    state = _of_shard("state")  # token → what the aggregator needs besides the rows to resume
    lease = _of_shard("lease")  # the id of the owning aggregator

    def shard_of(self, token: int) -> int:
        """Return the shard of an instrument. The low byte of its token, its segment, takes no part."""
        return (token >> 8) % self.shards

    def instrument(self, token: int) -> str:
        """Return the key of the row of the instrument master."""
        return f"{self.prefix}:instrument:{token}"

    def worker(self, worker_id: str) -> str:
        """Return the key of the heartbeat of a worker."""
        return f"{self.prefix}:worker:{worker_id}"

    def feed(self, number: int) -> str:
        """Return the key of the ingest worker that streams the n-th part of the instruments."""
        return f"{self.prefix}:feed:{number}"

    def limit(self, name: str) -> str:
        """Return the key of when the next request of a kind may be sent to Kite."""
        return f"{self.prefix}:limit:{name}"

    def job(self, job_id: str) -> str:
        """Return the key of the progress of a job."""
        return f"{self.prefix}:job:{job_id}"

    def job_lock(self, name: str) -> str:
        """Return the key of the running job of a kind."""
        return f"{self.prefix}:job:lock:{name}"

    def restart(self, role: str) -> str:
        """Return the key of when the workers of a role were last asked to restart."""
        return f"{self.prefix}:restart:{role}"

    def bot_update(self, update_id: str) -> str:
        """Return the key of a Telegram update that was handled."""
        return f"{self.prefix}:{{bot}}:update:{update_id}"

    def quote(self, token: int) -> str:
        """Return the key of the latest full quote."""
        return f"{self.prefix}:{{{self.shard_of(token)}}}:quote:{token}"

    def current(self, token: int) -> str:
        """Return the key of interval → row of the candle being formed."""
        return f"{self.prefix}:{{{self.shard_of(token)}}}:current:{token}"

    def candles(self, token: int, interval: str) -> str:
        """Return the key of completed rows, oldest first."""
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
    ("P:exchanges", "hash", "instrument sync", "permanent"),
    ("P:expired", "hash", "instrument sync", "permanent"),
    ("P:renamed", "hash", "instrument sync", "permanent"),
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
