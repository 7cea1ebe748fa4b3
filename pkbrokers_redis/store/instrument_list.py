"""`P:watch`: live changes to PKB_INSTRUMENTS, without a restart and without a deployment.

    P:watch   hash   NSE:TCS → add      streamed beside PKB_INSTRUMENTS
                     NSE:ITC → remove   not streamed, though PKB_INSTRUMENTS names it

`pkb instruments add|remove` writes it, ingest reads it again and again. A name that left the master (an
expired contract) is passed over: it must not stop what the others stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import redis
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.errors import UnknownSymbol, WrongKeyType
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.symbols import resolve, resolve_all, resolve_many

ADD, REMOVE = "add", "remove"
CHANGES_MAX = 100_000  # entries of P:watch that are read

log = logs.get("watch")
_once = logs.Once()


def load_watch(client: redis.Redis, keys: Keys) -> dict[str, str]:
    """Return symbol → `add` or `remove`, without malformed entries. Raise WrongKeyType."""
    try:
        found: Any = client.hgetall(keys.watch())
    except ResponseError as error:
        if "WRONGTYPE" in str(error):
            kind: Any = client.type(keys.watch())
            raise WrongKeyType(keys.watch(), kind.decode(), "hash") from None
        raise
    changes = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in found.items()}
    kept = sorted((name, change) for name, change in changes.items() if change in (ADD, REMOVE))
    return dict(kept[:CHANGES_MAX])


def edit_watch(
    client: redis.Redis, keys: Keys, *, add: Iterable[str] = (), remove: Iterable[str] = ()
) -> dict[str, str]:
    """Add and remove symbols, or tokens, live. Returns what was written: full symbol → change.

    All or nothing: raises UnknownSymbol before anything is written. `remove` also takes what is in the list
    but in no master any more.
    """
    listed = load_watch(client, keys)
    changes = {symbol: ADD for _, symbol in resolve_all(client, keys, list(add))}
    for text in remove:
        known = next((name for name in listed if name.upper() == text.strip().upper()), None)
        changes[known or resolve(client, keys, text)[1]] = REMOVE
    if changes:
        client.hset(keys.watch(), mapping=changes)  # type: ignore[arg-type]  # dict is invariant
    return changes


def instrument_list(client: redis.Redis, settings: Settings) -> list[tuple[int, str]]:
    """`[(token, symbol), …]`, each once: PKB_INSTRUMENTS as the master has it, with the live changes.

    Raises as `resolve_many` does for PKB_INSTRUMENTS itself.
    """
    keys = settings.keys
    chosen = dict(resolve_many(client, keys, settings.instruments))
    changes = load_watch(client, keys)
    for symbol, (token, name) in _resolve_known(client, keys, list(changes)).items():
        if changes[symbol] == ADD:
            chosen.setdefault(token, name)
        else:
            chosen.pop(token, None)
    return list(chosen.items())


def list_version(client: redis.Redis, settings: Settings) -> str:
    """Changes whenever `instrument_list` may: cheap enough to ask every second (two small hashes)."""
    keys = settings.keys
    changed_at: Any = client.hget(keys.master(), "changed_at")
    text = repr((settings.instruments, changed_at, load_watch(client, keys)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _resolve_known(client: redis.Redis, keys: Keys, symbols: list[str]) -> dict[str, tuple[int, str]]:
    try:
        return dict(zip(symbols, resolve_all(client, keys, symbols), strict=True))
    except UnknownSymbol:
        pass  # one by one, then
    found: dict[str, tuple[int, str]] = {}
    for symbol in symbols:
        try:
            found[symbol] = resolve(client, keys, symbol)
        except UnknownSymbol:
            if _once.first(symbol):
                log.warning("watched_unknown", symbol=symbol, hint=f"`pkb instruments remove {symbol}`")
    return found
