"""/start: what this bot is."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.registry import Command


async def start(ask: Ask) -> None:
    await ask.reply(
        "📊 <b>The market in a chat.</b>\n"
        "/quote INFY TCS – the latest quotes\n"
        "/chart INFY 5m – a picture of the day\n"
        "/alert INFY above 1600 – told when it happens\n"
        "/gainers, /losers, /active – what moves\n"
        "/help – everything else"
    )


COMMAND = Command("start", "say hello", start, words_max=5)  # a deep link's words come along
