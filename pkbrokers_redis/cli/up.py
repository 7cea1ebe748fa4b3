"""`pkb up`: the whole pipeline against Kite, one supervised process per role."""

from __future__ import annotations

from typing import Annotated

import typer

from pkbrokers_redis import logs
from pkbrokers_redis.runtime.supervisor import RoleSpec, Supervisor, worker_argv
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.queue import has_queue


def up(
    aggregators: Annotated[
        int, typer.Option(min=1, max=64, help="aggregator processes to share the shards")
    ] = 1,
    ingests: Annotated[
        int, typer.Option(min=1, max=64, help="ingest processes to share the connections to Kite")
    ] = 1,
    jobs: Annotated[
        int, typer.Option(min=0, max=16, help="job workers: repairs, warm starts, backfills; 0 for none")
    ] = 1,
    with_cron: Annotated[
        bool, typer.Option("--cron/--no-cron", help="the trading day's jobs at their times")
    ] = True,
    with_bot: Annotated[
        bool, typer.Option("--bot/--no-bot", help="the Telegram bot, where PKB_TELEGRAM_TOKEN is set")
    ] = True,
    with_web: Annotated[
        bool, typer.Option("--web/--no-web", help="the web server on PKB_WEB_HOST and PKB_WEB_PORT")
    ] = True,
) -> None:
    """Run the pipeline against Kite: one process per role, restarted when it dies.

    SIGTERM or Ctrl-C stops in order: ingest, cron, jobs, then the aggregators, which commit what was read.
    """
    settings = load_settings()
    logs.configure(settings)
    # Connect before anything starts: a wrong URL is one line here instead of one from every worker. Held
    # until the end, so that the embedded server lives as long as we do, whichever worker restarts.
    with connect(settings):
        log = logs.get("up")
        if jobs and not has_queue(settings):
            log.warning("no_jobs", why="RQ does not run on a Redis Cluster", hint="set PKB_RQ_REDIS_URL")
            jobs = 0
        with_cron = with_cron and jobs > 0
        with_bot = with_bot and settings.telegram_token is not None
        log.info(
            "starting", store=describe(settings), ingests=ingests, aggregators=aggregators, jobs=jobs,
            cron=with_cron,
        )  # fmt: skip
        code = Supervisor(roles(aggregators, ingests, jobs, with_bot, with_cron, with_web)).run()
    raise typer.Exit(code)


def roles(
    aggregators: int,
    ingests: int = 1,
    jobs: int = 1,
    with_bot: bool = False,
    with_cron: bool = False,
    with_web: bool = False,
) -> list[RoleSpec]:
    """The table of roles, in the order of the data flow, which is the order in which they stop.

    The processes load the same environment and `.env` as we did. A new role is a row here.
    """
    return [
        RoleSpec("ingest", worker_argv("ingest"), ingests),
        *([RoleSpec("cron", worker_argv("cron"))] if with_cron else []),
        RoleSpec("jobs", worker_argv("jobs"), jobs),
        RoleSpec("aggregate", worker_argv("aggregate"), aggregators),
        *([RoleSpec("web", worker_argv("web"))] if with_web else []),
        *([RoleSpec("bot", worker_argv("bot"))] if with_bot else []),
    ]
