"""Routes that show the pipeline: its health, Prometheus metrics, and the page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pkbrokers_redis.runtime.cluster_state import ClusterState
from pkbrokers_redis.runtime.health import Finding, counters, health_document, health_of
from pkbrokers_redis.web.executor import Route, Services
from pkbrokers_redis.web.http import json_response

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HEALTH_WORDS = ("healthy", "degraded", "down")
PAGE_FOLDER = Path(__file__).resolve().parent / "pages"
Sample = tuple[Sequence[str], float]  # label values, value


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
    health = health_of(findings)
    yield _gauge("redis_up", "1 when the store answers", (), [((), float(cluster is not None))])
    words = [((word,), float(word == health)) for word in HEALTH_WORDS]
    yield _gauge("health", "1 for the word that holds", ("health",), words)
    if cluster is not None:
        yield from _worker_metrics(cluster)
        yield from _store_metrics(cluster)


def _worker_metrics(cluster: ClusterState) -> Iterator[Metric]:
    alive = [((worker.role, worker.id), worker) for worker in cluster.workers if worker.age_ms is not None]
    labels = ("role", "worker")
    ages = [(names, (worker.age_ms or 0) / 1000) for names, worker in alive]
    yield _gauge("worker_beat_age_seconds", "since a worker's heartbeat", labels, ages)
    totals = [(names, worker.number("ticks_total")) for names, worker in alive]
    yield _counter("ticks", "ticks a worker took in since it started", labels, totals)
    rates = [(names, worker.number("ticks_per_second")) for names, worker in alive]
    yield _gauge("ticks_per_second", "between a worker's last two heartbeats", labels, rates)
    lost = [((what,), float(count)) for what, count in counters(cluster).items()]
    yield _counter("lost", "what the living workers lost or were refused", ("what",), lost)


def _store_metrics(cluster: ClusterState) -> Iterator[Metric]:
    shards = cluster.shards
    for name, does, values in (
        ("shard_lag_seconds", "age of the oldest waiting entry", [s.lag_ms / 1000 for s in shards]),
        ("shard_lag_entries", "entries that wait for their aggregator", [s.lag_entries for s in shards]),
        ("shard_entries", "entries in the tick stream", [s.entries for s in shards]),
        ("shard_owned", "1 when an aggregator owns it", [s.owner is not None for s in shards]),
    ):
        samples = [((str(shard.number),), float(value)) for shard, value in zip(shards, values, strict=True)]
        yield _gauge(name, does, ("shard",), samples)
    used = [((server.name,), float(server.used_bytes)) for server in cluster.servers]
    yield _gauge("redis_memory_used_bytes", "used_memory", ("server",), used)
    limits = [((server.name,), float(server.limit_bytes)) for server in cluster.servers]
    yield _gauge("redis_memory_limit_bytes", "maxmemory, 0 for none", ("server",), limits)


def _server_metrics(services: Services) -> Iterator[Metric]:
    """Return this web server's own counters."""
    for name, count in services.counts.items():
        yield _counter(f"web_{name}", f"{name.replace('_', ' ')} since it started", (), [((), float(count))])
    yield _gauge("web_streams", "followers of /api/closed now", (), [((), float(len(services.streams)))])


def _gauge(name: str, does: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    return _filled(GaugeMetricFamily(f"pkb_{name}", does, labels=labels), samples)


def _counter(name: str, does: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    return _filled(CounterMetricFamily(f"pkb_{name}", does, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Iterable[Sample]) -> Metric:
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


ROUTES = [
    Route("/", page, "/"),
    Route("/healthz", healthz, "/healthz", is_open=True),
    Route("/api/status", status, "/api/status"),
    Route("/metrics", metrics, "/metrics"),
]
