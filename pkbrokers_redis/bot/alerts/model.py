"""An alert: what a person typed, as a value.

/alert INFY above 1600        the price rises to it from below
/alert INFY below 1500        falls to it from above
/alert INFY 1550              crosses it, either way
/alert INFY move 2%           moves so far from where it stood, then again from there
/alert INFY volume 5x         a minute trades so many times the usual
/alert INFY high              a new high (low) of the day
/alert feed 30                no tick of anything for so many seconds, in market hours
… once                        removed when it has fired
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from pkbrokers_redis.bot.text import count, money
from pkbrokers_redis.bot.usage import UsageError

Kind = Literal["above", "below", "cross", "move", "volume", "high", "low", "feed"]

USAGE = (
    "/alert INFY above 1600 · below 1500 · 1550 · move 2% · volume 5x · high · low; /alert feed 30; "
    "add `once`"
)
PRICE_MIN, PRICE_MAX = 0.0001, 1e9
FEED_SECONDS = 30.0  # of `/alert feed` without a number


@dataclass(frozen=True, slots=True)
class Form:
    """How one kind is typed and told: `SYMBOL word number`, or `SYMBOL word` where `most` is 0.

    `told` makes of the number what stands behind the symbol in a message. `unit` may follow the number.
    """

    words: tuple[str, ...]
    told: Callable[[float], str]
    least: float = 0.0
    most: float = 0.0
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
        """`above 1,600.00`, in plain text."""
        return FORMS[self.kind].told(self.value) + (", once" if self.once else "")


class Wish(msgspec.Struct, frozen=True):
    """What was typed, before its symbol is looked up."""

    symbol: str
    kind: Kind
    value: float
    once: bool


def parse(words: Sequence[str]) -> Wish:
    """The words behind `/alert`. Raises UsageError, which says what was not understood."""
    rest = list(words)
    once = len(rest) > 1 and rest[-1].lower() == "once"
    if once:
        rest.pop()
    if rest and rest[0].lower() == "feed" and len(rest) <= 2:
        return Wish("", "feed", _number(rest[1], "feed") if len(rest) == 2 else FEED_SECONDS, once)
    # Symbols may have blanks (NIFTY 50): the condition is what stands at the end.
    kind = WORDS.get(rest[-2].lower()) if len(rest) >= 3 else None
    if kind is not None and kind != "feed" and FORMS[kind].most:
        return Wish(" ".join(rest[:-2]), kind, _number(rest[-1], kind), once)
    if len(rest) >= 2:
        symbol, last = " ".join(rest[:-1]), rest[-1].lower()
        if (word := WORDS.get(last)) is not None and not FORMS[word].most:
            return Wish(symbol, word, 0.0, once)
        if last.endswith("%"):
            return Wish(symbol, "move", _number(last, "move"), once)
        if glued := re.fullmatch(r"([<>])=?(.+)", last):
            return Wish(symbol, WORDS[glued[1]], _number(glued[2], WORDS[glued[1]]), once)
        if word is None:
            return Wish(symbol, "cross", _number(last, "cross"), once)
    raise UsageError("that is no alert", USAGE)


def _number(text: str, kind: Kind) -> float:
    """`1,600.50`, `2%`, `5x`, `30s`, within the kind's bounds. Raises UsageError."""
    form = FORMS[kind]
    plain = text.lower().replace(",", "").replace("₹", "")
    if form.unit:
        plain = plain.removesuffix(form.unit).removesuffix("×")
    try:
        value = abs(float(plain)) if form.unit == "%" else float(plain)  # -2% moves as far as 2%
    except ValueError:
        value = math.nan
    if not form.least <= value <= form.most:
        raise UsageError(f"{text[:20]!r} is not a number from {form.least:g} to {form.most:g}", USAGE)
    return value
