"""Upstream's module constants and plain data types: candles by name, ticks, order book levels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from pkbrokers_redis import __version__
from pkbrokers_redis.candles.model import DAY, DEFAULT_INTERVALS
from pkbrokers_redis.candles.model import Candle as CandleRow
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.store.rows import parse_candles


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


VERSION = f"{__version__}+redis"
Imports = {"kiteconnect": _is_installed("kiteconnect")}
KOLKATA_TZ = ZoneInfo("Asia/Kolkata")

DAY_SECONDS = 86_400
MAX_DAILY_ROWS = 251  # day candles of an export, as upstream
_ALIASES = {"1h": "60m", "1d": DAY}

SUPPORTED_INTERVALS = {interval.name: interval.seconds or DAY_SECONDS for interval in DEFAULT_INTERVALS}
SUPPORTED_INTERVALS |= {alias: SUPPORTED_INTERVALS[name] for alias, name in _ALIASES.items()}
MAX_CANDLES = {interval.name: interval.keep for interval in DEFAULT_INTERVALS}
MAX_CANDLES |= {alias: MAX_CANDLES[name] for alias, name in _ALIASES.items()}

# The cash market's continuous session, for programs that read it; the pipeline itself uses calendar.json.
MARKET_OPEN_HOUR, MARKET_OPEN_MINUTE = 9, 15
MARKET_CLOSE_HOUR, MARKET_CLOSE_MINUTE = 15, 30

# Instrument tokens. Upstream's `instruments` has them as numbers, its websocket modules as lists of one.
NIFTY_50, BSE_SENSEX = 256265, 265
NIFTY_50_LIST, BSE_SENSEX_LIST = [NIFTY_50], [BSE_SENSEX]
OPTIMAL_TOKEN_BATCH_SIZE = 500  # upstream's; Kite accepts 3,000 a connection


class DepthEntry(NamedTuple):
    """One level of the order book; price in rupees."""

    quantity: int
    price: float
    orders: int


@dataclass(slots=True)
class Tick:
    """One tick with upstream's field names: prices in rupees, times in epoch seconds, None where absent.

    `exchange_timestamp` is the receive time if the packet has none, as upstream has it.
    """

    instrument_token: int
    last_price: float
    last_quantity: int | None = None
    avg_price: float | None = None
    day_volume: int | None = None
    buy_quantity: int | None = None
    sell_quantity: int | None = None
    open_price: float | None = None
    high_price: float | None = None
    low_price: float | None = None
    prev_day_close: float | None = None
    last_trade_timestamp: int | None = None
    oi: int | None = None
    oi_day_high: int | None = None
    oi_day_low: int | None = None
    exchange_timestamp: int | None = None
    depth: dict[str, list[DepthEntry]] | None = None
    websocket_index: int = -1
    batch_index: int = -1


@dataclass
class Candle:
    """A candle by upstream's field names. `timestamp` in epoch seconds; `last_tick_time` is 0 if unknown."""

    timestamp: int
    last_tick_time: int = 0
    open: float = 0.0
    high: float = 0.0
    low: float = float("inf")
    close: float = 0.0
    volume: float = 0
    oi: float = 0
    tick_count: int = 0
    is_complete: bool = False

    @classmethod
    def from_row(cls, row: CandleRow, is_complete: bool, last_tick_time: int = 0) -> Candle:
        """Return the candle of a row as it stands in Redis."""
        prices = row.open, row.high, row.low, row.close
        return cls(row.start, last_tick_time, *prices, row.volume, row.oi or 0, row.ticks, is_complete)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candle:
        """Return the candle of a `to_dict()`; missing fields have their defaults."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**{"timestamp": 0, **known})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    def to_list(self) -> list[float]:
        """Return `[open, high, low, close, volume]`."""
        return [self.open, self.high, self.low, self.close, self.volume]


class InstrumentCandles:
    """One instrument's candles. Each property reads Redis when it is used."""

    def __init__(self, store: CandleStore, instrument_token: int, trading_symbol: str) -> None:
        self.instrument_token = instrument_token
        self.trading_symbol = trading_symbol
        self._store = store

    @property
    def candles(self) -> dict[str, deque[Candle]]:
        """Return interval → all completed candles kept, oldest first."""
        store = self._store
        pipe = store.client.pipeline(transaction=False)
        for name in store.intervals:
            pipe.lrange(store.keys.candles(self.instrument_token, name), 0, -1)
        return {
            name: deque(Candle.from_row(row, is_complete=True) for row in parse_candles(texts, store.tally))
            for name, texts in zip(store.intervals, pipe.execute(), strict=True)
        }

    @property
    def current_candle(self) -> dict[str, Candle | None]:
        """Return interval → the candle being formed, None if there is none."""
        store = self._store
        texts: Any = store.client.hmget(store.keys.current(self.instrument_token), list(store.intervals))
        found: dict[str, Candle | None] = {}
        for name, text in zip(store.intervals, texts, strict=True):
            rows = parse_candles([text] if text else [], store.tally)
            found[name] = Candle.from_row(rows[0], is_complete=False) if rows else None
        return found


class InstrumentsView(Mapping[int, InstrumentCandles]):
    """Token → InstrumentCandles of all known instruments."""

    def __init__(self, store: CandleStore, symbols: Mapping[int, str]) -> None:
        self._store = store
        self._symbols = symbols

    def __getitem__(self, token: int) -> InstrumentCandles:
        return InstrumentCandles(self._store, token, self._symbols[token])

    def __iter__(self) -> Iterator[int]:
        return iter(self._symbols)

    def __len__(self) -> int:
        return len(self._symbols)
