"""The feed doctor: each trouble is told from the others, and treated with measure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from pkbrokers_redis.core.model import BATCH_WIDTH, TOKEN
from pkbrokers_redis.core.sessions import load_sessions
from pkbrokers_redis.pipeline.cut import Feed
from pkbrokers_redis.pipeline.feed_doctor import (
    MUTE_MS_MAX,
    REMEDIES_MAX,
    UNKNOWN_MUTE_MS_MIN,
    FeedDoctor,
    Signs,
    Verdict,
)
from pkbrokers_redis.pipeline.feed_monitor import FeedMonitor
from pkbrokers_redis.pipeline.gaps import FeedLife, Outage
from pkbrokers_redis.pipeline.readers import Reading
from pkbrokers_redis.pipeline.tick_activity import CANARY_TICKS_MIN, TickActivity

S = 1000.0
INFY, TCS, ITC, NIFTY, GOLD = 408065, 2953217, 424961, 256265, 58839 << 8 | 7
SESSIONS = load_sessions("market")


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


# --- the activity


def ticks(*tokens: int) -> Any:
    found = np.full((len(tokens), BATCH_WIDTH), np.nan)
    found[:, TOKEN] = tokens
    return found


def ms(text: str) -> int:
    return int(datetime.fromisoformat(f"2026-01-05 {text}+05:30").timestamp() * 1000)


OPEN = [float(ms("09:15:00"))] * len(SESSIONS.schedules)
START = ms("10:00:00")


def activity_of(*feeds: tuple[int, ...]) -> TickActivity:
    activity = TickActivity(SESSIONS.schedule_of)
    activity.follow([Feed(n, 0, tuple(sorted(tokens))) for n, tokens in enumerate(feeds)])
    return activity


def beat(activity: TickActivity, tokens: tuple[int, ...], from_s: int, to_s: int, every_s: int = 1) -> None:
    for n in range(from_s, to_s, every_s):
        activity.note(ticks(*tokens), START + n * 1000)


def test_lively_instruments_are_canaries_and_seldom_ones_are_not() -> None:
    activity = activity_of((INFY, TCS, ITC, NIFTY))
    for n in range(100):
        activity.note(ticks(INFY, NIFTY, *([ITC] if n % 10 == 0 else [])), START + n * 1000)
    silence = activity.silence(0, OPEN, START, 15_000, 60_000)
    assert silence.canaries == 2 and silence.silent == () and silence.illiquid == (TCS,)
    beat(activity, (INFY,), 100, 120)
    assert activity.silence(0, OPEN, START, 15_000, 60_000).silent == ((NIFTY, START + 99_000.0),)
    assert activity.silence(0, OPEN, START + 110_000, 15_000, 60_000).silent == ()  # just connected anew
    assert activity.silence(0, OPEN, START, 25_000, 60_000).silent == ()
    assert activity.silence(7, OPEN, START, 15_000, 60_000).canaries == 0


def test_an_instrument_is_no_canary_before_its_way_is_known() -> None:
    activity = activity_of((INFY, NIFTY))
    beat(activity, (INFY, NIFTY), 0, CANARY_TICKS_MIN - 1)
    assert activity.silence(0, OPEN, START, 15_000, 60_000).canaries == 0
    beat(activity, (INFY,), CANARY_TICKS_MIN - 1, 100)
    silence = activity.silence(0, OPEN, START, 15_000, 60_000)
    assert silence.canaries == 1 and silence.silent == () and silence.illiquid == (NIFTY,)


def test_when_nothing_comes_at_all_nobody_is_partly_silent() -> None:
    """The feed's own newest tick is the clock: a writer that waits for Redis alarms nobody."""
    activity = activity_of((INFY, NIFTY), (TCS,))
    beat(activity, (INFY, NIFTY), 0, 100)
    beat(activity, (TCS,), 100, 200)
    assert activity.silence(0, OPEN, START, 15_000, 60_000).silent == ()


def test_closed_markets_have_no_canaries_and_an_opening_is_no_silence() -> None:
    activity = activity_of((INFY, GOLD))
    beat(activity, (INFY, GOLD), 0, 100)
    beat(activity, (GOLD,), 100, 200)
    opened: list[float | None] = list(OPEN)
    opened[SESSIONS.schedule_of(INFY)] = None
    assert activity.silence(0, opened, START, 15_000, 60_000).silent == ()
    opened[SESSIONS.schedule_of(INFY)] = START + 195_000.0
    assert activity.silence(0, opened, START, 15_000, 60_000).silent == ()


def test_instruments_that_stay_keep_their_pulse_when_the_list_changes() -> None:
    activity = activity_of((INFY, TCS), (NIFTY,))
    beat(activity, (INFY, TCS, NIFTY, 999), 0, 50)
    activity.follow([Feed(0, 0, (TCS,)), Feed(1, 0, (NIFTY, ITC))])
    assert activity.last_ms(TCS) == activity.last_ms(NIFTY) == START + 49_000
    assert activity.last_ms(INFY) == activity.last_ms(ITC) == activity.last_ms(999) == 0
    assert activity.silence(0, OPEN, START, 15_000, 60_000).canaries == 1
    activity.follow([])
    activity.note(ticks(TCS), START)
    assert activity.last_ms(TCS) == 0 and activity.schedules(0) == frozenset()


# --- the shell


class Socket:
    """What the monitor uses of a socket."""

    def __init__(self) -> None:
        self.state = "connected"
        self.asked: list[tuple[str, Any]] = []

    def resubscribe(self, tokens: Any) -> None:
        self.asked.append(("resubscribe", tuple(tokens)))

    def reconnect(self, why: str) -> None:
        self.asked.append(("reconnect", why))


class Ward:
    """One feed under a monitor, at a time of our own."""

    def __init__(self) -> None:
        self.now_ms = float(START)
        self.activity = activity_of((INFY, TCS, ITC, NIFTY))
        self.reading = Reading(Feed(0, 0, (NIFTY, INFY, ITC, TCS)), FeedLife(), connected_ms=START - 1)
        self.socket = Socket()
        self.reading.socket = self.socket  # type: ignore[assignment]
        self.over: list[tuple[tuple[int, ...], Outage]] = []
        self.monitor = FeedMonitor(
            SESSIONS,
            self.activity,
            now_ms=lambda: self.now_ms,
            speed=1.0,
            readings=lambda: [self.reading],
            on_silence_over=lambda tokens, outage: self.over.append((tokens, outage)),
        )

    def live(self, seconds: int, *tokens: int) -> None:
        """So many seconds in which these tick each second, with a look a second."""
        for _ in range(seconds):
            self.now_ms += 1000
            if tokens:
                self.reading.life.tick(self.now_ms)
                self.activity.note(ticks(*tokens), int(self.now_ms))
            else:
                self.reading.life.heartbeat(self.now_ms)
            self.monitor.look()

    @property
    def state(self) -> object:
        return self.monitor.figures()["feed_state"]


@pytest.fixture
def ward(capsys: pytest.CaptureFixture[str]) -> Ward:
    return Ward()


@pytest.fixture
def events(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The warnings logged since it was last asked, by event and action."""

    def read() -> list[str]:
        lines = capsys.readouterr().err.splitlines()
        return [
            " ".join(
                word.partition("=")[2] for word in line.split() if word.startswith(("event=", "action="))
            )
            for line in lines
            if "level=warning" in line  # what else is shown depends on who configured the logs before
        ]

    return read


def test_a_mute_feed_is_one_line_and_its_socket_hears_of_it(
    ward: Ward, events: Callable[[], list[str]]
) -> None:
    ward.live(60, INFY, NIFTY)
    assert ward.state == "0:ok" and events() == []
    ward.live(25)
    assert ward.state == "0:mute" and ward.reading.is_mute
    assert events() == ["feed_mute reconnect"]
    ward.reading.connected_ms = ward.now_ms
    ward.live(60, INFY, NIFTY)
    assert ward.state == "0:ok" and events() == []  # that all is well again is information, not a warning
    figures = ward.monitor.figures()
    assert figures["doctor_mute"] == figures["doctor_reconnect"] == 1


def test_half_mute_is_a_line_for_each_remedy_and_ends_in_an_outage_of_the_silent(
    ward: Ward, events: Callable[[], list[str]]
) -> None:
    ward.live(60, INFY, TCS, NIFTY)
    last_ms = int(ward.now_ms)
    ward.live(40, INFY)
    assert ward.state == "0:partly_mute"
    assert events() == ["feed_partly_mute resubscribe", "feed_partly_mute reconnect"]
    assert ward.socket.asked == [
        ("resubscribe", (NIFTY, TCS)), ("reconnect", "some instruments are silent")
    ]  # fmt: skip
    ward.live(1, INFY, TCS, NIFTY)
    assert ward.over == [((NIFTY, TCS), Outage(last_ms, int(ward.now_ms)))]


def test_an_illiquid_instrument_is_no_trouble(ward: Ward, events: Callable[[], list[str]]) -> None:
    ward.live(700, INFY, NIFTY)
    assert ward.state == "0:ok" and ward.socket.asked == [] and events() == []


@pytest.mark.parametrize(
    ("at", "state"), [("07:00:00", "0:quiet"), ("15:30:00", "0:quiet"), ("12:00:00", "0:mute")]
)
def test_no_alarm_outside_the_session(ward: Ward, at: str, state: str) -> None:
    ward.now_ms = ward.reading.connected_ms = ms(at)
    ward.live(int(UNKNOWN_MUTE_MS_MIN / S) + 60)
    assert ward.state == state


def test_an_expired_session_and_a_limit_are_one_line_each(
    ward: Ward, events: Callable[[], list[str]]
) -> None:
    ward.live(30, INFY, NIFTY)
    for state in ("forbidden", "throttled"):
        ward.socket.state = state
        ward.live(30)
    assert events() == ["feed_expired renew", "feed_rate_limited wait"]
    assert ward.socket.asked == [] and not ward.reading.is_mute
