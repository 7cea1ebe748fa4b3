"""When an alert fires. Pure: ticks in, a sentence out; what a rule remembers is JSON in Redis.

A tick that is older than the last one (a producer's repeat, a late tick) is skipped, so that a replay after a
restart cannot cross a level again.

    /alert INFY above 1600    armed while price < level; fires at price ≥ level
    /alert INFY below 1500    the mirror image
    /alert INFY 1550          crosses the level, either way
    /alert INFY move 2%       fires at ± 2 % of the reference price, which then becomes the price it fired at
    /alert INFY volume 5x     fires when the running minute reaches 5 times the average of the last 20;
                              armed again by a minute below that
    /alert INFY high          fires at a new high (low) of the day; armed again after a pullback of 0.25 %
    /alert feed 30            no tick of any instrument for 30 seconds while the market is open
    … once                    deleted after it fired
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

import msgspec

from pkbrokers_redis.bot.text import count, money, percent
from pkbrokers_redis.candles.calendar import IST_MS
from pkbrokers_redis.candles.model import FUTURE_MAX_MS, TIME_MAX_MS, TIME_MIN_MS
from pkbrokers_redis.errors import PkbError

Kind = Literal["above", "below", "cross", "move", "volume", "high", "low", "feed"]

USAGE = (
    "/alert INFY above 1600 · below 1500 · 1550 · move 2% · volume 5x · high · low; /alert feed 30; "
    "add `once`"
)
PRICE_MIN, PRICE_MAX = 0.0001, 1e9
MINUTE_MS = 60_000
DAY_MS = 86_400_000
MINUTES_AVERAGED = 20
MINUTES_NEEDED = 5  # with fewer minutes there is no average to compare with
PULLBACK_PART = 0.0025
ROUNDING_PART = 1e-9  # 102.00 is 2 % above 100.00 in spite of binary fractions


class Alert(msgspec.Struct, frozen=True):
    """One alert. `value` is rupees, percent, a multiple or seconds, by kind; 0 for high and low.

    `token` is 0 for the feed. `since` is when it was set, epoch seconds.
    """

    id: int
    chat_id: int
    user_id: int
    token: int
    symbol: str
    kind: Kind
    value: float
    once: bool
    since: float

    @property
    def condition(self) -> str:
        """Return `above 1,600.00`, in plain text."""
        return FORMS[self.kind].describe(self.value) + (", once" if self.once else "")


class AlertTick(NamedTuple):
    """The fields of a tick that rules use; a missing day high or low is NaN."""

    price: float
    volume: float
    day_high: float
    day_low: float
    time_ms: float


class Rule(msgspec.Struct, array_like=True):
    """What an alert remembers, as a JSON array: time and volume of the last tick, then by kind."""

    time_ms: float = 0.0
    volume: float = 0.0

    def apply(self, alert: Alert, tick: AlertTick) -> str | None:
        """Apply a tick in order; return a sentence when the alert fires. No tick decides about the feed."""
        return None


class Level(Rule, array_like=True):
    """above, below, cross: on which side of the level the last price was."""

    was_below: bool = False
    was_above: bool = False

    def apply(self, alert: Alert, tick: AlertTick) -> str | None:
        price, level, kind = tick.price, alert.value, alert.kind
        sentence = None
        if self.was_below and price >= level and kind != "below":
            sentence = f"rose to {money(price)}, {'above' if kind == 'above' else 'across'} {money(level)}"
        elif self.was_above and price <= level and kind != "above":
            sentence = f"fell to {money(price)}, {'below' if kind == 'below' else 'across'} {money(level)}"
        self.was_below, self.was_above = price < level, price > level
        return sentence


class Move(Rule, array_like=True):
    """move: the reference price, 0 before the first tick."""

    reference: float = 0.0

    def apply(self, alert: Alert, tick: AlertTick) -> str | None:
        reference = self.reference
        if reference <= 0:
            self.reference = tick.price
            return None
        moved = (tick.price / reference - 1) * 100
        if abs(moved) < alert.value * (1 - ROUNDING_PART) - ROUNDING_PART:
            return None
        self.reference = tick.price
        return f"moved {percent(moved)} to {money(tick.price)}, from {money(reference)}"


class Volume(Rule, array_like=True):
    """volume: the running minute, and the volumes of finished minutes."""

    minute: int = -1
    volume_at_start: float = 0.0
    has_fired: bool = False
    finished_minutes: list[float] = msgspec.field(default_factory=list)

    def apply(self, alert: Alert, tick: AlertTick) -> str | None:
        minute = int(tick.time_ms // MINUTE_MS)
        if self.minute < 0:
            self.minute, self.volume_at_start = minute, tick.volume
            return None
        if minute > self.minute:
            self._finish_minute(alert, minute, _day(tick.time_ms) != _day(self.time_ms))
        if len(self.finished_minutes) < MINUTES_NEEDED or self.has_fired:
            return None
        average = self._average()
        traded = tick.volume - self.volume_at_start
        if average <= 0 or traded < average * alert.value:
            return None
        self.has_fired = True
        times = f"{traded / average:.1f}× the usual"
        return f"traded {count(traded)} in this minute, {times}, at {money(tick.price)}"

    def _average(self) -> float:
        minutes = self.finished_minutes
        return sum(minutes) / len(minutes) if minutes else 0.0

    def _finish_minute(self, alert: Alert, minute: int, is_new_day: bool) -> None:
        """Store the last minute's volume, and 0 for minutes without a trade after it."""
        traded = self.volume - self.volume_at_start
        empty = 0 if is_new_day else min(minute - self.minute - 1, MINUTES_AVERAGED)
        if is_new_day or empty or traded < self._average() * alert.value:
            self.has_fired = False
        self.finished_minutes = [*self.finished_minutes, traded, *([0.0] * empty)][-MINUTES_AVERAGED:]
        # A new day's volume starts at 0.
        self.minute, self.volume_at_start = minute, 0.0 if is_new_day else self.volume


class Extreme(Rule, array_like=True):
    """high, low: the day's extreme so far."""

    day: int = -1
    extreme: float = 0.0
    is_armed: bool = True

    def apply(self, alert: Alert, tick: AlertTick) -> str | None:
        sign = 1.0 if alert.kind == "high" else -1.0
        field = tick.day_high if sign > 0 else tick.day_low
        # The packet's own day field includes trades between two ticks.
        has_field = not math.isnan(field) and field > 0
        now = sign * max(sign * field, sign * tick.price) if has_field else tick.price
        if _day(tick.time_ms) != self.day:
            self.day, self.extreme, self.is_armed = _day(tick.time_ms), now, True
            return None
        if sign * now > sign * self.extreme:
            before, self.extreme = self.extreme, now
            if self.is_armed:
                self.is_armed = False
                return f"made a new day {alert.kind}: {money(now)}, after {money(before)}"
        elif sign * tick.price <= sign * self.extreme - PULLBACK_PART * self.extreme:
            self.is_armed = True
        return None


class FeedSilence(Rule, array_like=True):
    """feed: whether the silence was reported, see `FeedMonitor.check`."""

    is_reported: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    """How one kind is typed: `SYMBOL word number`, or `SYMBOL word` where `maximum` is 0.

    `describe` turns the number into the text after the symbol. `unit` may follow the typed number.
    """

    rule: type[Rule]
    words: tuple[str, ...]
    describe: Callable[[float], str]
    minimum: float = 0.0
    maximum: float = 0.0
    unit: str = ""


def _level(words: tuple[str, ...]) -> Form:
    return Form(Level, words, lambda price: f"{words[0]} {money(price)}", PRICE_MIN, PRICE_MAX)


FORMS: dict[Kind, Form] = {
    "above": _level(("above", "over", ">=", ">")),
    "below": _level(("below", "under", "<=", "<")),
    "cross": _level(("crosses", "cross", "at")),
    "move": Form(Move, ("moves", "move"), lambda percent: f"moves {percent:g} %", 0.05, 100.0, "%"),
    "volume": Form(Volume, ("volume",), lambda times: f"volume {times:g}×", 1.1, 1000.0, "x"),
    "high": Form(Extreme, ("high",), lambda _: "new day high"),
    "low": Form(Extreme, ("low",), lambda _: "new day low"),
    "feed": Form(FeedSilence, ("feed",), lambda s: f"feed silent for {count(s)} s", 5.0, 3600.0, "s"),
}
WORDS = {word: kind for kind, form in FORMS.items() if form.maximum for word in form.words if kind != "feed"}
# Symbols can have blanks (NIFTY 50), so the condition is at the end.
NUMBERED = re.compile(rf"(.+?) (?:({'|'.join(WORDS)}) ?)?(\S+)", re.IGNORECASE)
EXTREME = re.compile(r"(.+) (high|low)", re.IGNORECASE)
FEED = re.compile(r"feed(?: (\S+))?", re.IGNORECASE)


def parse(words: Sequence[str]) -> Alert:
    """Return the alert that the words after `/alert` describe, without ids. Raise PkbError."""
    once = bool(words) and words[-1].lower() == "once"
    text = " ".join(words[:-1] if once else words)
    kind: Kind
    if match := FEED.fullmatch(text):
        symbol, kind, number = "", "feed", match[1] or "30"
    elif match := EXTREME.fullmatch(text):
        kind = "high" if match[2].lower() == "high" else "low"
        return Alert(0, 0, 0, 0, match[1], kind, 0.0, once, 0.0)
    elif match := NUMBERED.fullmatch(text):
        symbol, word, number = match.groups()
        kind = WORDS[word.lower()] if word else "move" if number.endswith("%") else "cross"
    else:
        raise PkbError("that is not an alert", USAGE)
    return Alert(0, 0, 0, 0, symbol, kind, _number(number, kind), once, 0.0)


def _number(text: str, kind: Kind) -> float:
    """Return `1,600.50`, `2%`, `5x` or `30s` as a number within the kind's bounds. Raise PkbError."""
    form = FORMS[kind]
    plain = text.lower().replace(",", "").replace("₹", "")
    if form.unit:
        plain = plain.removesuffix(form.unit).removesuffix("×")
    try:
        value = abs(float(plain)) if form.unit == "%" else float(plain)  # -2% moves as far as 2%
    except ValueError:
        value = math.nan
    if not form.minimum <= value <= form.maximum:
        raise PkbError(f"{text[:20]!r} is not a number from {form.minimum:g} to {form.maximum:g}", USAGE)
    return value


class Watch:
    """An alert with what it remembers. `is_dirty` when Redis does not have that yet."""

    def __init__(self, alert: Alert, state: Sequence[Any] = ()) -> None:
        """Resume from a state of Redis; start fresh when there is none or it is malformed."""
        rule = FORMS[alert.kind].rule
        self.alert = alert
        self.is_dirty = not state
        try:
            self.memory = msgspec.convert(list(state), rule)
        except msgspec.ValidationError:
            self.memory = rule()

    def state(self) -> list[Any]:
        """Return what to store in Redis."""
        cells: list[Any] = msgspec.to_builtins(self.memory)
        return cells

    def tick(
        self, price: float, volume: float, day_high: float, day_low: float, time_ms: float
    ) -> str | None:
        """Apply one tick; return a sentence when the alert fires. A missing field is NaN."""
        memory = self.memory
        if math.isnan(volume):  # an index has no volume
            volume = memory.volume
        if time_ms < memory.time_ms or (time_ms == memory.time_ms and volume < memory.volume):
            return None
        sentence = memory.apply(self.alert, AlertTick(price, volume, day_high, day_low, time_ms))
        memory.time_ms, memory.volume = time_ms, volume
        self.is_dirty = True
        return sentence


def first_state(alert: Alert, quote: dict[str, Any], minute_volumes: Sequence[float]) -> list[Any]:
    """Return an alert's state with the current quote as its first tick, so that the next tick can cross.

    It is empty when `quote` (of `get_quote`) has no price or time. `minute_volumes` are those of the last
    completed minutes, oldest first.
    """
    price, volume, time_ms = quote.get("last_price"), quote.get("volume") or 0, _quote_time(quote)
    if not isinstance(price, float) or not isinstance(volume, int) or not time_ms:
        return []
    watch = Watch(alert)
    high, low = (cell if isinstance(cell := quote.get(name), float) else math.nan for name in ("high", "low"))
    watch.tick(price, float(volume), high, low, time_ms)
    if isinstance(watch.memory, Volume):
        watch.memory.finished_minutes = [float(traded) for traded in minute_volumes][-MINUTES_AVERAGED:]
    return watch.state()


def trade_time(time_ms: float, received_ms: float) -> float:
    """Return the time a tick counts for, as in the aggregator: a time in the future counts as received."""
    is_future = received_ms >= TIME_MIN_MS and time_ms > received_ms + FUTURE_MAX_MS
    return received_ms if is_future else time_ms


def _quote_time(quote: dict[str, Any]) -> float:
    """Return the time of the quote's trade, else of its receipt, epoch ms; 0 when unknown."""
    names = ("received_at", "last_trade_time", "exchange_time")
    received, traded, exchange = (_parse_time(quote.get(name)) for name in names)
    return trade_time(traded or exchange or received, received)


def _parse_time(text: Any) -> float:
    """Return an ISO text as epoch ms; 0 when it is not a possible time of a tick."""
    try:
        time_ms = datetime.fromisoformat(str(text)).timestamp() * 1000
    except (ValueError, OverflowError, OSError):
        return 0.0
    return time_ms if TIME_MIN_MS <= time_ms < TIME_MAX_MS else 0.0


def _day(time_ms: float) -> int:
    return int((time_ms + IST_MS) // DAY_MS)
