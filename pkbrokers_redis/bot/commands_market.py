"""Commands that read the market: /quote, /watch, /chart, /candles, /gainers, /losers, /active, /top."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import redis
from telegram import Message
from telegram.constants import ParseMode
from telegram.error import TelegramError

from pkbrokers_redis.bot.charts import DAY_SECONDS, png
from pkbrokers_redis.bot.context import Command, CommandContext, resolve_words
from pkbrokers_redis.bot.files import deliver
from pkbrokers_redis.bot.telegram_client import with_retries
from pkbrokers_redis.bot.text import clock_time, count, day_time, duration, escape, money, percent, table
from pkbrokers_redis.candles.calendar import IST_SECONDS
from pkbrokers_redis.candles.model import Candle, find_interval
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError

QUOTES_MAX = 20  # symbols of one /quote
CHART_CANDLES = 90  # more are too thin on a phone
TABLE_CANDLES = 12
RANKING_ROWS_MAX = 50
CRORE = 1e7
WATCH_SYMBOLS_MAX = 5
WATCHES_PER_CHAT_MAX = 3
WATCH_EVERY_SECONDS = 5.0  # 12 edits a minute: Telegram allows a group 20 messages
WATCH_SECONDS = 900.0
STOP_BUTTON = (("Stop", "stop"),)


@Command("quote", "the latest quotes", "SYMBOL…", words_max=QUOTES_MAX)
async def quote(context: CommandContext) -> None:
    await context.reply(await _quotes_text(context, await _resolve(context, "send /quote INFY TCS")))


async def _resolve(context: CommandContext, example: str) -> list[tuple[int, str]]:
    if not context.words:
        raise PkbError("which symbol?", example)
    return await context.read(resolve_words, context.services.store, context.words)


async def _quotes_text(context: CommandContext, tokens: list[tuple[int, str]]) -> str:
    store = context.services.store
    quotes = await context.read(lambda: [(symbol, store.get_quote(token)) for token, symbol in tokens])
    return "\n\n".join(quote_text(symbol, fields) for symbol, fields in quotes)


def quote_text(symbol: str, fields: dict[str, Any]) -> str:
    """Return one quote as HTML. `fields` as in `CandleStore.get_quote`; empty when there is no quote."""
    name = f"<b>{escape(symbol)}</b>"
    if not fields or not isinstance(fields.get("last_price"), float):
        return f"{name}\nno quote yet"
    price, close = fields["last_price"], fields.get("close")
    lines = [f"{name}  {money(price)}"]
    if isinstance(close, float) and close > 0:
        lines[0] += f"  {percent((price / close - 1) * 100)}"
    numbers = {key: value for key, value in fields.items() if isinstance(value, (int, float))}
    if "open" in numbers:
        day = [f"{key[0].upper()} {money(numbers.get(key))}" for key in ("open", "high", "low", "close")]
        lines.append("  ".join(day))
    parts = [f"{key} {count(numbers[key])}" for key in ("volume", "oi") if numbers.get(key)]
    parts.append(_quote_time(fields))
    lines.append(" · ".join(filter(None, parts)))
    return "\n".join(lines)


def _quote_time(fields: dict[str, Any]) -> str:
    for name in ("last_trade_time", "exchange_time", "received_at"):
        try:
            return datetime.fromisoformat(str(fields.get(name))).strftime("%d %b %H:%M:%S")
        except ValueError:
            continue
    return ""


@Command("watch", "a quote that updates itself for 15 minutes", "SYMBOL…", words_max=WATCH_SYMBOLS_MAX)
async def watch(context: CommandContext) -> None:
    tokens = await _resolve(context, "send /watch INFY")
    prefix = f"watch {context.chat_id} "
    if sum(name.startswith(prefix) for name in context.services.background) >= WATCHES_PER_CHAT_MAX:
        raise PkbError(f"this chat watches {WATCHES_PER_CHAT_MAX} messages already", "stop one of them")
    text = await _quotes_text(context, tokens)
    message = await context.reply(text, STOP_BUTTON)
    work = _update_quotes(context, tokens, message, text)
    if not context.services.start(f"{prefix}{message.message_id}", work):
        await context.edit(message, f"{text}\n\n<i>not watched: the bot is busy, try again in a minute</i>")


async def _update_quotes(
    context: CommandContext, tokens: list[tuple[int, str]], message: Message, shown: str
) -> None:
    started = time.monotonic()
    try:
        while time.monotonic() - started < WATCH_SECONDS:
            await asyncio.sleep(WATCH_EVERY_SECONDS)
            try:
                text = await _quotes_text(context, tokens)
                if text != shown:
                    await context.edit(message, text, STOP_BUTTON)
                    shown = text
            except (redis.RedisError, TelegramError):
                continue
    finally:
        watched = duration(time.monotonic() - started)
        await asyncio.shield(context.edit(message, f"{shown}\n\n<i>watched for {watched}</i>"))


async def _read_candles(context: CommandContext, rows: int) -> tuple[str, str, list[Candle]]:
    """Return the symbol, the interval and the last candles that the words name, by default of 5m."""
    store, words = context.services.store, context.words
    interval = "5m" if "5m" in store.intervals else store.intervals[0]
    if len(words) > 1 and re.fullmatch(r"day|\d+[smhdw]", words[-1].lower()):
        interval = find_interval(store.settings.intervals, words[-1].lower()).name
        words = words[:-1]
    token, symbol = (await context.read(resolve_words, store, words))[0]
    candles = await context.read(store.get_candles, token, interval, rows, include_current=True)
    if not candles:
        raise PkbError(f"there are no {interval} candles of {symbol} yet", "try another interval, or later")
    return symbol, interval, candles


@Command("chart", "a candlestick picture with volume", "SYMBOL [INTERVAL]", words_max=6)
async def chart(context: CommandContext) -> None:
    if not context.words:
        raise PkbError("which symbol?", "send /chart INFY or /chart INFY 15m")
    symbol, interval, candles = await _read_candles(context, CHART_CANDLES)
    picture = await context.read(png, symbol, interval, candles)
    caption = f"<b>{escape(symbol)}</b> {escape(interval)} · {money(candles[-1].close)}"
    await with_retries(
        context.bot.send_photo, context.chat_id, picture, caption=caption, parse_mode=ParseMode.HTML
    )


@Command(
    "candles",
    "all candles as Parquet files, or the last of one instrument",
    "[SYMBOL [INTERVAL]]",
    words_max=6,
    is_slow=True,
)
async def candles(context: CommandContext) -> None:
    if not context.words:
        await deliver(context, "candles")
        return
    symbol, interval, rows = await _read_candles(context, TABLE_CANDLES)
    cells = [
        (
            day_time(c.start)[:6] if interval == "day" else clock_time(c.start, seconds=False),
            *map(money, (c.open, c.high, c.low, c.close)),
            count(c.volume) + ("*" if c.flag else ""),
        )
        for c in rows
    ]
    note = "\n* not whole" if any(c.flag for c in rows) else ""
    shown = table(("", "open", "high", "low", "close", "volume"), cells)
    await context.reply(f"<b>{escape(symbol)}</b> {escape(interval)}\n{shown}{note}")


class Mover(NamedTuple):
    """One instrument's day. `change` is percent from the previous close, None when that is unknown."""

    symbol: str
    price: float
    change: float | None
    volume: float
    turnover: float  # rupees, at the last price
    ticks: int


def ranked_movers(store: CandleStore, ranking: Ranking, rows: int) -> list[Mover]:
    """Return the first `rows` movers of a ranking. It reads all instruments: call it in a thread."""
    keyed = [(value, mover) for mover in _read_movers(store) if (value := ranking.key(mover)) is not None]
    keyed.sort(key=lambda pair: pair[0], reverse=True)
    return [mover for _, mover in keyed[:rows]]


def _read_movers(store: CandleStore) -> list[Mover]:
    """Return every instrument that traded on the latest day of any, by its day candle and its quote."""
    interval = "day" if "day" in store.intervals else store.intervals[-1]
    bulk = store.bulk(None, interval, 1, include_current=True)
    if not len(bulk):
        return []
    rows = bulk.rows[bulk.offsets[1:] - 1]
    days = (rows[:, 0].astype(np.int64) + IST_SECONDS) // DAY_SECONDS
    places = np.flatnonzero(days == days.max()).tolist()
    pipeline = store.client.pipeline(transaction=False)
    for i in places:
        pipeline.hget(store.keys.quote(int(bulk.tokens[i])), "close")
    closes: list[Any] = pipeline.execute(raise_on_error=False)
    movers: list[Mover] = []
    for i, close in zip(places, closes, strict=True):
        price, volume, ticks = float(rows[i, 4]), float(rows[i, 5]), int(rows[i, 7])
        try:
            change = (price / float(close) - 1) * 100
        except (TypeError, ValueError, ZeroDivisionError):  # absent or malformed
            change = None
        movers.append(Mover(bulk.symbols[i], price, change, volume, volume * price, ticks))
    return movers


def _crores(mover: Mover) -> str:
    crores = mover.turnover / CRORE
    return count(crores) if crores >= 1 else f"{crores:.2f}"


@dataclass(frozen=True, slots=True)
class Ranking:
    """One command that ranks movers: the largest `key` first; a key of None leaves the instrument out."""

    does: str
    title: str
    key: Callable[[Mover], float | None]
    columns: tuple[str, ...]  # of CELLS
    rows: int = 10


CELLS: dict[str, Callable[[Mover], str]] = {
    "price": lambda mover: money(mover.price),
    "change": lambda mover: percent(mover.change),
    "₹ crore": _crores,
    "ticks": lambda mover: count(mover.ticks),
}
RANKINGS = {
    "gainers": Ranking(
        "the largest gains since the previous close",
        "Gainers",
        lambda mover: mover.change if mover.volume else None,
        ("price", "change"),
    ),
    "losers": Ranking(
        "the largest losses since the previous close",
        "Losers",
        lambda mover: -mover.change if mover.volume and mover.change is not None else None,
        ("price", "change"),
    ),
    "active": Ranking(
        "the largest turnover today, in rupees",
        "Most active",
        lambda mover: mover.turnover or None,
        ("price", "change", "₹ crore"),
    ),
    "top": Ranking(
        "the instruments with the most ticks today",
        "Top by ticks today",
        lambda mover: mover.ticks,
        ("ticks", "price"),
        rows=20,
    ),
}


def ranking_table(ranking: Ranking, movers: list[Mover]) -> str:
    """Return movers as a table of HTML."""
    cells = [
        (mover.symbol.removeprefix("NSE:"), *(CELLS[column](mover) for column in ranking.columns))
        for mover in movers
    ]
    return table(("", *ranking.columns), cells)


def _add_command(name: str, ranking: Ranking) -> None:
    @Command(name, ranking.does, "[N]", words_max=1)
    async def handler(context: CommandContext) -> None:
        rows = _row_count(context.words[0]) if context.words else ranking.rows
        movers = await context.read(ranked_movers, context.services.store, ranking, rows)
        shown = f"<b>{ranking.title}</b>\n{ranking_table(ranking, movers)}"
        await context.reply(shown if movers else "Nothing has been traded yet.")


for _name, _row in RANKINGS.items():
    _add_command(_name, _row)


def _row_count(word: str) -> int:
    if not (word.isascii() and word.isdecimal() and 1 <= int(word[:6]) <= RANKING_ROWS_MAX):
        raise PkbError(
            f"{word[:20]!r} is not a number from 1 to {RANKING_ROWS_MAX}", "send it without, or e.g. 20"
        )
    return int(word)
