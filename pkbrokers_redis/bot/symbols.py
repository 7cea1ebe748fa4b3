"""Symbols as people type them in a chat: several, with blanks in index names, misspelt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from pkbrokers_redis.candles.model import find_interval
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError, UnknownSymbol


class NotFound(PkbError):
    """Raised for a symbol that is in no list; the mend names its nearest."""


def resolve_words(store: CandleStore, words: Sequence[str]) -> list[tuple[int, str]]:
    """Each word a symbol, else all of them together one (`NIFTY 50`). Each instrument once.

    Raises NotFound.
    """
    try:
        found = [resolve_word(store, word) for word in words]
    except NotFound:
        if len(words) < 2:
            raise
        with suppress(UnknownSymbol):
            return [store.resolve(" ".join(words))]
        raise
    return list(dict(found).items())


def resolve_word(store: CandleStore, text: str) -> tuple[int, str]:
    """`(token, "NSE:INFY")`. Raises NotFound, in a chat's words: `RELIANC? Did you mean RELIANCE?`"""
    try:
        return store.resolve(text.strip(" ,;").lstrip("$#"))
    except UnknownSymbol as error:
        near = " or ".join(name.removeprefix("NSE:") for name in error.nearest)
        raise NotFound(
            f"{text[:40]}?", f"did you mean {near}?" if near else "I know no such symbol"
        ) from None


def split_interval(store: CandleStore, words: Sequence[str], default: str) -> tuple[list[str], str]:
    """`["NIFTY", "50", "5m"]` → `(["NIFTY", "50"], "5m")`; the default where the last word is no interval.

    A last word that looks like one and is not configured raises UnknownInterval.
    """
    last = words[-1].lower() if len(words) > 1 else ""
    if last and (last in store.intervals or last in ("day", "1d", "1h") or _looks_like_one(last)):
        return list(words[:-1]), find_interval(store.settings.intervals, last).name
    names = store.intervals
    return list(words), default if default in names else names[0]


def _looks_like_one(word: str) -> bool:
    return word[:-1].isdigit() and word[-1] in "smhdw"
