"""Text for chats. Telegram's HTML: whatever comes from data goes through `escape`, so that no symbol, file
name or error can open a tag."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape as html_escape

from pkbrokers_redis.candles.calendar import IST

MESSAGE_CHARS_MAX = 4096  # Telegram's limit, after its entities are parsed


def escape(value: object) -> str:
    """Text that Telegram shows letter by letter."""
    return html_escape(str(value), quote=True)


def money(price: float | None) -> str:
    """`1,573.15`; paise are always shown, a currency pair gets its four places."""
    if price is None:
        return "–"
    places = 2 if abs(round(price, 2) - price) < 1e-9 else 4
    return f"{price:,.{places}f}"


def count(number: float | None) -> str:
    """`1,175,986`"""
    return "–" if number is None else f"{number:,.0f}"


def percent(value: float | None) -> str:
    """`+1.25 %`"""
    return "–" if value is None else f"{value:+.2f} %"


def clock_time(epoch_s: float, seconds: bool = True) -> str:
    """`10:31:07` in India."""
    return datetime.fromtimestamp(epoch_s, IST).strftime("%H:%M:%S" if seconds else "%H:%M")


def day_time(epoch_s: float) -> str:
    """`03 Aug 09:15` in India."""
    return datetime.fromtimestamp(epoch_s, IST).strftime("%d %b %H:%M")


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`"""
    whole = int(max(seconds, 0))
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min"
    if whole < 2 * 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def size(n: int) -> str:
    """`4.2 MB`"""
    return f"{n / 1e6:,.1f} MB" if n >= 100_000 else f"{n / 1e3:,.1f} kB"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return columns of fixed width: the first to the left, numbers to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts: list[str] = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        texts.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "<pre>" + escape("\n".join(texts)) + "</pre>"
