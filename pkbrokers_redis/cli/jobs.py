"""Jobs: `pkb jobs` and `pkb cron` run or list them; `pkb snapshot`, `sync` and `backfill` run one now.

With `--enqueue` the latter three leave the job to a `pkb jobs` worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.cli.common import (
    AsJson,
    InQueue,
    choose_form,
    emit,
    iso,
    new_group,
    note,
    open_client,
    parse_date,
    progress_bar,
    require_store,
    show,
)
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.files.manifest import problems, read_manifest
from pkbrokers_redis.jobs import pull as pulling
from pkbrokers_redis.jobs import sync as syncing
from pkbrokers_redis.jobs import view, worker
from pkbrokers_redis.jobs.backfill import kept_interval, repair_day
from pkbrokers_redis.jobs.context import JobContext, open_job_context
from pkbrokers_redis.jobs.cron import NSE_TOKEN, Plan, cron, next_runs, schedules_of
from pkbrokers_redis.jobs.github import target_of
from pkbrokers_redis.jobs.progress import read_progress
from pkbrokers_redis.jobs.restore import restore, verify
from pkbrokers_redis.jobs.snapshots import KINDS, Run, open_run
from pkbrokers_redis.jobs.snapshots import snapshot as write_snapshot
from pkbrokers_redis.runtime.roles import run_role
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.embedded import running
from pkbrokers_redis.store.queue import enqueue, has_queue, job_id, open_queue
from pkbrokers_redis.store.symbols import instrument_list, resolve_all

LISTED = ("id", "job", "state", "since", "progress", "retries_left")
FAILED = ("id", "job", "at", "reason")
CRON_COLUMNS = ("row", "next", "when", "job", "does")
EXIT_DIFFERENT = 1


def jobs(
    listed: Annotated[
        bool, typer.Option("--list", help="jobs that run, wait or are scheduled, with progress")
    ] = False,
    failed: Annotated[bool, typer.Option("--failed", help="failed jobs and the reason")] = False,
    retry: Annotated[
        str, typer.Option(metavar="ID|all", help="put a failed job, or all of them, into the queue again")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Run jobs from the queue: repairs of outages, warm starts, backfills. With an option: list them.

    Several workers share the queue. It is the same as `python -m workers.jobs`.
    """
    if not (listed or failed or retry):
        raise typer.Exit(run_role(worker.jobs))
    form = choose_form(as_json)
    with open_client() as (store, settings):
        # Use the store's client if the queue is in the store: another would start an embedded server.
        is_shared = settings.rq_redis_url is None and has_queue(settings)
        queue = open_queue(settings, store if is_shared else None)
        if retry:
            again = view.retry(queue, retry)
            emit([{"id": job} for job in again], ("id",), form, title="in the queue again")
        elif failed:
            rows = view.failed_jobs(queue)
            emit([{**row, "at": iso(row["at"]) if row["at"] else ""} for row in rows], FAILED, form)
        else:
            emit([_job_row(row) for row in view.list_jobs(queue, store, settings.keys)], LISTED, form)


def _job_row(row: dict[str, Any]) -> dict[str, Any]:
    since = iso(row["since"]) if row["since"] else ""
    return {**row, "since": since, "progress": f"{row['done']}/{row['total']}" if row["total"] else ""}


def cron_(
    listed: Annotated[
        bool, typer.Option("--list", help="print the table with each row's next time in India")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Queue the trading day's jobs when they are due: login, snapshots, final candles, sync.

    A `pkb jobs` worker runs them. Holidays have none; special sessions have their own times. A second cron
    changes nothing. It is the same as `python -m workers.cron`.
    """
    if not listed:
        raise typer.Exit(run_role(cron))
    settings = load_settings()
    sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
    schedules = {sessions.schedule_of(NSE_TOKEN)}
    try:
        if settings.redis_url is not None or running(settings.data_dir) is not None:
            with connect(settings, for_reading=True) as store:
                schedules = schedules_of(store, settings, sessions)
    except PkbError:
        pass  # the table needs no store: without one it is the day of NSE
    rows = next_runs(Plan(sessions, schedules), market_clock(settings)())
    emit(rows, CRON_COLUMNS, choose_form(as_json))


def snapshot(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=", ".join(KINDS) + "; restore, check")],
    shape: Annotated[
        str, typer.Option(help="of pickles: published (DataFrames) or split (lists)")
    ] = "published",
    interval: Annotated[list[str] | None, typer.Option(help="of Parquet, repeatable; 1m and day")] = None,
    full: Annotated[bool, typer.Option("--full", help="sqlite, parquet: write existing parts again")] = False,
    folder: Annotated[Path | None, typer.Option(help="default: PKB_FILES_DIR")] = None,
    in_queue: InQueue = False,
    as_json: AsJson = False,
) -> None:
    """Write the store as files, restore an empty store from them, or check them.

    `restore` fills a store without a running aggregator from the Parquet files; `check` compares the files
    with their manifest, and the Parquet files with the store.
    """
    is_writing = kind not in ("restore", "check")
    if shape not in ("published", "split"):
        raise SettingsError(f"unknown shape {shape!r}", "use published or split")
    if in_queue and not is_writing:
        raise SettingsError(f"--enqueue does not go with {kind}", "run it here")
    if in_queue and folder is not None:
        raise SettingsError(
            "--folder does not go with --enqueue", "the worker writes into the PKB_FILES_DIR it has"
        )
    settings = load_settings()
    logs.configure(settings)
    arguments: dict[str, Any] = {"kind": kind}
    if kind == "pickle":
        arguments["shape"] = shape
    elif kind in ("parquet", "sqlite"):
        arguments |= {"intervals": interval, "full": full}
    if in_queue and kind in KINDS:
        _enqueue(settings, "snapshot", arguments, as_json)
        return
    if is_writing:
        require_store(settings)
    with (
        progress_bar(hidden=as_json or not is_writing) as listener,
        open_run(settings, folder=folder, listener=listener) as run,
    ):
        if kind == "restore":
            _restore(run, as_json)
        elif kind == "check":
            _check(run, as_json)
        else:
            found = write_snapshot(**arguments, run=run)
    if is_writing:
        show(found, as_json, _summary(found, run.folder))
        if not found["files"]:
            note("the store has nothing to write: existing files stay as they are")


def _summary(found: dict[str, Any], folder: Path) -> str:
    lines = [f"{folder / name}  {rows:,} rows" for name, rows in found["files"].items()]
    return "\n".join(
        [*_first(lines, 10, "files"), f"{found['instruments']:,} instruments in {found['seconds']:.1f} s"]
    )


def _first(lines: list[str], count: int, things: str) -> list[str]:
    """Return the first lines, and how many more there are."""
    return lines if len(lines) <= count else [*lines[:count], f"… and {len(lines) - count:,} more {things}"]


def _restore(run: Run, as_json: bool) -> None:
    result = restore(run=run)
    different = verify(run=run)
    lines = [f"{name}  {rows:,} rows" for name, rows in result.rows.items()]
    document = {"rows": result.rows, "lists_skipped": result.lists_skipped, "different": different}
    show(document, as_json, "\n".join([*lines, *_first(different, 20, "differences")]))
    if result.lists_skipped and not as_json:
        note(f"{result.lists_skipped:,} lists had rows already and were not changed")
    if different:
        raise typer.Exit(EXIT_DIFFERENT)


def _check(run: Run, as_json: bool) -> None:
    files = read_manifest(run.folder)
    different = problems(run.folder)
    if not different and any(entry.kind == "parquet" for entry in files.values()):
        different = verify(run=run)
    lines = _first(different, 20, "differences") or [f"{len(files):,} files agree with their manifest"]
    show({"files": len(files), "different": different}, as_json, "\n".join(lines))
    if different:
        raise typer.Exit(EXIT_DIFFERENT)


sync_app = new_group()

Files = Annotated[
    list[str] | None,
    typer.Option(
        "--file", metavar="PATTERN", help="which files; default: ticks.json, *.pkl and a restore's Parquet"
    ),
]


@sync_app.callback()
def sync() -> None:
    """Push the snapshots to a data branch on GitHub, or pull them."""


@sync_app.command()
def push(files: Files = None, in_queue: InQueue = False, as_json: AsJson = False) -> None:
    """Push the snapshots to PKB_GITHUB_BRANCH in one rolling commit; other files of the branch stay."""
    settings = load_settings()
    logs.configure(settings)
    target = target_of(settings)
    if in_queue:
        _enqueue(settings, "sync_push", {"files": files or None}, as_json)
        return
    with progress_bar(hidden=as_json) as listener:
        found = syncing.push(
            target,
            settings.files_folder,
            files,
            intervals=settings.intervals,
            at_s=market_clock(settings)() / 1000,
            listener=listener,
        )
    did = "pushed" if found["changed"] else "nothing has changed;"
    show(found, as_json, f"{did} {found['files']} files, {found['bytes'] / 1e6:,.1f} MB: {target.shown}")


@sync_app.command()
def pull(
    files: Files = None,
    via: Annotated[str, typer.Option(help="https, git, or auto")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="fetch older files too")] = False,
    in_queue: InQueue = False,
    as_json: AsJson = False,
) -> None:
    """Fetch the published files that are newer than the local ones; check them before they replace any."""
    if via not in ("auto", "https", "git"):
        raise SettingsError(f"--via {via!r} is unknown", "use https, git or auto")
    settings = load_settings()
    logs.configure(settings)
    if in_queue:
        _enqueue(settings, "sync_pull", {"files": files or None, "via": via, "force": force}, as_json)
        return
    with progress_bar(hidden=as_json) as listener:
        found = pulling.pull(
            settings,
            settings.files_folder,
            files,
            via=cast(pulling.Via, via),
            force=force,
            listener=listener,
        )
    text = "nothing has changed on the branch"
    if not found.get("unchanged"):
        text = (
            f"pulled {found['pulled']} files, {found['bytes'] / 1e6:,.1f} MB; "
            f"{found['same']} unchanged, {found['older']} older than the local ones"
        )
    show(found, as_json, text)


def _enqueue(settings: Settings, name: str, arguments: dict[str, Any], as_json: bool) -> None:
    job = enqueue(open_queue(settings), name, arguments, again=True)
    named = job or job_id(name, arguments)
    state = "is in the queue" if job else "was in the queue already"
    show({"job": named, "new": job is not None}, as_json, f"{named} {state}; see pkb jobs --list")


WORDS = {
    "matched": "equal",
    "changed": "differed",
    "missing": "were missing here",
    "extra": "Kite does not have",
    "marked": "were marked as partial or gap",
}


def backfill(
    symbols: Annotated[
        list[str] | None, typer.Argument(metavar="[SYMBOL…]", help="default: all that is streamed")
    ] = None,
    day: Annotated[str, typer.Option(metavar="DATE", help="2026-11-20; default: the last session")] = "",
    interval: Annotated[
        str, typer.Option(help="1m also corrects the longer ones; or another one of Kite's, or day")
    ] = "1m",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="compare only")] = False,
    in_queue: InQueue = False,
    as_json: AsJson = False,
) -> None:
    """Compare a day's candles with Kite's history and replace what differs.

    Kite allows three requests a second, one per instrument. After an interruption the same command resumes.
    """
    settings = load_settings()
    logs.configure(settings)
    with open_job_context(settings) as context:
        interval = kept_interval(context, interval).name
        tokens = _tokens(context, symbols or [])
        arguments: dict[str, Any] = {
            "day": str(parse_date(day, "--day") if day else context.last_session(tokens[0])),
            "tokens": tokens,
            "interval": interval,
            "dry_run": dry_run,
        }
        if in_queue:
            _enqueue(settings, "repair_day", arguments, as_json)
            return
        before = read_progress(context.client, context.keys, job_id("repair_day", arguments))
        if before is not None:
            note(f"resuming an earlier run: {before[0]:,} of {before[1]:,} instruments are done")
        with progress_bar(hidden=as_json) as listener:
            found = repair_day(**arguments, context=context, listener=listener, seconds_max=None)
    text = _backfill_summary(found, arguments["day"], interval, dry_run)
    show({"day": arguments["day"], "interval": interval, "dry_run": dry_run, **found}, as_json, text)
    if not as_json and not found["applied"]:
        note("the aggregators have not applied it yet: is one running (`pkb status`)? The rows wait for it")


def _tokens(context: JobContext, symbols: list[str]) -> list[int]:
    if symbols:
        chosen = resolve_all(context.client, context.keys, symbols)
    else:
        chosen = instrument_list(context.client, context.settings)
    if not chosen:
        raise SettingsError("there is nothing to backfill", "name symbols, or set PKB_INSTRUMENTS")
    return list(dict.fromkeys(token for token, _ in chosen))


def _backfill_summary(found: dict[str, Any], day: str, interval: str, dry_run: bool) -> str:
    parts = [f"{found[name]:,} {words}" for name, words in WORDS.items() if found.get(name)]
    line = f"{day}: {found.get('rows', 0):,} {interval} rows of {found['instruments']:,} instruments at Kite"
    line += ": " + ", ".join(parts) if parts else ""
    if found.get("too_old"):
        line += f"; {found['too_old']:,} instruments no longer keep candles of that day"
    if found.get("refused"):
        line += f"; Kite refused {found['refused']:,} instruments, see the log"
    differing = found.get("changed", 0) + found.get("missing", 0) + found.get("marked", 0)
    if dry_run:
        return line + (f"\n{differing:,} would be replaced" if differing else "")
    return line + (f"\n{differing:,} replaced" if found.get("sent") else "")
