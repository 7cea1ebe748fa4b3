"""`pkb instruments …`: Kite's instrument master, and what of it is streamed."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from pkbrokers_redis.cli.output import AsCsv, AsJson, choose, dump, emit, note
from pkbrokers_redis.cli.reader import require_store
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.connect import connect

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)

SEARCH_COLUMNS = ("token", "symbol", "name", "instrument_type", "expiry", "strike", "lot_size")
Symbols = Annotated[list[str], typer.Argument(metavar="SYMBOL…", help="NSE:INFY, INFY or a token")]


@app.callback()
def instruments() -> None:
    """Fetch Kite's instrument master, search it, and change what is streamed without a restart."""


@app.command()
def sync(
    exchange: Annotated[
        list[str] | None, typer.Option(help="only this one, e.g. NSE; may be given several times")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="write it even if it is unchanged, or has lost half of its rows")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch Kite's list of instruments and swap it in; expired contracts go."""
    from pkbrokers_redis.kite.instruments import KiteInstruments

    settings = load_settings()
    began = time.monotonic()
    clock = market_clock(settings)
    with connect(settings) as client:
        found = KiteInstruments(settings=settings, client=client, now=lambda: clock() / 1000)
        synced = found.sync(exchange or (), force=force)
    seconds = time.monotonic() - began
    if as_json:
        print(dump({**synced._asdict(), "seconds": round(seconds, 2)}))
        return
    news = f"{synced.added:,} new, {synced.removed:,} gone" if synced.changed else "unchanged"
    odd = f"; {synced.refused:,} rows were no instruments" if synced.refused else ""
    print(f"{synced.rows:,} instruments in {seconds:.1f} s: {news}{odd}")


@app.command()
def search(
    text: Annotated[list[str], typer.Argument(metavar="TEXT…", help="a part of the symbol or company name")],
    exchange: Annotated[str, typer.Option(help="only on this one, e.g. NFO")] = "",
    n: Annotated[int, typer.Option("-n", min=1, max=1000, help="how many at most")] = 20,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Find instruments by symbol or company name; names what is spelt alike when nothing matches."""
    from pkbrokers_redis.errors import UnknownSymbol
    from pkbrokers_redis.store.instruments import search_instruments
    from pkbrokers_redis.store.symbols import SYNC

    form = choose(as_json, as_csv)
    settings = load_settings()
    wanted = " ".join(text)
    require_store(settings)
    with connect(settings, for_reading=True) as client:
        found = search_instruments(client, settings.keys, wanted, exchange=exchange, limit=n)
        if not found.rows:
            empty = not client.hlen(settings.keys.symbols())
            hint = SYNC if empty else "try a shorter part of its name, or another --exchange"
            raise UnknownSymbol(wanted[:40], [], f"the instrument master is empty: {hint}" if empty else hint)
    if not found.exact:
        note(f"nothing holds {wanted[:40]!r}; spelt alike:")
    emit(found.rows, SEARCH_COLUMNS, form)
    if found.total > len(found.rows):
        note(f"{found.total - len(found.rows):,} more: -n {min(found.total, 1000)} shows them")


@app.command("list")
def list_(as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """Print what is streamed: PKB_INSTRUMENTS as the master has it, with the live changes."""
    from pkbrokers_redis.store.instrument_list import ADD, instrument_list, load_watch

    form = choose(as_json, as_csv)
    settings = load_settings()
    require_store(settings)
    with connect(settings, for_reading=True) as client:
        chosen = instrument_list(client, settings)
        changes = load_watch(client, settings.keys)
    emit([{"token": token, "symbol": symbol} for token, symbol in chosen], ("token", "symbol"), form)
    added = sum(change == ADD for change in changes.values())
    live = f" ({added} added and {len(changes) - added} removed live)" if changes else ""
    note(f"{len(chosen):,} instruments{live}")


@app.command()
def add(symbols: Symbols) -> None:
    """Stream more instruments, now: a running ingest subscribes them within a second or two."""
    _edit(add=symbols)


@app.command()
def remove(symbols: Symbols) -> None:
    """Stop streaming instruments, now. Their candles stay."""
    _edit(remove=symbols)


def _edit(*, add: list[str] | None = None, remove: list[str] | None = None) -> None:
    from pkbrokers_redis.store.instrument_list import edit_watch, instrument_list

    settings = load_settings()
    with connect(settings) as client:
        changes = edit_watch(client, settings.keys, add=add or (), remove=remove or ())
        count = len(instrument_list(client, settings))
    for symbol, change in changes.items():
        print(f"{symbol}: {'added' if change == 'add' else 'removed'}")
    note(f"{count:,} instruments are streamed")
