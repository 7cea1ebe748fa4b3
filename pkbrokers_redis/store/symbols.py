"""Symbols and tokens: the instrument master's names in Redis, and what a person may type for an instrument.

    P:symbols              Kite's `EXCHANGE:TRADINGSYMBOL` → token
    P:instrument:<token>   the row of Kite's instruments CSV, under its own column names
    P:renamed              the old name of a renamed share or index → token
    P:watch                symbol → `add` or `remove`: live changes to PKB_INSTRUMENTS (`pkb instruments add`)

PKB_INSTRUMENTS may also name groups, which are rules over symbol and token. A new group is a row of `GROUPS`.

    all                           the whole master
    nse-equity  bse-equity        shares (NSE: without bonds, rights and funds)
    nse-indices bse-indices indices
    nfo bfo cds bcd mcx           an exchange's contracts
    nfo-futures, mcx-futures, …   its futures
    nfo-nifty, mcx-crudeoil, …    the contracts of one underlying
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import SEGMENT_INDICES, TOKEN_MAX
from pkbrokers_redis.errors import InputFileError, PkbError, UnknownSymbol
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import execute_all
from pkbrokers_redis.store.errors import expect_type

log = logs.get("watch")
_once = logs.Once()

Rule = Callable[[str, int], bool]  # (NSE:INFY, token) → whether it is in the group

# NSE series of shares: no suffix, BE/BZ (trade for trade), SM/ST (SME). Other suffixes (GS, SG, N1, RE, …)
# are bonds, rights and funds.
EQUITY_SERIES = {"BE", "BZ", "SM", "ST"}
NSE_SEGMENT, BSE_SEGMENT = 1, 4
CONTRACT_EXCHANGES = ("NFO", "BFO", "CDS", "BCD", "MCX")


def is_nse_equity(symbol: str, token: int) -> bool:
    """Return whether an instrument is a share on NSE."""
    exchange, _, name = symbol.partition(":")
    if exchange != "NSE" or token & 0xFF != NSE_SEGMENT:
        return False
    stem, hyphen, series = name.rpartition("-")
    return not (hyphen and stem and len(series) == 2) or series in EQUITY_SERIES


def _is_index(exchange: str = "") -> Rule:
    return lambda symbol, token: token & 0xFF == SEGMENT_INDICES and symbol.startswith(exchange)


def _starts(prefix: str) -> Rule:
    return lambda symbol, _: symbol.startswith(prefix)


GROUPS: dict[str, Rule] = {
    "all": lambda symbol, token: True,
    "nse-equity": is_nse_equity,
    "bse-equity": lambda symbol, token: symbol.startswith("BSE:") and token & 0xFF == BSE_SEGMENT,
    "indices": _is_index(),
    "nse-indices": _is_index("NSE:"),
    "bse-indices": _is_index("BSE:"),
    **{exchange.lower(): _starts(f"{exchange}:") for exchange in CONTRACT_EXCHANGES},
}


def group_of(text: str) -> Rule | None:
    """Return the rule of a group's name, in either case; None when there is no such group."""
    name = text.lower()
    if name in GROUPS:
        return GROUPS[name]
    exchange, hyphen, underlying = text.upper().partition("-")
    if exchange not in CONTRACT_EXCHANGES or not hyphen or not underlying:
        return None
    if underlying == "FUTURES":
        return lambda symbol, _: symbol.startswith(f"{exchange}:") and symbol.endswith("FUT")
    # A contract's symbol is the underlying, then two digits of its year: NIFTY26DECFUT, NIFTY2612524500CE.
    of_underlying = re.compile(re.escape(f"{exchange}:{underlying}") + r"\d\d", re.IGNORECASE)
    return lambda symbol, _: of_underlying.match(symbol) is not None


ROWS_A_PIPELINE = 1_000  # 100,000 instruments take 100 round trips, each of them short for Redis
FILE_LINES_MAX = 1_000_000
NEAREST_MAX = 3
SYNC = "run `pkb instruments sync`"
NEAREST_COMPARED_MAX = 2_000  # difflib takes ~20 µs a name


class SavedInstruments(NamedTuple):
    """Result of `save_instruments`: rows written, and rows without a valid token or symbol."""

    saved: int
    refused: int


def save_instruments(client: redis.Redis, keys: Keys, rows: Iterable[Mapping[str, Any]]) -> SavedInstruments:
    """Write instrument master rows, without removing any."""
    saved = refused = 0
    source = iter(rows)
    while chunk := list(islice(source, ROWS_A_PIPELINE)):
        names: dict[Any, Any] = {}
        pipe = client.pipeline(transaction=False)
        for row in chunk:
            token = _token_of(str(row.get("instrument_token", "")))
            symbol = str(row.get("tradingsymbol") or "").strip()
            if token is None or not symbol:
                refused += 1
                continue
            fields: dict[Any, Any] = {name: "" if cell is None else str(cell) for name, cell in row.items()}
            pipe.hset(keys.instrument(token), mapping=fields)
            names[f"{str(row.get('exchange') or 'NSE').strip().upper()}:{symbol}"] = token
        if names:
            pipe.hset(keys.symbols(), mapping=names)
            pipe.execute()
        saved += len(names)
    return SavedInstruments(saved, refused)


def load_symbols(client: redis.Redis, keys: Keys) -> dict[int, str]:
    """Return token → `EXCHANGE:TRADINGSYMBOL` of the whole master."""
    return {token: name for name, token in read_names(client, keys).items()}


def resolve(client: redis.Redis, keys: Keys, text: str) -> tuple[int, str]:
    """Return token and symbol of `NSE:INFY`, `infy`, `NIFTY 50` or a token. Raise UnknownSymbol."""
    return resolve_all(client, keys, [text])[0]


def resolve_all(client: redis.Redis, keys: Keys, texts: Sequence[str | int]) -> list[tuple[int, str]]:
    """Resolve many texts in their order, in two round trips when all are spelt exactly."""
    names = [str(text).strip() for text in texts]
    found, unknown = resolve_known(client, keys, names)
    if unknown:
        raise next(iter(unknown.values()))
    return [found[text] for text in names]


def resolve_known(
    client: redis.Redis, keys: Keys, texts: Sequence[str]
) -> tuple[dict[str, tuple[int, str]], dict[str, UnknownSymbol]]:
    """Return text → (token, symbol) of those that the master has, and text → error of the others.

    The old name of a renamed share or index leads to its token.
    """
    unique = list(dict.fromkeys(texts))
    exact = read_tokens(client, keys, sorted({_full_name(text) for text in unique if not _is_number(text)}))
    found: dict[str, tuple[int, str]] = {}
    rest: list[str] = []
    for text in unique:
        if not _is_number(text) and (name := _full_name(text)) in exact:
            found[text] = exact[name], name
        else:
            rest.append(text)
    found |= _symbols_of_tokens(client, keys, [text for text in rest if _token_of(text)])
    rest = [text for text in rest if text not in found]
    renamed = read_tokens(client, keys, [_full_name(text) for text in rest], keys.renamed())
    if renamed:  # to a name that the master still has: a token without a row was delisted since
        symbols = _symbols_of_tokens(client, keys, [str(token) for token in set(renamed.values())])
        old = {name: symbols[str(token)] for name, token in renamed.items()}
        found |= {
            text: old[name] for text in rest if (name := _full_name(text)) in old and ":" in old[name][1]
        }
    every: dict[str, int] | None = None
    unknown: dict[str, UnknownSymbol] = {}
    for text in rest:
        if text in found:
            continue
        if _is_number(text):
            unknown[text] = UnknownSymbol(text[:40], [])
            continue
        every = read_names(client, keys) if every is None else every
        try:
            found[text] = _search(every, text)
        except UnknownSymbol as error:
            unknown[text] = error
    return found, unknown


def resolve_many(client: redis.Redis, keys: Keys, text: str) -> list[tuple[int, str]]:
    """Return `(token, symbol)` for PKB_INSTRUMENTS: symbols, tokens, groups, files with one a line."""
    chosen = _choose(client, keys, text)
    if chosen.unknown:
        raise next(iter(chosen.unknown.values()))
    return chosen.instruments


class InstrumentList(NamedTuple):
    """`(token, symbol)` of each instrument, and the names that are not in the master, with their errors."""

    instruments: list[tuple[int, str]]
    unknown: dict[str, UnknownSymbol]


def _choose(client: redis.Redis, keys: Keys, text: str) -> InstrumentList:
    names: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        names += _lines_of(part) if _is_path(part) else [part]
    rules = {name: rule for name in names if (rule := group_of(name)) is not None}
    every = read_names(client, keys) if rules else {}
    if rules and not every:
        raise PkbError(f"the instrument master is empty, and {next(iter(rules))!r} is chosen from it", SYNC)
    singles, unknown = resolve_known(client, keys, [name for name in names if name not in rules])
    chosen: dict[int, str] = {}
    for name in names:
        found: dict[int, str] = dict([singles[name]]) if name in singles else {}
        if name in rules:
            found = {token: symbol for symbol, token in every.items() if rules[name](symbol, token)}
            if not found and name.lower() not in GROUPS:
                hint = "no contract starts with it: `pkb instruments search` finds names"
                unknown[name] = UnknownSymbol(name[:40], [], hint)
        for token, symbol in found.items():
            chosen.setdefault(token, symbol)
    return InstrumentList(list(chosen.items()), unknown)


def read_names(client: redis.Redis, keys: Keys) -> dict[str, int]:
    """Return the whole `P:symbols`, read in slices: 100,000 fields at once would block Redis."""
    names: dict[str, int] = {}
    for name, value in client.hscan_iter(keys.symbols(), count=10_000):
        token = _token_of(value.decode(errors="replace"))
        if token is not None:
            names[name.decode(errors="replace")] = token
    return names


def read_tokens(
    client: redis.Redis, keys: Keys, names: Sequence[str], key: str | None = None
) -> dict[str, int]:
    """Return `NSE:INFY` → token of names that the master, or the hash `key`, has in exactly this spelling."""
    found: dict[str, int] = {}
    for first in range(0, len(names), ROWS_A_PIPELINE):
        chunk = list(names[first : first + ROWS_A_PIPELINE])
        values: Any = client.hmget(key or keys.symbols(), chunk)
        for name, value in zip(chunk, values, strict=True):
            token = _token_of(value.decode(errors="replace")) if value else None
            if token is not None:
                found[name] = token
    return found


def _symbols_of_tokens(client: redis.Redis, keys: Keys, texts: list[str]) -> dict[str, tuple[int, str]]:
    """Return digits → (token, symbol in the master, or the number itself)."""
    commands = (("HMGET", keys.instrument(int(text)), "exchange", "tradingsymbol") for text in texts)
    answer: dict[str, tuple[int, str]] = {}
    replies = execute_all(client, commands, ROWS_A_PIPELINE) if texts else []
    for text, token, reply in zip(texts, map(int, texts), replies, strict=True):
        if isinstance(reply, Exception):
            raise reply
        name = b":".join(reply).decode() if all(reply) else str(token)
        answer[text] = (token, name)
    return answer


def _search(names: dict[str, int], text: str) -> tuple[int, str]:
    """Find a name that the hash does not have in this spelling: other case, an index of BSE."""
    full_name = _full_name(text)
    bare = "" if ":" in text else text.upper()
    for name, token in names.items():
        spelt = name.upper()
        if spelt == full_name:
            return token, name
        if bare and token & 0xFF == SEGMENT_INDICES and spelt.partition(":")[2] == bare:
            return token, name
    if not names:
        raise UnknownSymbol(text[:40], [], f"the instrument master is empty: {SYNC}, or give the token")
    raise UnknownSymbol(text[:40], nearest_names(names, text))


def nearest_names(names: Iterable[str], text: str) -> list[str]:
    """Return up to three names that resemble `text`, best first; its own exchange's (NSE's) come first."""
    exchange, _, typed = _full_name(text).rpartition(":")
    head, tail = typed[:1], typed[-2:]
    length_slack = max(3, len(typed) // 2)
    same_exchange: dict[str, str] = {}
    other_exchanges: dict[str, str] = {}
    for name in names:
        where, _, symbol = name.upper().partition(":")
        alike = symbol.startswith(head) or symbol.endswith(tail) or typed in symbol
        if alike and abs(len(symbol) - len(typed)) <= length_slack:
            (same_exchange if where == exchange else other_exchanges).setdefault(symbol, name)
    nearest: list[str] = []
    for group in (same_exchange, other_exchanges):
        candidates = heapq.nlargest(
            NEAREST_COMPARED_MAX, group, key=lambda symbol: _shared_ends(symbol, typed)
        )
        room = NEAREST_MAX - len(nearest)
        if room:
            nearest += [group[symbol] for symbol in difflib.get_close_matches(typed, candidates, room, 0.6)]
    return nearest


def _shared_ends(one: str, other: str) -> int:
    """Count equal letters from both ends: a cheap choice of the names that difflib compares."""
    return _shared_start(one, other) + _shared_start(one[::-1], other[::-1])


def _shared_start(one: str, other: str) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


def _full_name(text: str) -> str:
    """Return `NSE:INFY` for `infy`, `BSE:INFY` for `bse:infy`."""
    exchange, colon, symbol = text.upper().partition(":")
    return f"{exchange.strip()}:{symbol.strip()}" if colon else f"NSE:{exchange}"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _token_of(text: str) -> int | None:
    if not _is_number(text) or len(text) > 10:
        return None
    token = int(text)
    return token if 0 < token <= TOKEN_MAX else None


def _is_path(part: str) -> bool:
    """Return whether a part looks like a path. A file `INFY` in this folder must not hide the share."""
    return "/" in part or part.startswith("~") or part.lower().endswith((".txt", ".csv", ".list"))


def _lines_of(part: str) -> list[str]:
    path = Path(part).expanduser()
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line.partition("#")[0].strip() for line in islice(file, FILE_LINES_MAX)]
    except FileNotFoundError:
        raise InputFileError(f"no file {part!r}", "PKB_INSTRUMENTS names it: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        hint = "give a text file, one symbol a line"
        raise InputFileError(f"cannot read {part!r} ({reason})", hint) from error
    return [line for line in lines if line]


ADD, REMOVE = "add", "remove"
CHANGES_MAX = 100_000  # entries of P:watch that are read


def load_watch(client: redis.Redis, keys: Keys) -> dict[str, str]:
    """Return symbol → `add` or `remove`, without malformed entries. Raise WrongKeyType."""
    with expect_type(client, keys.watch(), "hash"):
        found: Any = client.hgetall(keys.watch())
    changes = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in found.items()}
    kept = sorted((name, change) for name, change in changes.items() if change in (ADD, REMOVE))
    return dict(kept[:CHANGES_MAX])


def edit_watch(
    client: redis.Redis, keys: Keys, *, add: Iterable[str] = (), remove: Iterable[str] = ()
) -> dict[str, str]:
    """Add and remove symbols or tokens live; return what was written: full symbol → change.

    UnknownSymbol is raised before anything is written. `remove` also accepts what is in no master any more.
    """
    listed = {name.upper(): name for name in load_watch(client, keys)}
    changes = {symbol: ADD for _, symbol in resolve_all(client, keys, list(add))}
    for text in remove:
        changes[listed.get(text.strip().upper()) or resolve(client, keys, text)[1]] = REMOVE
    if changes:
        client.hset(keys.watch(), mapping=changes)  # type: ignore[arg-type]  # dict is invariant
    return changes


def instrument_list(client: redis.Redis, settings: Settings) -> list[tuple[int, str]]:
    """Return `(token, symbol)` of PKB_INSTRUMENTS with the live changes, each once.

    A name that the master lacks (now) costs only that name. Raises UnknownSymbol when no other is there.
    """
    found = read_instrument_list(client, settings)
    if found.unknown and not found.instruments:
        raise next(iter(found.unknown.values()))
    return found.instruments


def read_instrument_list(client: redis.Redis, settings: Settings) -> InstrumentList:
    """Return the list and what is missing in it; names of expired contracts are not called unknown."""
    keys = settings.keys
    instruments, unknown = _choose(client, keys, settings.instruments)
    chosen = dict(instruments)
    changes = load_watch(client, keys)
    found, not_found = resolve_known(client, keys, list(changes))
    for symbol, (token, name) in found.items():
        if changes[symbol] == ADD:
            chosen.setdefault(token, name)
        else:
            chosen.pop(token, None)
    unknown |= {name: error for name, error in not_found.items() if changes[name] == ADD}
    for name in _expired_of(client, keys, unknown):
        del unknown[name]
        if _once.first(name):
            log.info("contract_expired", symbol=name, reason="it left the instrument list")
    for name, error in unknown.items():
        if chosen and _once.first(name):
            log.warning("instrument_unknown", symbol=name, reason="it is not in the master", hint=error.hint)
    return InstrumentList(list(chosen.items()), unknown)


def _expired_of(client: redis.Redis, keys: Keys, names: Iterable[str]) -> list[str]:
    """Return those names that are of expired contracts."""
    sought = {_full_name(name): name for name in names}
    if not sought:
        return []
    contracts = (name.decode(errors="replace") for _, name in client.hscan_iter(keys.expired(), count=10_000))
    return [sought[contract] for contract in contracts if contract in sought]


def list_version(client: redis.Redis, settings: Settings) -> str:
    """Return a text that changes whenever `instrument_list` may: two small reads, for every second."""
    keys = settings.keys
    changed_at: Any = client.hget(keys.master(), "changed_at")
    text = repr((settings.instruments, changed_at, load_watch(client, keys)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
