"""Search the instrument master: by symbol, by company name, with help for typos."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import redis

from pkbrokers_redis.core.keys import Keys
from pkbrokers_redis.core.model import SEGMENT_INDICES
from pkbrokers_redis.store.groups import BSE_SEGMENT, NSE_SEGMENT
from pkbrokers_redis.store.pipe import Pipe
from pkbrokers_redis.store.symbols import nearest_names, read_names

# Company names are looked at for these only: those of 90,000 contracts repeat their underlyings' symbols.
NAMED_SEGMENTS = {NSE_SEGMENT, BSE_SEGMENT, SEGMENT_INDICES}
COLUMNS = ("name", "expiry", "strike", "lot_size", "instrument_type", "tick_size")
ROWS_AT_ONCE = 5_000


class Found(NamedTuple):
    """`rows`: the best matches, as dicts of `token symbol` and COLUMNS. `total`: how many there are.
    `exact`: False when nothing matched and these are only spelt alike."""

    rows: list[dict[str, Any]]
    total: int
    exact: bool


def search_instruments(
    client: redis.Redis, keys: Keys, text: str, *, exchange: str = "", limit: int = 20
) -> Found:
    """The instruments whose symbol or company name holds `text`; shares and indices before contracts.

    Best first: the symbol itself, symbols that begin so, names that begin so, then those that hold it.
    """
    wanted = " ".join(text.upper().split())
    names = read_names(client, keys)
    if exchange or ":" in wanted:
        where, _, rest = wanted.rpartition(":")
        exchange, wanted = (exchange or where).upper(), rest
        names = {name: token for name, token in names.items() if name.startswith(f"{exchange}:")}
    if not wanted:
        return Found([], 0, True)
    named = [token for token in names.values() if token & 0xFF in NAMED_SEGMENTS]
    companies = dict(zip(named, _cells(client, keys, named, ("name",)), strict=True))
    ranked = []
    for symbol, token in names.items():
        rank = _rank(symbol.partition(":")[2].upper(), companies.get(token, ("",))[0].upper(), wanted)
        if rank is not None:
            ranked.append((rank, token & 0xFF not in NAMED_SEGMENTS, not symbol.startswith("NSE:"), symbol))
    ranked.sort(key=lambda each: (each[1] and each[0] > 0, each[0], each[2], len(each[3]), each[3]))
    best, exact = [symbol for *_, symbol in ranked[:limit]], bool(ranked)
    if not exact:
        best = nearest_names(names, f"{exchange}:{wanted}" if exchange else wanted)[:limit]
    rows = [
        {"token": names[symbol], "symbol": symbol, **dict(zip(COLUMNS, cells, strict=True))}
        for symbol, cells in zip(best, _cells(client, keys, [names[s] for s in best], COLUMNS), strict=True)
    ]
    return Found(rows, len(ranked) if exact else len(rows), exact)


def _rank(symbol: str, company: str, wanted: str) -> int | None:
    if symbol == wanted:
        return 0
    if symbol.startswith(wanted):
        return 1
    if company.startswith(wanted):
        return 2
    if wanted in symbol:
        return 3
    return 4 if wanted in company else None


def _cells(
    client: redis.Redis, keys: Keys, tokens: list[int], columns: Iterable[str]
) -> list[tuple[str, ...]]:
    """Those fields of the rows, "" where there is none."""
    columns = tuple(columns)
    answer: list[tuple[str, ...]] = []
    for first in range(0, len(tokens), ROWS_AT_ONCE):
        pipe = Pipe(client)
        for token in tokens[first : first + ROWS_AT_ONCE]:
            pipe.add("HMGET", keys.instrument(token), *columns)
        for reply in pipe.execute():
            cells = reply if isinstance(reply, list) else [None] * len(columns)
            answer.append(tuple(cell.decode(errors="replace") if cell else "" for cell in cells))
    return answer
