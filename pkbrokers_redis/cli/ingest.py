"""`pkb ingest`: one role in the foreground, for compose, systemd and Kubernetes."""

from __future__ import annotations

import typer

from pkbrokers_redis.runtime import roles


def ingest() -> None:
    """Stream PKB_INSTRUMENTS from Kite into Redis: tick streams and quotes."""
    raise typer.Exit(roles.main(roles.ingest))
