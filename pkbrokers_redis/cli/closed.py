"""`pkb closed`: completed candles of all instruments, as they are announced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from pkbrokers_redis.candles.model import CANDLE_FIELDS
from pkbrokers_redis.cli.output import AsCsv, AsJson, candle_row, choose, emit, emit_each, note
from pkbrokers_redis.cli.reader import open_store
from pkbrokers_redis.client.follow import ClosedCandle, Follower

COLUMNS = ("time", "token", "symbol", "interval", *CANDLE_FIELDS, "flag", "rev")
PEOPLE = tuple(name for name in COLUMNS if name not in ("token", "start", "oi"))


def closed(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with each as it closes")] = False,
    count: Annotated[int, typer.Option("-n", "--count", min=0, help="how many of the last ones")] = 20,
    interval: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
    position: Annotated[str | None, typer.Option(help="with --follow: go on after that position")] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Print the last completed candles of all instruments; with --follow the next ones as they close.

    `rev` above 0 is an amended candle. Each line of --follow --json carries a position to go on from.
    """
    form = choose(as_json, as_csv)
    columns = PEOPLE if form == "table" else COLUMNS
    with open_store() as store:
        if not follow:
            last = store.last_closed(count, interval)
            if not last:
                note("no candle has closed yet")
            emit([_row(closed) for closed in last], columns, form)
            return
        follower = store.follow(intervals=interval, position=position)
        emit_each(_rows(follower), columns, form)


def _row(closed: ClosedCandle) -> dict[str, Any]:
    row = candle_row(closed.candle)
    row |= {"token": closed.token, "symbol": closed.symbol, "interval": closed.interval, "rev": closed.rev}
    return row | {"position": closed.position} if closed.position else row


def _rows(follower: Follower) -> Iterator[dict[str, Any]]:
    told = 0
    for closed in follower:
        if follower.missed > told:
            note(f"missed {follower.missed - told} closed candles: trimmed before they were read")
            told = follower.missed
        yield _row(closed)
