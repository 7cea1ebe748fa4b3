"""`pkb bot`: one role in the foreground, for compose, systemd and Kubernetes."""

from __future__ import annotations

import typer

from pkbrokers_redis.bot import runner
from pkbrokers_redis.runtime import roles


def bot() -> None:
    """Answer in Telegram: quotes, charts, files, alerts. Of several one answers, and the others wait."""
    raise typer.Exit(roles.main(runner.bot))
