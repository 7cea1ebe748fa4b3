"""`pkb explain SYMBOL INTERVAL TIME`: why a candle looks as it does."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from pkbrokers_redis.candles.calendar import KOLKATA
from pkbrokers_redis.candles.model import CANDLE_FIELDS
from pkbrokers_redis.cli.output import AsJson, candle_row, dump, emit, iso
from pkbrokers_redis.cli.reader import open_store
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import PkbError

EPOCH_DIGITS_MIN = 9  # 1973; what is shorter is no time in epoch seconds


def explain(
    symbol: Annotated[str, typer.Argument(metavar="SYMBOL", help="NSE:INFY, INFY or a token")],
    interval: Annotated[str, typer.Argument(metavar="INTERVAL", help="1m, 5m, 1h, day, …")],
    time: Annotated[
        str, typer.Argument(metavar="TIME", help="inside it: 10:05, 2026-08-03T10:05, epoch seconds")
    ],
    as_json: AsJson = False,
) -> None:
    """Say why a candle looks as it does: its ticks, flag, revisions, source and session."""
    with open_store() as store:
        now_s = market_clock(store.settings)() / 1000
        found = store.explain(symbol, interval, parse_moment(time, now_s))
    if as_json:
        print(dump(found.as_dict()))
        return
    print(f"{found.symbol} {found.interval}  {iso(found.start)} to {iso(found.end)}")
    if found.row is not None:
        emit([candle_row(found.row)], [name for name in CANDLE_FIELDS if name != "start"], "table")
    for line in found.lines():
        print(f"  {line}")


def parse_moment(text: str, now_s: float) -> int:
    """A time as people write it → epoch seconds; without a date today's, without a zone Kolkata's.

    Raises PkbError.
    """
    text = text.strip()
    if text.isascii() and text.isdecimal() and EPOCH_DIGITS_MIN <= len(text) <= 10:
        return int(text)
    today = datetime.fromtimestamp(now_s, KOLKATA).date().isoformat()
    for candidate in (text, f"{today}T{text.rjust(5, '0')}"):
        try:
            moment = datetime.fromisoformat(candidate)
            if moment.year >= 1970:
                return int((moment if moment.tzinfo else moment.replace(tzinfo=KOLKATA)).timestamp())
        except (ValueError, OverflowError):
            continue
    raise PkbError(f"{text[:40]!r} is no time", "write 10:05, 2026-08-03T10:05 or epoch seconds")
