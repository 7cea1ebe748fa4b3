"""Outages of a feed: from the last sign of life to the first tick after it, in session hours."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.ingest.connections import OUTAGES_MAX, FeedLiveness, Outage
from pkbrokers_redis.ingest.outages import GAP_MS_MAX, Notice, notices, open_span

SESSIONS = load_sessions("market")
INFY, NIFTY_FUT, USDINR, GOLD = 408065, 53179 << 8 | 2, 1201 << 8 | 3, 58839 << 8 | 7


def ms(text: str) -> int:
    """`2026-01-05 09:15:03` in India as epoch ms. 2026-01-05 is a Monday."""
    return int(datetime.fromisoformat(f"{text}+05:30").timestamp() * 1000)


def ticking(from_ms: int, seconds: int = 10, received_to_ms: float | None = None) -> FeedLiveness:
    """A feed that ticks every second."""
    life = FeedLiveness(received_to_ms)
    for n in range(seconds):
        life.note_tick(from_ms + n * 1000)
    return life


def outages(life: FeedLiveness) -> list[Outage]:
    found = []
    while outage := life.first_outage:
        found.append(outage)
        life.drop_outage()
    return found


# -- when a feed was received


def test_an_outage_ends_with_the_first_tick_and_began_with_the_last_sign_of_life() -> None:
    life = ticking(0, 10)
    life.note_heartbeat(10_500)
    life.note_loss()
    life.note_loss()  # each failed connect reports it
    life.note_heartbeat(15_000)  # connected, but not yet subscribed
    assert not life.first_outage and life.received_to_ms == 10_500
    life.note_tick(16_000)
    assert outages(life) == [Outage(10_500, 16_000)]
    life.note_tick(17_000)
    assert outages(life) == [] and life.received_to_ms == 17_000


def test_the_first_tick_ever_ends_no_outage() -> None:
    life = FeedLiveness()
    life.note_loss()
    life.note_tick(5_000)
    assert outages(life) == [] and life.received_to_ms == 5_000


def test_the_saved_progress_is_where_the_outage_begins() -> None:
    life = FeedLiveness(1_000)
    life.note_loss()
    life.note_heartbeat(3_000)
    assert life.received_to_ms == 1_000
    life.note_tick(4_000)
    assert outages(life) == [Outage(1_000, 4_000)]


def test_a_mute_socket_was_received_up_to_its_last_tick() -> None:
    life = ticking(1_000, 10)
    for n in range(12, 40, 2):
        life.note_heartbeat(n * 1000)
    assert life.received_to_ms == 10_000  # heartbeats prove a connection, not a subscription
    life.note_loss()
    life.note_tick(41_000)
    assert outages(life) == [Outage(10_000, 41_000)]


def test_heartbeats_of_an_illiquid_feed_count() -> None:
    life = FeedLiveness()
    for n in range(10):
        life.note_tick(n * 60_000)  # once a minute is its rhythm
    life.note_heartbeat(600_000)
    assert life.mute_ms > 100_000
    assert life.received_to_ms == 600_000


def test_the_usual_silence_fades() -> None:
    life = ticking(1, 2)
    life.note_tick(31_001)
    assert life.usual_ms == 30_000
    for n in range(180):
        life.note_tick(32_001 + n * 1000)
    assert life.usual_ms < 5_000


def test_a_frame_that_was_not_kept_counts_as_not_received() -> None:
    life = ticking(0, 10)
    for n in range(10, 15):
        life.note_tick(n * 1000, is_kept=False)
        life.note_heartbeat(n * 1000 + 1)
    assert life.received_to_ms == 9_000
    life.note_tick(15_000)
    assert outages(life) == [Outage(9_000, 15_000)]


def test_unreported_outages_are_bounded_and_cover_everything() -> None:
    life = ticking(0, 1)
    for n in range(OUTAGES_MAX + 5):
        life.note_tick(n * 10_000 + 1_000)
        life.note_loss()
    found = outages(life)
    assert len(found) == OUTAGES_MAX
    assert found[-1].to_ms == (OUTAGES_MAX + 4) * 10_000 + 1_000
    assert all(one.to_ms <= other.from_ms for one, other in pairwise(found))


@given(st.lists(st.tuples(st.integers(1, 20_000), st.sampled_from(["tick", "beat", "lost", "drop"]))))
def test_every_kept_tick_lies_outside_and_every_lost_one_inside_an_outage(
    events: list[tuple[int, str]],
) -> None:
    life, now = FeedLiveness(), 0
    kept: list[int] = []
    dropped: list[int] = []
    for wait_ms, event in [(1, "tick"), *events, (1, "tick")]:
        now += wait_ms
        if event in ("tick", "drop"):
            life.note_tick(now, is_kept=event == "tick")
            (kept if event == "tick" else dropped).append(now)
        elif event == "beat":
            life.note_heartbeat(now)
        else:
            life.note_loss()
        assert life.received_to_ms <= now
    found = outages(life)
    assert life.received_to_ms == now
    assert not any(each.from_ms < tick < each.to_ms for each in found for tick in kept)
    assert all(any(each.from_ms < tick < each.to_ms for each in found) for tick in dropped)


# -- session hours of an outage


@pytest.mark.parametrize(
    ("token", "from_", "to", "span"),
    [
        (INFY, "2026-01-05 10:00:00", "2026-01-05 10:00:30", ("2026-01-05 10:00:00", "2026-01-05 10:00:30")),
        (INFY, "2026-01-05 10:00:00", "2026-01-05 10:00:01", None),  # too short
        (INFY, "2026-01-05 08:50:00", "2026-01-05 09:15:30", ("2026-01-05 09:15:00", "2026-01-05 09:15:30")),
        (INFY, "2026-01-05 15:29:59", "2026-01-06 08:55:00", None),  # one second of market
        (INFY, "2026-01-05 15:20:00", "2026-01-05 23:00:00", ("2026-01-05 15:20:00", "2026-01-05 15:30:00")),
        (INFY, "2026-01-02 15:00:00", "2026-01-05 09:20:00", ("2026-01-02 15:00:00", "2026-01-05 09:20:00")),
        (INFY, "2026-01-26 10:00:00", "2026-01-26 14:00:00", None),  # Republic Day
        (GOLD, "2026-01-05 20:00:00", "2026-01-05 21:00:00", ("2026-01-05 20:00:00", "2026-01-05 21:00:00")),
        (
            USDINR,
            "2026-01-05 08:00:00",
            "2026-01-05 09:00:10",
            ("2026-01-05 09:00:00", "2026-01-05 09:00:10"),
        ),
    ],
)
def test_an_outage_is_cut_to_session_hours(
    token: int, from_: str, to: str, span: tuple[str, str] | None
) -> None:
    found = open_span(SESSIONS, SESSIONS.schedule_of(token), Outage(ms(from_), ms(to)))
    assert found == (span and (ms(span[0]), ms(span[1])))


def test_instruments_of_the_same_hours_share_a_notice() -> None:
    outage = Outage(ms("2026-01-05 15:00:00"), ms("2026-01-05 20:00:00"))
    assert notices(SESSIONS, [GOLD, INFY, USDINR, NIFTY_FUT], outage) == [
        Notice((INFY, NIFTY_FUT), outage.from_ms, ms("2026-01-05 15:30:00")),
        Notice((USDINR,), outage.from_ms, ms("2026-01-05 17:00:00")),
        Notice((GOLD,), outage.from_ms, outage.to_ms),
    ]


def test_no_notice_reaches_further_back_than_rows_are_kept() -> None:
    always = load_sessions("always")
    to_ms = ms("2026-01-05 10:00:00")
    assert open_span(always, 0, Outage(0, to_ms)) == (to_ms - GAP_MS_MAX, to_ms)


def test_a_clock_set_back_makes_no_notice() -> None:
    assert open_span(SESSIONS, 0, Outage(ms("2026-01-05 11:00:00"), ms("2026-01-05 10:00:00"))) is None
