"""Commands that read the store from any machine: quote, candles, closed, ticks, explain, key."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from pkbrokers_redis.candles.model import CANDLE_FIELDS
from pkbrokers_redis.cli.common import (
    AsCsv,
    AsJson,
    IntervalName,
    Symbol,
    candle_row,
    choose_form,
    dump,
    emit,
    emit_each,
    iso,
    note,
    open_store,
    parse_moment,
)
from pkbrokers_redis.client.follow import ClosedCandle, Follower
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.store.rows import Tick, read_quote

COUNT_MAX = 1_000_000  # rows; no list or stream holds more
QUOTE_TABLE = (
    *("symbol", "last_price", "change", "bid", "ask", "volume", "open", "high", "low", "close", "oi"),
    "exchange_time",
)
QUOTE_COLUMNS = (
    *("token", "symbol", "last_price", "last_quantity", "average_price", "volume", "buy_quantity"),
    *("sell_quantity", "open", "high", "low", "close", "change", "oi", "oi_day_high", "oi_day_low"),
    *("last_trade_time", "exchange_time", "received_at", "mode", "depth"),
)
CANDLE_COLUMNS = ("time", *CANDLE_FIELDS, "flag")
CLOSED_COLUMNS = ("time", "token", "symbol", "interval", *CANDLE_FIELDS, "flag", "rev")
CLOSED_TABLE = tuple(name for name in CLOSED_COLUMNS if name not in ("token", "start", "oi"))
TICK_COLUMNS = ("time", *Tick._fields)
TICK_TABLE = ("time", "last_price", "last_quantity", "volume", "oi", "day_open", "day_high", "day_low")


def quote(
    symbols: Annotated[list[str], typer.Argument(metavar="SYMBOL", help="NSE:INFY, INFY or a token")],
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Print the latest quotes. --json gives an object for one symbol, an array for several."""
    form = choose_form(as_json, as_csv)
    rows: list[dict[str, Any]] = []
    with open_store() as store:
        for token, symbol in [store.resolve(text) for text in symbols]:
            fields = read_quote(store.client, store.keys, token)
            if not fields:
                note(f"no quote of {symbol} yet")
            rows.append({"token": token, "symbol": symbol, **fields})
    if form == "table":
        rows = [row | _best_offers(row) for row in rows]
    if form == "json" and len(rows) == 1:
        print(dump(rows[0]))
    else:
        emit(rows, QUOTE_TABLE if form == "table" else QUOTE_COLUMNS, form)


def _best_offers(row: dict[str, Any]) -> dict[str, Any]:
    """Return the best buyer and seller as `price × quantity`, for a table."""
    depth = row.get("depth")
    if not isinstance(depth, dict):
        return {}
    found: dict[str, Any] = {}
    for name, side in (("bid", "buy"), ("ask", "sell")):
        for level in (depth.get(side) or [])[:1]:
            if level.get("quantity"):
                found[name] = f"{level['price']:,.2f} × {level['quantity']:,}"
    return found


def candles(
    symbol: Symbol,
    interval: IntervalName,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=COUNT_MAX, help="how many at most")] = 20,
    current: Annotated[bool, typer.Option("--current", help="add the candle still forming, last")] = False,
    fill: Annotated[bool, typer.Option("--fill", help="add flat rows where nothing traded")] = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Print the last completed candles of an instrument, newest last."""
    form = choose_form(as_json, as_csv)
    with open_store() as store:
        token, name = store.resolve(symbol)
        rows = store.get_candles(token, interval, count, include_current=current, fill=fill)
    if not rows:
        note(f"no {interval} candles of {name} yet")
    columns = [column for column in CANDLE_COLUMNS if form != "table" or column != "start"]
    emit([candle_row(candle) for candle in rows], columns, form, f"{name} {interval}")


def closed(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with each as it closes")] = False,
    count: Annotated[
        int, typer.Option("-n", "--count", min=0, max=COUNT_MAX, help="how many of the last ones")
    ] = 20,
    interval: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
    position: Annotated[str | None, typer.Option(help="with --follow: start after that position")] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Print the last completed candles of all instruments; with --follow the next ones as they close.

    `rev` above 0 is an amended candle. Each line of --follow --json carries a position to resume from.
    """
    form = choose_form(as_json, as_csv)
    columns = CLOSED_TABLE if form == "table" else CLOSED_COLUMNS
    with open_store() as store:
        if follow:
            emit_each(_followed_rows(store.follow(intervals=interval, position=position)), columns, form)
            return
        last = store.last_closed(count, interval)
    if not last:
        note("no candle has closed yet")
    emit([_closed_row(event) for event in last], columns, form)


def _closed_row(event: ClosedCandle) -> dict[str, Any]:
    row = candle_row(event.candle)
    row |= {"token": event.token, "symbol": event.symbol, "interval": event.interval, "rev": event.rev}
    return row | {"position": event.position} if event.position else row


def _followed_rows(follower: Follower) -> Iterator[dict[str, Any]]:
    reported = 0
    for event in follower:
        if follower.missed > reported:
            note(f"missed {follower.missed - reported} closed candles: trimmed before they were read")
            reported = follower.missed
        yield _closed_row(event)


def ticks(
    symbol: Symbol,
    count: Annotated[
        int, typer.Option("-n", "--count", min=1, max=COUNT_MAX, help="how many of the last ones")
    ] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="print each new tick from now on")] = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Print the last ticks of an instrument, newest last; the stream holds minutes at most."""
    form = choose_form(as_json, as_csv)
    columns = TICK_TABLE if form == "table" else TICK_COLUMNS
    with open_store() as store:
        token, name = store.resolve(symbol)
        if follow:
            emit_each(map(_tick_row, store.follow_ticks(token)), columns, form)
            return
        last = store.ticks(token, count)
    if not last:
        note(f"no ticks of {name} in the stream")
    emit([_tick_row(tick) for tick in last], columns, form, f"{name} ticks")


def _tick_row(tick: Tick) -> dict[str, Any]:
    return {"time": iso(tick.time_ms / 1000), **tick._asdict()}


def explain(
    symbol: Symbol,
    interval: IntervalName,
    time: Annotated[
        str, typer.Argument(metavar="TIME", help="inside it: 10:05, 2026-08-03T10:05, epoch seconds")
    ],
    as_json: AsJson = False,
) -> None:
    """Explain why a candle looks as it does: its ticks, flag, revisions, source and session."""
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


def key(symbol: Symbol, as_json: AsJson = False) -> None:
    """Print the Redis keys of an instrument, and redis-cli lines that read them."""
    from pkbrokers_redis.cli.redis_cli import cli_arguments

    with open_store() as store:
        token, name = store.resolve(symbol)
        keys, interval = store.keys, store.intervals[0]
        shard = keys.shard_of(token)
        options, secrets = cli_arguments(store.client)
        names = {
            "instrument": keys.instrument(token),
            "quote": keys.quote(token),
            "current": keys.current(token),
            **{f"candles {each}": keys.candles(token, each) for each in store.intervals},
            "ticks": keys.ticks(shard),
            "closed": keys.closed(shard),
        }
    # The lines show no password. `pkb redis-cli` finds it by itself.
    program = ["pkb", "redis-cli"] if secrets else ["redis-cli", *options]
    examples = {
        "the latest quote": ["HGETALL", names["quote"]],
        f"the {interval} candle being formed": ["HGET", names["current"], interval],
        f"the last 5 completed {interval} candles": ["LRANGE", names[f"candles {interval}"], "-5", "-1"],
        "the newest frame of its shard": ["XREVRANGE", names["ticks"], "+", "-", "COUNT", "1"],
        "candles as they close": ["XREAD", "BLOCK", "0", "STREAMS", names["closed"], "$"],
    }
    lines = {what: shlex.join([*program, *words]) for what, words in examples.items()}
    if as_json:
        document = {"token": token, "symbol": name, "shard": shard, "keys": names}
        print(dump({**document, "examples": list(lines.values())}))
        return
    print(f"{name}: token {token}, shard {{{shard}}} of {keys.shards}\n")
    for label, redis_key in names.items():
        print(f"  {label:<14}{redis_key}")
    print()
    for what, line in lines.items():
        print(f"  # {what}\n  {line}")
