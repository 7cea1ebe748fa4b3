"""The Telegram bot: the market in a chat. `commands.py` has the table of commands."""
