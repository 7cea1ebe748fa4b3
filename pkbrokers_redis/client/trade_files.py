"""Read trade files into tick batches: columns `time,symbol,price,quantity`, or cumulative `volume`.

Rows are trades, each for itself, also two of one millisecond with quantity 0 (the legs of a spread). They
need not be in order: they are sorted by time, then by cumulative volume. A volume that still falls within a
trade date is a late row's, never a new start from 0.

`time` is ISO 8601 (Asia/Kolkata without a zone) or epoch seconds, milliseconds, microseconds or nanoseconds,
recognised by size. `volume` is the day's, as Kite's: a new trade date starts from 0. A file holds all trades
of its instruments, so they start at a baseline of 0: each gets one tick with volume 0 at the end of the day
before its first trade. `client.replay` decides how a file continues what the store has.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pkbrokers_redis.candles.calendar import Sessions
from pkbrokers_redis.candles.model import (
    BATCH_WIDTH,
    LAST_PRICE,
    LAST_QUANTITY,
    NUMBER_MAX,
    TIME_MAX_MS,
    TIME_MIN_MS,
    TIME_MS,
    TOKEN,
    VOLUME,
    TickArray,
)
from pkbrokers_redis.errors import InputFileError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

TICKS_PER_FRAME = 2_000
MARKET_ZONE = "Asia/Kolkata"
_ZONE = r"(?i::\d\d(?:\.\d+)?(?:z|[+-]\d\d(?::?\d\d)?)$)"  # matches a time of day that has a zone


@dataclass(frozen=True)
class TradeFile:
    """A trade file's ticks, sorted by time.

    Attributes:
        symbols, tokens: The file's instruments.
        ticks: float64[n, 10] as in `candles.model`, AT_MS still NaN, the baselines first.
        rows_refused: Rows without a valid time, a symbol, a price above 0 or a quantity of at least 0.
        cumulative: The file has the day's volume instead of quantities.
        baselines: How many ticks at the beginning are baselines.
        rows_older: Rows left out because the store has later ones of their instruments.
        rows_unordered: Rows of a cumulative file whose volume is below that of an earlier row of the date.
        rows_known: Rows that the store has already.
    """

    symbols: list[str]
    tokens: list[int]
    ticks: TickArray
    rows_refused: int
    cumulative: bool
    baselines: int
    rows_older: int = 0
    rows_unordered: int = 0
    rows_known: int = 0


def read_trades(path: Path, known: Mapping[str, int], sessions: Sessions) -> TradeFile:
    """Read a CSV (also .gz, .zip) or Parquet file. Raises InputFileError if it is no table of trades.

    `known` is symbol (`NSE:INFY`) → token. An unknown symbol gets a token of its own, the same every time.
    """
    table = _load(path)
    table = table.loc[:, ~table.columns.duplicated()]
    missing = [name for name in ("time", "symbol", "price") if name not in table]
    if missing or not {"quantity", "volume"} & set(table.columns):
        absent = missing or ["quantity (or cumulative volume)"]
        raise InputFileError(
            f"{path.name} has no column {', '.join(absent)}", "name its columns time,symbol,price,quantity"
        )
    cumulative = "quantity" not in table
    frame = _valid_rows(table, "volume" if cumulative else "quantity", path)
    refused = len(table) - len(frame)
    if frame.empty:
        raise InputFileError(f"{path.name} holds no trade", "look at its first lines and its column names")
    tokens = _tokens(sorted(frame["symbol"].unique()), known)
    token: Ints = frame["symbol"].map(tokens).to_numpy(np.int64)  # type: ignore[assignment]
    times = frame["time"].to_numpy(np.float64)
    days = days_of(times, sessions)
    unordered = 0
    if cumulative:
        unordered = _count_falls(frame, token, days)
        reached = frame["quantity"].groupby([token, days]).cummax()  # a lower volume is a late row's
        frame["quantity"] = reached - reached.groupby([token, days]).shift(fill_value=0.0)
    totals = frame["quantity"].groupby([token, days]).cumsum().round(8)
    ticks = np.full((len(frame), BATCH_WIDTH), np.nan)
    ticks[:, TOKEN] = token
    ticks[:, LAST_PRICE] = frame["price"]
    ticks[:, LAST_QUANTITY] = frame["quantity"].round(8)
    ticks[:, VOLUME] = totals
    ticks[:, TIME_MS] = _apart(frame.assign(token=token, total=totals))
    ticks = np.concatenate([_baselines(ticks, sessions), ticks])
    return TradeFile(
        list(tokens), list(tokens.values()), ticks, refused, cumulative, len(tokens), rows_unordered=unordered
    )


def _count_falls(frame: pd.DataFrame, token: Ints, days: Ints) -> int:
    """Return how many rows of a cumulative file come after one of their date with a higher volume."""
    place = np.argsort(frame["row"].to_numpy(), kind="stable")
    volume = frame["quantity"].iloc[place].reset_index(drop=True)
    return int((volume < volume.groupby([token[place], days[place]]).cummax()).sum())


def _apart(frame: pd.DataFrame) -> Floats:
    """Return times that tell trades of one millisecond and volume apart, by a millisecond, in their order.

    The rules take the same time and volume for the same trade. The moved ones stay within their second. Rows
    that repeat a price are the same packet twice.
    """
    group = frame.groupby(["token", "time", "total"])["price"]
    is_other = (frame["price"] != group.shift()) & (group.cumcount() > 0)
    place = is_other.groupby([frame["token"], frame["time"], frame["total"]]).cumsum()
    most = place.groupby([frame["token"], frame["time"], frame["total"]]).transform("max")
    beyond = (frame["time"] % 1000 + most - 999).clip(lower=0)
    return np.asarray(frame["time"] + place - beyond, np.float64)


def frames_of(ticks: TickArray, window_ms: float | None) -> Iterator[TickArray]:
    """Split a batch into frames of TICKS_PER_FRAME ticks and `window_ms` of trade time at most."""
    start = 0
    while start < len(ticks):
        end = min(start + TICKS_PER_FRAME, len(ticks))
        if window_ms is not None:
            limit = ticks[start, TIME_MS] + window_ms
            end = start + max(1, int(np.searchsorted(ticks[start:end, TIME_MS], limit)))
        yield ticks[start:end]
        start = end


def _load(path: Path) -> pd.DataFrame:
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, on_bad_lines="skip", low_memory=False)
    except FileNotFoundError:
        raise InputFileError(
            f"there is no file {path}", "give the path of a trade file or a capture"
        ) from None
    except ImportError:
        raise InputFileError(f"{path.name} is Parquet", "pip install pyarrow, or give a CSV") from None
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise InputFileError(
            f"{path.name} cannot be read: {reason}", "give a CSV or Parquet of trades"
        ) from None
    table.columns = [str(name).strip().lower() for name in table.columns]
    return table


def _valid_rows(table: pd.DataFrame, quantity: str, path: Path) -> pd.DataFrame:
    """Return the valid rows by time: `time` (epoch ms), `symbol` (`NSE:INFY`), `price`, `quantity`."""
    frame = pd.DataFrame(
        {
            "time": _to_ms(table["time"], path),
            "symbol": table["symbol"].astype("string").str.strip(),
            "price": pd.to_numeric(table["price"], errors="coerce"),
            "quantity": pd.to_numeric(table[quantity], errors="coerce"),
        }
    )
    valid = (
        frame["time"].between(TIME_MIN_MS, TIME_MAX_MS, inclusive="left")
        & frame["symbol"].fillna("").str.fullmatch(r"[^\x00-\x1f\x7f]+")  # printable in one line
        & frame["price"].between(0, NUMBER_MAX, inclusive="neither")
        & frame["quantity"].between(0, NUMBER_MAX)
    )
    frame = frame[valid].rename_axis("row").reset_index()  # `row` is the place in the file
    by = ["time", "quantity"] if quantity == "volume" else ["time"]
    frame = frame.sort_values(by, kind="stable").reset_index(drop=True)
    frame["symbol"] = [name if ":" in name else f"NSE:{name}" for name in frame["symbol"].str.upper()]
    return frame


def _baselines(ticks: TickArray, sessions: Sessions) -> TickArray:
    """Return a tick with volume 0 for each instrument, at the end of the day before its first trade."""
    first = np.unique(ticks[:, TOKEN], return_index=True)[1]
    baselines = ticks[np.sort(first)].copy()
    baselines[:, [LAST_QUANTITY, VOLUME]] = 0.0
    baselines[:, TIME_MS] = [sessions.day(0, int(t)).day_start_ms - 1 for t in baselines[:, TIME_MS]]
    return baselines


def _to_ms(times: pd.Series[Any], path: Path) -> pd.Series[Any]:
    numbers = pd.to_numeric(times, errors="coerce")
    if numbers.notna().mean() > 0.5:
        size = float(numbers.abs().median())
        scale = next((s for limit, s in ((1e11, 1e3), (1e14, 1.0), (1e17, 1e-3)) if size < limit), 1e-6)
        return pd.Series(np.floor(numbers * scale))
    text = times.astype("string").str.strip()
    has_zone = text.str.contains(_ZONE, na=False)
    zoned = pd.to_datetime(text.where(has_zone), errors="coerce", utc=True, format="ISO8601")
    local = pd.to_datetime(text.mask(has_zone), errors="coerce", format="ISO8601")
    local = local.dt.tz_localize(MARKET_ZONE, ambiguous="NaT", nonexistent="NaT")
    moments = zoned.fillna(local.dt.tz_convert("UTC"))
    if moments.isna().all():
        raise InputFileError(f"{path.name}: no time can be read", "use ISO 8601 or epoch seconds or ms")
    whole = (moments - pd.Timestamp(0, tz="UTC")) // pd.Timedelta(milliseconds=1)
    return whole.astype("Float64").astype("float64")


def days_of(times_ms: npt.NDArray[np.float64], sessions: Sessions) -> npt.NDArray[np.int64]:
    """Return the trade date of each time (sorted, epoch ms), as its midnight in epoch ms."""
    days = np.zeros(len(times_ms), np.int64)
    first = 0
    while first < len(times_ms):  # one look-up a day
        day = sessions.day(0, int(times_ms[first]))
        last = int(np.searchsorted(times_ms, day.day_end_ms))
        days[first:last] = day.day_start_ms
        first = max(last, first + 1)
    return days


def _tokens(symbols: list[str], known: Mapping[str, int]) -> dict[str, int]:
    used = set(known.values())
    tokens: dict[str, int] = {}
    for symbol in symbols:
        if symbol in known:
            token = known[symbol]
        else:
            number = zlib.crc32(symbol.encode()) & 0xFF_FFFF
            while (token := number << 8 | 1) in used or not number:
                number = (number + 1) & 0xFF_FFFF
        used.add(token)
        tokens[symbol] = token
    return tokens
