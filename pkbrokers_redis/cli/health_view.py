"""The pipeline's health for people: what `pkb status`, `pkb doctor` and `pkb top` print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pkbrokers_redis.runtime.cluster_state import Facts, Server, Worker
from pkbrokers_redis.runtime.health import Finding, Health, counters, health_of

STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
STYLE_OF: dict[Health, str] = {"healthy": "green", "degraded": "yellow", "down": "red"}
WIDTH_MIN = 110  # rather wrapped by the terminal than cut short


def view(facts: Facts, findings: Iterable[Finding]) -> Group:
    """The whole picture, for a terminal or a pipe."""
    findings = list(findings)
    health = health_of(findings)
    trouble = [finding for finding in findings if finding.level != "ok"]
    lost = " · ".join(f"{name} {count:,}" for name, count in counters(facts).items() if count)
    head = (health, f"bold {STYLE_OF[health]}")
    parts: list[Any] = [
        Text.assemble(head, f"  {facts.place}  ", (_servers(facts.servers), "dim")),
        *([_workers(facts)] if facts.workers else []),
        _shards(facts),
    ]
    if lost:
        parts.append(Text(lost, "yellow"))
    return Group(*parts, *(line(finding) for finding in trouble))


def line(finding: Finding) -> Text:
    """One finding: level, what was looked at, what was found, the mend."""
    hint = f": {finding.hint}" if finding.hint else ""
    return Text.assemble(
        (f"{finding.level:<5}", STYLES[finding.level]), f"{finding.check:<12} {finding.what}{hint}"
    )


def console() -> Console:
    """stdout, wide enough for the tables."""
    found = Console(highlight=False, soft_wrap=True)
    found.width = max(found.width, WIDTH_MIN)
    return found


def _servers(servers: Sequence[Server]) -> str:
    if not servers:
        return ""
    used, limit = sum(each.used_bytes for each in servers), sum(each.limit_bytes for each in servers)
    memory = f"{used / 1e6:,.0f} MB" + (f" of {limit / 1e6:,.0f}" if limit else "")
    aof = "appendonly" if all(each.aof for each in servers) else "no appendonly"
    masters = f"{len(servers)} masters, " if len(servers) > 1 else ""
    return f"{masters}{servers[0].version}, {memory}, {aof}"


def _workers(facts: Facts) -> Table:
    table = _table(("worker", False), ("beat", True), ("ticks/s", True), ("ticks", True), ("has", False))
    for worker in sorted(facts.workers, key=lambda each: (each.role != "ingest", each.role, each.id)):
        if worker.age_ms is None:
            table.add_row(worker.id, "gone", "", "", "", style="dim")
            continue
        table.add_row(
            worker.id,
            f"{worker.age_ms / 1000:.1f} s",
            f"{worker.number('ticks_per_second'):,.0f}",
            f"{worker.number('ticks_total'):,.0f}",
            _has(worker),
        )
    return table


def _has(worker: Worker) -> str:
    if worker.role == "ingest":
        feeds = worker.numbers("feeds")
        return (
            f"{worker.number('instruments'):,.0f} instruments in feeds {_list(feeds)}, "
            f"{worker.number('connected'):.0f} of {len(feeds)} connected"
        )
    if worker.role == "aggregate":
        return f"{worker.number('instruments'):,.0f} instruments in shards {_list(worker.numbers('shards'))}"
    return ""


def _shards(facts: Facts) -> Table:
    table = _table(
        ("shard", True), ("aggregator", False), ("waiting", True), ("lag ms", True), ("stream", True)
    )
    for shard in facts.shards:
        table.add_row(
            str(shard.number),
            shard.owner or "–",
            f"{shard.lag_entries:,}",
            f"{shard.lag_ms:,.0f}",
            f"{shard.entries:,}",
        )
    return table


def _table(*columns: tuple[str, bool]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, is_number in columns:
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    return table


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers)) or "none"
