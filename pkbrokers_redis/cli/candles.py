"""`pkb candles SYMBOL INTERVAL`: the last candles of an instrument."""

from __future__ import annotations

from typing import Annotated

import typer

from pkbrokers_redis.candles.model import CANDLE_FIELDS
from pkbrokers_redis.cli.output import AsCsv, AsJson, candle_row, choose, emit, note
from pkbrokers_redis.cli.reader import open_store

COLUMNS = ("time", *CANDLE_FIELDS, "flag")


def candles(
    symbol: Annotated[str, typer.Argument(metavar="SYMBOL", help="NSE:INFY, INFY or a token")],
    interval: Annotated[str, typer.Argument(metavar="INTERVAL", help="1m, 5m, 1h, day, …")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="how many, at most")] = 20,
    current: Annotated[bool, typer.Option("--current", help="with the candle still forming, last")] = False,
    fill: Annotated[bool, typer.Option("--fill", help="flat rows where nothing traded")] = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Print the last completed candles of an instrument, newest last."""
    form = choose(as_json, as_csv)
    with open_store() as store:
        token, name = store.resolve(symbol)
        found = store.get_candles(token, interval, count, include_current=current, fill=fill)
    if not found:
        note(f"no {interval} candles of {name} yet")
    columns = [column for column in COLUMNS if form != "table" or column != "start"]
    emit([candle_row(candle) for candle in found], columns, form, f"{name} {interval}")
