"""Is the pipeline well? Pure rules over `facts.py`: a rule says one thing about one picture.

    ok     as it should be
    warn   degraded: it runs, but late, in part, or without a safety it should have
    fail   down: no candles come of it

`STATUS` are the rules about how it runs now, `SETUP` those about how it was set up; `pkb doctor` asks both.

Is what stands around the pipeline well: jobs, instrument master? Pure, as the rules of `health.py`.

A look at a running pipeline, and what programs are told of it: `pkb status --json`, the web server.

Do the volumes add up? An instrument's candles sum up to its last cumulative volume minus the baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

import msgspec
import redis

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.candles.model import DAY, Interval
from pkbrokers_redis.errors import MetaMismatch, PkbError
from pkbrokers_redis.keys import JOB_QUEUE, Keys
from pkbrokers_redis.runtime.cluster_state import Facts, Worker, gather
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import describe
from pkbrokers_redis.store.instruments import Manifest

Level = Literal["ok", "warn", "fail"]
Health = Literal["healthy", "degraded", "down"]

EXIT_CODES: dict[Health, int] = {"healthy": 0, "degraded": 1, "down": 2}

LAG_MS_MAX = 5_000  # an aggregator that keeps up is behind by milliseconds
BEAT_AGE_MS_MAX = 6_000  # three heartbeats missed
SKEW_MS_MAX = 1_000  # candles close by the aggregator's clock, 2 s after their end
MEMORY_PART_MAX = 0.9
STREAM_PART_MAX = 0.5  # of the hard cap
NAMES_MAX = 5  # in one line
FORK_SECONDS_MIN, FORKS_MIN = 30.0, 10  # between two forks of Redis, on average, once it has had so many


class Finding(NamedTuple):
    """One line of a check-up: `what` was found, and how to mend it."""

    check: str
    level: Level
    what: str
    hint: str = ""


Rule = Callable[[Facts], Iterator[Finding]]


def judge(facts: Facts, rules: Iterable[Rule]) -> list[Finding]:
    """What the rules say, in their order."""
    return [finding for rule in rules for finding in rule(facts)]


def health_of(findings: Iterable[Finding]) -> Health:
    """The worst of them in one word."""
    levels = {finding.level for finding in findings}
    return "down" if "fail" in levels else "degraded" if "warn" in levels else "healthy"


# --- how it runs


def workers_live(facts: Facts) -> Iterator[Finding]:
    """Somebody reads Kite, somebody makes candles, and none of them hangs."""
    for role, does, command in (
        ("ingest", "reads Kite", "pkb ingest"),
        ("aggregate", "makes candles", "pkb aggregate"),
    ):
        workers = facts.alive(role)
        if not workers:
            yield Finding(role, "fail", f"no worker {does}", f"start `{command}`, or all with `pkb up`")
            continue
        late = [each.id for each in workers if (each.age_ms or 0) > BEAT_AGE_MS_MAX]
        if late:
            yield Finding(
                role, "warn", f"{_some(late)} did not beat for {BEAT_AGE_MS_MAX / 1000:g} s",
                "look whether it hangs or its host is overloaded; kill it and it is replaced",
            )  # fmt: skip
        else:
            yield Finding(role, "ok", f"{len(workers)} running")


def shards_owned(facts: Facts) -> Iterator[Finding]:
    """Every shard has an aggregator."""
    free = [shard.number for shard in facts.shards if shard.owner is None]
    if not free:
        yield Finding("shards", "ok", f"all {len(facts.shards)} have an aggregator")
    elif facts.alive("aggregate"):
        yield Finding(
            "shards", "warn", f"no aggregator has shard {_some(free)}",
            "wait for PKB_LEASE_SECONDS; then look at the aggregators' logs for `shard_quarantined`",
        )  # fmt: skip


def feeds_owned(facts: Facts) -> Iterator[Finding]:
    """Every feed has a reader, and it is connected to Kite."""
    readers = facts.alive("ingest")
    if not readers:
        return
    free = [number for number, owner in enumerate(facts.feeds) if owner is None]
    if free:
        yield Finding(
            "feeds", "warn", f"no ingest worker reads feed {_some(free)}",
            "wait for PKB_LEASE_SECONDS; then look at the ingest workers' logs",
        )  # fmt: skip
    offline = [each.id for each in readers if each.number("connected") < len(each.numbers("feeds"))]
    if offline:
        yield Finding(
            "feeds", "warn", f"{_some(offline)} is not connected to Kite on every feed",
            "look at its log: 403 is a dead session (`pkb login`), 429 too many connections of one api key",
        )  # fmt: skip
    if not free and not offline:
        yield Finding("feeds", "ok", f"all {len(facts.feeds)} are read")


FEED_TROUBLES = {  # the feed doctor's states (`feed_doctor.py`) that an operator should know of
    "mute": ("gets heartbeats but no ticks in market hours; it reconnects", "if it lasts, ask Kite's status"),
    "partly_mute": (
        "gets no ticks of some lively instruments; it subscribes them anew", "if it lasts, ask Kite's status"
    ),
    "expired": ("is refused by Kite (403): the session is dead", "run `pkb login` if no worker can log in"),
    "rate_limited": ("is told to wait by Kite (429)", "look who else uses this api key: 3 connections each"),
}  # fmt: skip


def feeds_well(facts: Facts) -> Iterator[Finding]:
    """No feed is mute, refused or told to wait, as its watchdog judges it."""
    for worker in facts.alive("ingest"):
        pairs = [pair.partition(":")[::2] for pair in worker.fields.get("feed_state", "").split(",")]
        for state, (what, hint) in FEED_TROUBLES.items():
            if numbers := [number for number, each in pairs if each == state]:
                yield Finding("feeds", "warn", f"feed {_some(numbers)} {what}", hint)


def keeps_up(facts: Facts) -> Iterator[Finding]:
    """No entry waits long for its aggregator."""
    late = [shard for shard in facts.shards if shard.lag_ms > LAG_MS_MAX]
    worst = max((shard.lag_ms for shard in facts.shards), default=0.0)
    entries = sum(shard.lag_entries for shard in facts.shards)
    if late:
        yield Finding(
            "lag", "warn",
            f"shard {_some([each.number for each in late])} is behind: {entries:,} entries wait, "
            f"the oldest for {worst / 1000:,.0f} s",
            "start more aggregators (`pkb up --aggregators N`), or a faster machine",
        )  # fmt: skip
    else:
        yield Finding("lag", "ok", f"{entries:,} entries wait, the oldest for {worst:,.0f} ms")


def nothing_lost(facts: Facts) -> Iterator[Finding]:
    """No tick was given up by a worker that runs now."""
    lost = False
    for name, what, hint in (
        ("dropped_at_cap", "entries were cut at the hard cap of a stream before they were applied",
         "keep aggregators running, or raise PKB_STREAM_MAX_ENTRIES"),
        ("frames_lost", "frames were lost while Redis was away: the spool was full, or damaged",
         "give PKB_SPOOL_DIR more room, or another disk"),
        ("malformed_repairs", "entries of the repair streams could not be applied",
         "look for `malformed_repair` in the aggregators' logs"),
        ("jobs_refused", "repairs were not asked for, because too many wait for RQ",
         "bring PKB_RQ_REDIS_URL back"),
    ):  # fmt: skip
        count = sum(worker.number(name) for worker in facts.workers)
        if count:
            lost = True
            yield Finding(
                "losses", "warn", f"{count:,.0f} {what}", f"{hint}; replay or backfill what is missing"
            )
    if not lost:
        yield Finding("losses", "ok", "no tick was given up")


def redis_takes_writes(facts: Facts) -> Iterator[Finding]:
    """Redis has memory and a disk that works."""
    trouble = False
    for server in facts.servers:
        where = f"Redis {server.name}".strip()
        if not server.saves:
            trouble = True
            yield Finding(
                "redis", "fail", f"{where} cannot save to its disk, and refuses writes",
                "make room there or mend its permissions; its log has the cause",
            )  # fmt: skip
        if server.limit_bytes and server.used_bytes > MEMORY_PART_MAX * server.limit_bytes:
            trouble = True
            part = server.used_bytes / server.limit_bytes
            yield Finding(
                "memory", "warn", f"{where} has used {part:.0%} of its maxmemory",
                "raise it, or keep fewer rows",
            )  # fmt: skip
    if facts.servers and not trouble:
        used = sum(server.used_bytes for server in facts.servers)
        yield Finding("memory", "ok", f"{used / 1e6:,.0f} MB used")


def moves(earlier: Facts) -> Rule:
    """A rule: shards where entries wait go on between two pictures."""

    def rule(facts: Facts) -> Iterator[Finding]:
        before = {shard.number: shard for shard in earlier.shards}
        stuck = [
            shard.number
            for shard in facts.shards
            if shard.owner is not None
            and shard.lag_entries
            and (old := before.get(shard.number)) is not None
            and old.lag_entries
            and old.position == shard.position
        ]
        seconds = (facts.at_ms - earlier.at_ms) / 1000
        if stuck:
            yield Finding(
                "stuck", "fail",
                f"shard {_some(stuck)} did not move for {seconds:.1f} s while entries waited",
                "look at its aggregator's log, then restart it: another takes over",
            )  # fmt: skip
        else:
            yield Finding("stuck", "ok", "every shard with waiting entries moves")

    return rule


STATUS: tuple[Rule, ...] = (
    workers_live, shards_owned, feeds_owned, feeds_well, keeps_up, nothing_lost, redis_takes_writes
)  # fmt: skip


# --- how it is set up


def persistent(facts: Facts) -> Iterator[Finding]:
    """A restart of Redis loses nothing, and Redis throws nothing away."""
    without = [server for server in facts.servers if not server.aof]
    if without:
        yield Finding(
            "persistence", "warn", "appendonly is off: a restart of Redis loses ticks and candles",
            "CONFIG SET appendonly yes, and set it in redis.conf",
        )  # fmt: skip
    elif facts.servers:
        yield Finding("persistence", "ok", "appendonly is on")
    evicting = {server.eviction for server in facts.servers} - {"noeviction", ""}
    if evicting:
        yield Finding(
            "eviction", "fail" if any(each.startswith("allkeys") for each in evicting) else "warn",
            f"maxmemory-policy is {_some(sorted(evicting))}: Redis may throw away "
            "keys of ours when memory is short",
            "CONFIG SET maxmemory-policy noeviction, and set it in redis.conf",
        )  # fmt: skip
    elif facts.servers:
        yield Finding("eviction", "ok", "maxmemory-policy is noeviction")


def forks_seldom(facts: Facts) -> Iterator[Finding]:
    """Redis seldom forks to write its files anew: each time costs the ticks a core for seconds."""
    often = {
        server.up_seconds / server.forks
        for server in facts.servers
        if server.forks >= FORKS_MIN and server.up_seconds < server.forks * FORK_SECONDS_MIN
    }
    if often:
        yield Finding(
            "forks", "warn", f"Redis forks every {min(often):.0f} s to write its files anew, and ticks wait",
            'CONFIG SET save "" and auto-aof-rewrite-min-size 1gb, and set them in redis.conf',
        )  # fmt: skip
    elif facts.servers:
        yield Finding("forks", "ok", f"{sum(server.forks for server in facts.servers):,} since Redis started")


def clocks_agree(facts: Facts) -> Iterator[Finding]:
    """The clocks of this host, of the workers' hosts and of Redis's agree."""
    hint = "synchronise the clocks (chrony, systemd-timesyncd): candles close by them"
    skews = {"this host": facts.host_skew_ms}
    skews |= {worker.id: worker.skew_ms for worker in facts.workers if worker.skew_ms is not None}
    wrong = {name: skew for name, skew in skews.items() if abs(skew) > SKEW_MS_MAX}
    for name, skew in wrong.items():
        direction = "ahead of" if skew > 0 else "behind"
        yield Finding("clocks", "warn", f"{name} is {abs(skew) / 1000:.1f} s {direction} Redis's host", hint)
    if not wrong:
        worst = max(abs(skew) for skew in skews.values())
        yield Finding("clocks", "ok", f"{len(skews)} compared with Redis's, at most {worst:,.0f} ms off")


def one_list(facts: Facts) -> Iterator[Finding]:
    """All ingest workers share the same instruments and the same number of feeds."""
    lists: dict[str, list[str]] = {}
    for worker in facts.alive("ingest"):
        if name := worker.fields.get("list"):
            lists.setdefault(name, []).append(worker.id)
    if len(lists) > 1:
        few = min(lists.values(), key=len)
        yield Finding(
            "instruments", "fail", f"{_some(few)} has another instrument list than the other ingest workers",
            "give all the same PKB_INSTRUMENTS and instrument master, and restart them",
        )  # fmt: skip
    elif lists:
        total = max(worker.number("instruments_total") for worker in facts.alive("ingest"))
        yield Finding("instruments", "ok", f"{total:,.0f}, one list for all ingest workers")


def streams_small(entries_max: int) -> Rule:
    """A rule: the tick streams are far from their hard cap."""

    def rule(facts: Facts) -> Iterator[Finding]:
        big = [shard.number for shard in facts.shards if shard.entries > STREAM_PART_MAX * entries_max]
        longest = max((shard.entries for shard in facts.shards), default=0)
        size = sum(shard.stream_bytes or 0 for shard in facts.shards)
        what = f"{size / 1e6:,.1f} MB, the longest has {longest:,} of {entries_max:,} entries"
        if big:
            yield Finding(
                "streams", "warn", f"shard {_some(big)} nears its hard cap: {what}",
                "aggregators must keep up; a registered reader that fell behind also holds entries "
                "(XINFO GROUPS), and so does a long PKB_STREAM_RETENTION_SECONDS",
            )  # fmt: skip
        else:
            yield Finding("streams", "ok", what)

    return rule


def functions_there(missing: Sequence[str]) -> Iterator[Finding]:
    """Our Functions are loaded on every master."""
    if missing:
        yield Finding(
            "functions", "warn", f"missing: {_some(missing)}", "an aggregator loads them as it starts"
        )
    else:
        yield Finding("functions", "ok", "loaded")


def meta_agrees(problem: PkbError | None, exists: bool) -> Iterator[Finding]:
    """The store was made with the settings of this host."""
    if problem is not None:
        level: Level = "fail" if isinstance(problem, MetaMismatch) else "warn"
        yield Finding("meta", level, problem.message, problem.hint)
    elif not exists:
        yield Finding("meta", "fail", "there is no store yet", "start `pkb up`, or check PKB_PREFIX")
    else:
        yield Finding("meta", "ok", "the store was made with these settings")


SETUP: tuple[Rule, ...] = (persistent, forks_seldom, clocks_agree, one_list)


def here(workers: Iterable[Worker], host: str) -> list[Finding]:
    """For a container's healthcheck: only whether the workers of this host beat."""
    ours = [each for each in workers if each.age_ms is not None and each.fields.get("host") == host]
    if not ours:
        return [Finding("here", "fail", f"no worker of {host} beats", "look at its log")]
    late = [each.id for each in ours if (each.age_ms or 0) > BEAT_AGE_MS_MAX]
    if late:
        return [Finding("here", "warn", f"{_some(late)} does not beat", "look at its log")]
    return [Finding("here", "ok", _some([each.id for each in ours]))]


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(map(str, names[:NAMES_MAX]))
    return shown + (f" and {len(names) - NAMES_MAX} more" if len(names) > NAMES_MAX else "")


FAILED_JOBS = f"rq:failed:{JOB_QUEUE}"  # RQ's own registry, a sorted set
MASTER_AGE_SECONDS_MAX = 4 * 86_400  # over a long weekend; contracts expire and tokens are given anew


def jobs_well(failed: int) -> Finding:
    """No job is listed as failed."""
    if failed:
        return Finding("jobs", "warn", f"{failed:,} have failed", "`pkb jobs --failed` lists them")
    return Finding("jobs", "ok", "none has failed")


def master_well(manifest: Manifest | None, now_s: float) -> Finding:
    """The instrument master is of these days."""
    if manifest is None:
        return Finding("master", "ok", "none was fetched; tokens and names given by hand do without")
    age_seconds = manifest.age_seconds(now_s)
    hint = "run `pkb instruments sync`, or keep `pkb cron` running: it does so each morning"
    if age_seconds is None:
        return Finding("master", "warn", "its time cannot be read", hint)
    what = f"{manifest.rows:,} instruments, fetched {age_seconds / 3600:,.0f} h ago"
    return Finding("master", "warn" if age_seconds > MASTER_AGE_SECONDS_MAX else "ok", what, hint)


SECOND_LOOK_SECONDS = 1.0  # a shard or feed on its way from one worker to another has no owner for less
COUNTERS = ("dropped_at_cap", "frames_lost", "fenced")  # of the heartbeats, shown where they are not 0


def look(client: redis.Redis, settings: Settings) -> tuple[Facts, list[Finding]]:
    """A picture and what the rules say of it; of two pictures where the first shows trouble."""
    place = describe(settings, for_reading=True)
    facts = gather(client, settings.keys, place)
    findings = judge(facts, STATUS)
    if health_of(findings) != "healthy":
        time.sleep(SECOND_LOOK_SECONDS)
        earlier, facts = facts, gather(client, settings.keys, place)
        findings = judge(facts, (*STATUS, moves(earlier)))
    return facts, findings


def as_dict(facts: Facts | None, findings: Sequence[Finding]) -> dict[str, Any]:
    """What `--json` prints."""
    found: dict[str, Any] = {"health": health_of(findings)}
    if facts is not None:
        at = datetime.fromtimestamp(facts.at_ms / 1000, IST)
        found |= {
            "at": at.isoformat(timespec="milliseconds" if at.microsecond else "seconds"),
            "redis": {
                "place": facts.place,
                "servers": [
                    {"name": each.name, "version": each.version, "used_bytes": each.used_bytes,
                     "limit_bytes": each.limit_bytes, "appendonly": each.aof, "saves": each.saves}
                    for each in facts.servers
                ],
            },
            "workers": [
                {"id": each.id, "role": each.role, "age_ms": each.age_ms, "skew_ms": each.skew_ms,
                 **{name: _value(name, text) for name, text in each.fields.items() if name != "role"}}
                for each in facts.workers
            ],
            "shards": [
                {"shard": each.number, "owner": each.owner, "entries": each.entries,
                 "position": each.position, "lag_entries": each.lag_entries, "lag_ms": each.lag_ms}
                for each in facts.shards
            ],
            "feeds": [{"feed": number, "owner": owner} for number, owner in enumerate(facts.feeds)],
            "counters": counters(facts),
        }  # fmt: skip
    return {**found, "findings": [finding._asdict() for finding in findings]}


def counters(facts: Facts) -> dict[str, int]:
    """What the living workers gave up or were refused, added up."""
    return {name: int(sum(worker.number(name) for worker in facts.workers)) for name in COUNTERS}


def _value(name: str, text: str) -> Any:
    """A field of a heartbeat as JSON: numbers as numbers, lists as lists, whatever their length."""
    if name in ("shards", "feeds"):
        return [int(part) for part in text.split(",") if part.isdecimal()]
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


INSTRUMENTS_AT_ONCE = 500


@dataclass
class VolumeCheck:
    """How many instruments were added up, and those that did not: token → (sum, last − baseline).

    `cut`: the list is full, so that rows of today may be gone. `odd`: keys that somebody else wrote to.
    """

    checked: int = 0
    wrong: dict[int, tuple[float, float]] = field(default_factory=dict)
    cut: int = 0
    odd: int = 0


def widest(intervals: Sequence[Interval]) -> Interval:
    """The interval whose list reaches back furthest, `day` aside: its rows are the most to add up."""
    return max(intervals, key=lambda each: each.seconds * each.keep if each.name != DAY else 0)


def check_volumes(
    client: redis.Redis, keys: Keys, interval: str = "1m", *, keep: int | None = None
) -> VolumeCheck:
    """Add up every instrument of the store, also while aggregators work: a commit is one step, as is a look.

    `keep` is how many completed rows of the interval the lists hold at most.
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
                except (ValueError, TypeError, IndexError):  # not JSON, not our rows, WRONGTYPE
                    result.odd += 1
    return result


def _add_up(
    result: VolumeCheck, token: int, hot: bytes, rows: list[bytes], current: bytes | None, *, keep: int | None
) -> None:
    _, _, _, day_s, seen, baseline, *_ = msgspec.json.decode(hot)
    if seen is None:
        return  # an index has no volume
    texts = [*rows, *([current] if current else [])]
    of_today = [row for row in map(msgspec.json.decode, texts) if row[0] >= day_s]
    if keep is not None and keep <= len(rows) == len(of_today) - bool(current):
        result.cut += 1
        return
    total = round(sum(row[5] for row in of_today), 8)
    result.checked += 1
    if abs(total - (seen - baseline)) > 1e-6:
        result.wrong[token] = total, seen - baseline
