"""`pkb ticks SYMBOL`: what the tick stream holds of an instrument."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pkbrokers_redis.cli.output import AsCsv, AsJson, choose, emit, emit_each, iso, note
from pkbrokers_redis.cli.reader import open_store
from pkbrokers_redis.store.rows import Tick

COLUMNS = ("time", *Tick._fields)
PEOPLE = ("time", "last_price", "last_quantity", "volume", "oi", "day_open", "day_high", "day_low")


def ticks(
    symbol: Annotated[str, typer.Argument(metavar="SYMBOL", help="NSE:INFY, INFY or a token")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="how many of the last ones")] = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="print each as it comes, from now on")
    ] = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Print the last ticks of an instrument, newest last; the stream holds minutes at most."""
    form = choose(as_json, as_csv)
    columns = PEOPLE if form == "table" else COLUMNS
    with open_store() as store:
        token, name = store.resolve(symbol)
        if follow:
            emit_each(map(_row, store.follow_ticks(token)), columns, form)
            return
        found = store.ticks(token, count)
    if not found:
        note(f"no ticks of {name} in the stream")
    emit([_row(tick) for tick in found], columns, form, f"{name} ticks")


def _row(tick: Tick) -> dict[str, Any]:
    return {"time": iso(tick.time_ms / 1000), **tick._asdict()}
