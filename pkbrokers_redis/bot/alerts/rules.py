"""When an alert fires. Pure: ticks in, a sentence out; what is remembered goes to Redis and comes back.

A tick is a statement as of `(time_ms, volume)`. One that is older than the last one seen (a producer's
repeat, a straggler) is passed over, so that a replay after a restart cannot cross a level again.

    level    armed while the price is on the other side. above: armed at price < level, fires at price ≥ level
    move     fires at ± so many percent of the reference, which is then the price it fired at
    volume   fires once when the running minute's volume reaches so many times the average of the last 20
             minutes; armed again by a minute that stays below
    high     fires at a new extreme of the day; armed again once the price came back by 0.25 %
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pkbrokers_redis.bot.alerts.model import Alert, Kind
from pkbrokers_redis.bot.text import count, money, percent
from pkbrokers_redis.candles.calendar import IST_MS
from pkbrokers_redis.candles.model import FUTURE_MAX_MS, TIME_MAX_MS, TIME_MIN_MS

MINUTE_MS = 60_000
DAY_MS = 86_400_000
MINUTES_AVERAGED = 20
MINUTES_NEEDED = 5  # below it there is no usual volume to compare with
COME_BACK_PART = 0.0025
NEARLY = 1e-9  # of a price: 102.00 is 2 % above 100.00 whatever the last bit says


class Watch(ABC):
    """One alert and what it remembers: `state()` is JSON, `Watch(alert, state)` goes on from it."""

    def __init__(self, alert: Alert, state: Sequence[Any] = ()) -> None:
        self.alert = alert
        self.dirty = not state
        self._time, self._volume = 0.0, 0.0
        if len(state) >= 2:
            self._time, self._volume = float(state[0]), float(state[1])
            self.restore(list(state[2:]))

    def state(self) -> list[Any]:
        """`[time_ms, volume, …]`, the … by kind."""
        return [self._time, self._volume, *self.remembered()]

    def tick(
        self, price: float, volume: float, day_high: float, day_low: float, time_ms: float
    ) -> str | None:
        """One tick, NaN where a packet has no such field. What happened, where the alert fires."""
        if math.isnan(volume):  # an index: only its time tells
            volume = self._volume
        if time_ms < self._time or (time_ms == self._time and volume < self._volume):
            return None
        told = self.see(price, volume, day_high, day_low, time_ms)
        self._time, self._volume = time_ms, volume
        self.dirty = True
        return told

    # by kind

    @abstractmethod
    def see(self, price: float, volume: float, day_high: float, day_low: float, time_ms: float) -> str | None:
        """One tick in order: a sentence where the alert fires."""

    @abstractmethod
    def remembered(self) -> list[Any]:
        """What `restore` gets back, as JSON."""

    @abstractmethod
    def restore(self, cells: list[Any]) -> None:
        """Go on from what was remembered. Raises what a foreign hand's cells raise."""


class Level(Watch):
    """above, below, cross: `[armed_up, armed_down]`."""

    def __init__(self, alert: Alert, state: Sequence[Any] = ()) -> None:
        self._up = self._down = False
        super().__init__(alert, state)

    def restore(self, cells: list[Any]) -> None:
        self._up, self._down = bool(cells[0]), bool(cells[1])

    def remembered(self) -> list[Any]:
        return [self._up, self._down]

    def see(self, price: float, volume: float, day_high: float, day_low: float, time_ms: float) -> str | None:
        level, kind = self.alert.value, self.alert.kind
        told = None
        if self._up and price >= level and kind != "below":
            told = f"rose to {money(price)}, {'above' if kind == 'above' else 'across'} {money(level)}"
        elif self._down and price <= level and kind != "above":
            told = f"fell to {money(price)}, {'below' if kind == 'below' else 'across'} {money(level)}"
        self._up, self._down = price < level, price > level
        return told


class Move(Watch):
    """move: `[reference]`, 0 before the first tick."""

    def __init__(self, alert: Alert, state: Sequence[Any] = ()) -> None:
        self._reference = 0.0
        super().__init__(alert, state)

    def restore(self, cells: list[Any]) -> None:
        self._reference = float(cells[0])

    def remembered(self) -> list[Any]:
        return [self._reference]

    def see(self, price: float, volume: float, day_high: float, day_low: float, time_ms: float) -> str | None:
        reference = self._reference
        if reference <= 0:
            self._reference = price
            return None
        moved = (price / reference - 1) * 100
        if abs(moved) < self.alert.value * (1 - NEARLY) - NEARLY:
            return None
        self._reference = price
        return f"moved {percent(moved)} to {money(price)}, from {money(reference)}"


class Volume(Watch):
    """volume: `[minute, volume at its start, is hot, finished minutes' volumes]`."""

    def __init__(self, alert: Alert, state: Sequence[Any] = ()) -> None:
        self._minute, self._base, self._hot = -1, 0.0, False
        self._minutes: list[float] = []
        super().__init__(alert, state)

    def restore(self, cells: list[Any]) -> None:
        self._minute, self._base, self._hot = int(cells[0]), float(cells[1]), bool(cells[2])
        self._minutes = [float(cell) for cell in cells[3]][-MINUTES_AVERAGED:]

    def remembered(self) -> list[Any]:
        return [self._minute, self._base, self._hot, self._minutes]

    def see(self, price: float, volume: float, day_high: float, day_low: float, time_ms: float) -> str | None:
        minute = int(time_ms // MINUTE_MS)
        if self._minute < 0:
            self._minute, self._base = minute, volume
            return None
        if minute > self._minute:
            self._roll(minute, _day(time_ms) != _day(self._time))
        if len(self._minutes) < MINUTES_NEEDED or self._hot:
            return None
        usual = sum(self._minutes) / len(self._minutes)
        traded = volume - self._base
        if usual <= 0 or traded < usual * self.alert.value:
            return None
        self._hot = True
        return f"traded {count(traded)} in this minute, {traded / usual:.1f}× the usual, at {money(price)}"

    def _roll(self, minute: int, is_new_day: bool) -> None:
        """The last minute is over, and those without a trade after it."""
        traded = self._volume - self._base
        usual = sum(self._minutes) / len(self._minutes) if self._minutes else 0.0
        if self._hot and (traded < usual * self.alert.value or is_new_day):
            self._hot = False
        quiet = 0 if is_new_day else min(minute - self._minute - 1, MINUTES_AVERAGED)
        if quiet:
            self._hot = False
        self._minutes = [*self._minutes, traded, *([0.0] * quiet)][-MINUTES_AVERAGED:]
        # A new day's volume counts from 0.
        self._minute, self._base = minute, 0.0 if is_new_day else self._volume


class Extreme(Watch):
    """high, low: `[day, extreme, armed]`."""

    def __init__(self, alert: Alert, state: Sequence[Any] = ()) -> None:
        self._on, self._extreme, self._armed = -1, 0.0, True
        super().__init__(alert, state)

    def restore(self, cells: list[Any]) -> None:
        self._on, self._extreme, self._armed = int(cells[0]), float(cells[1]), bool(cells[2])

    def remembered(self) -> list[Any]:
        return [self._on, self._extreme, self._armed]

    def see(self, price: float, volume: float, day_high: float, day_low: float, time_ms: float) -> str | None:
        sign = 1.0 if self.alert.kind == "high" else -1.0
        field = day_high if sign > 0 else day_low
        # The packet's own day field has what happened between two ticks.
        now = price if math.isnan(field) or field <= 0 else sign * max(sign * field, sign * price)
        if _day(time_ms) != self._on:
            self._on, self._extreme, self._armed = _day(time_ms), now, True
            return None
        if sign * now > sign * self._extreme:
            before, self._extreme = self._extreme, now
            if self._armed:
                self._armed = False
                return f"made a new day {self.alert.kind}: {money(now)}, after {money(before)}"
        elif sign * price <= sign * self._extreme - COME_BACK_PART * self._extreme:
            self._armed = True
        return None


# Every kind but `feed`, which no tick decides: see `feed.py`.
RULES: dict[Kind, type[Level | Move | Volume | Extreme]] = {
    "above": Level, "below": Level, "cross": Level, "move": Move, "volume": Volume,
    "high": Extreme, "low": Extreme,
}  # fmt: skip


def watch_of(alert: Alert, state: Sequence[Any] = ()) -> Watch:
    """The rule of an alert's kind, going on from a remembered state; anew where that is not readable."""
    rule = RULES[alert.kind]
    try:
        return rule(alert, state)
    except (ValueError, TypeError, IndexError):  # a foreign hand's
        return rule(alert)


def first_state(alert: Alert, quote: dict[str, Any], minutes: Sequence[float]) -> list[Any]:
    """What an alert remembers when it is set: the quote of that moment is its first tick.

    So a crossing by the very next tick is one. `minutes` are the volumes of the last whole minutes. Empty
    where there is no quote yet: then the first tick begins.
    """
    price, volume = quote.get("last_price"), quote.get("volume") or 0
    time_ms = _time_of(quote)
    if not isinstance(price, float) or not isinstance(volume, int) or not time_ms:
        return []
    watch = watch_of(alert)
    high, low = (
        float(each) if isinstance(each := quote.get(name), float) else math.nan for name in ("high", "low")
    )
    watch.tick(price, float(volume), high, low, time_ms)
    cells = watch.state()
    if isinstance(watch, Volume):
        # Its first minute is not whole for us, but the minutes before it are known.
        cells[-1] = [float(each) for each in minutes][-MINUTES_AVERAGED:]
    return cells


def trade_time(time_ms: float, at_ms: float) -> float:
    """The time a tick counts for, as the aggregator has it: its receipt's where its own is still to come."""
    return at_ms if at_ms >= TIME_MIN_MS and time_ms > at_ms + FUTURE_MAX_MS else time_ms


def _time_of(quote: dict[str, Any]) -> float:
    """When the quote's trade was, as the tick rows have it. 0: unknown.

    An index has no last trade, and modes `ltp` and `quote` only the time of their receipt.
    """
    received = _milliseconds(quote.get("received_at"))
    stated = _milliseconds(quote.get("last_trade_time")) or _milliseconds(quote.get("exchange_time"))
    return trade_time(stated or received, received)


def _milliseconds(text: Any) -> float:
    """Epoch ms of an ISO text; 0 for what is no time of a tick."""
    try:
        time_ms = datetime.fromisoformat(str(text)).timestamp() * 1000
    except (ValueError, OverflowError, OSError):
        return 0.0
    return time_ms if TIME_MIN_MS <= time_ms < TIME_MAX_MS else 0.0


def _day(time_ms: float) -> int:
    return int((time_ms + IST_MS) // DAY_MS)
