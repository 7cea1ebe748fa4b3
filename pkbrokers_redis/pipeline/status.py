"""A look at a running pipeline, and what programs are told of it: `pkb status --json`, the web server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
import redis

from pkbrokers_redis.core.india import IST
from pkbrokers_redis.pipeline.facts import Facts, gather
from pkbrokers_redis.pipeline.health import STATUS, Finding, health_of, judge, moves
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import describe

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
