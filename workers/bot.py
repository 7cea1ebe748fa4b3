"""The bot worker: `python -m workers.bot`, the same as `pkb bot`."""

from __future__ import annotations

import sys

from pkbrokers_redis.bot.runner import bot
from pkbrokers_redis.runtime.roles import run_role

if __name__ == "__main__":
    sys.exit(run_role(bot, sys.argv[1:]))
