"""`pkb web`: one role in the foreground, for compose, systemd and Kubernetes."""

from __future__ import annotations

import typer

from pkbrokers_redis.cli.reader import require_store
from pkbrokers_redis.runtime import roles
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.web import runner


def web() -> None:
    """Serve health, candles, closed-candle events and a page over HTTP. Reads only; any number may run."""
    require_store(load_settings())
    raise typer.Exit(roles.main(runner.serve))
