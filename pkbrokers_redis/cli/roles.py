"""`pkb up`, which supervises one process a role, and the roles of the pipeline in the foreground."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.settings import load_settings

if TYPE_CHECKING:
    from pkbrokers_redis.runtime.supervisor import RoleSpec


def ingest() -> None:
    """Read Kite's websockets and write tick streams and quotes."""
    from pkbrokers_redis.ingest.worker import run_ingest
    from pkbrokers_redis.runtime.roles import run_role

    raise typer.Exit(run_role(run_ingest))


def aggregate() -> None:
    """Turn the tick streams into candles of every interval."""
    from pkbrokers_redis.aggregate.worker import run_aggregate
    from pkbrokers_redis.runtime.roles import run_role

    raise typer.Exit(run_role(run_aggregate))


def bot() -> None:
    """Answer in Telegram: quotes, charts, files and alerts.

    If several bots run, one is active and another replaces it when it dies.
    """
    from pkbrokers_redis.bot.runner import bot
    from pkbrokers_redis.runtime.roles import run_role

    raise typer.Exit(run_role(bot))


def web() -> None:
    """Serve health, quotes, candles and closed-candle events over HTTP.

    It listens on PKB_WEB_HOST and PKB_WEB_PORT (127.0.0.1:8377) and only reads. Any number may run.
    """
    from pkbrokers_redis.cli.common import require_store
    from pkbrokers_redis.runtime.roles import run_role
    from pkbrokers_redis.web.runner import serve

    require_store(load_settings())
    raise typer.Exit(run_role(serve))


def up(
    aggregators: Annotated[
        int, typer.Option(min=1, max=64, help="aggregator processes, which share the shards")
    ] = 1,
    ingests: Annotated[
        int, typer.Option(min=1, max=64, help="ingest processes, which share the connections to Kite")
    ] = 1,
    jobs: Annotated[
        int, typer.Option(min=0, max=16, help="job workers: repairs, warm starts, backfills; 0 for none")
    ] = 1,
    with_cron: Annotated[
        bool, typer.Option("--cron/--no-cron", help="run the trading day's jobs at their times")
    ] = True,
    with_bot: Annotated[
        bool, typer.Option("--bot/--no-bot", help="run the Telegram bot if PKB_TELEGRAM_TOKEN is set")
    ] = True,
    with_web: Annotated[
        bool, typer.Option("--web/--no-web", help="run the web server on PKB_WEB_HOST and PKB_WEB_PORT")
    ] = True,
) -> None:
    """Run the pipeline against Kite: one process per role, restarted when it dies.

    SIGTERM or Ctrl-C stops the roles in order: ingest, cron, jobs, then the aggregators, which commit what
    was read.
    """
    from pkbrokers_redis import logs
    from pkbrokers_redis.runtime.supervisor import Supervisor
    from pkbrokers_redis.store.connect import connect, describe
    from pkbrokers_redis.store.queue import has_queue
    from pkbrokers_redis.store.symbols import load_watch

    settings = load_settings()
    logs.configure(settings)
    # Connect before any worker starts: a wrong URL is one line here instead of one from every worker. The
    # connection stays open, so that the embedded server lives as long as this process.
    with connect(settings) as client:
        if not settings.instruments and not load_watch(client, settings.keys):
            raise SettingsError("there is nothing to stream", "set PKB_INSTRUMENTS, e.g. NSE:INFY,NSE:TCS")
        log = logs.get("up")
        if jobs and not has_queue(settings):
            log.warning(
                "jobs_disabled", reason="RQ does not run on a Redis Cluster", hint="set PKB_RQ_REDIS_URL"
            )
            jobs = 0
        counts = {
            "ingest": ingests,
            "cron": int(with_cron and jobs > 0),
            "jobs": jobs,
            "aggregate": aggregators,
            "web": int(with_web),
            "bot": int(with_bot and settings.telegram_token is not None),
        }
        log.info("starting", store=describe(settings), **counts)
        code = Supervisor(role_specs(counts)).run()
    raise typer.Exit(code)


def role_specs(counts: dict[str, int]) -> list[RoleSpec]:
    """Return the supervised roles, in the order in which they stop. Their environment is this process's.

    Args:
        counts: Processes of each role, in the order of the data flow; 0 leaves the role out.
    """
    from pkbrokers_redis.runtime.supervisor import RoleSpec, worker_argv

    return [RoleSpec(role, worker_argv(role), count) for role, count in counts.items() if count]
