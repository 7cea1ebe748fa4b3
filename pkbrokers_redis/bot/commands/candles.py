"""/candles: all candles as files; /candles SYMBOL [interval]: the last of one instrument."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.files.delivery import deliver
from pkbrokers_redis.bot.registry import Command
from pkbrokers_redis.bot.symbols import resolve_words, split_interval
from pkbrokers_redis.bot.text import clock_time, count, day_time, escape, money, table

ROWS = 12


async def candles(ask: Ask) -> None:
    if not ask.words:
        await deliver(ask, "candles")
        return
    store = ask.services.store
    words, interval = await ask.read(split_interval, store, ask.words, "5m")
    token, symbol = (await ask.read(resolve_words, store, words))[0]
    found = await ask.read(store.get_candles, token, interval, ROWS, include_current=True)
    if not found:
        await ask.reply(f"There are no {escape(interval)} candles of {escape(symbol)} yet.")
        return
    rows = [
        (
            day_time(c.start)[:6] if interval == "day" else clock_time(c.start, seconds=False),
            *map(money, (c.open, c.high, c.low, c.close)),
            count(c.volume) + ("*" if c.flag else ""),
        )
        for c in found
    ]
    note = "\n* not whole" if any(c.flag for c in found) else ""
    shown = table(("", "open", "high", "low", "close", "volume"), rows)
    await ask.reply(f"<b>{escape(symbol)}</b> {escape(interval)}\n{shown}{note}")


COMMAND = Command(
    "candles", "all candles as Parquet files, or the last of one instrument", candles, "[SYMBOL [INTERVAL]]",
    words_max=6, is_slow=True,
)  # fmt: skip
