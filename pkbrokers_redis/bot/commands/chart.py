"""/chart SYMBOL [interval]: candlesticks with volume."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.symbols import resolve_words, split_interval
from pkbrokers_redis.bot.text import escape, money
from pkbrokers_redis.bot.usage import UsageError
from pkbrokers_redis.errors import PkbError

CANDLES_MAX = 90  # more are too thin on a phone


async def chart(ask: Ask) -> None:
    if not ask.words:
        raise UsageError("which symbol?", "send /chart INFY or /chart INFY 15m")
    store = ask.services.store
    words, interval = await ask.read(split_interval, store, ask.words, "5m")
    token, symbol = (await ask.read(resolve_words, store, words))[0]
    candles = await ask.read(store.get_candles, token, interval, CANDLES_MAX, include_current=True)
    if not candles:
        raise PkbError(f"there are no {interval} candles of {symbol} yet", "try another interval, or later")
    png = await ask.read(ask.services.charts.png, symbol, interval, candles)
    await ask.photo(png, f"<b>{escape(symbol)}</b> {escape(interval)} · {money(candles[-1].close)}")


COMMAND = Command("chart", "a candlestick picture with volume", chart, "SYMBOL [INTERVAL]", words_max=6)
