"""Is the pipeline healthy? Checks over a `ClusterState`; each yields findings with a hint.

    ok     as it should be
    warn   degraded: it runs, but late, in part, or without a safety net
    fail   down: no candles are made

`STATUS_CHECKS` judge how the pipeline runs now, `SETUP_CHECKS` how it is set up; `pkb doctor` runs both. All
are pure but for `check_health` and `check_volumes`, which read Redis.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import msgspec
import redis

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.candles.model import DAY, Interval
from pkbrokers_redis.errors import MetaMismatch, PkbError
from pkbrokers_redis.keys import JOB_QUEUE, Keys
from pkbrokers_redis.runtime.cluster_state import ClusterState, Finding, Level, Worker, read_cluster_state
from pkbrokers_redis.runtime.market_checks import MARKET_CHECKS, shown
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import describe
from pkbrokers_redis.store.instruments import Manifest

Health = Literal["healthy", "degraded", "down"]

EXIT_CODES: dict[Health, int] = {"healthy": 0, "degraded": 1, "down": 2}

LAG_MS_MAX = 5_000  # an aggregator that keeps up is behind by milliseconds
BEAT_AGE_MS_MAX = 6_000  # three heartbeats missed
SKEW_MS_MAX = 1_000  # candles close by the aggregator's clock, 2 s after their end
MEMORY_PART_MAX = 0.9
STREAM_PART_MAX = 0.5  # of the hard cap
FORK_SECONDS_MIN, FORKS_MIN = 30.0, 10  # between two forks of Redis, on average, once it has had so many
SECOND_LOOK_SECONDS = 1.0  # a shard or feed on its way between two workers has no owner for less
MASTER_AGE_SECONDS_MAX = 4 * 86_400  # over a long weekend; contracts expire, and tokens get other contracts
COUNTERS = ("dropped_at_cap", "frames_lost", "fenced")  # of the heartbeats, shown where they are not 0
FAILED_JOBS = f"rq:failed:{JOB_QUEUE}"  # RQ's own registry, a sorted set
INSTRUMENTS_AT_ONCE = 500
KEYS_SHOWN_MAX = 5


Check = Callable[[ClusterState], Iterator[Finding]]


def run_checks(cluster: ClusterState, checks: Iterable[Check]) -> list[Finding]:
    """Return the findings of all checks in their order."""
    return [finding for check in checks for finding in check(cluster)]


def health_of(findings: Iterable[Finding]) -> Health:
    """Return the worst finding in one word."""
    levels = {finding.level for finding in findings}
    return "down" if "fail" in levels else "degraded" if "warn" in levels else "healthy"


# --- how it runs


def workers_beat(cluster: ClusterState) -> Iterator[Finding]:
    """Check that a worker reads Kite, one makes candles, and none hangs."""
    for role, does in (("ingest", "reads Kite"), ("aggregate", "makes candles")):
        workers = cluster.alive(role)
        late = [worker.id for worker in workers if (worker.age_ms or 0) > BEAT_AGE_MS_MAX]
        if not workers:
            hint = f"start `pkb {role}`, or all with `pkb up`"
            yield Finding(role, "fail", f"no worker {does}", hint)
        elif late:
            hint = "look whether it hangs or its host is overloaded; kill it and it is replaced"
            yield Finding(role, "warn", f"{shown(late)} did not beat for {BEAT_AGE_MS_MAX / 1000:g} s", hint)
        else:
            yield Finding(role, "ok", f"{len(workers)} running")


def shards_owned(cluster: ClusterState) -> Iterator[Finding]:
    """Check that every shard has an aggregator."""
    free = [shard.number for shard in cluster.shards if shard.owner is None]
    if not free:
        yield Finding("shards", "ok", f"all {len(cluster.shards)} have an aggregator")
    elif cluster.alive("aggregate"):
        hint = "wait for PKB_LEASE_SECONDS; then look at the aggregators' logs for `shard_quarantined`"
        yield Finding("shards", "warn", f"no aggregator has shard {shown(free)}", hint)


FEED_PROBLEMS = {  # states of the ingest workers' watchdog that an operator should know of
    "mute": ("gets no ticks in market hours; it reconnects", "if it lasts, ask Kite's status"),
    "partly_mute": (
        "gets no ticks of some active instruments; it subscribes them again", "if it lasts, ask Kite's status"
    ),
    "expired": ("is refused by Kite (403): the session has ended", "run `pkb login` if no worker can log in"),
    "rate_limited": ("is rate-limited by Kite (429)", "look who else uses this api key: 3 connections each"),
}  # fmt: skip


def feeds_read(cluster: ClusterState) -> Iterator[Finding]:
    """Check that every feed has a reader, which is connected to Kite, and what its watchdog reports."""
    readers = cluster.alive("ingest")
    if not readers:
        return
    free = [number for number, owner in enumerate(cluster.feeds) if owner is None]
    if free:
        hint = "wait for PKB_LEASE_SECONDS; then look at the ingest workers' logs"
        yield Finding("feeds", "warn", f"no ingest worker reads feed {shown(free)}", hint)
    offline = [each.id for each in readers if each.number("connected") < len(each.numbers("feeds"))]
    if offline:
        hint = "look at its log: 403 is an expired session (`pkb login`), 429 too many connections of a key"
        yield Finding("feeds", "warn", f"{shown(offline)} is not connected to Kite on every feed", hint)
    if not free and not offline:
        yield Finding("feeds", "ok", f"all {len(cluster.feeds)} are read")
    for worker in readers:
        pairs = [pair.partition(":")[::2] for pair in worker.fields.get("feed_state", "").split(",")]
        for problem, (message, hint) in FEED_PROBLEMS.items():
            if numbers := [number for number, state in pairs if state == problem]:
                yield Finding("feeds", "warn", f"feed {shown(numbers)} {message}", hint)


def lag_small(cluster: ClusterState) -> Iterator[Finding]:
    """Check that no entry waits long for its aggregator."""
    late = [shard.number for shard in cluster.shards if shard.lag_ms > LAG_MS_MAX]
    worst_ms = max((shard.lag_ms for shard in cluster.shards), default=0.0)
    waiting = f"{sum(shard.lag_entries for shard in cluster.shards):,} entries wait, the oldest for"
    if late:
        message = f"shard {shown(late)} is behind: {waiting} {worst_ms / 1000:,.0f} s"
        hint = "start more aggregators (`pkb up --aggregators N`), or a faster machine"
        yield Finding("lag", "warn", message, hint)
    else:
        yield Finding("lag", "ok", f"{waiting} {worst_ms:,.0f} ms")


LOSSES = (
    ("dropped_at_cap", "entries were cut at the hard cap of a stream before they were applied",
     "keep aggregators running, or raise PKB_STREAM_MAX_ENTRIES"),
    ("frames_lost", "frames were lost while Redis was unavailable: the spool was full, or damaged",
     "give PKB_SPOOL_DIR more room, or another disk"),
    ("malformed_repairs", "entries of the repair streams could not be applied",
     "look for `malformed_repair` in the aggregators' logs"),
    ("jobs_refused", "repairs were not queued, because too many wait for RQ",
     "start the Redis at PKB_RQ_REDIS_URL"),
)  # fmt: skip


def nothing_lost(cluster: ClusterState) -> Iterator[Finding]:
    """Check that no worker has lost ticks."""
    totals = [sum(worker.number(name) for worker in cluster.workers) for name, _, _ in LOSSES]
    for count, (_, message, hint) in zip(totals, LOSSES, strict=True):
        if count:
            hint = f"{hint}; replay or backfill what is missing"
            yield Finding("losses", "warn", f"{count:,.0f} {message}", hint)
    if not any(totals):
        yield Finding("losses", "ok", "no tick was lost")


def keys_typed(cluster: ClusterState) -> Iterator[Finding]:
    """Check that no other program has written a key of the store."""
    for wrong in cluster.wrong_keys[:KEYS_SHOWN_MAX]:
        yield Finding("keys", "fail", wrong.message, wrong.hint)


def redis_takes_writes(cluster: ClusterState) -> Iterator[Finding]:
    """Check that Redis takes writes, and has memory and a disk that works."""
    problem = False
    for server in cluster.servers:
        where = f"Redis {server.name}".strip()
        if server.is_replica:
            problem = True
            message = f"{where} is a replica and refuses writes: no candle can be made there"
            yield Finding("redis", "fail", message, "point PKB_REDIS_URL at the primary")
        if server.evicted:
            problem = True
            message = f"{where} has deleted {server.evicted:,} keys for want of memory (maxmemory-policy)"
            hint = "CONFIG SET maxmemory-policy noeviction, raise maxmemory; then backfill what is missing"
            yield Finding("eviction", "fail", message, hint)
        if not server.saves:
            problem = True
            hint = "free space there or correct its permissions; its log has the cause"
            yield Finding("redis", "fail", f"{where} cannot save to its disk, and refuses writes", hint)
        if server.limit_bytes and server.used_bytes > MEMORY_PART_MAX * server.limit_bytes:
            problem = True
            message = f"{where} has used {server.used_bytes / server.limit_bytes:.0%} of its maxmemory"
            yield Finding("memory", "warn", message, "raise it, or keep fewer rows")
    if cluster.servers and not problem:
        used = sum(server.used_bytes for server in cluster.servers)
        yield Finding("memory", "ok", f"{used / 1e6:,.0f} MB used")


def progress_since(earlier: ClusterState) -> Check:
    """Return a check that shards with waiting entries have moved since an earlier state."""
    waiting = {shard.number: shard.position for shard in earlier.shards if shard.lag_entries}

    def check(cluster: ClusterState) -> Iterator[Finding]:
        stuck = [
            shard.number
            for shard in cluster.shards
            if shard.owner is not None and shard.lag_entries and waiting.get(shard.number) == shard.position
        ]
        if stuck:
            seconds = (cluster.at_ms - earlier.at_ms) / 1000
            message = f"shard {shown(stuck)} did not move for {seconds:.1f} s while entries waited"
            hint = "look at its aggregator's log, then restart it: another takes over"
            yield Finding("stuck", "fail", message, hint)
        else:
            yield Finding("stuck", "ok", "every shard with waiting entries moves")

    return check


STATUS_CHECKS: tuple[Check, ...] = (
    redis_takes_writes, keys_typed, workers_beat, shards_owned, feeds_read, lag_small, nothing_lost,
    *MARKET_CHECKS,
)  # fmt: skip


# --- how it is set up


def persistent(cluster: ClusterState) -> Iterator[Finding]:
    """Check that a restart of Redis loses nothing, and that Redis evicts nothing."""
    if not cluster.servers:
        return
    if all(server.aof for server in cluster.servers):
        yield Finding("persistence", "ok", "appendonly is on")
    else:
        message = "appendonly is off: a restart of Redis loses ticks and candles"
        hint = "CONFIG SET appendonly yes, and set it in redis.conf"
        yield Finding("persistence", "warn", message, hint)
    evicting = sorted({server.eviction for server in cluster.servers} - {"noeviction", ""})
    if evicting:
        level: Level = "fail" if any(policy.startswith("allkeys") for policy in evicting) else "warn"
        message = f"maxmemory-policy is {shown(evicting)}: Redis may delete keys when memory is short"
        hint = "CONFIG SET maxmemory-policy noeviction, and set it in redis.conf"
        yield Finding("eviction", level, message, hint)
    else:
        yield Finding("eviction", "ok", "maxmemory-policy is noeviction")


def forks_rare(cluster: ClusterState) -> Iterator[Finding]:
    """Check that Redis seldom forks to rewrite its files: each fork costs the ticks a core for seconds."""
    often = [
        server.up_seconds / server.forks
        for server in cluster.servers
        if server.forks >= FORKS_MIN and server.up_seconds < server.forks * FORK_SECONDS_MIN
    ]
    if often:
        message = f"Redis forks every {min(often):.0f} s to rewrite its files, and ticks wait"
        hint = 'CONFIG SET save "" and auto-aof-rewrite-min-size 1gb, and set them in redis.conf'
        yield Finding("forks", "warn", message, hint)
    elif cluster.servers:
        forks = sum(server.forks for server in cluster.servers)
        yield Finding("forks", "ok", f"{forks:,} since Redis started")


def clocks_agree(cluster: ClusterState) -> Iterator[Finding]:
    """Check this host's clock and the workers' against Redis's."""
    hint = "synchronise the clocks (chrony, systemd-timesyncd): candles close by them"
    skews = {"this host": cluster.host_skew_ms}
    skews |= {worker.id: worker.skew_ms for worker in cluster.workers if worker.skew_ms is not None}
    wrong = {name: skew for name, skew in skews.items() if abs(skew) > SKEW_MS_MAX}
    for name, skew in wrong.items():
        direction = "ahead of" if skew > 0 else "behind"
        yield Finding("clocks", "warn", f"{name} is {abs(skew) / 1000:.1f} s {direction} Redis's host", hint)
    if not wrong:
        worst = max(abs(skew) for skew in skews.values())
        yield Finding("clocks", "ok", f"{len(skews)} compared with Redis's, at most {worst:,.0f} ms off")


def one_instrument_list(cluster: ClusterState) -> Iterator[Finding]:
    """Check that all ingest workers have the same instrument list."""
    lists: dict[str, list[str]] = {}
    for worker in cluster.alive("ingest"):
        if name := worker.fields.get("list"):
            lists.setdefault(name, []).append(worker.id)
    if len(lists) > 1:
        few = min(lists.values(), key=len)
        message = f"{shown(few)} has another instrument list than the other ingest workers"
        hint = "give all the same PKB_INSTRUMENTS and instrument master, and restart them"
        yield Finding("instruments", "fail", message, hint)
    elif lists:
        total = max(worker.number("instruments_total") for worker in cluster.alive("ingest"))
        yield Finding("instruments", "ok", f"{total:,.0f}, one list for all ingest workers")


SETUP_CHECKS: tuple[Check, ...] = (persistent, forks_rare, clocks_agree, one_instrument_list)


def streams_below(entries_max: int) -> Check:
    """Return a check that the tick streams are far below their hard cap."""

    def check(cluster: ClusterState) -> Iterator[Finding]:
        big = [shard.number for shard in cluster.shards if shard.entries > STREAM_PART_MAX * entries_max]
        longest = max((shard.entries for shard in cluster.shards), default=0)
        size = sum(shard.stream_bytes or 0 for shard in cluster.shards)
        message = f"{size / 1e6:,.1f} MB, the longest has {longest:,} of {entries_max:,} entries"
        if big:
            hint = (
                "aggregators must keep up; a registered reader that fell behind also holds entries "
                "(XINFO GROUPS), and so does a long PKB_STREAM_RETENTION_SECONDS"
            )
            yield Finding("streams", "warn", f"shard {shown(big)} nears its hard cap: {message}", hint)
        else:
            yield Finding("streams", "ok", message)

    return check


def check_functions(missing: Sequence[str]) -> Finding:
    """Check that the Redis Functions are loaded on every master."""
    if not missing:
        return Finding("functions", "ok", "loaded")
    hint = "an aggregator loads them as it starts"
    return Finding("functions", "warn", f"missing: {shown(missing)}", hint)


def check_settings(problem: PkbError | None, exists: bool) -> Finding:
    """Check that the store was made with this host's settings."""
    if problem is not None:
        level: Level = "fail" if isinstance(problem, MetaMismatch) else "warn"
        return Finding("meta", level, problem.message, problem.hint)
    if not exists:
        return Finding("meta", "fail", "there is no store yet", "start `pkb up`, or check PKB_PREFIX")
    return Finding("meta", "ok", "the store was made with these settings")


def check_jobs(failed: int) -> Finding:
    """Check that no job has failed for good."""
    if failed:
        return Finding("jobs", "warn", f"{failed:,} have failed", "`pkb jobs --failed` lists them")
    return Finding("jobs", "ok", "none has failed")


def check_master(manifest: Manifest | None, now_s: float) -> Finding:
    """Check that the instrument master is recent."""
    if manifest is None:
        return Finding("master", "ok", "none was fetched; tokens and names given by hand need none")
    age_seconds = manifest.age_seconds(now_s)
    hint = "run `pkb instruments sync`, or keep `pkb cron` running: it does so each morning"
    if age_seconds is None:
        return Finding("master", "warn", "its time cannot be read", hint)
    message = f"{manifest.rows:,} instruments, fetched {age_seconds / 3600:,.0f} h ago"
    return Finding("master", "warn" if age_seconds > MASTER_AGE_SECONDS_MAX else "ok", message, hint)


def check_host(workers: Iterable[Worker], host: str) -> Finding:
    """Check that the workers of one host beat: a container's healthcheck."""
    local = [worker for worker in workers if worker.age_ms is not None and worker.fields.get("host") == host]
    late = [worker.id for worker in local if (worker.age_ms or 0) > BEAT_AGE_MS_MAX]
    if not local:
        return Finding("here", "fail", f"no worker of {host} beats", "look at its log")
    if late:
        return Finding("here", "warn", f"{shown(late)} does not beat", "look at its log")
    return Finding("here", "ok", shown([worker.id for worker in local]))


# --- for commands and the web server


def check_health(client: redis.Redis, settings: Settings) -> tuple[ClusterState, list[Finding]]:
    """Read the cluster's state and run the status checks.

    A problem is checked again after a second: one that has passed was a handover between workers.
    """
    place = describe(settings, for_reading=True)
    cluster = read_cluster_state(client, settings.keys, place)
    findings = run_checks(cluster, STATUS_CHECKS)
    if health_of(findings) != "healthy":
        time.sleep(SECOND_LOOK_SECONDS)
        earlier, cluster = cluster, read_cluster_state(client, settings.keys, place)
        findings = run_checks(cluster, (*STATUS_CHECKS, progress_since(earlier)))
    return cluster, findings


def health_document(cluster: ClusterState | None, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return what `pkb status --json` prints and the web server's /health answers."""
    document: dict[str, Any] = {"health": health_of(findings)}
    if cluster is not None:
        at = datetime.fromtimestamp(cluster.at_ms / 1000, IST)
        document |= {
            "at": at.isoformat(timespec="milliseconds" if at.microsecond else "seconds"),
            "redis": {
                "place": cluster.place,
                "servers": [
                    {"name": each.name, "version": each.version, "used_bytes": each.used_bytes,
                     "limit_bytes": each.limit_bytes, "appendonly": each.aof, "saves": each.saves}
                    for each in cluster.servers
                ],
            },
            "workers": [
                {"id": each.id, "role": each.role, "age_ms": each.age_ms, "skew_ms": each.skew_ms,
                 **{name: _value(name, text) for name, text in each.fields.items() if name != "role"}}
                for each in cluster.workers
            ],
            "shards": [
                {"shard": each.number, "owner": each.owner, "entries": each.entries,
                 "position": each.position, "lag_entries": each.lag_entries, "lag_ms": each.lag_ms}
                for each in cluster.shards
            ],
            "feeds": [{"feed": number, "owner": owner} for number, owner in enumerate(cluster.feeds)],
            "counters": counters(cluster),
        }  # fmt: skip
    return {**document, "findings": [finding._asdict() for finding in findings]}


def counters(cluster: ClusterState) -> dict[str, int]:
    """Return what the workers lost or were refused, added up."""
    return {name: int(sum(worker.number(name) for worker in cluster.workers)) for name in COUNTERS}


def _value(name: str, text: str) -> Any:
    """Return a heartbeat's field as JSON: numbers as numbers, lists as lists, whatever their length."""
    if name in ("shards", "feeds"):
        return [int(part) for part in text.split(",") if part.isdecimal()]
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


@dataclass
class VolumeCheck:
    """How many instruments were added up, and those that do not: token → (sum, last − baseline)."""

    checked: int = 0
    wrong: dict[int, tuple[float, float]] = field(default_factory=dict)
    truncated: int = 0  # lists that are full, so that rows of today may be missing
    malformed: int = 0  # keys that another writer changed


def longest_interval(intervals: Sequence[Interval]) -> Interval:
    """Return the interval, other than `day`, whose list reaches back furthest."""
    return max(intervals, key=lambda each: each.seconds * each.keep if each.name != DAY else 0)


def check_volumes(
    client: redis.Redis, keys: Keys, interval: str = "1m", *, keep: int | None = None
) -> VolumeCheck:
    """Check that each instrument's candle volumes add up to its last cumulative volume minus the baseline.

    It may run while aggregators work: a commit is atomic, and so is the read of one instrument. `keep` is how
    many completed rows of the interval a list holds at most.
    """
    result = VolumeCheck()
    for shard in range(keys.shards):
        fields: Any = client.hkeys(keys.state(shard))
        tokens = [int(name) for name in fields if name.isdigit()]
        for first in range(0, len(tokens), INSTRUMENTS_AT_ONCE):
            chunk = tokens[first : first + INSTRUMENTS_AT_ONCE]
            pipeline = client.pipeline(transaction=True)
            for token in chunk:
                pipeline.hget(keys.state(shard), str(token))
                pipeline.lrange(keys.candles(token, interval), 0, -1)
                pipeline.hget(keys.current(token), interval)
            replies = pipeline.execute(raise_on_error=False)
            for n, token in enumerate(chunk):
                try:
                    _add_up(result, token, *replies[3 * n : 3 * n + 3], keep=keep)
                except (ValueError, TypeError, IndexError):  # not JSON, other fields, WRONGTYPE
                    result.malformed += 1
    return result


def _add_up(
    result: VolumeCheck,
    token: int,
    state: bytes,
    rows: list[bytes],
    current: bytes | None,
    *,
    keep: int | None,
) -> None:
    _, _, _, day_s, volume, baseline, *_ = msgspec.json.decode(state)
    if volume is None:
        return  # an index has no volume
    texts = [*rows, *([current] if current else [])]
    of_today = [row for row in map(msgspec.json.decode, texts) if row[0] >= day_s]
    if keep is not None and keep <= len(rows) == len(of_today) - bool(current):
        result.truncated += 1
        return
    total = round(sum(row[5] for row in of_today), 8)
    result.checked += 1
    if abs(total - (volume - baseline)) > 1e-6:
        result.wrong[token] = total, volume - baseline
