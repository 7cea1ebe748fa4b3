"""Prometheus: the pipeline's figures as of now, read from Redis; a Redis that is away is `pkb_redis_up 0`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pkbrokers_redis.runtime.cluster_state import Facts
from pkbrokers_redis.runtime.health import Finding, counters, health_of
from pkbrokers_redis.web.registry import Route
from pkbrokers_redis.web.services import Services

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HEALTHS = ("healthy", "degraded", "down")
Sample = tuple[Sequence[str], float]  # label values, value


async def metrics(_: web.Request, services: Services) -> web.Response:
    """Text format 0.0.4."""
    facts, findings = await services.picture.get()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected([*of_pipeline(facts, findings), *of_us(services)]))
    return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE})


def of_pipeline(facts: Facts | None, findings: Sequence[Finding]) -> Iterator[Metric]:
    """What `pkb status` shows."""
    health = health_of(findings)
    yield _gauge("redis_up", "1 when the store answers", (), [((), float(facts is not None))])
    yield _gauge(
        "health", "1 for the word that holds", ("health",), [((h,), float(h == health)) for h in HEALTHS]
    )
    if facts is None:
        return
    alive = [each for each in facts.workers if each.age_ms is not None]
    of_worker = [((each.role, each.id), each) for each in alive]
    labels = ("role", "worker")
    yield _gauge(
        "worker_beat_age_seconds", "since a worker's heartbeat", labels,
        [(names, (each.age_ms or 0) / 1000) for names, each in of_worker],
    )  # fmt: skip
    yield _counter(
        "ticks", "ticks a worker took in since it started", labels,
        [(names, each.number("ticks_total")) for names, each in of_worker],
    )  # fmt: skip
    yield _gauge(
        "ticks_per_second", "between a worker's last two heartbeats", labels,
        [(names, each.number("ticks_per_second")) for names, each in of_worker],
    )  # fmt: skip
    yield _counter(
        "lost", "what the living workers gave up or were refused", ("what",),
        [((what,), float(count)) for what, count in counters(facts).items()],
    )  # fmt: skip
    for name, does, values in (
        ("shard_lag_seconds", "age of the oldest entry that waits", [s.lag_ms / 1000 for s in facts.shards]),
        (
            "shard_lag_entries",
            "entries that wait for their aggregator",
            [s.lag_entries for s in facts.shards],
        ),
        ("shard_entries", "entries in the tick stream", [s.entries for s in facts.shards]),
        ("shard_owned", "1 when an aggregator has it", [s.owner is not None for s in facts.shards]),
    ):
        shards = (str(shard.number) for shard in facts.shards)
        yield _gauge(name, does, ("shard",), [((s,), float(v)) for s, v in zip(shards, values, strict=True)])
    for name, does, sizes in (
        ("redis_memory_used_bytes", "used_memory", [each.used_bytes for each in facts.servers]),
        ("redis_memory_limit_bytes", "maxmemory, 0 for none", [each.limit_bytes for each in facts.servers]),
    ):
        servers = (each.name for each in facts.servers)
        yield _gauge(name, does, ("server",), [((s,), float(v)) for s, v in zip(servers, sizes, strict=True)])


def of_us(services: Services) -> Iterator[Metric]:
    """This web server's own."""
    for name, count in services.counts.items():
        yield _counter(f"web_{name}", f"{name.replace('_', ' ')} since it started", (), [((), float(count))])
    yield _gauge("web_streams", "followers of /api/closed now", (), [((), float(len(services.streams)))])


class _Collected:
    """What the registry asks for its metrics."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _gauge(name: str, does: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    return _filled(GaugeMetricFamily(f"pkb_{name}", does, labels=labels), samples)


def _counter(name: str, does: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    return _filled(CounterMetricFamily(f"pkb_{name}", does, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Iterable[Sample]) -> Metric:
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


ROUTES = [Route("/metrics", metrics, "/metrics")]
