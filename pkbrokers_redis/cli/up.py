"""`pkb up`: the whole pipeline against Kite, one supervised process a role."""

from __future__ import annotations

from typing import Annotated

import typer

from pkbrokers_redis import logs
from pkbrokers_redis.pipeline.supervise import RoleSpec, Supervisor, worker_argv
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.connect import connect, describe


def up(
    aggregators: Annotated[
        int, typer.Option(min=1, max=64, help="aggregator processes to share the shards")
    ] = 1,
    ingests: Annotated[
        int, typer.Option(min=1, max=64, help="ingest processes to share the connections to Kite")
    ] = 1,
) -> None:
    """Run the pipeline against Kite: one process a role, restarted when it dies.

    SIGTERM or Ctrl-C stops in order: ingest, then the aggregators once they have committed what was read.
    """
    settings = load_settings()
    logs.configure(settings)
    # Connect before anything starts: a wrong URL is one line here instead of one from every worker. Held
    # until the end, so that the embedded server lives as long as we do, whichever worker restarts.
    with connect(settings):
        log = logs.get("up")
        log.info("starting", store=describe(settings), ingests=ingests, aggregators=aggregators)
        code = Supervisor(roles(aggregators, ingests)).run()
    raise typer.Exit(code)


def roles(aggregators: int, ingests: int = 1) -> list[RoleSpec]:
    """The table of roles, in the order of the data flow, which is the order in which they stop.

    The processes load the same environment and `.env` as we did. A new role is a row here.
    """
    return [
        RoleSpec("ingest", worker_argv("ingest"), ingests),
        RoleSpec("aggregate", worker_argv("aggregate"), aggregators),
    ]
