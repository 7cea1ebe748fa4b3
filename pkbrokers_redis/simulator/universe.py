"""The simulator's instrument master: rows, and the CSV that Kite publishes of them.

Well-known instruments with their real tokens come first, invented ones follow. Rows have the field names of
Kite's instruments CSV. A token is `exchange_token << 8 | segment`.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable
from typing import Any, Final

from pkbrokers_redis.errors import SettingsError

INSTRUMENTS_MAX = 100_000
EXCHANGES: Final = ("NSE", "BSE", "NFO", "BFO", "CDS", "BCD", "MCX")
GZIP_LEVEL = 1  # compresses 100,000 rows in a fifth of a second
_SIM_EXCHANGE_TOKEN = 100_000  # NSE's real exchange tokens are lower
_EXPIRY = "2030-12-26"  # fixed, so that the same n always gives the same rows

# The segment codes: low bytes of the tokens.
_NSE, _NFO, _CDS, _BSE, _BFO, _BCD, _MCX, _INDEX = 1, 2, 3, 4, 5, 6, 7, 9

_INDICES = (
    (256265, "NIFTY 50", "NSE", 24_500.0),
    (260105, "NIFTY BANK", "NSE", 52_000.0),
    (265, "SENSEX", "BSE", 80_500.0),
    (259849, "NIFTY IT", "NSE", 38_000.0),
    (257801, "NIFTY FIN SERVICE", "NSE", 24_800.0),
    (264969, "INDIA VIX", "NSE", 13.5),
)
_EQUITIES = (
    (408065, "INFY", "INFOSYS", 1_500.0),
    (738561, "RELIANCE", "RELIANCE INDUSTRIES", 1_400.0),
    (2953217, "TCS", "TATA CONSULTANCY SERV LT", 3_400.0),
    (341249, "HDFCBANK", "HDFC BANK", 1_900.0),
    (1270529, "ICICIBANK", "ICICI BANK.", 1_350.0),
    (779521, "SBIN", "STATE BANK OF INDIA", 800.0),
    (424961, "ITC", "ITC", 420.0),
    (2714625, "BHARTIARTL", "BHARTI AIRTEL", 1_850.0),
    (1510401, "AXISBANK", "AXIS BANK", 1_150.0),
    (492033, "KOTAKBANK", "KOTAK MAHINDRA BANK", 2_050.0),
    (2939649, "LT", "LARSEN & TOUBRO", 3_550.0),
    (356865, "HINDUNILVR", "HINDUSTAN UNILEVER", 2_350.0),
    (60417, "ASIANPAINT", "ASIAN PAINTS", 2_300.0),
    (2815745, "MARUTI", "MARUTI SUZUKI INDIA", 12_300.0),
    (81153, "BAJFINANCE", "BAJAJ FINANCE", 900.0),
    (969473, "WIPRO", "WIPRO", 250.0),
    (1850625, "HCLTECH", "HCL TECHNOLOGIES", 1_600.0),
    (857857, "SUNPHARMA", "SUN PHARMACEUTICAL IND L", 1_700.0),
    (897537, "TITAN", "TITAN COMPANY", 3_400.0),
    (2977281, "NTPC", "NTPC", 340.0),
    (3834113, "POWERGRID", "POWER GRID CORP. LTD.", 290.0),
    (633601, "ONGC", "OIL AND NATURAL GAS CORP.", 240.0),
    (895745, "TATASTEEL", "TATA STEEL", 150.0),
    (2952193, "ULTRACEMCO", "ULTRATECH CEMENT", 12_000.0),
    (3001089, "JSWSTEEL", "JSW STEEL", 1_000.0),
    (519937, "M&M", "MAHINDRA & MAHINDRA", 3_100.0),
    (4267265, "BAJAJ-AUTO", "BAJAJ AUTO", 8_400.0),
    (177665, "CIPLA", "CIPLA", 1_500.0),
    (3465729, "TECHM", "TECH MAHINDRA", 1_550.0),
    (348929, "HINDALCO", "HINDALCO INDUSTRIES", 680.0),
)
# exchange token, segment, exchange, tradingsymbol, name, price, tick size, lot, type
_OTHERS = (
    (35_001, _NFO, "NFO", "NIFTY30DECFUT", "NIFTY", 24_560.0, 0.05, 75, "FUT"),
    (35_002, _NFO, "NFO", "BANKNIFTY30DECFUT", "BANKNIFTY", 52_120.0, 0.05, 35, "FUT"),
    (35_003, _NFO, "NFO", "NIFTY30DEC24500CE", "NIFTY", 182.0, 0.05, 75, "CE"),
    (35_004, _NFO, "NFO", "NIFTY30DEC24500PE", "NIFTY", 161.0, 0.05, 75, "PE"),
    (1_201, _CDS, "CDS", "USDINR30DECFUT", "USDINR", 84.155, 0.0025, 1, "FUT"),
    (2_201, _BCD, "BCD", "EURINR30DECFUT", "EURINR", 91.4325, 0.0025, 1, "FUT"),
    (220_001, _MCX, "MCX", "CRUDEOIL30DECFUT", "CRUDEOIL", 6_100.0, 1.0, 100, "FUT"),
    (220_002, _MCX, "MCX", "GOLD30DECFUT", "GOLD", 76_500.0, 1.0, 100, "FUT"),
    (500_325, _BSE, "BSE", "RELIANCE", "RELIANCE INDUSTRIES", 1_400.0, 0.05, 1, "EQ"),
    (500_209, _BSE, "BSE", "INFY", "INFOSYS", 1_500.0, 0.05, 1, "EQ"),
)
# More contracts, of stocks too: underlying (NSE's tradingsymbol), price, lot. Exchange tokens from 36,001 on.
_STOCK_FUTURES = (
    ("INFY", 1_507.0, 400),
    ("RELIANCE", 1_406.0, 500),
    ("TCS", 3_416.0, 175),
    ("HDFCBANK", 1_909.0, 550),
    ("ICICIBANK", 1_356.0, 700),
    ("SBIN", 803.0, 750),
    ("ITC", 422.0, 1_600),
    ("TATASTEEL", 150.6, 5_500),
)
_BFO_CONTRACTS = (
    (850_001, "SENSEX30DECFUT", "SENSEX", 80_700.0, 20, "FUT", 0.0),
    (850_002, "SENSEX30DEC80500CE", "SENSEX", 610.0, 20, "CE", 80_500.0),
    (850_003, "SENSEX30DEC80500PE", "SENSEX", 540.0, 20, "PE", 80_500.0),
)
_EXPIRED = "2024-12-26"
_EQUITIES_FIRST = 6  # before the minor indices, so that a small demo shows shares


def universe(n: int) -> list[dict[str, Any]]:
    """Return the first `n` instruments of the simulated exchanges.

    A larger `n` only appends rows. Tokens are unique.

    Raises:
        SettingsError: `n` is not within 1 to 100,000.
    """
    if not 1 <= n <= INSTRUMENTS_MAX:
        raise SettingsError(f"{n} instruments cannot be simulated", f"choose 1 to {INSTRUMENTS_MAX}")
    rows = _known()[:n]
    for number in range(1, n - len(rows) + 1):
        price = 20.0 + (number * 7919 % 40_000) / 10  # spread over 20 to 4,020, on the tick
        exchange_token = _SIM_EXCHANGE_TOKEN + number
        rows.append(_row(exchange_token, _NSE, "NSE", f"SIM{number:05d}", f"SIMULATED {number}", price))
    return rows


def expired_contracts() -> list[dict[str, Any]]:
    """Return contracts that expired in 2024. The CSV still lists them, but they do not trade."""
    rows = [
        _row(37_000 + number, _NFO, "NFO", f"{name}24DECFUT", name, price, 0.05, lot, "FUT")
        for number, (name, price, lot) in enumerate(_STOCK_FUTURES, 1)
    ]
    rows.append(_row(220_101, _MCX, "MCX", "GOLD24DECFUT", "GOLD", 74_000.0, 1.0, 100, "FUT"))
    return [row | {"expiry": _EXPIRED} for row in rows]


def _known() -> list[dict[str, Any]]:
    """Return the rows of the tables above: well-known shares and indices first, then the rest."""
    indices = [
        _row(token >> 8, token & 0xFF, exchange, name, name, price) | {"segment": "INDICES"}
        for token, name, exchange, price in _INDICES
    ]
    equities = [
        _row(token >> 8, _NSE, "NSE", symbol, name, price) for token, symbol, name, price in _EQUITIES
    ]
    contracts = [_row(*row) for row in _OTHERS]
    futures = [
        _row(36_000 + number, _NFO, "NFO", f"{name}30DECFUT", name, price, 0.05, lot, "FUT")
        for number, (name, price, lot) in enumerate(_STOCK_FUTURES, 1)
    ]
    sensex = [
        _row(number, _BFO, "BFO", symbol, name, price, 0.05, lot, kind) | {"strike": strike}
        for number, symbol, name, price, lot, kind, strike in _BFO_CONTRACTS
    ]
    first = [indices[0], *equities[:_EQUITIES_FIRST], *indices[1:3]]
    return [*first, *equities[_EQUITIES_FIRST:], *contracts, *indices[3:], *futures, *sensex]


def _row(
    exchange_token: int,
    segment: int,
    exchange: str,
    symbol: str,
    name: str,
    price: float,
    tick_size: float = 0.05,
    lot_size: int = 1,
    kind: str = "EQ",
) -> dict[str, Any]:
    suffix = {"EQ": "", "FUT": "-FUT"}.get(kind, "-OPT")
    return {
        "instrument_token": exchange_token << 8 | segment,
        "exchange_token": exchange_token,
        "tradingsymbol": symbol,
        "name": name,
        "last_price": price,
        "expiry": "" if kind == "EQ" else _EXPIRY,
        "strike": 24_500.0 if kind in ("CE", "PE") else 0.0,
        "tick_size": tick_size,
        "lot_size": lot_size,
        "instrument_type": kind,
        "segment": exchange + suffix,
        "exchange": exchange,
    }


class InstrumentsCsv:
    """The listed instruments: found by name, and as Kite's CSV of all or one exchange."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = list(rows)
        self.by_symbol = {f"{row['exchange']}:{row['tradingsymbol']}": row for row in self.rows}
        self.by_token = {int(row["instrument_token"]): row for row in self.rows}
        self._csv_of: dict[str | None, tuple[bytes, bytes]] = {}

    def csv(self, exchange: str | None = None) -> tuple[bytes, bytes]:
        """Return the CSV of an exchange, or of all: plain and gzipped. It is made once."""
        if exchange not in self._csv_of:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(_row(0, 0, "", "", "", 0.0)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in self.rows if exchange in (None, row["exchange"]))
            plain = text.getvalue().encode()
            self._csv_of[exchange] = (plain, gzip.compress(plain, GZIP_LEVEL))
        return self._csv_of[exchange]

    def find(self, name: str) -> dict[str, Any] | None:
        """Return the row of `NSE:INFY`, or of a token in digits."""
        row = self.by_symbol.get(name)
        return self.by_token.get(int(name)) if row is None and name.isdecimal() else row
