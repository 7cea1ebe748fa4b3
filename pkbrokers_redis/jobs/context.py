"""What a job on candles works with: settings, the store, Kite's history, the calendar, market time.

    with open_job_context() as context:
        rows = context.history.rows(408065, "1m", *context.span_s(408065, from_ms, to_ms))

A job is a process of its own and opens everything itself; tests and commands pass a context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from math import ceil
from typing import Any

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import Day, Sessions, load_sessions
from pkbrokers_redis.candles.model import SEGMENT_INDICES, Interval, bucket_end_s, bucket_start_s
from pkbrokers_redis.clock import Clock, market_clock
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.history import KiteTickerHistory
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.instruments import read_hours
from pkbrokers_redis.store.meta import adopt_meta

HISTORY_LAG_SECONDS = 5  # market time after a minute's end until Kite's history certainly has it
QUOTES_AT_ONCE = 1_000

log = logs.get("jobs")


@dataclass
class JobContext:
    """The tools of one job. `settings` holds the store's own shards and intervals."""

    settings: Settings
    client: redis.Redis
    history: KiteTickerHistory
    sessions: Sessions
    clock: Clock = field(default_factory=Clock)

    @property
    def keys(self) -> Keys:
        """Return the key names."""
        return self.settings.keys

    @property
    def base(self) -> Interval:
        """Return the shortest interval. Its rows repair all longer ones."""
        return self.settings.intervals[0]

    def known_until_s(self, token: int) -> int:
        """Return the end of the last base candle that Kite's history certainly has, market epoch seconds.

        After the close every candle is complete.
        """
        now_ms = int(self.clock()) - HISTORY_LAG_SECONDS * 1000
        day = self._day(token, now_ms)
        is_over = now_ms // 1000 >= bucket_end_s(day, 0, 0)
        return now_ms // 1000 if is_over else bucket_start_s(day, self._step_s, now_ms)

    def span_s(self, token: int, from_ms: float, to_ms: float) -> tuple[int, int]:
        """Return first start and last end of the base candles that [from_ms, to_ms) touches, epoch seconds.

        The end is earlier than the start if the session was over.
        """
        first, last = int(from_ms), max(int(from_ms), ceil(to_ms) - 1)
        day = self._day(token, last)
        end_s = bucket_end_s(day, self._step_s, bucket_start_s(day, self._step_s, last))
        return bucket_start_s(self._day(token, first), self._step_s, first), end_s

    def seconds_until_known(self, to_s: int) -> float:
        """Return the machine's seconds until Kite's history has everything before `to_s`."""
        missing_ms = (to_s + HISTORY_LAG_SECONDS) * 1000 - self.clock()
        return max(0.0, self.clock.real_seconds(missing_ms))

    def schedule_of(self, token: int) -> int:
        """Return the number of the instrument's trading schedule."""
        return self.sessions.schedule_of(token)

    def kept_since_s(self, token: int) -> int:
        """Return the open of the session of the oldest row that the base list may hold, epoch seconds."""
        needed_ms: float = self.base.keep * self._step_s * 1000
        schedule, now_ms = self.schedule_of(token), self.clock()
        local = self.sessions.date_of(int(now_ms))
        while True:
            windows = self.sessions.on_date(schedule, local).windows
            needed_ms -= sum(min(closed, now_ms) - opened for opened, closed in windows if opened < now_ms)
            if needed_ms <= 0 and windows:
                return windows[0][0] // 1000
            earlier = self.sessions.session_near(schedule, local, -1)
            if earlier is None:
                return 0
            local = earlier

    def session_s(self, token: int, local: date) -> tuple[int, int]:
        """Return first open and last close of a date, epoch seconds; equal values on a closed day."""
        day = self.sessions.on_date(self.schedule_of(token), local)
        if not day.windows:
            return day.day_start_ms // 1000, day.day_start_ms // 1000
        return day.windows[0][0] // 1000, day.windows[-1][1] // 1000

    def last_session(self, token: int) -> date:
        """Return today once its first candle is complete, else the previous session's date."""
        local = self.sessions.date_of(int(self.clock()))
        opened, closed = self.session_s(token, local)
        if opened < closed and opened < self.known_until_s(token):
            return local
        return self.sessions.session_near(self.schedule_of(token), local, -1) or local

    def by_activity(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens, indices first, then by the value traded today: watched ones come first."""
        weights: dict[int, float] = {}
        for first in range(0, len(tokens), QUOTES_AT_ONCE):
            chunk = tokens[first : first + QUOTES_AT_ONCE]
            pipeline = self.client.pipeline(transaction=False)
            for token in chunk:
                pipeline.hmget(self.keys.quote(token), ["volume", "average_price"])
            for token, reply in zip(chunk, pipeline.execute(raise_on_error=False), strict=True):
                weights[token] = _traded(reply)
        return sorted(
            dict.fromkeys(tokens), key=lambda token: (token & 0xFF != SEGMENT_INDICES, -weights[token])
        )

    def _day(self, token: int, time_ms: int) -> Day:
        return self.sessions.day(self.schedule_of(token), time_ms)

    @property
    def _step_s(self) -> int:
        return self.base.seconds or 60


@contextmanager
def open_job_context(settings: Settings | None = None) -> Iterator[JobContext]:
    """Open a context on the configured store.

    Raises:
        PkbError: settings, Redis or the calendar cannot be used.
    """
    settings = settings or load_settings()
    client = connect(settings)
    try:
        settings = adopt_meta(client, settings)
        sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
        read_hours(client, settings.keys, sessions)
        with KiteTickerHistory(settings=settings, client=client) as history:
            yield JobContext(settings, client, history, sessions, market_clock(settings))
    finally:
        client.close()


def _traded(reply: Any) -> float:
    """Return volume × average price of a quote, 0 without one."""
    try:
        volume, price = (float(cell or 0) for cell in reply)
    except (TypeError, ValueError):
        return 0.0
    return volume * price
