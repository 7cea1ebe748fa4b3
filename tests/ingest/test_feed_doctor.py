"""The feed doctor: each trouble is told from the others, and treated with measure."""

from __future__ import annotations

from typing import Any

import pytest

from pkbrokers_redis.ingest.watchdog import MUTE_MS_MAX, REMEDIES_MAX, FeedDoctor, Signs, Verdict

S = 1000.0
INFY = 408065


def signs(**changes: Any) -> Signs:
    """A healthy feed at 100 s: connected since 10 s, open since 0, ticked just now."""
    found = Signs("connected", 10 * S, 100 * S, 5 * S, 0.0, 50, 20)
    return found._replace(**changes)


def seen(doctor: FeedDoctor, at_s: float, **changes: Any) -> tuple[str, str]:
    verdict = doctor.look(signs(**changes), at_s * S)
    return verdict.state, verdict.action


# --- one look


@pytest.mark.parametrize(
    ("changes", "state", "action"),
    [
        ({}, "ok", "none"),
        ({"opened_ms": None}, "quiet", "none"),
        ({"opened_ms": None, "ticked_ms": 0.0}, "quiet", "none"),
        ({"instruments": 0, "ticked_ms": 0.0}, "quiet", "none"),
        ({"socket": "forbidden"}, "expired", "renew"),
        ({"socket": "forbidden", "opened_ms": None}, "expired", "renew"),
        ({"socket": "throttled"}, "rate_limited", "wait"),
        ({"socket": "waiting"}, "away", "none"),
        ({"socket": "connecting", "opened_ms": None}, "quiet", "none"),
        ({"ticked_ms": 84 * S}, "mute", "reconnect"),
        ({"ticked_ms": 86 * S}, "ok", "none"),
        ({"ticked_ms": 50 * S, "mute_ms": 60 * S}, "ok", "none"),  # its usual silence
        ({"ticked_ms": 50 * S, "canaries": 0}, "ok", "none"),  # we do not know its way yet
        ({"ticked_ms": 30 * S, "canaries": 0}, "mute", "reconnect"),
        ({"ticked_ms": 0.0, "opened_ms": 90 * S}, "ok", "none"),  # the market opened ten seconds ago
        ({"ticked_ms": 0.0, "connected_ms": 90 * S}, "ok", "none"),
        ({"silent": (INFY,)}, "partly_mute", "resubscribe"),
    ],
)
def test_signs_and_what_they_mean(changes: dict[str, Any], state: str, action: str) -> None:
    assert seen(FeedDoctor(), 100, **changes) == (state, action)


def test_at_sixty_times_the_speed_no_limit_is_below_two_seconds_of_the_machine() -> None:
    assert seen(FeedDoctor(speed=60), 219, ticked_ms=100 * S)[0] == "ok"
    assert seen(FeedDoctor(speed=60), 221, ticked_ms=100 * S)[0] == "mute"


# --- a feed that stays mute


def test_a_feed_that_stays_mute_is_reconnected_ever_more_seldom() -> None:
    doctor, now_s, connected_s = FeedDoctor(), 0.0, 0.0
    gaps: list[float] = []
    for _ in range(12):
        while seen(doctor, now_s, ticked_ms=0.0, connected_ms=connected_s * S) != ("mute", "reconnect"):
            now_s += 1
        gaps.append(now_s - connected_s)
        connected_s = now_s
    assert gaps[:4] == [16, 31, 61, 121]
    assert gaps[-1] == MUTE_MS_MAX / S + 1


def test_the_last_tick_sent_again_mends_nothing() -> None:
    doctor = FeedDoctor()
    assert seen(doctor, 120) == ("mute", "reconnect")
    assert seen(doctor, 121, socket="connecting") == ("mute", "none")
    # Connected at 122, and Kite sends each instrument's last tick: it may be hours old.
    assert seen(doctor, 124, connected_ms=122 * S, ticked_ms=123 * S) == ("mute", "none")
    assert seen(doctor, 150, connected_ms=122 * S, ticked_ms=123 * S) == ("mute", "none")
    assert seen(doctor, 154, connected_ms=122 * S, ticked_ms=123 * S) == ("mute", "reconnect")
    assert seen(doctor, 170, connected_ms=155 * S, ticked_ms=169 * S) == ("ok", "none")
    assert seen(doctor, 186, connected_ms=155 * S, ticked_ms=169 * S) == (
        "mute",
        "reconnect",
    )  # from the start


def test_the_market_closes_over_a_mute_feed() -> None:
    doctor = FeedDoctor()
    assert seen(doctor, 120) == ("mute", "reconnect")
    assert seen(doctor, 130, opened_ms=None) == ("quiet", "none")
    assert seen(doctor, 140, opened_ms=139 * S) == ("ok", "none")


# --- some instruments are silent


def test_silent_canaries_are_subscribed_anew_and_then_the_connection_is() -> None:
    doctor = FeedDoctor()
    silent = tuple(range(1, 16))
    first = doctor.look(signs(silent=silent), 100 * S)
    assert (first.state, first.action, first.tokens) == ("partly_mute", "resubscribe", silent)
    assert "15 of 20" in first.why
    assert seen(doctor, 110, ticked_ms=110 * S, silent=silent) == ("partly_mute", "none")
    assert seen(doctor, 116, ticked_ms=116 * S, silent=silent) == ("partly_mute", "reconnect")
    assert seen(doctor, 120, ticked_ms=120 * S, silent=silent) == ("partly_mute", "none")
    assert seen(doctor, 122, ticked_ms=122 * S) == ("ok", "none")


def test_a_single_halted_stock_costs_no_connection_and_is_given_up() -> None:
    doctor, actions = FeedDoctor(), []
    for n in range(300):
        verdict = doctor.look(signs(silent=(INFY,), ticked_ms=(100 + n) * S), (100 + n) * S)
        actions.append(verdict)
    assert [each.action for each in actions if each.action != "none"] == ["resubscribe"] * REMEDIES_MAX
    assert actions[-1] == Verdict("ok", "none", "1 lively instruments are halted")


def test_a_resent_tick_does_not_hide_that_it_is_still_silent() -> None:
    doctor = FeedDoctor()
    assert seen(doctor, 100, silent=(1, 2), canaries=2) == ("partly_mute", "resubscribe")
    assert seen(doctor, 105, ticked_ms=105 * S, canaries=2) == ("ok", "none")  # its last tick came again
    assert seen(doctor, 120, ticked_ms=120 * S, silent=(1, 2), canaries=2) == ("partly_mute", "reconnect")


def test_who_ticked_for_a_minute_after_a_remedy_is_well() -> None:
    doctor = FeedDoctor()
    assert seen(doctor, 100, silent=(1, 2), canaries=2) == ("partly_mute", "resubscribe")
    assert seen(doctor, 161, ticked_ms=161 * S, canaries=2) == ("ok", "none")
    assert seen(doctor, 300, ticked_ms=300 * S, silent=(1, 2), canaries=2) == ("partly_mute", "resubscribe")
