"""`pkb backfill`: our candles of a day against Kite's history, and Kite's in place of those that differ."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

import typer

from pkbrokers_redis import logs
from pkbrokers_redis.cli.bar import bar
from pkbrokers_redis.cli.output import AsJson, dump, note, say_enqueued
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.jobs.backfill import kept_interval, repair_day
from pkbrokers_redis.jobs.context import Desk, open_desk
from pkbrokers_redis.jobs.progress import read_progress
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.instrument_list import instrument_list
from pkbrokers_redis.store.job_names import job_id
from pkbrokers_redis.store.queue import enqueue, open_queue
from pkbrokers_redis.store.symbols import resolve_all

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
        str, typer.Option(help="1m mends the longer ones too; or one that Kite has, or day")
    ] = "1m",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="compare only")] = False,
    in_queue: Annotated[bool, typer.Option("--enqueue", help="leave it to a `pkb jobs` worker")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a day's candles with Kite's history and replace what differs.

    Kite allows three requests a second, one per instrument. Interrupted, the same command goes on.
    """
    settings = load_settings()
    logs.configure(settings)
    with open_desk(settings) as desk:
        interval = kept_interval(desk, interval).name
        tokens = _tokens(desk, symbols or [])
        arguments: dict[str, Any] = {
            "day": str(_date(desk, tokens[0], day)),
            "tokens": tokens,
            "interval": interval,
            "dry_run": dry_run,
        }
        if in_queue:
            job = enqueue(open_queue(settings), "repair_day", arguments, again=True)
            say_enqueued(job or job_id("repair_day", arguments), job is not None, as_json)
            return
        before = read_progress(desk.client, desk.keys, job_id("repair_day", arguments))
        if before is not None:
            note(f"going on where an earlier run ended: {before[0]:,} of {before[1]:,} instruments are done")
        with bar(hidden=as_json) as listener:
            found = repair_day(**arguments, desk=desk, listener=listener, seconds_max=None)
    if as_json:
        print(dump({"day": arguments["day"], "interval": interval, "dry_run": dry_run, **found}))
        return
    print(_summary(found, arguments["day"], interval, dry_run))
    if not found["applied"]:
        note("the aggregators have not applied it yet: is one running (`pkb status`)? The rows wait for it")


def _tokens(desk: Desk, symbols: list[str]) -> list[int]:
    if symbols:
        chosen = resolve_all(desk.client, desk.keys, symbols)
    else:
        chosen = instrument_list(desk.client, desk.settings)
    if not chosen:
        raise SettingsError("there is nothing to backfill", "name symbols, or set PKB_INSTRUMENTS")
    return list(dict.fromkeys(token for token, _ in chosen))


def _date(desk: Desk, token: int, text: str) -> date:
    if not text:
        return desk.last_session(token)
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"--day {text!r} is no date", "write it as 2026-11-20") from None


def _summary(found: dict[str, Any], day: str, interval: str, dry_run: bool) -> str:
    parts = [f"{found[name]:,} {words}" for name, words in WORDS.items() if found.get(name)]
    line = f"{day}: {found.get('rows', 0):,} {interval} rows of {found['instruments']:,} instruments at Kite"
    line += ": " + ", ".join(parts) if parts else ""
    if found.get("too_old"):
        line += f"; {found['too_old']:,} instruments keep none of that day any more"
    if found.get("refused"):
        line += f"; Kite refused {found['refused']:,} instruments, see the log"
    differing = found.get("changed", 0) + found.get("missing", 0) + found.get("marked", 0)
    if dry_run:
        return line + (f"\n{differing:,} would be replaced" if differing else "")
    return line + (f"\n{differing:,} replaced" if found.get("sent") else "")
