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
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec

from pkbrokers_redis.bot.context import UsageError
from pkbrokers_redis.bot.text import count, money, percent
from pkbrokers_redis.candles.calendar import IST_MS
from pkbrokers_redis.candles.model import FUTURE_MAX_MS, TIME_MAX_MS, TIME_MIN_MS

Kind = Literal["above", "below", "cross", "move", "volume", "high", "low", "feed"]

USAGE = (
    "/alert INFY above 1600 · below 1500 · 1550 · move 2% · volume 5x · high · low; /alert feed 30; "
    "add `once`"
)
PRICE_MIN, PRICE_MAX = 0.0001, 1e9
FEED_SECONDS = 30.0  # of `/alert feed` without a number
MINUTE_MS = 60_000
DAY_MS = 86_400_000
MINUTES_AVERAGED = 20
MINUTES_NEEDED = 5  # with fewer minutes there is no average to compare with
PULLBACK_PART = 0.0025
ROUNDING_PART = 1e-9  # 102.00 is 2 % above 100.00 in spite of binary fractions


@dataclass(frozen=True, slots=True)
class Form:
    """How one kind is typed: `SYMBOL word number`, or `SYMBOL word` where `maximum` is 0.

    `describe` turns the number into the text after the symbol. `unit` may follow the typed number.
    """

    words: tuple[str, ...]
    describe: Callable[[float], str]
    minimum: float = 0.0
    maximum: float = 0.0
    unit: str = ""


FORMS: dict[Kind, Form] = {
    "above": Form(("above", "over", ">", ">="), lambda price: f"above {money(price)}", PRICE_MIN, PRICE_MAX),
    "below": Form(("below", "under", "<", "<="), lambda price: f"below {money(price)}", PRICE_MIN, PRICE_MAX),
    "cross": Form(("cross", "crosses", "at"), lambda price: f"crosses {money(price)}", PRICE_MIN, PRICE_MAX),
    "move": Form(("move", "moves"), lambda percent: f"moves {percent:g} %", 0.05, 100.0, "%"),
    "volume": Form(("volume",), lambda times: f"volume {times:g}×", 1.1, 1000.0, "x"),
    "high": Form(("high",), lambda _: "new day high"),
    "low": Form(("low",), lambda _: "new day low"),
    "feed": Form(("feed",), lambda seconds: f"feed silent for {count(seconds)} s", 5.0, 3600.0, "s"),
}
WORDS = {word: kind for kind, form in FORMS.items() for word in form.words}


class ParsedAlert(msgspec.Struct, frozen=True):
    """What a person typed, before the symbol is resolved."""

    symbol: str
    kind: Kind
    value: float
    once: bool


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


def parse(words: Sequence[str]) -> ParsedAlert:
    """Return the alert that the words after `/alert` describe. Raise UsageError when they do not."""
    rest = list(words)
    once = len(rest) > 1 and rest[-1].lower() == "once"
    if once:
        rest.pop()
    if rest and rest[0].lower() == "feed" and len(rest) <= 2:
        return ParsedAlert("", "feed", _number(rest[1], "feed") if len(rest) == 2 else FEED_SECONDS, once)
    # Symbols can have blanks (NIFTY 50), so the condition is at the end.
    kind = WORDS.get(rest[-2].lower()) if len(rest) >= 3 else None
    if kind is not None and kind != "feed" and FORMS[kind].maximum:
        return ParsedAlert(" ".join(rest[:-2]), kind, _number(rest[-1], kind), once)
    if len(rest) >= 2:
        symbol, last = " ".join(rest[:-1]), rest[-1].lower()
        if (word := WORDS.get(last)) is not None and not FORMS[word].maximum:
            return ParsedAlert(symbol, word, 0.0, once)
        if last.endswith("%"):
            return ParsedAlert(symbol, "move", _number(last, "move"), once)
        if joined := re.fullmatch(r"([<>])=?(.+)", last):
            return ParsedAlert(symbol, WORDS[joined[1]], _number(joined[2], WORDS[joined[1]]), once)
        if word is None:
            return ParsedAlert(symbol, "cross", _number(last, "cross"), once)
    raise UsageError("that is not an alert", USAGE)


def _number(text: str, kind: Kind) -> float:
    """Return `1,600.50`, `2%`, `5x` or `30s` as a number within the kind's bounds. Raise UsageError."""
    form = FORMS[kind]
    plain = text.lower().replace(",", "").replace("₹", "")
    if form.unit:
        plain = plain.removesuffix(form.unit).removesuffix("×")
    try:
        value = abs(float(plain)) if form.unit == "%" else float(plain)  # -2% moves as far as 2%
    except ValueError:
        value = math.nan
    if not form.minimum <= value <= form.maximum:
        raise UsageError(f"{text[:20]!r} is not a number from {form.minimum:g} to {form.maximum:g}", USAGE)
    return value


class AlertTick(NamedTuple):
    """The fields of a tick that rules use; a missing day high or low is NaN."""

    price: float
    volume: float
    day_high: float
    day_low: float
    time_ms: float


class Rule(msgspec.Struct, array_like=True):
    """What an alert remembers, as a JSON array: `[time_ms, volume, …]` of the last tick, then by kind."""

    START: ClassVar[tuple[Any, ...]]
    time_ms: float
    volume: float

    @abstractmethod
    def apply(self, alert: Alert, tick: AlertTick) -> str | None:
        """Apply a tick in order; return a sentence when the alert fires."""


class Level(Rule, array_like=True):
    """above, below, cross: on which side of the level the last price was."""

    START = (0.0, 0.0, False, False)
    was_below: bool
    was_above: bool

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

    START = (0.0, 0.0, 0.0)
    reference: float

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

    START = (0.0, 0.0, -1, 0.0, False, [])
    minute: int
    volume_at_start: float
    has_fired: bool
    finished_minutes: list[float]

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
        if traded < self._average() * alert.value or is_new_day:
            self.has_fired = False
        empty = 0 if is_new_day else min(minute - self.minute - 1, MINUTES_AVERAGED)
        if empty:
            self.has_fired = False
        self.finished_minutes = [*self.finished_minutes, traded, *([0.0] * empty)][-MINUTES_AVERAGED:]
        # A new day's volume starts at 0.
        self.minute, self.volume_at_start = minute, 0.0 if is_new_day else self.volume


class Extreme(Rule, array_like=True):
    """high, low: the day's extreme so far."""

    START = (0.0, 0.0, -1, 0.0, True)
    day: int
    extreme: float
    is_armed: bool

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


class FeedSilence(msgspec.Struct, array_like=True):
    """feed: whether the silence was reported. No tick decides it, see `worker.py`."""

    START: ClassVar[tuple[Any, ...]] = (False,)
    is_reported: bool


RULES: dict[Kind, type[Level | Move | Volume | Extreme | FeedSilence]] = {
    "above": Level, "below": Level, "cross": Level, "move": Move, "volume": Volume,
    "high": Extreme, "low": Extreme, "feed": FeedSilence,
}  # fmt: skip


class Watch:
    """An alert with what it remembers. `is_dirty` when Redis does not have that yet."""

    def __init__(self, alert: Alert, state: Sequence[Any] = ()) -> None:
        """Resume from a state of Redis; start fresh when there is none or it is malformed."""
        rule = RULES[alert.kind]
        self.alert = alert
        self.is_dirty = not state
        try:
            self.memory = msgspec.convert(list(state or rule.START), rule)
        except msgspec.ValidationError:
            self.memory = msgspec.convert(list(rule.START), rule)

    def state(self) -> list[Any]:
        """Return what to store in Redis."""
        cells: list[Any] = msgspec.to_builtins(self.memory)
        return cells

    def tick(
        self, price: float, volume: float, day_high: float, day_low: float, time_ms: float
    ) -> str | None:
        """Apply one tick; return a sentence when the alert fires. A missing field is NaN."""
        memory = self.memory
        if isinstance(memory, FeedSilence):
            return None
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

    Args:
        quote: Fields as in `P:{S}:quote:<token>`. Without a price or time the result is empty, and the
            alert starts with the first tick.
        minute_volumes: Volumes of the last completed minutes, oldest first.
    """
    price, volume = quote.get("last_price"), quote.get("volume") or 0
    time_ms = _quote_time(quote)
    if not isinstance(price, float) or not isinstance(volume, int) or not time_ms:
        return []
    watch = Watch(alert)
    high, low = (
        value if isinstance(value := quote.get(name), float) else math.nan for name in ("high", "low")
    )
    watch.tick(price, float(volume), high, low, time_ms)
    if isinstance(watch.memory, Volume):
        watch.memory.finished_minutes = [float(traded) for traded in minute_volumes][-MINUTES_AVERAGED:]
    return watch.state()


def trade_time(time_ms: float, received_ms: float) -> float:
    """Return the time a tick counts for, as in the aggregator: a time in the future counts as received."""
    is_future = received_ms >= TIME_MIN_MS and time_ms > received_ms + FUTURE_MAX_MS
    return received_ms if is_future else time_ms


def _quote_time(quote: dict[str, Any]) -> float:
    """Return the time of the quote's trade, epoch ms, as in tick rows; 0 when unknown.

    An index has no last trade, and modes `ltp` and `quote` have only the receive time.
    """
    received = _parse_time(quote.get("received_at"))
    stated = _parse_time(quote.get("last_trade_time")) or _parse_time(quote.get("exchange_time"))
    return trade_time(stated or received, received)


def _parse_time(text: Any) -> float:
    """Return an ISO text as epoch ms; 0 when it is not a possible time of a tick."""
    try:
        time_ms = datetime.fromisoformat(str(text)).timestamp() * 1000
    except (ValueError, OverflowError, OSError):
        return 0.0
    return time_ms if TIME_MIN_MS <= time_ms < TIME_MAX_MS else 0.0


def _day(time_ms: float) -> int:
    return int((time_ms + IST_MS) // DAY_MS)
