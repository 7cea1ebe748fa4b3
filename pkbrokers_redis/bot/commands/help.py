"""/help: all commands, or one of them."""

from __future__ import annotations

from pkbrokers_redis.bot.ask import Ask
from pkbrokers_redis.bot.registry import Command, commands
from pkbrokers_redis.bot.text import escape
from pkbrokers_redis.bot.usage import UsageError


async def help_(ask: Ask) -> None:
    if ask.words:
        name = ask.words[0].lstrip("/").lower()
        found = commands().get(name)
        if found is None:
            raise UsageError(f"there is no /{name}", "/help lists all")
        who = " Operators only." if found.for_admins else ""
        await ask.reply(f"<code>{escape(found.usage)}</code>\n{escape(found.does)}.{who}")
        return
    shown = [each for each in commands().values() if ask.is_admin or not each.for_admins]
    lines = [f"{escape(each.usage)} – {escape(each.does)}" for each in shown]
    await ask.reply(
        "\n".join(lines)
        + "\n\nSYMBOL is INFY (NSE), BSE:INFY, an index name or a token. Large files come in parts."
    )


COMMAND = Command("help", "list the commands, or explain one", help_, "[COMMAND]", words_max=1)
