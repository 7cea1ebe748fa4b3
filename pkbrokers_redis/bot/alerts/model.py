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
from collections.abc import Sequence
from typing import Literal

import msgspec

from pkbrokers_redis.bot.text import count, money
from pkbrokers_redis.bot.usage import UsageError

Kind = Literal["above", "below", "cross", "move", "volume", "high", "low", "feed"]

USAGE = (
    "/alert INFY above 1600 · below 1500 · 1550 · move 2% · volume 5x · high · low; /alert feed 30; "
    "add `once`"
)
WORDS: dict[str, Kind] = {
    "above": "above", "over": "above", ">": "above", ">=": "above",
    "below": "below", "under": "below", "<": "below", "<=": "below",
    "cross": "cross", "crosses": "cross", "at": "cross",
    "move": "move", "moves": "move", "volume": "volume", "high": "high", "low": "low", "feed": "feed",
}  # fmt: skip
PRICE_MAX = 1e9
FEED_SECONDS, FEED_SECONDS_MIN, FEED_SECONDS_MAX = 30.0, 5.0, 3600.0


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
        words = {
            "above": f"above {money(self.value)}",
            "below": f"below {money(self.value)}",
            "cross": f"crosses {money(self.value)}",
            "move": f"moves {self.value:g} %",
            "volume": f"volume {self.value:g}×",
            "high": "new day high",
            "low": "new day low",
            "feed": f"feed silent for {count(self.value)} s",
        }
        return words[self.kind] + (", once" if self.once else "")


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
        seconds = (
            _number(rest[1], "s", FEED_SECONDS_MIN, FEED_SECONDS_MAX) if len(rest) == 2 else FEED_SECONDS
        )
        return Wish("", "feed", seconds, once)
    # Symbols may have blanks (NIFTY 50): the condition is what stands at the end.
    if len(rest) >= 3 and (kind := WORDS.get(rest[-2].lower())) in (
        "above",
        "below",
        "cross",
        "move",
        "volume",
    ):
        unit = {"move": "%", "volume": "x"}.get(kind, "")
        limits = {"move": (0.05, 100.0), "volume": (1.1, 1000.0)}.get(kind, (0.0001, PRICE_MAX))
        return Wish(" ".join(rest[:-2]), kind, _number(rest[-1], unit, *limits), once)
    if len(rest) >= 2 and (kind := WORDS.get(rest[-1].lower())) in ("high", "low"):
        return Wish(" ".join(rest[:-1]), kind, 0.0, once)
    if len(rest) >= 2:
        last = rest[-1].lower()
        if last.endswith("%"):
            return Wish(" ".join(rest[:-1]), "move", _number(last, "%", 0.05, 100.0), once)
        if glued := re.fullmatch(r"([<>])=?(.+)", last):
            return Wish(" ".join(rest[:-1]), WORDS[glued[1]], _number(glued[2], "", 0.0001, PRICE_MAX), once)
        if WORDS.get(last) is None:
            return Wish(" ".join(rest[:-1]), "cross", _number(last, "", 0.0001, PRICE_MAX), once)
    raise UsageError("that is no alert", USAGE)


def _number(text: str, unit: str, least: float, most: float) -> float:
    """`1,600.50`, `2%`, `5x`, `30s`. Raises UsageError."""
    plain = text.lower().replace(",", "").replace("₹", "")
    if unit:
        plain = plain.removesuffix(unit).removesuffix("×")
    try:
        value = abs(float(plain)) if unit == "%" else float(plain)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise UsageError(f"{text[:20]!r} is not a number from {least:g} to {most:g}", USAGE)
    return value
