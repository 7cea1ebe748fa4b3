"""Check that the outage judges find every missing, wrong or unflagged report."""

from __future__ import annotations

import numpy as np
import pytest

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.model import parse_intervals
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from tests.chaos.oracle import Row, Rows
from tests.chaos.outages import (
    GRACE_MS,
    PROGRESS_MS,
    THRESHOLD_MS,
    MarketMemory,
    Notice,
    Said,
    Span,
    losses,
    notices_of,
    unfounded,
    unreported,
    wrong_flags,
)

TOKEN, OTHER = 408065, 738561
MINUTE_S = 1_785_728_820
BEGIN_MS = MINUTE_S * 1000
SESSIONS = load_sessions("always", "Asia/Kolkata")
INTERVALS = parse_intervals("1m,3m,day")
LONG_MS = THRESHOLD_MS + GRACE_MS


def notice(from_ms: int, to_ms: int, *tokens: int) -> Notice:
    return Notice(frozenset(tokens or (TOKEN,)), BEGIN_MS + from_ms, BEGIN_MS + to_ms)


def span(from_ms: int, to_ms: int) -> Span:
    return Span(BEGIN_MS + from_ms, BEGIN_MS + to_ms)


def row(start_s: int, *flag: str) -> Row:
    return [start_s, 100, 101, 99, 100.5, 50, None, 7, *flag]


def frames(*seconds: float) -> list[int]:
    return [BEGIN_MS + int(each * 1000) for each in seconds]


# -- what was lost ---------------------------------------------------------------------------------


def steps_and_ticks(arrive: set[int]) -> tuple[list[Said], list[tuple[int, Row]]]:
    """A step a second for ten seconds, each with one more traded; those of `arrive` come 10 ms later."""
    steps = [Said(BEGIN_MS + n * 1000, [(TOKEN, 100 + n)]) for n in range(10)]
    ticks = [
        (step.at_ms + 10, [TOKEN, 1.0, 1, step.volumes[0][1], None, None, None, None, step.at_ms])
        for n, step in enumerate(steps)
        if n in arrive
    ]
    return steps, ticks


def test_loss_lasts_from_first_lost_step_to_next_frame() -> None:
    steps, ticks = steps_and_ticks(set(range(10)) - {4, 5, 6})
    assert losses(steps, ticks) == [span(4_000, 7_010)]


def test_nothing_is_lost_before_the_first_and_after_the_last_frame() -> None:
    steps, ticks = steps_and_ticks({3, 4, 5})
    assert losses(steps, ticks) == []
    assert losses(steps, []) == []


def test_cached_tick_after_subscribe_does_not_shorten_a_loss() -> None:
    steps, ticks = steps_and_ticks(set(range(10)) - {4, 5, 6})
    at_ms, tick = ticks[4]
    again = [*tick[:3], 106, *tick[4:]]  # step 6's, in the first frame after it
    assert losses(steps, [*ticks, (at_ms, again)]) == [span(4_000, 7_010)]


def test_recorder_keeps_trades_and_ignores_repeated_packets() -> None:
    market = Market(universe(20), BEGIN_MS, seed=3)
    memory = MarketMemory(market)
    before = market.volume.copy()
    for n in range(1, 41):
        now_ms = BEGIN_MS + n * 50
        memory.note(market.step(now_ms), now_ms)
        memory.note(np.arange(20), now_ms)  # the same once more
    newest = {token: volume for step in memory.steps for token, volume in step.volumes}
    moved = np.flatnonzero(market.volume > before)
    assert newest == {int(market.tokens[i]): int(market.volume[i]) for i in moved}
    pairs = [pair for step in memory.steps for pair in step.volumes]
    assert len(pairs) == len(set(pairs)) > 0


# -- lost → reported -----------------------------------------------------------------------------------


def test_judge_finds_a_long_unreported_loss() -> None:
    assert unreported([span(0, LONG_MS)], [], [TOKEN])
    assert not unreported([span(0, LONG_MS - 1)], [], [TOKEN])
    assert not unreported([span(0, LONG_MS)], [notice(-50, LONG_MS)], [TOKEN])


def test_judge_requires_a_report_for_every_instrument() -> None:
    assert unreported([span(0, LONG_MS)], [notice(0, LONG_MS)], [TOKEN, OTHER])
    assert not unreported([span(0, LONG_MS)], [notice(0, LONG_MS, TOKEN, OTHER)], [TOKEN, OTHER])


def test_judge_requires_a_report_from_begin_plus_grace_to_end() -> None:
    lost = [span(0, 10_000)]
    assert not unreported(lost, [notice(GRACE_MS, 10_000)], [TOKEN])
    assert unreported(lost, [notice(GRACE_MS + 1, 10_000)], [TOKEN])
    assert unreported(lost, [notice(0, 9_999)], [TOKEN])
    assert not unreported(lost, [notice(0, 6_000), notice(5_000, 10_000)], [TOKEN])
    assert unreported(lost, [notice(0, 6_000), notice(6_001, 10_000)], [TOKEN])


# -- reported → silent ---------------------------------------------------------------------------------


def test_judge_finds_a_notice_while_frames_arrived() -> None:
    arrivals = frames(0, 0.4, 0.8, 1.2, 1.6, 2, 2.4, 2.8, 6, 6.4, 6.8, 7.2, 7.6, 8, 8.4, 8.8, 9.2)
    assert not unfounded([notice(2_800, 6_000)], arrivals, [])
    assert not unfounded([notice(2_800, 6_500)], arrivals, [])  # read by a process that had hung, from 6 s on
    assert unfounded([notice(6_000, 9_200)], arrivals, [])
    assert unfounded([notice(6_000, 9_200)], arrivals, [span(5_000, 9_000)])
    assert unfounded([notice(0, 2_800)], arrivals, [])


def test_judge_finds_an_early_notice_unless_faults_explain_it() -> None:
    arrivals = frames(0, 1, 2, 3, 4, 5, 9, 10)
    early = notice(5_000 - PROGRESS_MS - 1, 9_000)
    assert not unfounded([notice(5_000 - PROGRESS_MS, 9_000)], arrivals, [])
    assert unfounded([early], arrivals, [])
    assert not unfounded([early], arrivals, [span(3_000, 6_000)])
    assert unfounded([notice(-1, 9_000)], arrivals, [span(3_000, 6_000)])
    assert not unfounded([notice(-1, 9_000)], arrivals, [span(3_000, 6_000), span(1_000, 2_000)])
    assert unfounded([early], arrivals, [span(6_000, 8_000)])  # it came after the feed had ended


# -- reported = marked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("from_ms", "to_ms", "marked"),
    [
        (-5_000, 0, False),
        (-5_000, 1, True),
        (20_000, 23_000, True),
        (59_999, 65_000, True),
        (60_000, 65_000, False),
    ],
)
def test_minute_carries_gap_exactly_where_a_notice_overlaps(from_ms: int, to_ms: int, marked: bool) -> None:
    for flag in ("gap", ""):
        rows: Rows = {(TOKEN, "1m"): {MINUTE_S: row(MINUTE_S, *filter(None, [flag]))}}
        found = wrong_flags(rows, [notice(from_ms, to_ms)], INTERVALS, SESSIONS)
        assert bool(found) == (bool(flag) != marked)


def test_longer_candle_carries_gap_by_its_own_end_and_own_instrument() -> None:
    start_s = MINUTE_S // 180 * 180
    rows: Rows = {(TOKEN, "3m"): {start_s: row(start_s)}}
    late = Notice(frozenset({TOKEN}), start_s * 1000 + 179_999, start_s * 1000 + 190_000)
    assert wrong_flags(rows, [late], INTERVALS, SESSIONS)
    assert not wrong_flags(rows, [late._replace(tokens=frozenset({OTHER}))], INTERVALS, SESSIONS)
    assert not wrong_flags(rows, [late._replace(from_ms=start_s * 1000 + 180_000)], INTERVALS, SESSIONS)


def test_partial_overrides_gap_and_day_candle_never_carries_it() -> None:
    day_s = SESSIONS.day(SESSIONS.schedule_of(TOKEN), BEGIN_MS).anchor_ms // 1000
    notices = [notice(0, 5_000)]
    for name, start_s, flag, is_wrong in (
        ("1m", MINUTE_S, "partial", False),
        ("1m", MINUTE_S, "backfilled", False),
        ("day", day_s, "", False),
        ("day", day_s, "gap", True),
    ):
        rows: Rows = {(TOKEN, name): {start_s: row(start_s, *filter(None, [flag]))}}
        assert bool(wrong_flags(rows, notices, INTERVALS, SESSIONS)) == is_wrong, (name, flag)


def test_only_outage_entries_of_a_repair_stream_are_notices() -> None:
    gap = {b"kind": b"gap", b"from": b"5", b"to": b"9", b"tokens": b"[1,2]", b"why": b"no data"}
    assert notices_of([gap, {b"kind": b"rows"}]) == [Notice(frozenset({1, 2}), 5, 9)]
