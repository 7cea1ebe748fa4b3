"""What status and doctor say of the market, from the heartbeats of constructed workers."""

from __future__ import annotations

from dataclasses import replace

from pkbrokers_redis.runtime.health import STATUS_CHECKS, health_of, run_checks
from tests.runtime.test_health import AGGREGATE, INGEST, cluster, worker


def said(check: str, *workers: object) -> list[tuple[str, str]]:
    """Level and message of a check's findings for a healthy pipeline with these workers besides."""
    findings = run_checks(cluster(workers=[AGGREGATE, INGEST, *workers]), STATUS_CHECKS)
    return [(each.level, each.message) for each in findings if each.check == check]


def test_volumes_that_the_exchange_took_back_are_shown_and_are_no_problem() -> None:
    assert said("corrections") == []
    mine = replace(AGGREGATE, fields=AGGREGATE.fields | {"volumes_taken_back": "2"})
    found = run_checks(
        cluster(workers=[mine, INGEST, worker("aggregate", volumes_taken_back=1)]), STATUS_CHECKS
    )
    assert health_of(found) == "healthy"
    assert [each.message for each in found if each.check == "corrections"] == [
        "3 times a lower volume replaced a wrong one; sums still add up"
    ]
