"""One instrument, typed, with upstream's name and fields; to and from the rows of Kite's CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from pkbrokers_redis.store.groups import is_nse_equity


@dataclass
class Instrument:
    """One row, typed. `expiry` is YYYY-MM-DD, `last_updated` ISO 8601."""

    instrument_token: int
    exchange_token: str
    tradingsymbol: str
    name: str | None
    last_price: float | None
    expiry: str | None
    strike: float | None
    tick_size: float
    lot_size: int
    instrument_type: str
    segment: str
    exchange: str
    last_updated: str
    nse_stock: bool = False


def instrument_of(row: Mapping[str, str], at: str) -> Instrument:
    """A row of the master, read at that time. A field `nse_stock` overrules what the series says."""
    token, exchange = int(row["instrument_token"]), row.get("exchange", "")
    symbol = row.get("tradingsymbol", "")
    overruled = row.get("nse_stock", "")
    return Instrument(
        instrument_token=token,
        exchange_token=row.get("exchange_token", ""),
        tradingsymbol=symbol,
        name=row.get("name") or None,
        last_price=_number(row.get("last_price")),
        expiry=row.get("expiry") or None,
        strike=_number(row.get("strike")),
        tick_size=_number(row.get("tick_size")) or 0.0,
        lot_size=int(_number(row.get("lot_size")) or 0),
        instrument_type=row.get("instrument_type", ""),
        segment=row.get("segment", ""),
        exchange=exchange,
        last_updated=at,
        nse_stock=overruled == "1" if overruled else is_nse_equity(f"{exchange}:{symbol}", token),
    )


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def csv_of(instruments: Iterable[Instrument]) -> bytes:
    """Kite's CSV of some instruments."""
    text = io.StringIO()
    columns = [name for name in Instrument.__dataclass_fields__ if name not in ("last_updated", "nse_stock")]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(asdict(instrument) for instrument in instruments)
    return text.getvalue().encode()
