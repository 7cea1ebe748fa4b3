"""URL parameters of the routes: each value is checked, and each limit is stated in the error."""

from __future__ import annotations

from collections.abc import Iterable

from aiohttp import web

from pkbrokers_redis.errors import PkbError

COUNT_MAX = 5_000  # rows per instrument
SYMBOLS_MAX = 500  # per request
TEXT_MAX = 60  # letters of a symbol or of a search text


class BadRequest(PkbError):
    """Raised when a request has an invalid parameter."""


def int_param(request: web.Request, name: str, default: int, maximum: int = COUNT_MAX) -> int:
    """Return `?name=50` as an integer from 1 to `maximum`.

    Raises:
        BadRequest: The value is not such an integer.
    """
    text = request.query.get(name, str(default))
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if not 1 <= number <= maximum:
        raise BadRequest(f"{name} is not a number from 1 to {maximum}", f"write {name}={default}")
    return number


def flag_param(request: web.Request, name: str) -> bool:
    """Return `?name=1` as a boolean; 0 and an absent parameter are False. Raise BadRequest otherwise."""
    text = request.query.get(name, "0")
    if text not in ("0", "1"):
        raise BadRequest(f"{name} is neither 0 nor 1", f"write {name}=1")
    return text == "1"


def text_param(request: web.Request, name: str, default: str = "") -> str:
    """Return a short word or phrase. Raise BadRequest when it is too long."""
    return _checked_length(name, request.query.get(name, default).strip())


def list_param(request: web.Request, name: str) -> list[str] | None:
    """Return `?symbols=INFY,TCS` as a list; None when it is absent or empty. Raise BadRequest."""
    return split_list(name, request.query.get(name, "").split(",")) or None


def split_list(name: str, texts: Iterable[str]) -> list[str]:
    """Return the non-empty texts without duplicates. Raise BadRequest for too many or too long ones."""
    values = list(dict.fromkeys(_checked_length(name, text.strip()) for text in texts if text.strip()))
    if len(values) > SYMBOLS_MAX:
        raise BadRequest(f"{len(values)} {name} are too many", f"send at most {SYMBOLS_MAX} at a time")
    return values


def _checked_length(name: str, text: str) -> str:
    if len(text) > TEXT_MAX:
        raise BadRequest(f"{name}: {text[:20]!r}… is too long", f"send at most {TEXT_MAX} letters")
    return text
