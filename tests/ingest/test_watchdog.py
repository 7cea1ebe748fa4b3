"""The watchdog: it tells the troubles of a feed apart, acts in measure, and reports silent instruments."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.model import BATCH_WIDTH, LAST_PRICE, LAST_QUANTITY, TOKEN, VOLUME, TickArray
from pkbrokers_redis.ingest.connections import FeedConnection, FeedLiveness, Outage
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.ingest.watchdog import (
    ACTIVE_TICKS_MIN,
    ATTEMPTS_MAX,
    MUTE_MS_MAX,
    UNKNOWN_MUTE_MS_MIN,
    FeedDiagnosis,
    Observation,
    TickActivity,
    Verdict,
    Watchdog,
)

S = 1000.0
INFY, TCS, ITC, NIFTY, GOLD = 408065, 2953217, 424961, 256265, 58839 << 8 | 7
SESSIONS = load_sessions("market")
AUCTION_DAY = "2026-08-05"


def ms(text: str, day: str = "2026-01-05") -> int:
    return int(datetime.fromisoformat(f"{day} {text}+05:30").timestamp() * 1000)


START = ms("10:00:00")
OPEN = [float(ms("09:15:00"))] * len(SESSIONS.schedules)


def observed(**changes: Any) -> Observation:
    """A healthy feed at 100 s: connected since 10 s, open since 0, ticked just now."""
    found = Observation("connected", 10 * S, 100 * S, 5 * S, 0.0, 50, 20)
    return found._replace(**changes)


def seen(diagnosis: FeedDiagnosis, at_s: float, **changes: Any) -> tuple[str, str]:
    verdict = diagnosis.judge(observed(**changes), at_s * S)
    return verdict.state, verdict.action


# -- one observation


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
        ({"socket": "waiting"}, "disconnected", "none"),
        ({"socket": "connecting", "opened_ms": None}, "quiet", "none"),
        ({"ticked_ms": 84 * S}, "mute", "reconnect"),
        ({"ticked_ms": 86 * S}, "ok", "none"),
        ({"ticked_ms": 50 * S, "mute_ms": 60 * S}, "ok", "none"),  # its usual silence
        ({"ticked_ms": 50 * S, "active": 0}, "ok", "none"),  # we do not know its way yet
        ({"ticked_ms": 30 * S, "active": 0}, "mute", "reconnect"),
        ({"ticked_ms": 0.0, "opened_ms": 90 * S}, "ok", "none"),  # the market opened ten seconds ago
        ({"ticked_ms": 0.0, "connected_ms": 90 * S}, "ok", "none"),
        ({"silent": (INFY,)}, "partly_mute", "resubscribe"),
    ],
)
def test_each_observation_has_its_verdict(changes: dict[str, Any], state: str, action: str) -> None:
    assert seen(FeedDiagnosis(), 100, **changes) == (state, action)


def test_no_limit_is_below_two_seconds_of_the_machine_at_any_speed() -> None:
    assert seen(FeedDiagnosis(speed=60), 219, ticked_ms=100 * S)[0] == "ok"
    assert seen(FeedDiagnosis(speed=60), 221, ticked_ms=100 * S)[0] == "mute"


# -- a feed that stays mute


def test_a_feed_that_stays_mute_is_reconnected_with_growing_pauses() -> None:
    diagnosis, now_s, connected_s = FeedDiagnosis(), 0.0, 0.0
    gaps: list[float] = []
    for _ in range(12):
        while seen(diagnosis, now_s, ticked_ms=0.0, connected_ms=connected_s * S) != ("mute", "reconnect"):
            now_s += 1
        gaps.append(now_s - connected_s)
        connected_s = now_s
    assert gaps[:4] == [16, 31, 61, 121]
    assert gaps[-1] == MUTE_MS_MAX / S + 1


def test_the_last_tick_sent_again_does_not_end_a_mute_state() -> None:
    diagnosis = FeedDiagnosis()
    assert seen(diagnosis, 120) == ("mute", "reconnect")
    assert seen(diagnosis, 121, socket="connecting") == ("mute", "none")
    # Connected at 122, and Kite sends each instrument's last tick: it may be hours old.
    assert seen(diagnosis, 124, connected_ms=122 * S, ticked_ms=123 * S) == ("mute", "none")
    assert seen(diagnosis, 150, connected_ms=122 * S, ticked_ms=123 * S) == ("mute", "none")
    assert seen(diagnosis, 154, connected_ms=122 * S, ticked_ms=123 * S) == ("mute", "reconnect")
    assert seen(diagnosis, 170, connected_ms=155 * S, ticked_ms=169 * S) == ("ok", "none")
    assert seen(diagnosis, 186, connected_ms=155 * S, ticked_ms=169 * S) == (
        "mute",
        "reconnect",
    )  # from the start


def test_a_feed_whose_connections_end_in_silence_is_mute_within_half_a_minute() -> None:
    diagnosis, states = FeedDiagnosis(), []
    assert seen(diagnosis, 99, ticked_ms=99 * S) == ("ok", "none")
    for n in range(100, 160):  # the socket gives each connection ten seconds, and needs one for the next
        socket = "connected" if n % 10 else "connecting"
        connected_ms = (n // 10 * 10 + 1) * S if n % 10 else (n - 9) * S
        states.append(seen(diagnosis, n, socket=socket, connected_ms=connected_ms, ticked_ms=99 * S)[0])
    assert states.index("mute") <= 30
    assert set(states[states.index("mute") :]) == {"mute"}
    # A tick that is not the last one sent again ends it.
    assert seen(diagnosis, 170, connected_ms=161 * S, ticked_ms=170 * S) == ("ok", "none")


def test_a_feed_that_never_had_a_tick_and_connects_again_and_again_is_mute() -> None:
    diagnosis = FeedDiagnosis()
    young = {"ticked_ms": 0.0, "active": 0}
    assert seen(diagnosis, 11, connected_ms=10 * S, **young) == ("ok", "none")
    assert seen(diagnosis, 22, connected_ms=21 * S, **young) == ("ok", "none")
    assert seen(diagnosis, 33, connected_ms=32 * S, **young) == ("mute", "none")


def test_the_market_closes_over_a_mute_feed() -> None:
    diagnosis = FeedDiagnosis()
    assert seen(diagnosis, 120) == ("mute", "reconnect")
    assert seen(diagnosis, 130, opened_ms=None) == ("quiet", "none")
    assert seen(diagnosis, 140, opened_ms=139 * S) == ("ok", "none")


# -- some instruments are silent


def test_silent_active_instruments_are_resubscribed_and_then_the_feed_reconnects() -> None:
    diagnosis = FeedDiagnosis()
    silent = tuple(range(1, 16))
    first = diagnosis.judge(observed(silent=silent), 100 * S)
    assert (first.state, first.action, first.tokens) == ("partly_mute", "resubscribe", silent)
    assert "15 of 20" in first.reason
    assert seen(diagnosis, 110, ticked_ms=110 * S, silent=silent) == ("partly_mute", "none")
    assert seen(diagnosis, 116, ticked_ms=116 * S, silent=silent) == ("partly_mute", "reconnect")
    assert seen(diagnosis, 120, ticked_ms=120 * S, silent=silent) == ("partly_mute", "none")
    assert seen(diagnosis, 122, ticked_ms=122 * S) == ("ok", "none")


def test_a_single_halted_stock_causes_no_reconnect() -> None:
    diagnosis, actions = FeedDiagnosis(), []
    for n in range(300):
        verdict = diagnosis.judge(observed(silent=(INFY,), ticked_ms=(100 + n) * S), (100 + n) * S)
        actions.append(verdict)
    assert [each.action for each in actions if each.action != "none"] == ["resubscribe"] * ATTEMPTS_MAX
    assert actions[-1] == Verdict("ok", "none", "1 active instruments are halted")


def test_a_halted_instrument_stays_visible_until_it_ticks_and_is_subscribed_again() -> None:
    diagnosis, resubscribed = FeedDiagnosis(), []
    for n in range(1000):
        verdict = diagnosis.judge(observed(silent=(INFY,), ticked_ms=(100 + n) * S), (100 + n) * S)
        if verdict.action == "resubscribe":
            resubscribed.append(n)
        if len(resubscribed) >= ATTEMPTS_MAX and n > resubscribed[ATTEMPTS_MAX - 1]:
            assert diagnosis.halted == (INFY,) or verdict.state == "partly_mute"
    assert diagnosis.halted == (INFY,)
    assert [each - resubscribed[2] for each in resubscribed[3:]] == [301, 602, 903]
    diagnosis.judge(observed(silent=(), ticked_ms=1100 * S), 1100 * S)
    assert diagnosis.halted == ()


def test_the_names_of_halted_instruments_end_with_the_session() -> None:
    diagnosis = FeedDiagnosis()
    for n in range(200):
        diagnosis.judge(observed(silent=(INFY,), ticked_ms=(100 + n) * S), (100 + n) * S)
    assert diagnosis.halted == (INFY,)
    diagnosis.judge(observed(silent=(INFY,), opened_ms=None), 400 * S)
    assert diagnosis.halted == ()


def test_a_resent_tick_does_not_hide_a_silent_instrument() -> None:
    diagnosis = FeedDiagnosis()
    assert seen(diagnosis, 100, silent=(1, 2), active=2) == ("partly_mute", "resubscribe")
    assert seen(diagnosis, 105, ticked_ms=105 * S, active=2) == ("ok", "none")  # its last tick came again
    assert seen(diagnosis, 120, ticked_ms=120 * S, silent=(1, 2), active=2) == ("partly_mute", "reconnect")


def test_an_instrument_that_ticks_for_a_minute_has_recovered() -> None:
    diagnosis = FeedDiagnosis()
    assert seen(diagnosis, 100, silent=(1, 2), active=2) == ("partly_mute", "resubscribe")
    assert seen(diagnosis, 161, ticked_ms=161 * S, active=2) == ("ok", "none")
    assert seen(diagnosis, 300, ticked_ms=300 * S, silent=(1, 2), active=2) == ("partly_mute", "resubscribe")


# -- when each instrument ticks


def ticks(*tokens: int) -> Any:
    found = np.full((len(tokens), BATCH_WIDTH), np.nan)
    found[:, TOKEN] = tokens
    return found


def traded(token: int, price: float, quantity: float = np.nan, volume: float = np.nan) -> Any:
    found = ticks(token)
    found[:, [LAST_PRICE, LAST_QUANTITY, VOLUME]] = price, quantity, volume
    return found


def activity_of(*feeds: tuple[int, ...]) -> TickActivity:
    activity = TickActivity(SESSIONS.schedule_of)
    activity.follow([Feed(n, 0, tuple(sorted(tokens))) for n, tokens in enumerate(feeds)])
    return activity


def note(activity: TickActivity, batch: TickArray, at_ms: int) -> None:
    activity.note(batch[:, TOKEN].astype(np.int64), batch, at_ms)


def beat(activity: TickActivity, tokens: tuple[int, ...], from_s: int, to_s: int, every_s: int = 1) -> None:
    for n in range(from_s, to_s, every_s):
        note(activity, ticks(*tokens), START + n * 1000)


def test_instruments_that_tick_often_are_active_and_rare_ones_are_not() -> None:
    activity = activity_of((INFY, TCS, ITC, NIFTY))
    for n in range(100):
        note(activity, ticks(INFY, NIFTY, *([ITC] if n % 10 == 0 else [])), START + n * 1000)
    silence = activity.silence(0, OPEN, START, 15_000)
    assert silence.active == 2 and silence.silent == ()
    beat(activity, (INFY,), 100, 120)
    assert activity.silence(0, OPEN, START, 15_000).silent == (NIFTY,)
    assert activity.silence(0, OPEN, START + 110_000, 15_000).silent == ()  # just reconnected
    assert activity.silence(0, OPEN, START, 25_000).silent == ()
    assert activity.silence(7, OPEN, START, 15_000).active == 0


def test_an_instrument_is_not_active_before_its_rhythm_is_known() -> None:
    activity = activity_of((INFY, NIFTY))
    beat(activity, (INFY, NIFTY), 0, ACTIVE_TICKS_MIN - 1)
    assert activity.silence(0, OPEN, START, 15_000).active == 0
    beat(activity, (INFY,), ACTIVE_TICKS_MIN - 1, 100)
    silence = activity.silence(0, OPEN, START, 15_000)
    assert silence.active == 1 and silence.silent == ()


def test_a_feed_without_any_tick_is_not_partly_silent() -> None:
    """The feed's own newest tick is the clock: a writer that waits for Redis raises no alarm."""
    activity = activity_of((INFY, NIFTY), (TCS,))
    beat(activity, (INFY, NIFTY), 0, 100)
    beat(activity, (TCS,), 100, 200)
    assert activity.silence(0, OPEN, START, 15_000).silent == ()


def test_closed_markets_have_no_active_instruments_and_an_opening_is_no_silence() -> None:
    activity = activity_of((INFY, GOLD))
    beat(activity, (INFY, GOLD), 0, 100)
    beat(activity, (GOLD,), 100, 200)
    opened: list[float | None] = list(OPEN)
    opened[SESSIONS.schedule_of(INFY)] = None
    assert activity.silence(0, opened, START, 15_000).silent == ()
    opened[SESSIONS.schedule_of(INFY)] = START + 195_000.0
    assert activity.silence(0, opened, START, 15_000).silent == ()


def test_instruments_that_stay_keep_their_history_when_the_list_changes() -> None:
    activity = activity_of((INFY, TCS), (NIFTY,))
    beat(activity, (INFY, TCS, NIFTY, 999), 0, 50)
    activity.follow([Feed(0, 0, (TCS,)), Feed(1, 0, (NIFTY, ITC))])
    assert activity.last_tick(TCS).at_ms == activity.last_tick(NIFTY).at_ms == START + 49_000
    assert [activity.last_tick(token).at_ms for token in (INFY, ITC, 999)] == [0, 0, 0]
    assert activity.silence(0, OPEN, START, 15_000).active == 1
    activity.follow([])
    note(activity, ticks(TCS), START)
    assert activity.last_tick(TCS).at_ms == 0 and activity.schedules(0) == frozenset()


def test_a_clock_set_back_makes_no_instrument_active() -> None:
    activity = activity_of((INFY, NIFTY))
    beat(activity, (INFY,), 0, 30 * ACTIVE_TICKS_MIN, every_s=30)
    beat(activity, (INFY,), -18_000, -17_999)
    assert activity.silence(0, OPEN, START - 20_000_000, 15_000).active == 0


@pytest.mark.parametrize(
    ("before", "later", "missed"),
    [
        (traded(INFY, 100, 5, 1_000), traded(INFY, 100, 5, 1_000), False),  # the last tick, sent again
        (traded(INFY, 100, 5, 1_000), traded(INFY, 101, 7, 1_007), False),  # the next trade
        (traded(INFY, 100, 5, 1_000), traded(INFY, 101, 7, 1_050), True),
        (traded(NIFTY, 24_000), traded(NIFTY, 24_000), False),  # an index has no volume
        (traded(NIFTY, 24_000), traded(NIFTY, 24_010), True),
    ],
)
def test_a_later_tick_shows_whether_trades_were_missed(before: Any, later: Any, missed: bool) -> None:
    activity, token = activity_of((INFY, NIFTY)), int(before[0, TOKEN])
    note(activity, before, START)
    last = activity.last_tick(token)
    note(activity, ticks(TCS, ITC), START + 10_000)  # unknown ones
    note(activity, later, START + 20_000)
    assert activity.last_tick(token).at_ms == START + 20_000
    assert last.has_missed(activity.last_tick(token)) is missed


def test_an_instrument_without_a_tick_for_ten_minutes_is_illiquid() -> None:
    activity = activity_of((INFY, TCS))
    beat(activity, (INFY,), 0, 700)
    assert activity.silence(0, OPEN, START, 15_000).illiquid == (TCS,)


# -- the watchdog


class Socket:
    """What the watchdog uses of a socket."""

    def __init__(self, resend: Callable[[tuple[int, ...]], None]) -> None:
        self.state = "connected"
        self.requests: list[tuple[str, Any]] = []
        self._resend = resend

    def resubscribe(self, tokens: Any) -> None:
        self.requests.append(("resubscribe", tuple(tokens)))
        self._resend(tuple(tokens))

    def reconnect(self, why: str) -> None:
        self.requests.append(("reconnect", why))


class Watched:
    """One feed under a watchdog, at a time that the test sets.

    Where Kite `answers`, a new subscription brings the last tick again.
    """

    def __init__(
        self,
        *tokens: int,
        start_ms: int = START,
        derivatives: tuple[int, ...] = (),
        answers: bool = False,
    ) -> None:
        self.now_ms = float(start_ms)
        self.tokens = tokens or (NIFTY, INFY, ITC, TCS)
        self.answers = answers
        self.trades = dict.fromkeys(self.tokens, 0)
        feed = Feed(0, 0, tuple(sorted(self.tokens)))
        self.activity = TickActivity(lambda token: SESSIONS.schedule_of(token, token in derivatives))
        self.activity.follow([feed])
        self.connection = FeedConnection(feed, FeedLiveness(), connected_ms=start_ms - 1)
        self.socket = Socket(self.resend)
        self.connection.socket = self.socket  # type: ignore[assignment]
        self.reported: list[tuple[tuple[int, ...], Outage]] = []
        part: Any = self
        self.watchdog = Watchdog(SESSIONS, self.activity, part, part, now_ms=lambda: self.now_ms)

    def all(self) -> list[FeedConnection]:
        """As the worker's connections."""
        return [self.connection]

    def add(self, reason: str, tokens: tuple[int, ...], outage: Outage) -> None:
        """As the worker's outages."""
        self.reported.append((tokens, outage))

    def last_tick(self, token: int) -> TickArray:
        """As Kite has it: ten pieces a trade; an index has a price only."""
        count = self.trades[token]
        found: TickArray = (
            traded(token, 24_000 + count) if token == NIFTY else traded(token, 100, 10, 10 * count)
        )
        return found

    def resend(self, tokens: tuple[int, ...]) -> None:
        if self.answers and tokens:
            self.connection.liveness.note_tick(self.now_ms)
            note(self.activity, np.concatenate([self.last_tick(token) for token in tokens]), int(self.now_ms))

    def live(self, seconds: int, *tokens: int, muted: tuple[int, ...] = ()) -> None:
        """So many seconds in which these are traded and tick each second, with a look a second.

        `muted` are traded, and do not tick.
        """
        for _ in range(seconds):
            self.now_ms += 1000
            for token in (*tokens, *muted):
                self.trades[token] += 1
            if tokens:
                self.connection.liveness.note_tick(self.now_ms)
                note(
                    self.activity, np.concatenate([self.last_tick(each) for each in tokens]), int(self.now_ms)
                )
            else:
                self.connection.liveness.note_heartbeat(self.now_ms)
            self.watchdog.check()

    def live_until(self, time_ms: int, *tokens: int) -> None:
        self.live(int(time_ms - self.now_ms) // 1000, *tokens)

    @property
    def state(self) -> object:
        return self.watchdog.figures()["feed_state"]


@pytest.fixture
def ward(capsys: pytest.CaptureFixture[str]) -> Watched:
    return Watched()


@pytest.fixture
def events(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The warnings logged since the last call, by event and action."""

    def read() -> list[str]:
        lines = capsys.readouterr().err.splitlines()
        return [
            " ".join(
                word.partition("=")[2] for word in line.split() if word.startswith(("event=", "action="))
            )
            for line in lines
            if "level=warning" in line  # other levels depend on the log configuration
        ]

    return read


def test_a_mute_feed_is_one_log_line_and_reconnects(ward: Watched, events: Callable[[], list[str]]) -> None:
    ward.live(60, INFY, NIFTY)
    assert ward.state == "0:ok" and events() == []
    ward.live(25)
    assert ward.state == "0:mute" and ward.connection.is_mute
    assert events() == ["feed_mute reconnect"]
    ward.connection.connected_ms = ward.now_ms
    ward.live(60, INFY, NIFTY)
    assert ward.state == "0:ok" and events() == []  # recovery is information, not a warning
    figures = ward.watchdog.figures()
    assert figures["watchdog_mute"] == figures["watchdog_reconnect"] == 1


def test_a_partly_mute_feed_is_treated_twice_and_ends_in_an_outage_of_the_silent_instruments(
    ward: Watched, events: Callable[[], list[str]]
) -> None:
    ward.live(60, INFY, TCS, NIFTY)
    last_ms = int(ward.now_ms)
    ward.live(40, INFY, muted=(TCS, NIFTY))
    assert ward.state == "0:partly_mute"
    assert events() == ["feed_partly_mute resubscribe", "feed_partly_mute reconnect"]
    assert ward.socket.requests == [
        ("resubscribe", (NIFTY, TCS)), ("reconnect", "some instruments are silent")
    ]  # fmt: skip
    ward.live(1, INFY, TCS, NIFTY)
    assert ward.reported == [((NIFTY, TCS), Outage(last_ms, int(ward.now_ms)))]


def test_an_illiquid_instrument_raises_no_alarm(ward: Watched, events: Callable[[], list[str]]) -> None:
    ward.live(700, INFY, NIFTY)
    assert ward.state == "0:ok" and ward.socket.requests == [] and events() == []


@pytest.mark.parametrize(
    ("at", "state"), [("07:00:00", "0:quiet"), ("15:30:00", "0:quiet"), ("12:00:00", "0:mute")]
)
def test_a_silent_feed_is_mute_in_market_hours_only(ward: Watched, at: str, state: str) -> None:
    ward.now_ms = ward.connection.connected_ms = ms(at)
    ward.live(int(UNKNOWN_MUTE_MS_MIN / 1000) + 60)
    assert ward.state == state


def test_an_expired_session_and_a_rate_limit_are_one_log_line_each(
    ward: Watched, events: Callable[[], list[str]]
) -> None:
    ward.live(30, INFY, NIFTY)
    for state in ("forbidden", "throttled"):
        ward.socket.state = state
        ward.live(30)
    assert events() == ["feed_expired renew", "feed_rate_limited wait"]
    assert ward.socket.requests == [] and not ward.connection.is_mute


# -- silences that are no outages


@pytest.mark.parametrize(
    "continuous", [(), (ITC, NIFTY)], ids=["stocks with derivatives alone", "with other instruments"]
)
def test_a_closing_auction_is_no_outage(continuous: tuple[int, ...], events: Callable[[], list[str]]) -> None:
    """Orders are collected from 15:15 on, and matched from 15:30 to 15:35: no tick is missing."""
    start_ms = ms("15:10:00", AUCTION_DAY)
    ward = Watched(INFY, TCS, *continuous, start_ms=start_ms, derivatives=(INFY, TCS), answers=True)
    ward.live_until(ms("15:15:00", AUCTION_DAY), INFY, TCS, *continuous)
    ward.live_until(ms("15:30:00", AUCTION_DAY), *continuous)
    ward.live_until(ms("15:35:00", AUCTION_DAY), INFY, TCS)
    ward.live(300)
    assert ward.reported == [] and ward.socket.requests == [] and events() == []
    assert not ward.connection.is_mute and ward.state == "0:quiet"


def test_an_active_instrument_that_was_not_traded_for_a_while_had_no_outage() -> None:
    ward = Watched(answers=True)
    ward.live(60, INFY, TCS, NIFTY)
    ward.live(90, INFY, NIFTY)
    assert ("resubscribe", (TCS,)) in ward.socket.requests
    ward.live(5, INFY, TCS, NIFTY)
    assert ward.reported == []


def test_trades_that_a_new_subscription_reveals_were_an_outage() -> None:
    ward = Watched(answers=True)
    ward.live(60, INFY, TCS, NIFTY)
    last_ms = int(ward.now_ms)
    ward.live(30, INFY, NIFTY, muted=(TCS,))
    [(tokens, outage)] = ward.reported
    assert tokens == (TCS,) and outage.from_ms == last_ms and 15_000 < outage.to_ms - last_ms < 20_000


def test_a_silence_does_not_last_over_the_night() -> None:
    ward = Watched(start_ms=ms("15:28:00"))
    ward.live(90, INFY, TCS, NIFTY)
    ward.live_until(ms("15:30:00"), INFY, NIFTY)
    assert ("resubscribe", (TCS,)) in ward.socket.requests
    ward.live(10)
    ward.now_ms = ms("09:15:00", "2026-01-06")
    ward.live(5, INFY, TCS, NIFTY)
    assert ward.reported == []


def test_a_clock_set_back_does_not_hide_a_mute_feed(ward: Watched) -> None:
    ward.now_ms = ms("15:00:00")
    ward.connection.connected_ms = ward.now_ms
    ward.live(60, INFY, NIFTY)
    ward.now_ms = ms("10:00:00")
    ward.live(25)
    assert ward.state == "0:mute" and ward.connection.is_mute
