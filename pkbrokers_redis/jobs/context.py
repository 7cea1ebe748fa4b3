"""What jobs on candles work with: settings, the store, Kite's history, the calendar, market time.

    with open_desk() as desk:
        rows = desk.history.rows(408065, "1m", *desk.span_s(408065, from_ms, to_ms))

A job is a process of its own and opens everything anew; tests and commands hand in what they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
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
from pkbrokers_redis.store.instruments import load_derivative_tokens
from pkbrokers_redis.store.meta import adopt_meta

HISTORY_LAG_SECONDS = 5  # market time after a minute's end until Kite's history is sure to have it
QUOTES_AT_ONCE = 1_000

log = logs.get("jobs")


@dataclass
class Desk:
    """One job's tools. `settings` are the store's own (shards, intervals)."""

    settings: Settings
    client: redis.Redis
    history: KiteTickerHistory
    sessions: Sessions
    clock: Clock = field(default_factory=Clock)

    @property
    def keys(self) -> Keys:
        """Key names."""
        return self.settings.keys

    @property
    def base(self) -> Interval:
        """The shortest interval: the one whose rows mend all longer ones."""
        return self.settings.intervals[0]

    def known_until_s(self, token: int) -> int:
        """The end of the instrument's last base candle that Kite's history is sure to have; epoch seconds,
        market time. After the close all are over."""
        now_ms = int(self.clock()) - HISTORY_LAG_SECONDS * 1000
        day = self._day(token, now_ms)
        is_over = now_ms // 1000 >= bucket_end_s(day, 0, 0)
        return now_ms // 1000 if is_over else bucket_start_s(day, self._step_s, now_ms)

    def span_s(self, token: int, from_ms: float, to_ms: float) -> tuple[int, int]:
        """The instrument's base candles that [from_ms, to_ms) touches: their first start and last end, epoch
        seconds. The end is before the start where the session was over."""
        first, last = int(from_ms), max(int(from_ms), ceil(to_ms) - 1)
        day = self._day(token, last)
        end_s = bucket_end_s(day, self._step_s, bucket_start_s(day, self._step_s, last))
        return bucket_start_s(self._day(token, first), self._step_s, first), end_s

    def seconds_until_known(self, to_s: int) -> float:
        """How long the machine must wait until Kite's history has everything before `to_s`."""
        missing_ms = (to_s + HISTORY_LAG_SECONDS) * 1000 - self.clock()
        return max(0.0, self.clock.real_seconds(missing_ms))

    def schedule_of(self, token: int) -> int:
        """The instrument's trading hours."""
        return self.sessions.schedule_of(token, token in self._derivatives)

    def kept_since_s(self, token: int) -> int:
        """How far back the base list may reach: the open of the session that its oldest row is in."""
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
        """First open and last close of a date, epoch seconds; an empty span on a closed day."""
        day = self.sessions.on_date(self.schedule_of(token), local)
        if not day.windows:
            return day.day_start_ms // 1000, day.day_start_ms // 1000
        return day.windows[0][0] // 1000, day.windows[-1][1] // 1000

    def last_session(self, token: int) -> date:
        """Today once its first candle is over, else the session before it."""
        local = self.sessions.date_of(int(self.clock()))
        opened, closed = self.session_s(token, local)
        if opened < closed and opened < self.known_until_s(token):
            return local
        return self.sessions.session_near(self.schedule_of(token), local, -1) or local

    def by_activity(self, tokens: Sequence[int]) -> list[int]:
        """Indices first, then what is traded most today: what people look at is mended first."""
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

    @cached_property
    def _derivatives(self) -> set[int]:
        return load_derivative_tokens(self.client, self.keys)

    def _day(self, token: int, time_ms: int) -> Day:
        return self.sessions.day(self.schedule_of(token), time_ms)

    @property
    def _step_s(self) -> int:
        return self.base.seconds or 60


@contextmanager
def open_desk(settings: Settings | None = None) -> Iterator[Desk]:
    """A desk on the configured store. Raises what opening it raises: one line each."""
    settings = settings or load_settings()
    client = connect(settings)
    try:
        settings = adopt_meta(client, settings)
        sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
        with KiteTickerHistory(settings=settings, client=client) as history:
            yield Desk(settings, client, history, sessions, market_clock(settings))
    finally:
        client.close()


def _traded(reply: Any) -> float:
    """Volume × average price of a quote; 0 where there is none."""
    try:
        volume, price = (float(cell or 0) for cell in reply)
    except (TypeError, ValueError):
        return 0.0
    return volume * price
