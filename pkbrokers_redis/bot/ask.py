"""What a command's handler gets: who asks, with which words, and the ways to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from telegram import InlineKeyboardButton, InlineKeyboardMarkup, LinkPreviewOptions, Message
from telegram.constants import ParseMode
from telegram.error import BadRequest

from pkbrokers_redis.bot.sending import insist
from pkbrokers_redis.bot.text import MESSAGE_CHARS_MAX

if TYPE_CHECKING:
    from telegram.ext import ExtBot

    from pkbrokers_redis.bot.services import Services

P = ParamSpec("P")
T = TypeVar("T")

Buttons = Sequence[tuple[str, str]]  # label and what a press sends back (64 bytes at most)


@dataclass
class Ask:
    """One command of one person in one chat.

    `words` are what came behind the command's name. Handlers read Redis with `await ask.read(function, …)`,
    which runs it in a thread: the loop that answers all chats never waits for a disk or a socket.
    """

    bot: ExtBot[Any]
    services: Services
    chat_id: int
    user_id: int
    is_admin: bool
    words: list[str] = field(default_factory=list)

    async def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something that blocks, in a thread."""
        return await asyncio.to_thread(function, *args, **kwargs)

    async def reply(self, html: str, buttons: Buttons = ()) -> Message:
        """Send a message of HTML. `html` is the caller's text with data escaped (`text.escape`)."""
        return await insist(
            lambda: self.bot.send_message(
                self.chat_id,
                html[:MESSAGE_CHARS_MAX],
                parse_mode=ParseMode.HTML,
                reply_markup=keyboard(buttons),
                link_preview_options=LinkPreviewOptions(is_disabled=True),
            )
        )

    async def edit(self, message: Message, html: str, buttons: Buttons = ()) -> None:
        """Change a message of ours. One that is gone, or says this already, is left as it is."""
        try:
            await insist(
                lambda: self.bot.edit_message_text(
                    html[:MESSAGE_CHARS_MAX],
                    chat_id=self.chat_id,
                    message_id=message.message_id,
                    parse_mode=ParseMode.HTML,
                    reply_markup=keyboard(buttons),
                )
            )
        except BadRequest:
            pass  # deleted meanwhile, or not modified: neither is worth a word

    async def photo(self, png: bytes, caption: str) -> Message:
        """Send a picture."""
        return await insist(
            lambda: self.bot.send_photo(self.chat_id, png, caption=caption, parse_mode=ParseMode.HTML)
        )


def keyboard(buttons: Buttons) -> InlineKeyboardMarkup | None:
    """A row of buttons under a message."""
    if not buttons:
        return None
    return InlineKeyboardMarkup(
        [[InlineKeyboardButton(label, callback_data=sent_back) for label, sent_back in buttons]]
    )
