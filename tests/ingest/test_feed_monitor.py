"""The feed monitor: what it has the doctor judge, what it does about it, and which outages it tells."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.model import TickArray
from pkbrokers_redis.ingest.connections import Reading
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.ingest.liveness import FeedLife, Outage
from pkbrokers_redis.ingest.watchdog import UNKNOWN_MUTE_MS_MIN, FeedMonitor, TickActivity
from tests.ingest.test_tick_activity import traded

INFY, TCS, ITC, NIFTY = 408065, 2953217, 424961, 256265
SESSIONS = load_sessions("market")
AUCTION_DAY = "2026-08-05"


def ms(text: str, day: str = "2026-01-05") -> int:
    return int(datetime.fromisoformat(f"{day} {text}+05:30").timestamp() * 1000)


START = ms("10:00:00")


class Socket:
    """What the monitor uses of a socket."""

    def __init__(self, resend: Callable[[tuple[int, ...]], None]) -> None:
        self.state = "connected"
        self.asked: list[tuple[str, Any]] = []
        self._resend = resend

    def resubscribe(self, tokens: Any) -> None:
        self.asked.append(("resubscribe", tuple(tokens)))
        self._resend(tuple(tokens))

    def reconnect(self, why: str) -> None:
        self.asked.append(("reconnect", why))


class Ward:
    """One feed under a monitor, at a time of our own.

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
        self.reading = Reading(feed, FeedLife(), connected_ms=start_ms - 1)
        self.socket = Socket(self.resend)
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

    def last_tick(self, token: int) -> TickArray:
        """As Kite has it: ten pieces a trade; an index has a price only."""
        count = self.trades[token]
        found: TickArray = (
            traded(token, 24_000 + count) if token == NIFTY else traded(token, 100, 10, 10 * count)
        )
        return found

    def resend(self, tokens: tuple[int, ...]) -> None:
        if self.answers and tokens:
            self.reading.life.tick(self.now_ms)
            self.activity.note(np.concatenate([self.last_tick(token) for token in tokens]), int(self.now_ms))

    def live(self, seconds: int, *tokens: int, muted: tuple[int, ...] = ()) -> None:
        """So many seconds in which these are traded and tick each second, with a look a second.

        `muted` are traded, and do not tick.
        """
        for _ in range(seconds):
            self.now_ms += 1000
            for token in (*tokens, *muted):
                self.trades[token] += 1
            if tokens:
                self.reading.life.tick(self.now_ms)
                self.activity.note(
                    np.concatenate([self.last_tick(each) for each in tokens]), int(self.now_ms)
                )
            else:
                self.reading.life.heartbeat(self.now_ms)
            self.monitor.look()

    def live_until(self, time_ms: int, *tokens: int) -> None:
        self.live(int(time_ms - self.now_ms) // 1000, *tokens)

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
    ward.live(40, INFY, muted=(TCS, NIFTY))
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
    ward.live(int(UNKNOWN_MUTE_MS_MIN / 1000) + 60)
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


# --- silences that are none


@pytest.mark.parametrize("others", [(), (ITC, NIFTY)], ids=["stocks with derivatives alone", "with others"])
def test_a_faultless_closing_auction_is_no_trouble_and_no_outage(
    others: tuple[int, ...], events: Callable[[], list[str]]
) -> None:
    """Orders are collected from 15:15 on, and matched from 15:30 to 15:35: no tick is missing."""
    start_ms = ms("15:10:00", AUCTION_DAY)
    ward = Ward(INFY, TCS, *others, start_ms=start_ms, derivatives=(INFY, TCS), answers=True)
    ward.live_until(ms("15:15:00", AUCTION_DAY), INFY, TCS, *others)
    ward.live_until(ms("15:30:00", AUCTION_DAY), *others)
    ward.live_until(ms("15:35:00", AUCTION_DAY), INFY, TCS)
    ward.live(300)
    assert ward.over == [] and ward.socket.asked == [] and events() == []
    assert not ward.reading.is_mute and ward.state == "0:quiet"


def test_a_lively_instrument_that_nobody_traded_for_a_while_had_no_outage() -> None:
    ward = Ward(answers=True)
    ward.live(60, INFY, TCS, NIFTY)
    ward.live(90, INFY, NIFTY)
    assert ("resubscribe", (TCS,)) in ward.socket.asked
    ward.live(5, INFY, TCS, NIFTY)
    assert ward.over == []


def test_trades_that_a_new_subscription_tells_of_were_an_outage() -> None:
    ward = Ward(answers=True)
    ward.live(60, INFY, TCS, NIFTY)
    last_ms = int(ward.now_ms)
    ward.live(30, INFY, NIFTY, muted=(TCS,))
    [(tokens, outage)] = ward.over
    assert tokens == (TCS,) and outage.from_ms == last_ms and 15_000 < outage.to_ms - last_ms < 20_000


def test_a_silence_does_not_last_over_the_night() -> None:
    ward = Ward(start_ms=ms("15:28:00"))
    ward.live(90, INFY, TCS, NIFTY)
    ward.live_until(ms("15:30:00"), INFY, NIFTY)
    assert ("resubscribe", (TCS,)) in ward.socket.asked
    ward.live(10)
    ward.now_ms = ms("09:15:00", "2026-01-06")
    ward.live(5, INFY, TCS, NIFTY)
    assert ward.over == []


def test_a_clock_set_back_hides_no_mute_feed(ward: Ward) -> None:
    ward.now_ms = ms("15:00:00")
    ward.reading.connected_ms = ward.now_ms
    ward.live(60, INFY, NIFTY)
    ward.now_ms = ms("10:00:00")
    ward.live(25)
    assert ward.state == "0:mute" and ward.reading.is_mute
