"""What a URL asks for: each value checked, each limit stated."""

from __future__ import annotations

from collections.abc import Iterable

from aiohttp import web

from pkbrokers_redis.errors import PkbError

COUNT_MAX = 5_000  # rows per instrument
SYMBOLS_MAX = 500
TEXT_MAX = 60  # letters of a symbol or a search


class Mistake(PkbError):
    """Raised when a request asks for something that cannot be."""


def number_of(request: web.Request, name: str, default: int, most: int = COUNT_MAX) -> int:
    """`?count=50`: 1 to `most`. Raises Mistake."""
    text = request.query.get(name, str(default))
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if not 1 <= number <= most:
        raise Mistake(f"{name} is no number from 1 to {most}", f"write {name}={default}")
    return number


def flag_of(request: web.Request, name: str) -> bool:
    """`?current=1`; 0 or absent is no. Raises Mistake."""
    text = request.query.get(name, "0")
    if text not in ("0", "1"):
        raise Mistake(f"{name} is neither 0 nor 1", f"write {name}=1")
    return text == "1"


def word_of(request: web.Request, name: str, default: str = "") -> str:
    """One short word or phrase. Raises Mistake."""
    return _short(name, request.query.get(name, default).strip())


def list_of(request: web.Request, name: str) -> list[str] | None:
    """`?symbols=INFY,TCS`; None when it is absent or empty. Raises Mistake."""
    return words(name, request.query.get(name, "").split(",")) or None


def words(name: str, texts: Iterable[str]) -> list[str]:
    """What is left of some texts without blanks, each once. Raises Mistake for too many or too long ones."""
    found = list(dict.fromkeys(_short(name, text.strip()) for text in texts if text.strip()))
    if len(found) > SYMBOLS_MAX:
        raise Mistake(f"{len(found)} {name} are too many", f"ask for {SYMBOLS_MAX} at a time")
    return found


def _short(name: str, text: str) -> str:
    if len(text) > TEXT_MAX:
        raise Mistake(f"{name}: {text[:20]!r}… is too long", f"{TEXT_MAX} letters at most")
    return text
