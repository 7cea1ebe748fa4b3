"""Looks at each feed that is read, twice a second, has the feed doctor judge it, and acts on the verdict.

A line is logged when a verdict changes, not while it lasts; `feed_state` in the heartbeat has the last ones.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable

from pkbrokers_redis import logs
from pkbrokers_redis.core.india import IST_MS
from pkbrokers_redis.core.sessions import Sessions
from pkbrokers_redis.pipeline.feed_doctor import ILLIQUID_MS, FeedDoctor, Signs, Verdict
from pkbrokers_redis.pipeline.gaps import Outage
from pkbrokers_redis.pipeline.readers import Reading
from pkbrokers_redis.pipeline.tick_activity import Silence, TickActivity

log = logs.get("doctor")

LOOK_SECONDS = 0.5
NAMES_MAX = 5  # instruments named in a line
DAY_MS = 86_400_000
AUCTION = "closing_auction"  # a window of the calendar: orders are collected, and no tick is missing
ALARMING = {"mute", "partly_mute", "expired", "rate_limited"}


class _WatchedFeed:
    """One feed's doctor, and what was said and seen last."""

    def __init__(self, reading: Reading, speed: float) -> None:
        self.reading = reading
        self.doctor = FeedDoctor(speed)
        self.verdict = Verdict("away", "none", "")
        self.silenced: dict[int, float] = {}  # silent canary → its last tick before
        self.illiquid_day = 0  # of the last line about illiquid ones


class FeedMonitor:
    """`look` at all `readings()`; `on_silence_over(tokens, outage)` hears of canaries that tick again.

    Canaries are a feed's most active instruments (`tick_activity.py`): when they fall silent, the feed has.
    """

    def __init__(
        self,
        sessions: Sessions,
        activity: TickActivity,
        *,
        now_ms: Callable[[], float],
        speed: float,
        readings: Callable[[], list[Reading]],
        on_silence_over: Callable[[tuple[int, ...], Outage], None],
    ) -> None:
        self._sessions = sessions
        self._activity = activity
        self._now_ms = now_ms
        self._speed = speed
        self._readings = readings
        self._on_silence_over = on_silence_over
        self._watched: dict[int, _WatchedFeed] = {}
        self._looked_ms = 0.0
        self._counts: Counter[str] = Counter()

    def run(self, stop: threading.Event) -> None:
        """`look` twice a second."""
        while not stop.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """One round: a verdict for each feed, and what follows from it."""
        now_ms = self._now_ms()
        readings = {reading.feed.number: reading for reading in self._readings()}
        if now_ms < self._looked_ms:
            self._start_anew(readings.values(), now_ms)
        self._looked_ms = now_ms
        watched: dict[int, _WatchedFeed] = {}
        for number, reading in readings.items():
            known = self._watched.get(number)
            watched[number] = (
                known if known and known.reading is reading else _WatchedFeed(reading, self._speed)
            )
        self._watched = watched
        opened_ms = [self._opened_ms(schedule, now_ms) for schedule in range(len(self._sessions.schedules))]
        for feed in watched.values():
            self._look_at(feed, opened_ms, now_ms)

    def _start_anew(self, readings: Iterable[Reading], now_ms: float) -> None:
        """The clock was set back: what was seen later than now would keep us waiting."""
        self._watched = {}
        for reading in readings:
            reading.connected_ms = min(reading.connected_ms, now_ms)
            reading.life.ticked_ms = min(reading.life.ticked_ms, now_ms)

    def figures(self) -> dict[str, object]:
        """`feed_state`, `0:ok,1:mute`, and how often each trouble began and was treated."""
        states = sorted((number, feed.verdict.state) for number, feed in self._watched.items())
        counts = {f"doctor_{name}": count for name, count in sorted(self._counts.items())}
        return {"feed_state": ",".join(f"{number}:{state}" for number, state in states), **counts}

    def _look_at(self, feed: _WatchedFeed, opened_ms: list[float | None], now_ms: float) -> None:
        reading, life = feed.reading, feed.reading.life
        silence = Silence()
        if reading.socket.state == "connected":
            silent_ms_min = feed.doctor.silent_ms_min
            silence = self._activity.silence(
                reading.feed.number, opened_ms, reading.connected_ms, silent_ms_min, ILLIQUID_MS
            )
        opened = [opened_ms[schedule] for schedule in self._activity.schedules(reading.feed.number)]
        signs = Signs(
            reading.socket.state,
            reading.connected_ms,
            life.ticked_ms,
            life.mute_ms,
            min((at_ms for at_ms in opened if at_ms is not None), default=None),
            len(reading.feed.tokens),
            silence.canaries,
            tuple(token for token, _ in silence.silent),
        )
        verdict = feed.doctor.look(signs, now_ms)
        self._tell(feed, verdict)
        self._follow_silence(feed, verdict, dict(silence.silent))
        self._act(reading, verdict)
        self._mention_illiquid(feed, silence, now_ms)

    def _opened_ms(self, schedule: int, now_ms: float) -> float | None:
        """Since when a schedule trades continuously; None: it does not."""
        windows = self._sessions.named_windows(schedule, self._sessions.date_of(int(now_ms)))
        for name, opened, closed in windows:
            if opened <= now_ms < closed and name != AUCTION:
                return float(opened)
        return None

    def _tell(self, feed: _WatchedFeed, verdict: Verdict) -> None:
        before, feed.verdict = feed.verdict, verdict
        is_new = verdict.state != before.state
        if not is_new and (verdict.action == "none" or verdict.action == before.action):
            return
        if is_new:
            self._counts[verdict.state] += verdict.state in ALARMING
        tell = log.warning if verdict.state in ALARMING else log.info
        tell(
            f"feed_{verdict.state}", feed=feed.reading.feed.number, action=verdict.action, why=verdict.why,
            **({"tokens": _some(verdict.tokens)} if verdict.tokens else {}),
        )  # fmt: skip

    def _act(self, reading: Reading, verdict: Verdict) -> None:
        if verdict.action not in ("reconnect", "resubscribe"):
            return  # the socket renews and waits by itself
        self._counts[verdict.action] += 1
        if verdict.action == "resubscribe":
            reading.socket.resubscribe(verdict.tokens)
        elif verdict.state == "mute":
            reading.is_mute = True  # the socket asks
        else:
            reading.socket.reconnect("some instruments are silent")

    def _follow_silence(self, feed: _WatchedFeed, verdict: Verdict, silent: dict[int, float]) -> None:
        """Canaries that tick again had an outage of their own, if they were traded meanwhile."""
        if verdict.state == "quiet":
            feed.silenced.clear()
        if verdict.state == "partly_mute":
            for token in verdict.tokens:
                if last_ms := silent.get(token):
                    feed.silenced.setdefault(token, last_ms)
        self._activity.watch({token for each in self._watched.values() for token in each.silenced})
        spans = []
        for token in tuple(feed.silenced):
            if (found := self._activity.take_return(token)) is not None:
                since_ms = feed.silenced.pop(token)
                if found.missed:
                    spans.append((token, since_ms, found.at_ms))
        if spans:
            tokens, since, until = zip(*spans, strict=True)
            self._on_silence_over(tuple(sorted(tokens)), Outage(int(min(since)), int(max(until))))

    def _mention_illiquid(self, feed: _WatchedFeed, silence: Silence, now_ms: float) -> None:
        """Once a day: instruments that nobody trades are no fault."""
        today = int(now_ms + IST_MS) // DAY_MS
        if silence.illiquid and feed.illiquid_day != today:
            feed.illiquid_day = today
            log.info(
                "instruments_illiquid", feed=feed.reading.feed.number, action="none",
                instruments=len(silence.illiquid), tokens=_some(silence.illiquid),
                why=f"no tick for {ILLIQUID_MS / 60_000:.0f} min in an open market, others tick",
            )  # fmt: skip


def _some(tokens: tuple[int, ...]) -> str:
    more = f" and {len(tokens) - NAMES_MAX} more" if len(tokens) > NAMES_MAX else ""
    return ",".join(map(str, tokens[:NAMES_MAX])) + more
