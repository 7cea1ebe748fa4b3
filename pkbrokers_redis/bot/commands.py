"""The table of the bot's commands, in the order of /help. docs/adding.md shows how to add one."""

from __future__ import annotations

from pkbrokers_redis.bot import commands_admin, commands_alerts, commands_files, commands_market
from pkbrokers_redis.bot.context import Command, CommandContext, UsageError
from pkbrokers_redis.bot.text import escape


async def start(context: CommandContext) -> None:
    """Say what this bot is."""
    await context.reply(
        "📊 <b>The market in a chat.</b>\n"
        "/quote INFY TCS – the latest quotes\n"
        "/chart INFY 5m – a picture of the day\n"
        "/alert INFY above 1600 – a message when it happens\n"
        "/gainers, /losers, /active – the day's movers\n"
        "/help – all commands"
    )


async def help_(context: CommandContext) -> None:
    """List all commands, or explain one."""
    if context.words:
        name = context.words[0].lstrip("/").lower()
        command = COMMANDS.get(name)
        if command is None:
            raise UsageError(f"there is no /{name}", "/help lists all")
        audience = " Operators only." if command.for_admins else ""
        await context.reply(f"<code>{escape(command.usage)}</code>\n{escape(command.does)}.{audience}")
        return
    shown = [command for command in COMMANDS.values() if context.is_admin or not command.for_admins]
    lines = [f"{escape(command.usage)} – {escape(command.does)}" for command in shown]
    note = "SYMBOL is INFY (NSE), BSE:INFY, an index name or a token. Large files come in parts."
    await context.reply("\n".join(lines) + f"\n\n{note}")


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("start", "say hello", start, words_max=5),  # a deep link sends words with it
        Command("help", "list the commands, or explain one", help_, "[COMMAND]", words_max=1),
        *commands_market.COMMANDS,
        *commands_alerts.COMMANDS,
        *commands_files.COMMANDS,
        *commands_admin.COMMANDS,
    )
}
