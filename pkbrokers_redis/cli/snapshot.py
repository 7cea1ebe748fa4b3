"""`pkb snapshot`: the store as files, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pkbrokers_redis import logs
from pkbrokers_redis.cli.bar import bar
from pkbrokers_redis.cli.output import AsJson, dump, note, say_enqueued
from pkbrokers_redis.cli.reader import require_store
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.files.manifest import problems, read_manifest
from pkbrokers_redis.jobs.restore import restore, verify
from pkbrokers_redis.jobs.snapshots import KINDS, open_run
from pkbrokers_redis.jobs.snapshots import snapshot as write_snapshot
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.job_names import job_id
from pkbrokers_redis.store.queue import enqueue, open_queue

EXIT_DIFFERENT = 1


def snapshot(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=", ".join(KINDS) + "; restore, check")],
    shape: Annotated[
        str, typer.Option(help="of pickles: published (DataFrames) or split (lists)")
    ] = "published",
    interval: Annotated[list[str] | None, typer.Option(help="of Parquet, repeatable; 1m and day")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="sqlite, parquet: write what is there already too")
    ] = False,
    folder: Annotated[Path | None, typer.Option(help="default: PKB_FILES_DIR")] = None,
    in_queue: Annotated[bool, typer.Option("--enqueue", help="leave it to a `pkb jobs` worker")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the store as files, restore an empty store from them, or check them.

    `restore` fills a store that no aggregator is at work on from the Parquet files; `check` compares the
    files with their manifest, and the Parquet ones with the store.
    """
    if shape not in ("published", "split"):
        raise SettingsError(f"unknown shape {shape!r}", "use published or split")
    if in_queue and kind in ("restore", "check"):
        raise SettingsError(f"--enqueue does not go with {kind}", "run it here")
    if in_queue and folder is not None:
        raise SettingsError(
            "--folder does not go with --enqueue", "the worker writes into the PKB_FILES_DIR it has"
        )
    settings = load_settings()
    logs.configure(settings)
    if kind == "restore":
        _restore(settings, folder, as_json)
    elif kind == "check":
        _check(settings, folder, as_json)
    else:
        arguments: dict[str, Any] = {"kind": kind}
        if kind == "pickle":
            arguments["shape"] = shape
        elif kind in ("parquet", "sqlite"):
            arguments |= {"intervals": interval, "full": full}
        if in_queue and kind in KINDS:
            job = enqueue(open_queue(settings), "snapshot", arguments, again=True)
            say_enqueued(job or job_id("snapshot", arguments), job is not None, as_json)
            return
        require_store(settings)
        with bar(hidden=as_json) as listener, open_run(settings, folder=folder, listener=listener) as run:
            found = write_snapshot(**arguments, run=run)
        print(dump(found) if as_json else _summary(found, run.folder))
        if not found["files"]:
            note("the store has nothing to write: files that are there stay as they are")


def _summary(found: dict[str, Any], folder: Path) -> str:
    files = list(found["files"].items())
    lines = [f"{folder / name}  {rows:,} rows" for name, rows in files[:10]]
    if len(files) > len(lines):
        lines.append(f"… and {len(files) - len(lines):,} more files")
    return "\n".join([*lines, f"{found['instruments']:,} instruments in {found['seconds']:.1f} s"])


def _restore(settings: Settings, folder: Path | None, as_json: bool) -> None:
    with open_run(settings, folder=folder) as run:
        told = restore(run=run)
        different = verify(run=run)
    if as_json:
        print(dump({"rows": told.rows, "left_alone": told.left_alone, "different": different}))
    else:
        for name, rows in told.rows.items():
            print(f"{name}  {rows:,} rows")
        if told.left_alone:
            note(f"{told.left_alone:,} lists had rows already and were left alone")
    _end(different, as_json)


def _check(settings: Settings, folder: Path | None, as_json: bool) -> None:
    with open_run(settings, folder=folder) as run:
        listed = read_manifest(run.folder)
        wrong = problems(run.folder)
        has_parquet = any(entry.kind == "parquet" for entry in listed.values())
        different = wrong or (verify(run=run) if has_parquet else [])
    if as_json:
        print(dump({"files": len(listed), "different": different}))
    elif not different:
        print(f"{len(listed):,} files are as their manifest says")
    _end(different, as_json)


def _end(different: list[str], as_json: bool) -> None:
    if not different:
        return
    if not as_json:
        for line in different[:20]:
            print(line)
        if len(different) > 20:
            print(f"… and {len(different) - 20:,} more")
    raise typer.Exit(EXIT_DIFFERENT)
