"""The judges of outages can condemn: each wrong told, untold, shown or not shown is found."""

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
    HEARD_MS,
    THRESHOLD_MS,
    MarketMemory,
    Notice,
    Said,
    Span,
    losses,
    notices_of,
    unfounded,
    untold,
    wrong_flags,
)

TOKEN, OTHER = 408065, 738561
MINUTE_S = 1_785_728_820
BEGIN_MS = MINUTE_S * 1000
SESSIONS = load_sessions("always", "Asia/Kolkata")
INTERVALS = parse_intervals("1m,3m,day")
LONG_MS = THRESHOLD_MS + GRACE_MS


def told(from_ms: int, to_ms: int, *tokens: int) -> Notice:
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


def test_a_loss_lasts_from_the_first_lost_step_to_the_next_frame() -> None:
    steps, ticks = steps_and_ticks(set(range(10)) - {4, 5, 6})
    assert losses(steps, ticks) == [span(4_000, 7_010)]


def test_before_the_first_frame_and_after_the_last_nothing_counts_as_lost() -> None:
    steps, ticks = steps_and_ticks({3, 4, 5})
    assert losses(steps, ticks) == []
    assert losses(steps, []) == []


def test_what_a_new_subscription_shows_again_shortens_no_loss() -> None:
    steps, ticks = steps_and_ticks(set(range(10)) - {4, 5, 6})
    at_ms, tick = ticks[4]
    again = [*tick[:3], 106, *tick[4:]]  # step 6's, in the first frame after it
    assert losses(steps, [*ticks, (at_ms, again)]) == [span(4_000, 7_010)]


def test_a_market_remembers_what_traded_and_no_picture_without_news() -> None:
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


# -- lost → told -----------------------------------------------------------------------------------


def test_a_long_loss_that_nobody_told_is_found() -> None:
    assert untold([span(0, LONG_MS)], [], [TOKEN])
    assert not untold([span(0, LONG_MS - 1)], [], [TOKEN])
    assert not untold([span(0, LONG_MS)], [told(-50, LONG_MS)], [TOKEN])


def test_a_loss_must_be_told_of_every_instrument() -> None:
    assert untold([span(0, LONG_MS)], [told(0, LONG_MS)], [TOKEN, OTHER])
    assert not untold([span(0, LONG_MS)], [told(0, LONG_MS, TOKEN, OTHER)], [TOKEN, OTHER])


def test_a_loss_must_be_told_to_its_end_and_but_for_the_grace_from_its_begin() -> None:
    lost = [span(0, 10_000)]
    assert not untold(lost, [told(GRACE_MS, 10_000)], [TOKEN])
    assert untold(lost, [told(GRACE_MS + 1, 10_000)], [TOKEN])
    assert untold(lost, [told(0, 9_999)], [TOKEN])
    assert not untold(lost, [told(0, 6_000), told(5_000, 10_000)], [TOKEN])
    assert untold(lost, [told(0, 6_000), told(6_001, 10_000)], [TOKEN])


# -- told → silent ---------------------------------------------------------------------------------


def test_a_notice_while_frames_came_is_found() -> None:
    heard = frames(0, 0.4, 0.8, 1.2, 1.6, 2, 2.4, 2.8, 6, 6.4, 6.8, 7.2, 7.6, 8, 8.4, 8.8, 9.2)
    assert not unfounded([told(2_800, 6_000)], heard, [])
    assert not unfounded([told(2_800, 6_500)], heard, [])  # read by one that had hung, from 6 s on
    assert unfounded([told(6_000, 9_200)], heard, [])
    assert unfounded([told(6_000, 9_200)], heard, [span(5_000, 9_000)])
    assert unfounded([told(0, 2_800)], heard, [])


def test_a_notice_that_begins_too_early_is_found_unless_faults_explain_it() -> None:
    heard = frames(0, 1, 2, 3, 4, 5, 9, 10)
    early = told(5_000 - HEARD_MS - 1, 9_000)
    assert not unfounded([told(5_000 - HEARD_MS, 9_000)], heard, [])
    assert unfounded([early], heard, [])
    assert not unfounded([early], heard, [span(3_000, 6_000)])
    assert unfounded([told(-1, 9_000)], heard, [span(3_000, 6_000)])
    assert not unfounded([told(-1, 9_000)], heard, [span(3_000, 6_000), span(1_000, 2_000)])
    assert unfounded([early], heard, [span(6_000, 8_000)])  # it came after the feed was gone


# -- told = marked ---------------------------------------------------------------------------------


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
def test_a_minute_is_marked_exactly_where_a_notice_overlaps_it(
    from_ms: int, to_ms: int, marked: bool
) -> None:
    for flag in ("gap", ""):
        rows: Rows = {(TOKEN, "1m"): {MINUTE_S: row(MINUTE_S, *filter(None, [flag]))}}
        found = wrong_flags(rows, [told(from_ms, to_ms)], INTERVALS, SESSIONS)
        assert bool(found) == (bool(flag) != marked)


def test_a_longer_candle_is_marked_to_its_own_end_and_another_instruments_notice_is_none() -> None:
    start_s = MINUTE_S // 180 * 180
    rows: Rows = {(TOKEN, "3m"): {start_s: row(start_s)}}
    late = Notice(frozenset({TOKEN}), start_s * 1000 + 179_999, start_s * 1000 + 190_000)
    assert wrong_flags(rows, [late], INTERVALS, SESSIONS)
    assert not wrong_flags(rows, [late._replace(tokens=frozenset({OTHER}))], INTERVALS, SESSIONS)
    assert not wrong_flags(rows, [late._replace(from_ms=start_s * 1000 + 180_000)], INTERVALS, SESSIONS)


def test_partial_says_more_backfilled_as_much_and_the_day_never_gap() -> None:
    day_s = SESSIONS.day(SESSIONS.schedule_of(TOKEN), BEGIN_MS).anchor_ms // 1000
    notices = [told(0, 5_000)]
    for name, start_s, flag, is_wrong in (
        ("1m", MINUTE_S, "partial", False),
        ("1m", MINUTE_S, "backfilled", False),
        ("day", day_s, "", False),
        ("day", day_s, "gap", True),
    ):
        rows: Rows = {(TOKEN, name): {start_s: row(start_s, *filter(None, [flag]))}}
        assert bool(wrong_flags(rows, notices, INTERVALS, SESSIONS)) == is_wrong, (name, flag)


def test_only_the_outages_of_a_repair_stream_are_notices() -> None:
    gap = {b"kind": b"gap", b"from": b"5", b"to": b"9", b"tokens": b"[1,2]", b"why": b"not heard"}
    assert notices_of([gap, {b"kind": b"rows"}]) == [Notice(frozenset({1, 2}), 5, 9)]
