"""`pkb login`: a Kite session for all processes. `pkb instruments`: the master, and what is streamed."""

from __future__ import annotations

import getpass
import sys
import time
from datetime import datetime, timedelta
from typing import Annotated

import typer

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.cli.common import (
    AsCsv,
    AsJson,
    choose_form,
    emit,
    iso,
    new_group,
    note,
    open_client,
    show,
)
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.errors import LoginNeeded
from pkbrokers_redis.kite.rest import session_in
from pkbrokers_redis.kite.session import KiteAuthenticator, SessionManager
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.auth import Session, load_login_state, load_session
from pkbrokers_redis.store.connect import connect

EXIT_NO_SESSION = 1
WHAT_TO_SET = (
    "set PKB_KITE_USER_ID, PKB_KITE_PASSWORD and PKB_KITE_TOTP_SECRET (web login), or PKB_KITE_API_KEY and "
    "PKB_KITE_API_SECRET (Kite Connect), or all five"
)


def login(
    request_token: Annotated[
        str,
        typer.Option(metavar="TOKEN", help="what Kite appended to the app's URL; default: a hidden prompt"),
    ] = "",
    by_hand: Annotated[
        bool, typer.Option("--by-hand", help="log in with the browser even where all credentials are set")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="only print the current session")] = False,
    as_json: AsJson = False,
) -> None:
    """Log in at Kite and share the session with all processes.

    It prints the user and the end of the session, never the token.
    """
    if status:
        _print_status(as_json)
        return
    settings = load_settings()
    with connect(settings) as client:
        manager = SessionManager(settings, lambda: client)
        authenticator = manager.authenticator
        if not request_token and (by_hand or not authenticator.has_web_credentials):
            if not authenticator.has_app:
                raise LoginNeeded("there are no credentials to log in with", WHAT_TO_SET)
            request_token = _ask_for_token(authenticator)
        elif not request_token:
            note(f"logging in as {settings.kite_user_id}; a fresh TOTP may take half a minute")
        session = manager.log_in(request_token=request_token)
    until = f"the session is shared until {_when(session.expires_at)}"
    show(_facts(session, "P:auth"), as_json, f"logged in{_as_whom(session)}; {until}")


def _ask_for_token(authenticator: KiteAuthenticator) -> str:
    note("open this page, log in, and copy the URL that the browser ends at (…?request_token=…):")
    print(authenticator.login_url, flush=True)
    if sys.stdin.isatty():
        return getpass.getpass("the URL, or its request_token (not shown): ")
    line = sys.stdin.readline().strip()
    if not line:
        raise LoginNeeded(
            "there is no terminal to ask for the request token", "pipe it in, or give --request-token"
        )
    return line


def _print_status(as_json: bool) -> None:
    """Exit 0 with a session, 1 without."""
    with open_client() as (client, settings):
        shared = load_session(client, settings.keys)
        state = load_login_state(client, settings.keys, time.time())
    session = shared or session_in(settings)
    facts = _facts(session, "P:auth" if shared else "settings")
    if session is None:
        text = "no session: run `pkb login`"
    elif shared:
        age = str(timedelta(seconds=round(time.time() - session.login_at)))
        kind = session.kind.replace("_", " ")
        text = f"{kind}{_as_whom(session)}, {age} old, until {_when(session.expires_at)} at the latest"
    else:
        name = "PKB_KITE_ACCESS_TOKEN" if session.kind == "access_token" else "PKB_KITE_ENCTOKEN"
        text = f"the token in {name}; its age is unknown"
    show(facts | {"refused": state.refused or None, "attempts": state.attempts}, as_json, text)
    if state.refused and not as_json:
        note(f"the last automatic login: {state.refused}: {state.hint}")
    if session is None:
        raise typer.Exit(EXIT_NO_SESSION)


def _facts(session: Session | None, source: str) -> dict[str, object]:
    if session is None:
        return {"session": False}
    return {
        "session": True,
        "kind": session.kind,
        "source": source,
        "user_id": session.user_id or None,
        "login_at": iso(int(session.login_at)) if session.login_at else None,
        "age_seconds": round(time.time() - session.login_at) if session.login_at else None,
        "expires_at": iso(int(session.expires_at)) if session.expires_at else None,
    }


def _as_whom(session: Session) -> str:
    return f" as {session.user_id}" if session.user_id else ""


def _when(epoch_s: float) -> str:
    return f"{datetime.fromtimestamp(epoch_s, IST):%Y-%m-%d %H:%M} India time"


instruments_app = new_group()
SEARCH_COLUMNS = ("token", "symbol", "name", "instrument_type", "expiry", "strike", "lot_size")
Symbols = Annotated[list[str], typer.Argument(metavar="SYMBOL…", help="NSE:INFY, INFY or a token")]


@instruments_app.callback()
def instruments() -> None:
    """Fetch Kite's instrument master, search it, and change what is streamed without a restart."""


@instruments_app.command()
def sync(
    exchange: Annotated[
        list[str] | None, typer.Option(help="only this one, e.g. NSE; may be given several times")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="write it even if it is unchanged, or has lost half of its rows")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch Kite's list of instruments and replace the stored one; expired contracts are removed."""
    from pkbrokers_redis.kite.instruments import KiteInstruments

    settings = load_settings()
    began = time.monotonic()
    clock = market_clock(settings)
    with connect(settings) as client:
        found = KiteInstruments(settings=settings, client=client, now=lambda: clock() / 1000)
        synced = found.sync(exchange or (), force=force)
    seconds = time.monotonic() - began
    news = f"{synced.added:,} new, {synced.removed:,} removed" if synced.changed else "unchanged"
    refused = f"; {synced.refused:,} malformed rows" if synced.refused else ""
    text = f"{synced.rows:,} instruments in {seconds:.1f} s: {news}{refused}"
    show({**synced._asdict(), "seconds": round(seconds, 2)}, as_json, text)


@instruments_app.command()
def search(
    text: Annotated[list[str], typer.Argument(metavar="TEXT…", help="a part of the symbol or company name")],
    exchange: Annotated[str, typer.Option(help="only on this one, e.g. NFO")] = "",
    n: Annotated[int, typer.Option("-n", min=1, max=1000, help="how many at most")] = 20,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Find instruments by symbol or company name; with similar names if nothing matches."""
    from pkbrokers_redis.errors import UnknownSymbol
    from pkbrokers_redis.store.instruments import search_instruments
    from pkbrokers_redis.store.symbols import SYNC

    form = choose_form(as_json, as_csv)
    query = " ".join(text)
    with open_client() as (client, settings):
        found = search_instruments(client, settings.keys, query, exchange=exchange, limit=n)
        if not found.rows:
            empty = not client.hlen(settings.keys.symbols())
            hint = SYNC if empty else "try a shorter part of its name, or another --exchange"
            raise UnknownSymbol(query[:40], [], f"the instrument master is empty: {hint}" if empty else hint)
    if not found.exact:
        note(f"nothing contains {query[:40]!r}; similar names:")
    emit(found.rows, SEARCH_COLUMNS, form)
    if found.total > len(found.rows):
        note(f"{found.total - len(found.rows):,} more: -n {min(found.total, 1000)} shows them")


@instruments_app.command("list")
def list_(as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """Print what is streamed: PKB_INSTRUMENTS as the master has it, with the live changes."""
    from pkbrokers_redis.store.symbols import ADD, instrument_list, load_watch

    form = choose_form(as_json, as_csv)
    with open_client() as (client, settings):
        chosen = instrument_list(client, settings)
        changes = load_watch(client, settings.keys)
    emit([{"token": token, "symbol": symbol} for token, symbol in chosen], ("token", "symbol"), form)
    added = sum(change == ADD for change in changes.values())
    live = f" ({added} added and {len(changes) - added} removed live)" if changes else ""
    note(f"{len(chosen):,} instruments{live}")


@instruments_app.command()
def add(symbols: Symbols) -> None:
    """Stream more instruments, now: a running ingest subscribes them within a second or two."""
    _edit(add=symbols)


@instruments_app.command()
def remove(symbols: Symbols) -> None:
    """Stop streaming instruments, now. Their candles stay."""
    _edit(remove=symbols)


def _edit(*, add: list[str] | None = None, remove: list[str] | None = None) -> None:
    from pkbrokers_redis.store.symbols import edit_watch, instrument_list

    settings = load_settings()
    with connect(settings) as client:
        changes = edit_watch(client, settings.keys, add=add or (), remove=remove or ())
        count = len(instrument_list(client, settings))
    for symbol, change in changes.items():
        print(f"{symbol}: {'added' if change == 'add' else 'removed'}")
    note(f"{count:,} instruments are streamed")
