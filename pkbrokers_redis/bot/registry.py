"""The bot's commands: one file each in `commands/`, one row each in `NAMES`.

A file defines `COMMAND`. The contract test picks every row up: help text, the row in docs/bot.md, unknown
arguments answered politely, admins' commands refused to others.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.usage import UsageError

Handler = Callable[[Ask], Awaitable[None]]

# File names below `commands/`, in the order of /help.
NAMES = (
    "start", "help", "quote", "chart", "candles", "watch", "alert", "gainers", "losers", "active", "top",
    "status", "ticks", "db", "daily_pkl", "intraday_pkl", "instrument_history", "request_data",
    "token", "refresh_token", "restart", "test_ticks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Command:
    """One command. `arguments` as /help shows them; more words than `words_max` are refused.

    `for_admins`: only PKB_TELEGRAM_ADMINS may. `question`: what they are asked to confirm by a button before
    the handler runs; "" asks nothing. `is_slow`: runs beside the chat's other commands, one at a time a chat.
    """

    name: str
    does: str
    handler: Handler
    arguments: str = ""
    words_max: int = 0
    for_admins: bool = False
    question: str = ""
    is_slow: bool = False

    @property
    def usage(self) -> str:
        """`/chart SYMBOL [interval]`"""
        return f"/{self.name} {self.arguments}".strip()

    def check(self, words: list[str]) -> None:
        """Raises UsageError for more words than the command takes."""
        if len(words) > self.words_max:
            what = "takes no arguments" if not self.words_max else "does not understand all of that"
            raise UsageError(f"/{self.name} {what}", f"send {self.usage}")


@cache
def commands() -> dict[str, Command]:
    """Name → command, in the order of the table."""
    found: dict[str, Command] = {}
    for name in NAMES:
        command: Command = importlib.import_module(f"pkbrokers_redis.bot.commands.{name}").COMMAND
        found[command.name] = command
    return found
