"""`pkb aggregate`: one role in the foreground, for compose, systemd and Kubernetes."""

from __future__ import annotations

import typer

from pkbrokers_redis.runtime import roles


def aggregate() -> None:
    """Turn the tick streams into candles of every interval."""
    raise typer.Exit(roles.main(roles.aggregate))
