"""`pkb jobs`: the jobs worker in the foreground, and a look at the queue."""

from __future__ import annotations

from typing import Annotated

import typer

from pkbrokers_redis.cli.output import AsJson, choose, emit, iso
from pkbrokers_redis.cli.reader import require_store
from pkbrokers_redis.jobs import view, worker
from pkbrokers_redis.runtime import roles
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.queue import has_queue, open_queue

LISTED = ("id", "job", "state", "since", "progress", "retries_left")
FAILED = ("id", "job", "at", "why")


def jobs(
    listed: Annotated[
        bool, typer.Option("--list", help="what runs, waits or is due later, and how far it is")
    ] = False,
    failed: Annotated[bool, typer.Option("--failed", help="what was given up, and why")] = False,
    retry: Annotated[
        str, typer.Option(metavar="ID|all", help="try a failed job, or all of them, again")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Run jobs from the queue: repairs of outages, warm starts, backfills. With an option: look at it.

    One role in the foreground, as `python -m workers.jobs`. Several share the queue.
    """
    if not (listed or failed or retry):
        raise typer.Exit(roles.main(worker.jobs))
    settings = load_settings()
    form = choose(as_json, False)
    require_store(settings)
    with connect(settings, for_reading=True) as store:
        # The store's own client where the queue is there too: another would make an embedded store anew.
        is_shared = settings.rq_redis_url is None and has_queue(settings)
        queue = open_queue(settings, store if is_shared else None)
        if retry:
            again = view.retry(queue, retry)
            emit([{"id": each} for each in again], ("id",), form, title="in the queue again")
            return
        if failed:
            rows = view.failed_jobs(queue)
            emit([{**row, "at": iso(row["at"]) if row["at"] else ""} for row in rows], FAILED, form)
            return
        rows = view.list_jobs(queue, store, settings.keys)
    shown = [
        {
            **row,
            "since": iso(row["since"]) if row["since"] else "",
            "progress": f"{row['done']}/{row['total']}" if row["total"] else "",
        }
        for row in rows
    ]
    emit(shown, LISTED, form)
