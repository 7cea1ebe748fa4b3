"""The Telegram bot: the market in a chat. One file per command in `commands/`; the table is `registry.py`."""
