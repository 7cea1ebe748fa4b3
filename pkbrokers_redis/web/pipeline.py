"""Routes that show the pipeline: its health, Prometheus metrics, and the page."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter as Counted
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import Metric

from pkbrokers_redis.runtime.cluster_state import ClusterState, Finding, Shard, Worker
from pkbrokers_redis.runtime.health import counters, health_document, health_of
from pkbrokers_redis.web.executor import Route, Services
from pkbrokers_redis.web.http import json_response

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LEVELS = ("ok", "warn", "fail")
HEALTH_WORDS = ("healthy", "degraded", "down")
PAGE_FOLDER = Path(__file__).resolve().parent / "pages"
Labels = TypeVar("Labels", bound=tuple[str, ...])
WORKER = ("role", "worker")  # labels
SHARD_GAUGES: tuple[tuple[str, str, Callable[[Shard], float]], ...] = (
    ("shard_lag_seconds", "age of the oldest waiting entry", lambda shard: shard.lag_ms / 1000),
    ("shard_lag_entries", "entries that wait for their aggregator", lambda shard: shard.lag_entries),
    ("shard_entries", "entries in the tick stream", lambda shard: shard.entries),
    ("shard_owned", "1 when an aggregator owns it", lambda shard: shard.owner is not None),
)


async def healthz(_: web.Request, services: Services) -> web.Response:
    """Answer 200 while candles are made (late or in part too), 503 when none are. One word, no details."""
    health = health_of((await services.health())[1])
    return json_response({"health": health}, 503 if health == "down" else 200)


async def status(_: web.Request, services: Services) -> web.Response:
    """Answer what `pkb status --json` prints; 503 while Redis is unavailable."""
    cluster, findings = await services.health()
    return json_response(health_document(cluster, findings), 503 if cluster is None else 200)


async def page(_: web.Request, services: Services) -> web.Response:
    """Answer the page. It holds no data: its script calls the API with the token of its own URL."""
    html, policy = built_page()
    headers = {"Content-Security-Policy": policy}
    return web.Response(body=html, content_type="text/html", charset="utf-8", headers=headers)


@cache
def built_page() -> tuple[bytes, str]:
    """Return the page with its style and script, and a policy that allows these two by hash."""
    html, style, script = (
        (PAGE_FOLDER / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; style-src '{_csp_hash(style)}'; script-src '{_csp_hash(script)}'"
    )
    return html.replace("/*style*/", style).replace("/*script*/", script).encode(), policy


def _csp_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


async def metrics(_: web.Request, services: Services) -> web.Response:
    """Answer Prometheus' text format 0.0.4; an unavailable Redis is `pkb_redis_up 0`."""
    cluster, findings = await services.health()
    families = [*_pipeline_metrics(cluster, findings), *_server_metrics(services)]
    registry: Any = SimpleNamespace(collect=lambda: families)  # all that the library asks of it
    return web.Response(body=generate_latest(registry), headers={"Content-Type": METRICS_TYPE})


def _pipeline_metrics(cluster: ClusterState | None, findings: Sequence[Finding]) -> Iterator[Metric]:
    yield _metric(Gauge, "redis_up", "1 when the store answers", {(): cluster is not None})
    words = {(word,): word == health_of(findings) for word in HEALTH_WORDS}
    yield _metric(Gauge, "health", "1 for the word that holds", words, "health")
    if cluster is None:
        return
    levels: dict[tuple[str], float] = {}
    for finding in findings:  # the worst of a check that found several things
        levels[finding.check,] = max(LEVELS.index(finding.level), levels.get((finding.check,), 0))
    yield _metric(Gauge, "check", "0 ok, 1 warn, 2 fail: the checks of `pkb status`", levels, "check")
    alive = _named(cluster.workers)
    ages = {names: (worker.age_ms or 0) / 1000 for names, worker in alive.items()}
    yield _metric(Gauge, "worker_beat_age_seconds", "since a worker's heartbeat", ages, *WORKER)
    totals = {names: worker.number("ticks_total") for names, worker in alive.items()}
    yield _metric(Counter, "ticks", "ticks a worker took in since it started", totals, *WORKER)
    rates = {names: worker.number("ticks_per_second") for names, worker in alive.items()}
    yield _metric(Gauge, "ticks_per_second", "between a worker's last two heartbeats", rates, *WORKER)
    lost = {(what,): count for what, count in counters(cluster).items()}
    yield _metric(Counter, "lost", "what the living workers lost or were refused", lost, "what")
    shards = {(str(shard.number),): shard for shard in cluster.shards}
    for name, does, value_of in SHARD_GAUGES:
        samples = {number: value_of(shard) for number, shard in shards.items()}
        yield _metric(Gauge, name, does, samples, "shard")
    used = {(server.name,): server.used_bytes for server in cluster.servers}
    yield _metric(Gauge, "redis_memory_used_bytes", "used_memory", used, "server")
    limits = {(server.name,): server.limit_bytes for server in cluster.servers}
    yield _metric(Gauge, "redis_memory_limit_bytes", "maxmemory, 0 for none", limits, "server")


def _named(workers: Sequence[Worker]) -> dict[tuple[str, str], Worker]:
    """Return the living workers by role and a name that a restart keeps: host, and a number from 1 on it."""
    named: dict[tuple[str, str], Worker] = {}
    counted: Counted[tuple[str, str]] = Counted()
    for each in sorted(workers, key=lambda worker: worker.fields.get("started_at", "")):
        if each.age_ms is not None:
            host = each.fields.get("host", "")
            counted[each.role, host] += 1
            named[each.role, f"{host}-{counted[each.role, host]}"] = each
    return named


def _server_metrics(services: Services) -> Iterator[Metric]:
    """Return this web server's own counters."""
    for name, count in services.counts.items():
        yield _metric(Counter, f"web_{name}", f"{name.replace('_', ' ')} since it started", {(): count})
    yield _metric(Gauge, "web_streams", "followers of /api/closed now", {(): len(services.streams)})


def _metric(
    kind: type[Gauge | Counter],
    name: str,
    does: str,
    samples: Mapping[Labels, float],
    *labels: str,
) -> Metric:
    """Return a metric with its samples: label values → value."""
    family = kind(f"pkb_{name}", does, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, float(value))
    return family


ROUTES = [
    Route("/", page, "/"),
    Route("/healthz", healthz, "/healthz", is_open=True),
    Route("/api/status", status, "/api/status"),
    Route("/metrics", metrics, "/metrics"),
]
