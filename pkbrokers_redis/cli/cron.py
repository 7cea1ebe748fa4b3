"""`pkb cron`: the trading day's jobs at their times; `--list` shows the table."""

from __future__ import annotations

from typing import Annotated

import typer

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.cli.output import AsJson, choose, emit
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.jobs.cron import NSE_TOKEN, Plan, cron, next_runs, schedules_of
from pkbrokers_redis.runtime import roles
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.embedded.server import running

COLUMNS = ("row", "next", "when", "job", "does")


def cron_(
    listed: Annotated[
        bool, typer.Option("--list", help="the table, with each row's next time in India")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put the trading day's jobs into the queue when they are due: login, snapshots, settling, sync.

    One role in the foreground, as `python -m workers.cron`; a `pkb jobs` worker carries them out. Holidays
    have none, special sessions theirs. Two of them do no harm.
    """
    if not listed:
        raise typer.Exit(roles.main(cron))
    settings = load_settings()
    sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
    schedules = {sessions.schedule_of(NSE_TOKEN)}
    try:
        if settings.redis_url is not None or running(settings.data_dir) is not None:
            with connect(settings, for_reading=True) as store:
                schedules = schedules_of(store, settings, sessions)
    except PkbError:
        pass  # the table needs no store, and starts none: then it is NSE's day
    rows = next_runs(Plan(sessions, schedules), market_clock(settings)())
    emit(rows, COLUMNS, choose(as_json, False))
