"""`pkb sync`: the snapshots to a data branch, and from there."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from pkbrokers_redis import logs
from pkbrokers_redis.cli.bar import bar
from pkbrokers_redis.cli.output import AsJson, dump, say_enqueued
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.jobs import pull as pulling
from pkbrokers_redis.jobs import sync as syncing
from pkbrokers_redis.jobs.github import target_of
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.job_names import job_id
from pkbrokers_redis.store.queue import enqueue, open_queue

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Bring the snapshots to a data branch on GitHub, or from there.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Files = Annotated[
    list[str] | None,
    typer.Option(
        "--file", metavar="PATTERN", help="which files; default: ticks.json, *.pkl and a restore's Parquet"
    ),
]
InQueue = Annotated[bool, typer.Option("--enqueue", help="leave it to a `pkb jobs` worker")]


def sync() -> None:
    """Bring the snapshots to a data branch on GitHub, or from there."""


@app.command()
def push(files: Files = None, in_queue: InQueue = False, as_json: AsJson = False) -> None:
    """Push the snapshots to PKB_GITHUB_BRANCH in one rolling commit; other files of the branch stay."""
    settings = load_settings()
    logs.configure(settings)
    target = target_of(settings)
    if in_queue:
        _enqueue("sync_push", {"files": files or None}, as_json)
        return
    with bar(hidden=as_json) as listener:
        found = syncing.push(
            target,
            settings.files_folder,
            files,
            intervals=settings.intervals,
            at_s=market_clock(settings)() / 1000,
            listener=listener,
        )
    if as_json:
        print(dump(found))
        return
    did = "pushed" if found["changed"] else "nothing is new; there are"
    print(f"{did} {found['files']} files, {found['bytes'] / 1e6:,.1f} MB: {target.shown}")


@app.command()
def pull(
    files: Files = None,
    via: Annotated[str, typer.Option(help="https, git, or auto")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="older files too")] = False,
    in_queue: InQueue = False,
    as_json: AsJson = False,
) -> None:
    """Fetch the published files that are newer than ours, checked before they take a place."""
    if via not in ("auto", "https", "git"):
        raise SettingsError(f"--via {via!r} is not known", "use https, git or auto")
    settings = load_settings()
    logs.configure(settings)
    if in_queue:
        _enqueue("sync_pull", {"files": files or None, "via": via, "force": force}, as_json)
        return
    with bar(hidden=as_json) as listener:
        found = pulling.pull(
            settings,
            settings.files_folder,
            files,
            via=cast(pulling.Via, via),
            force=force,
            listener=listener,
        )
    if as_json:
        print(dump(found))
        return
    print(
        f"{found['pulled']} files are new here ({found['bytes'] / 1e6:,.1f} MB), {found['same']} the same, "
        f"{found['older']} older than ours" if not found.get("unchanged") else "nothing has changed there"
    )  # fmt: skip


def _enqueue(name: str, arguments: dict[str, Any], as_json: bool) -> None:
    job = enqueue(open_queue(load_settings()), name, arguments, again=True)
    say_enqueued(job or job_id(name, arguments), job is not None, as_json)
