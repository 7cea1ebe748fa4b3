"""One file command from question to documents, with its progress in the chat."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack

from telegram import Message
from telegram.constants import ParseMode

from pkbrokers_redis.bot.alerts.feed import EQUITY_TOKEN
from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.files.making import make
from pkbrokers_redis.bot.files.parcel import Parcel, packed
from pkbrokers_redis.bot.files.shelf import KINDS, Found, Kind, Market, is_fresh, market_at, newest
from pkbrokers_redis.bot.sending import insist
from pkbrokers_redis.bot.text import count, day_time, duration, escape, size
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.store.instruments import load_derivative_tokens

PROGRESS_EVERY_SECONDS = 3.0  # an edit each: Telegram allows a chat about one a second


class NoFile(PkbError):
    """Raised when there is no file to send, and none came of making one."""


async def deliver(ask: Ask, name: str) -> None:
    """Send what KINDS calls `name`: the newest snapshot, or a new one where that is too old."""
    kind = KINDS[name]
    progress = await ask.reply(f"{escape(kind.title)}: looking …")
    found = await _find(ask, kind, progress)
    await ask.edit(progress, f"{escape(kind.title)}: zipping {size(found.size_bytes)} …")
    parts_max = ask.services.settings.telegram_file_max_bytes
    root = ask.services.settings.files_folder
    with ExitStack() as stack:
        parcel = await ask.read(stack.enter_context, packed(found.paths, kind.title, root, parts_max))
        await _send(ask, kind, found, parcel, progress)
    await ask.edit(progress, f"{escape(kind.title)}: sent.")


async def _find(ask: Ask, kind: Kind, progress: Message) -> Found:
    folder = ask.services.settings.files_folder
    found = await ask.read(newest, folder, kind)
    now_s = ask.services.market() / 1000
    if found is not None and is_fresh(found, kind, now_s, await ask.read(_market, ask, now_s)):
        return found
    began = time.monotonic()
    making = asyncio.create_task(make(ask.services.settings, kind.snapshot))
    try:
        while not (await asyncio.wait({making}, timeout=PROGRESS_EVERY_SECONDS))[0]:
            seconds = duration(time.monotonic() - began)
            await ask.edit(progress, f"{escape(kind.title)}: making a new one … {seconds}")
    finally:
        making.cancel()  # for the case that we were
    try:
        making.result()
    except PkbError:
        if found is None:
            raise
        # An older one is better than none, and its caption tells its age.
        return found
    found = await ask.read(newest, folder, kind)
    if found is None:
        raise NoFile(f"there is no {kind.title} yet", "try again once candles have been made (/status)")
    return found


def _market(ask: Ask, now_s: float) -> Market:
    """The market of all instruments of which there were ticks; NSE's hours before any."""
    settings, store = ask.services.settings, ask.services.store
    sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
    derivatives = load_derivative_tokens(store.client, store.keys)
    tokens = store.tokens_seen() or {EQUITY_TOKEN}
    schedules = {sessions.schedule_of(token, token in derivatives) for token in tokens}
    return market_at(sessions, schedules, now_s)


async def _send(ask: Ask, kind: Kind, found: Found, parcel: Parcel, progress: Message) -> None:
    total = parcel.parts_total
    parts: Iterator[tuple[int, str, bytes]] = parcel.parts()
    while (part := await ask.read(next, parts, None)) is not None:
        number, name, content = part
        if total > 1:
            await ask.edit(progress, f"{escape(kind.title)}: sending part {number} of {total} …")
        caption = _caption(kind, found, parcel, number)

        async def send(content: bytes = content, name: str = name, caption: str = caption) -> Message:
            return await ask.bot.send_document(
                ask.chat_id, content, filename=name, caption=caption, parse_mode=ParseMode.HTML
            )

        await insist(send)
    if total > 1:
        stem = escape(parcel.name.removesuffix(".zip"))
        await ask.reply(
            f"To join the {total} parts: <code>cat {stem}.part*.zip &gt; {stem}.zip</code>, then compare "
            f"<code>sha256sum {stem}.zip</code> with the captions."
        )


def _caption(kind: Kind, found: Found, parcel: Parcel, number: int) -> str:
    which = f", part {number} of {parcel.parts_total}" if parcel.parts_total > 1 else ""
    return (
        f"{escape(kind.title)}{which} · as of {day_time(found.made_at)}\n"
        f"{count(found.rows)} rows, {size(found.size_bytes)}, zipped {size(parcel.size_bytes)}\n"
        f"sha256 of the zip <code>{parcel.sha256}</code>"
    )
