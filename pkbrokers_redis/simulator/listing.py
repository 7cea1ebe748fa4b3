"""The instruments CSV as Kite gives it, made once and kept, plain and gzipped."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable
from typing import Any, Final

FIELDS: Final = (
    "instrument_token",
    "exchange_token",
    "tradingsymbol",
    "name",
    "last_price",
    "expiry",
    "strike",
    "tick_size",
    "lot_size",
    "instrument_type",
    "segment",
    "exchange",
)
EXCHANGES: Final = ("NSE", "BSE", "NFO", "BFO", "CDS", "BCD", "MCX")
GZIP_LEVEL = 1  # 100,000 rows in a fifth of a second


class Listing:
    """What may be asked for by name: rows (see `universe`), and their CSV of all or one exchange."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = list(rows)
        self.by_symbol = {f"{row['exchange']}:{row['tradingsymbol']}": row for row in self.rows}
        self.by_token = {int(row["instrument_token"]): row for row in self.rows}
        self._made: dict[str | None, tuple[bytes, bytes]] = {}

    def csv(self, exchange: str | None = None) -> tuple[bytes, bytes]:
        """The CSV of an exchange or of all, plain and gzipped."""
        if exchange not in self._made:
            text = io.StringIO()
            writer = csv.DictWriter(text, FIELDS, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in self.rows if exchange in (None, row["exchange"]))
            plain = text.getvalue().encode()
            self._made[exchange] = (plain, gzip.compress(plain, GZIP_LEVEL))
        return self._made[exchange]

    def find(self, name: str) -> dict[str, Any] | None:
        """The row of `NSE:INFY`, or of a token in digits."""
        found = self.by_symbol.get(name)
        return self.by_token.get(int(name)) if found is None and name.isdecimal() else found
