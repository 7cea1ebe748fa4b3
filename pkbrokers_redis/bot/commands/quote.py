"""/quote SYMBOL…: the latest quotes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.symbols import resolve_words
from pkbrokers_redis.bot.text import count, escape, money, percent
from pkbrokers_redis.bot.usage import UsageError

SYMBOLS_MAX = 20


async def quote(ask: Ask) -> None:
    if not ask.words:
        raise UsageError("which symbol?", "send /quote INFY or /quote INFY TCS")
    store = ask.services.store
    found = await ask.read(
        lambda: [(symbol, store.get_quote(token)) for token, symbol in resolve_words(store, ask.words)]
    )
    await ask.reply("\n\n".join(quote_text(symbol, cells) for symbol, cells in found))


def quote_text(symbol: str, cells: dict[str, Any]) -> str:
    """One quote as HTML."""
    name = f"<b>{escape(symbol)}</b>"
    if not cells or not isinstance(cells.get("last_price"), float):
        return f"{name}\nno quote yet"
    price, close = cells["last_price"], cells.get("close")
    lines = [f"{name}  {money(price)}"]
    if isinstance(close, float) and close > 0:
        lines[0] += f"  {percent((price / close - 1) * 100)}"
    numbers = {key: value for key, value in cells.items() if isinstance(value, (int, float))}
    if "open" in numbers:
        day = [f"{name[0].upper()} {money(numbers.get(name))}" for name in ("open", "high", "low", "close")]
        lines.append("  ".join(day))
    more = [f"volume {count(numbers['volume'])}"] if numbers.get("volume") else []
    if numbers.get("oi"):
        more.append(f"oi {count(numbers['oi'])}")
    more.append(_when(cells))
    lines.append(" · ".join(filter(None, more)))
    return "\n".join(lines)


def _when(cells: dict[str, Any]) -> str:
    for name in ("last_trade_time", "exchange_time", "received_at"):
        try:
            return datetime.fromisoformat(str(cells.get(name))).strftime("%d %b %H:%M:%S")
        except ValueError:
            continue
    return ""


COMMAND = Command("quote", "the latest quotes", quote, "SYMBOL…", words_max=SYMBOLS_MAX)
