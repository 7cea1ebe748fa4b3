"""`pkb quote SYMBOL…`: the latest quotes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pkbrokers_redis.cli.output import AsCsv, AsJson, choose, dump, emit, note
from pkbrokers_redis.cli.reader import open_store
from pkbrokers_redis.store.rows import read_quote

SHORT = ("symbol", "last_price", "change", "open", "high", "low", "close", "volume", "oi", "exchange_time")
ALL = (
    *("token", "symbol", "last_price", "last_quantity", "average_price", "volume", "buy_quantity"),
    *("sell_quantity", "open", "high", "low", "close", "change", "oi", "oi_day_high", "oi_day_low"),
    *("last_trade_time", "exchange_time", "received_at", "mode", "depth"),
)


def quote(
    symbols: Annotated[list[str], typer.Argument(metavar="SYMBOL", help="NSE:INFY, INFY or a token")],
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Print the latest quotes. --json gives an object for one symbol, an array for several."""
    form = choose(as_json, as_csv)
    with open_store() as store:
        rows: list[dict[str, Any]] = []
        for token, symbol in [store.resolve(text) for text in symbols]:
            found = read_quote(store.client, store.keys, token)
            if not found:
                note(f"no quote of {symbol} yet")
            rows.append({"token": token, "symbol": symbol, **found})
    if form == "json" and len(rows) == 1:
        print(dump(rows[0]))
    else:
        emit(rows, SHORT if form == "table" else ALL, form)
