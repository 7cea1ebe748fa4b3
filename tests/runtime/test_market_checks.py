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


def test_trading_outside_the_calendar_is_degraded_and_named() -> None:
    mine = worker("ingest", closed_trading=7, closed_trading_names="NSE:B,NSE:A,NSE:C,NSE:D,NSE:E")
    assert said("calendar", mine) == [
        (
            "warn",
            "7 instruments trade while the calendar says closed: NSE:A, NSE:B, NSE:C, NSE:D, NSE:E",
        )
    ]
    assert said("calendar", worker("ingest", closed_trading=0, closed_trading_names="")) == []


def test_a_clock_off_the_exchange_is_shown_and_above_five_seconds_alarmed() -> None:
    assert said("exchange_clock") == []
    assert said("exchange_clock", worker("ingest", clock_offset_ms="")) == []
    assert said("exchange_clock", worker("ingest", clock_offset_ms=-320)) == [
        ("ok", "at most 0.3 s off the exchange's timestamps")
    ]
    assert said("exchange_clock", worker("ingest", clock_offset_ms=-180_200)) == [
        ("warn", "ingest-1's clock is 180.2 s behind the exchange")
    ]
    assert said("exchange_clock", worker("ingest", clock_offset_ms=5_100)) == [
        ("warn", "ingest-1's clock is 5.1 s ahead of the exchange")
    ]


def test_an_instrument_that_kite_dropped_degrades_and_is_named() -> None:
    assert said("halted", worker("ingest", halted=1, halted_names="NSE:INFY")) == [
        ("warn", "1 active instruments get no ticks, though subscribed again: NSE:INFY")
    ]


def test_a_previous_close_on_another_scale_is_named() -> None:
    assert said(
        "previous_close", worker("ingest", closes_differ=1, closes_differ_names="NSE:A 1000 → 200")
    ) == [("warn", "Kite's previous close of 1 instruments is not our last day's: NSE:A 1000 → 200")]
