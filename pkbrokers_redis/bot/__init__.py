"""The Telegram bot: the market in a chat. One file a command in `commands/`, their table in `registry.py`."""
