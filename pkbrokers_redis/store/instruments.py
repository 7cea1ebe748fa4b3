"""The instrument master in Redis: swapped in at once, and searched by symbol or company name.

A swap takes these steps, so that a name never leads to a missing row:

    1  P:instrument:<token>   rows of all instruments of the new master, one HSET each
       P:expired              token → contract, of contracts that leave
       P:renamed              old name → token, of shares and indices that changed their name
       P:{S}:repairs          `forget` for tokens that belong to other contracts now
    2  P:symbols              one transaction on this key: removed names out, new and moved names in
    3  P:derivatives          one transaction: stocks that have futures or options
       P:exchanges            one transaction: tokens that say another exchange than the master
    4  P:instrument:<token>   rows of removed instruments deleted
    5  P:master               the manifest, last: a sync that died earlier is simply repeated

RENAME of a complete new hash would do for step 2 as well, but not on a cluster: `P:symbols` has no hash tag,
so no second key shares its slot. A scan of `P:symbols` across the swap sees names of both masters.

Zerodha gives the token of an expired contract to another one, at once or weeks later. A share or an index
that only changed its name keeps its candles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import redis
from redis.exceptions import NoPermissionError, ResponseError

from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.candles.model import SEGMENT_INDICES
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.store.cluster import execute_all
from pkbrokers_redis.store.errors import is_wrong_type
from pkbrokers_redis.store.repairs import send_forget
from pkbrokers_redis.store.symbols import BSE_SEGMENT, NSE_SEGMENT, nearest_names, read_names, read_tokens

T = TypeVar("T")

ROWS_AT_ONCE = 2_000  # a round trip of ~0.5 MB
NAMES_AT_ONCE = 5_000  # fields of one HSET
UNDERLYING_OF = {"NFO": "NSE", "BFO": "BSE"}  # where the stocks of an exchange's contracts trade
EXCHANGES_OF_SEGMENT = {  # the low byte of a token → exchanges, as Kite's own library reads it
    1: ("NSE",), 2: ("NFO",), 3: ("CDS",), 4: ("BSE",), 5: ("BFO",), 6: ("BCD",), 7: ("MCX",),
    8: ("MCXSX",), SEGMENT_INDICES: ("NSE", "BSE"),
}  # fmt: skip
CASH_SEGMENTS = {1, 4, SEGMENT_INDICES}  # every other segment holds contracts
SHRUNK_FROM = 1_000  # a master of so many rows never loses half of them overnight

Row = Mapping[str, str]  # Kite's CSV, columns by name


class Manifest(NamedTuple):
    """The fields of `P:master`, which describe the master in Redis. Times are ISO 8601, +05:30."""

    synced_at: str
    changed_at: str
    rows: int
    refused: int
    sha256: str
    scope: str

    def age_seconds(self, now_s: float) -> float | None:
        """Return the age of the last sync in seconds, None when its time is malformed."""
        try:
            return now_s - datetime.fromisoformat(self.synced_at).timestamp()
        except ValueError:
            return None


class SwapResult(NamedTuple):
    """Counts of a swap."""

    names: int  # in the master now
    added: int  # new names, and names with another token
    removed: int
    reassigned: int = 0  # tokens that belong to other contracts now


class MasterShrunk(PkbError):
    """Raised when a new master lacks half of the old one's rows: usually a truncated download."""


def read_manifest(client: redis.Redis, keys: Keys) -> Manifest | None:
    """Return the manifest, None before the first sync."""
    found: Any = client.hgetall(keys.master())
    cells = {name.decode(errors="replace"): text.decode(errors="replace") for name, text in found.items()}
    if not cells.get("synced_at"):
        return None
    rows, refused = cells.get("rows", ""), cells.get("refused", "")
    return Manifest(
        cells["synced_at"],
        cells.get("changed_at", ""),
        int(rows) if rows.isdecimal() else 0,
        int(refused) if refused.isdecimal() else 0,
        cells.get("sha256", ""),
        cells.get("scope", ""),
    )


def write_manifest(client: redis.Redis, keys: Keys, manifest: Manifest) -> None:
    """Write the manifest, the last step of a swap."""
    fields: dict[Any, Any] = manifest._asdict()
    client.hset(keys.master(), mapping=fields)


def is_current(client: redis.Redis, keys: Keys, sha256: str, scope: str) -> bool:
    """Return whether the same download was swapped in before, and its names are still present."""
    manifest = read_manifest(client, keys)
    if manifest is None or (manifest.sha256, manifest.scope) != (sha256, scope):
        return False
    count: Any = client.hlen(keys.symbols())
    return manifest.rows > 0 and int(count) >= manifest.rows


def swap_master(
    client: redis.Redis, keys: Keys, rows: Sequence[Row], exchanges: Iterable[str], *, force: bool = False
) -> SwapResult:
    """Replace the master of some exchanges by checked rows; the instruments of other exchanges stay.

    Raise MasterShrunk when half of the rows are missing, unless `force`.
    """
    scope = set(exchanges)
    old = {name: token for name, token in read_names(client, keys).items() if _exchange(name) in scope}
    new = {f"{row['exchange']}:{row['tradingsymbol']}": int(row["instrument_token"]) for row in rows}
    if len(old) >= SHRUNK_FROM and len(new) < len(old) / 2 and not force:
        raise MasterShrunk(
            f"the new instrument master has {len(new):,} rows where {len(old):,} were",
            "try again; `pkb instruments sync --force` accepts it",
        )
    reassigned = _reassigned(client, keys, old, new)
    _write(client, (_hset(keys, row) for row in rows))
    removed = [name for name in old if name not in new]
    added = {name: token for name, token in new.items() if old.get(name) != token}
    kept = set(new.values())
    _note_expired(client, keys, {old[name]: name for name in removed})
    _note_renamed(client, keys, {name: old[name] for name in removed if old[name] in kept})
    send_forget(client, keys, reassigned, "reassigned")
    _swap_names(client, keys, removed, added)
    _swap_derivatives(client, keys, rows, scope, new)
    _swap_exchanges(client, keys, rows, scope)
    stale = dict.fromkeys(token for token in old.values() if token not in kept)
    _write(client, (("UNLINK", keys.instrument(token)) for token in stale))
    return SwapResult(len(new), len(added), len(removed), len(reassigned))


def load_derivatives(client: redis.Redis, keys: Keys) -> set[str]:
    """Return the stocks (`NSE:RELIANCE`) that have futures or options on their exchange."""
    found: Any = client.smembers(keys.derivatives())
    return {name.decode(errors="replace") for name in found}


def read_hours(client: redis.Redis, keys: Keys, sessions: Sessions) -> bool:
    """Note in `sessions` what the master says of trading hours; return whether that changed.

    That are the stocks with derivatives (closing auction), and the exchanges of instruments whose token says
    another one. A key of another type counts as no master. Three round trips.
    """
    try:
        derivatives = frozenset(read_tokens(client, keys, sorted(load_derivatives(client, keys))).values())
        found: Any = client.hgetall(keys.exchanges())
    except ResponseError as error:
        if not is_wrong_type(error) and not isinstance(error, NoPermissionError):
            raise
        derivatives, found = frozenset(), {}
    pairs = ((token, name.decode(errors="replace")) for token, name in found.items())
    exchanges = {int(token): name for token, name in pairs if token.isdigit()}
    before = sessions.derivatives, sessions.exchanges
    sessions.derivatives, sessions.exchanges = derivatives, exchanges
    return before != (derivatives, exchanges)


def read_rows(client: redis.Redis, keys: Keys, tokens: Sequence[int]) -> list[dict[str, str]]:
    """Return the rows of the tokens that have one, in their order, columns by name."""
    rows: list[dict[str, str]] = []
    commands = (("HGETALL", keys.instrument(token)) for token in tokens)
    for token, reply in zip(tokens, execute_all(client, commands, ROWS_AT_ONCE), strict=True):
        # RESP3 has maps, RESP2 flat lists. An error counts as a missing row.
        flat = [cell for pair in reply.items() for cell in pair] if isinstance(reply, dict) else reply
        if isinstance(flat, list) and flat:
            cells = [cell.decode(errors="replace") for cell in flat]
            row = dict(zip(cells[::2], cells[1::2], strict=False))
            rows.append({**row, "instrument_token": str(token)})
    return rows


def _reassigned(client: redis.Redis, keys: Keys, old: Mapping[str, int], new: Mapping[str, int]) -> list[int]:
    """Return the tokens that belonged to another contract: in the old master, or an expired one."""
    before: dict[int, set[str]] = {}
    for name, token in old.items():
        before.setdefault(token, set()).add(name)
    contracts = {token: name for name, token in new.items() if token & 0xFF not in CASH_SEGMENTS}
    for tokens in _chunks((token for token in contracts if token not in before), NAMES_AT_ONCE):
        found: Any = client.hmget(keys.expired(), tokens)
        before |= {
            token: {name.decode(errors="replace")} for token, name in zip(tokens, found, strict=True) if name
        }
    return [token for token, name in contracts.items() if name not in before.get(token, {name})]


def _note_expired(client: redis.Redis, keys: Keys, removed: Mapping[int, str]) -> None:
    """Record expired contracts, also those whose token went to another one at once."""
    contracts = ((token, name) for token, name in removed.items() if token & 0xFF not in CASH_SEGMENTS)
    for pairs in _chunks(contracts, NAMES_AT_ONCE):
        client.hset(keys.expired(), items=[cell for pair in pairs for cell in pair])


def _note_renamed(client: redis.Redis, keys: Keys, removed: Mapping[str, int]) -> None:
    names = ((name, token) for name, token in removed.items() if token & 0xFF in CASH_SEGMENTS)
    for pairs in _chunks(names, NAMES_AT_ONCE):
        client.hset(keys.renamed(), items=[cell for pair in pairs for cell in pair])


def _hset(keys: Keys, row: Row) -> tuple[Any, ...]:
    cells = [cell for pair in row.items() for cell in pair]
    return ("HSET", keys.instrument(int(row["instrument_token"])), *cells)


def _swap_names(client: redis.Redis, keys: Keys, removed: Sequence[str], added: Mapping[str, int]) -> None:
    if not removed and not added:
        return
    transaction = client.pipeline(transaction=True)
    for names in _chunks(removed, NAMES_AT_ONCE):
        transaction.hdel(keys.symbols(), *names)
    for pairs in _chunks(added.items(), NAMES_AT_ONCE):
        transaction.hset(keys.symbols(), items=[cell for pair in pairs for cell in pair])
    transaction.execute()


def _swap_derivatives(
    client: redis.Redis, keys: Keys, rows: Iterable[Row], scope: set[str], new: Mapping[str, int]
) -> None:
    """Replace `P:derivatives`. A contract's `name` is its underlying's symbol; indices are left out."""
    underlyings = {
        f"{UNDERLYING_OF[row['exchange']]}:{row.get('name', '')}"
        for row in rows
        if row["exchange"] in UNDERLYING_OF
    }
    unknown = sorted(name for name in underlyings if name not in new)
    tokens = {**new, **read_tokens(client, keys, unknown)}  # another sync may have written the stocks
    stocks = {name for name in underlyings if name in tokens and tokens[name] & 0xFF != SEGMENT_INDICES}
    replaced = {UNDERLYING_OF[exchange] for exchange in scope if exchange in UNDERLYING_OF}
    before = {name for name in load_derivatives(client, keys) if _exchange(name) in replaced}
    transaction = client.pipeline(transaction=True)
    for names in _chunks(before - stocks, NAMES_AT_ONCE):
        transaction.srem(keys.derivatives(), *names)
    for names in _chunks(stocks - before, NAMES_AT_ONCE):
        transaction.sadd(keys.derivatives(), *names)
    if len(transaction):
        transaction.execute()


def _swap_exchanges(client: redis.Redis, keys: Keys, rows: Iterable[Row], scope: set[str]) -> None:
    """Replace `P:exchanges`: MCX's indices have the byte of NSE's, other rows a byte of no known exchange."""
    unusual: dict[int, str] = {}
    for row in rows:
        token, exchange = int(row["instrument_token"]), row["exchange"]
        if exchange not in EXCHANGES_OF_SEGMENT.get(token & 0xFF, ()):
            unusual[token] = exchange
    found: Any = client.hgetall(keys.exchanges())
    transaction = client.pipeline(transaction=True)
    for stale in _chunks((each for each, name in found.items() if name.decode() in scope), NAMES_AT_ONCE):
        transaction.hdel(keys.exchanges(), *stale)
    for pairs in _chunks(unusual.items(), NAMES_AT_ONCE):
        transaction.hset(keys.exchanges(), items=[cell for pair in pairs for cell in pair])
    if len(transaction):
        transaction.execute()


def _write(client: redis.Redis, commands: Iterable[tuple[Any, ...]]) -> None:
    for reply in execute_all(client, commands, ROWS_AT_ONCE):
        if isinstance(reply, Exception):
            raise reply


def _chunks(items: Iterable[T], size: int) -> Iterable[list[T]]:
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


def _exchange(name: str) -> str:
    return name.partition(":")[0]


# Only these are searched by company name: the names of 90,000 contracts repeat their underlyings' symbols.
NAMED_SEGMENTS = {NSE_SEGMENT, BSE_SEGMENT, SEGMENT_INDICES}
COLUMNS = ("name", "expiry", "strike", "lot_size", "instrument_type", "tick_size")
ROWS_AT_ONCE_SEARCH = 5_000


class SearchResult(NamedTuple):
    """The matches of a search."""

    rows: list[dict[str, Any]]  # the best ones: `token`, `symbol` and COLUMNS
    total: int
    exact: bool  # False: nothing matched, and these names are only similar


def search_instruments(
    client: redis.Redis, keys: Keys, text: str, *, exchange: str = "", limit: int = 20
) -> SearchResult:
    """Find instruments whose symbol or company name contains `text`; shares and indices before contracts.

    The order is: equal symbols, symbols that start with it, names that start with it, then the rest.
    """
    sought = " ".join(text.upper().split())
    names = read_names(client, keys)
    if exchange or ":" in sought:
        prefix, _, rest = sought.rpartition(":")
        exchange, sought = (exchange or prefix).upper(), rest
        names = {name: token for name, token in names.items() if name.startswith(f"{exchange}:")}
    if not sought:
        return SearchResult([], 0, True)
    named = [token for token in names.values() if token & 0xFF in NAMED_SEGMENTS]
    companies = dict(zip(named, _cells(client, keys, named, ("name",)), strict=True))
    ranked = []
    for symbol, token in names.items():
        rank = _rank(symbol.partition(":")[2].upper(), companies.get(token, ("",))[0].upper(), sought)
        if rank is not None:
            ranked.append((rank, token & 0xFF not in NAMED_SEGMENTS, not symbol.startswith("NSE:"), symbol))
    ranked.sort(key=lambda row: (row[1] and row[0] > 0, row[0], row[2], len(row[3]), row[3]))
    best, exact = [symbol for *_, symbol in ranked[:limit]], bool(ranked)
    if not exact:
        best = nearest_names(names, f"{exchange}:{sought}" if exchange else sought)[:limit]
    rows = [
        {"token": names[symbol], "symbol": symbol, **dict(zip(COLUMNS, cells, strict=True))}
        for symbol, cells in zip(best, _cells(client, keys, [names[s] for s in best], COLUMNS), strict=True)
    ]
    return SearchResult(rows, len(ranked) if exact else len(rows), exact)


def _rank(symbol: str, company: str, sought: str) -> int | None:
    if symbol == sought:
        return 0
    if symbol.startswith(sought):
        return 1
    if company.startswith(sought):
        return 2
    if sought in symbol:
        return 3
    return 4 if sought in company else None


def _cells(
    client: redis.Redis, keys: Keys, tokens: Iterable[int], columns: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return these fields of the rows, "" where one is missing."""
    commands = (("HMGET", keys.instrument(token), *columns) for token in tokens)
    replies = execute_all(client, commands, ROWS_AT_ONCE_SEARCH)
    none = [None] * len(columns)  # of a key of another type
    rows = (reply if isinstance(reply, list) else none for reply in replies)
    return [tuple(cell.decode(errors="replace") if cell else "" for cell in row) for row in rows]
