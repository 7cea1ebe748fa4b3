"""Kite's instruments CSV → rows that may be stored. ~97,000 rows of

    instrument_token,exchange_token,tradingsymbol,name,last_price,expiry,strike,tick_size,lot_size,…
    408065,1594,INFY,INFOSYS,0.0,,0.0,0.05,1,EQ,NSE,NSE

Columns are found by name, so that a new one does no harm. A row that is no instrument is counted and left
out, and costs the others nothing. (kiteconnect's own parser stops at the first, and takes 50 µs a date.)
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from datetime import date
from typing import NamedTuple

from pkbrokers_redis.core.errors import KiteUnavailable
from pkbrokers_redis.core.model import TOKEN_MAX

REQUIRED = ("instrument_token", "tradingsymbol", "exchange")
NUMBERS = ("last_price", "strike", "tick_size", "lot_size")
ROWS_MAX = 1_000_000  # ten times what Kite has
COLUMNS_MAX = 40
_EXCHANGE = re.compile(r"[A-Z][A-Z0-9_]{1,11}")
_COLUMN = re.compile(r"[a-z][a-z0-9_]{0,39}")
_SYMBOL_LENGTH_MAX = 64
_CELL_LENGTH_MAX = 200


class Parsed(NamedTuple):
    """`rows`: column → text, each with a valid token, exchange and symbol, none twice. `expired` contracts
    are left out too. `refused` counts by reason. `sha256` is the download's."""

    rows: list[dict[str, str]]
    expired: int
    refused: Counter[str]
    sha256: str


def parse_instruments(content: bytes, today: date) -> Parsed:
    """`today` is the date in India: a contract is expired from the day after its expiry.

    Raises KiteUnavailable when this is no instruments CSV at all.
    """
    reader = csv.reader(io.StringIO(content.decode("utf-8", errors="replace"), newline=""))
    header = [name.strip().lstrip("\ufeff") for name in next(_lines(reader, Counter()), [])]
    if not set(REQUIRED) <= set(header) or len(header) > COLUMNS_MAX or len(set(header)) < len(header):
        raise KiteUnavailable("Kite's instruments are no CSV as documented", "try again later")
    if not all(_COLUMN.fullmatch(name) for name in header):
        raise KiteUnavailable("Kite's instruments have odd column names", "try again later")
    rows: list[dict[str, str]] = []
    refused: Counter[str] = Counter()
    expired = 0
    tokens: set[str] = set()
    symbols: set[str] = set()
    for cells in _lines(reader, refused):
        if not cells:
            continue  # an empty line
        if len(cells) != len(header):
            refused["columns"] += 1
            continue
        row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        why = _refusal(row)
        symbol = f"{row['exchange']}:{row['tradingsymbol']}"
        if not why and (row["instrument_token"] in tokens or symbol in symbols):
            why = "repeated"
        if why:
            refused[why] += 1
        elif row.get("expiry") and date.fromisoformat(row["expiry"]) < today:
            expired += 1
        else:
            tokens.add(row["instrument_token"])
            symbols.add(symbol)
            rows.append(row)
            if len(rows) >= ROWS_MAX:
                refused["too_many"] += 1
                break
    return Parsed(rows, expired, refused, hashlib.sha256(content).hexdigest())


def _lines(reader: Iterator[list[str]], refused: Counter[str]) -> Iterator[list[str]]:
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:  # a NUL, a cell without an end: the reader goes on behind it
            refused["unreadable"] += 1


def _refusal(row: dict[str, str]) -> str:
    """Why it is no instrument; "" when it is one. Makes the token canonical (no leading zeros)."""
    token, symbol = row["instrument_token"], row["tradingsymbol"]
    if not (token.isascii() and token.isdecimal() and len(token) <= 12 and 0 < int(token) <= TOKEN_MAX):
        return "token"
    row["instrument_token"] = str(int(token))
    if not symbol or len(symbol) > _SYMBOL_LENGTH_MAX or not symbol.isprintable() or "\ufffd" in symbol:
        return "symbol"
    if not _EXCHANGE.fullmatch(row["exchange"]):
        return "exchange"
    for name in NUMBERS:
        if not _is_number(row.get(name, "")):
            return name
    if not _is_date(row.get("expiry", "")):
        return "expiry"
    if any(len(cell) > _CELL_LENGTH_MAX or not cell.isprintable() for cell in row.values()):
        return "text"
    return ""


def _is_number(text: str) -> bool:
    if not text:
        return True
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_date(text: str) -> bool:
    if not text:
        return True
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return len(text) == 10
