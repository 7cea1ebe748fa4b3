"""`HighPerformanceDataProvider`: what a screener reads, from a mirror in its own process.

The first read of an instrument and interval comes from Redis and adds it to the mirror. Later reads come from
memory; the mirror keeps itself current.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pkbrokers_redis.candles.model import DAY, find_interval
from pkbrokers_redis.client.mirror import Mirror
from pkbrokers_redis.client.mirror_rows import NO_ROWS
from pkbrokers_redis.compat import shapes
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore, get_candle_store
from pkbrokers_redis.compat.tick_processor import TickProcessor
from pkbrokers_redis.errors import UnknownInterval

if TYPE_CHECKING:
    import pandas as pd

INTRADAY_ROWS = 100  # of an interval whose length of history the store does not state


class HighPerformanceDataProvider:
    """Upstream's methods, arguments and frames. An unknown instrument gives an empty frame or None.

    Frames are copies: a caller may change them. Any thread may use it; `mirror` keeps itself current in a
    thread of its own, and `mirror.lag_ms` is how old its data may be.

    Args:
        candle_store: Default: the process' `get_candle_store()`.
        mirror: Default: a mirror of its own, started here.

    Example:
        >>> provider = HighPerformanceDataProvider()
        >>> list(provider.get_stock_data("INFY", "5m", count=20).columns)
        ['open', 'high', 'low', 'close', 'volume']
        >>> provider.close()
    """

    def __init__(
        self, *, candle_store: InMemoryCandleStore | None = None, mirror: Mirror | None = None
    ) -> None:
        self.candle_store = candle_store or get_candle_store()
        self.processor = TickProcessor(candle_store=self.candle_store)
        self.mirror = mirror or Mirror(self.candle_store.store, symbols=())
        self._adding = threading.Lock()
        if mirror is None:
            self.mirror.start()

    def get_stock_data(self, symbol: str, interval: str = DAY, count: int = 100) -> pd.DataFrame:
        """Return the last `count` candles, current one included, under `datetime` (Asia/Kolkata)."""
        if not self.mirror.has(symbol, interval, count):
            interval = self._add([symbol], interval, count)
            if not interval or not self.mirror.has(symbol, interval, count):
                return shapes.ohlcv_frame(NO_ROWS)
        return shapes.ohlcv_frame(self.mirror.rows(symbol, interval, count, include_current=True))

    def get_stocks_data(
        self, symbols: Sequence[str], interval: str = DAY, count: int = 100
    ) -> dict[str, pd.DataFrame]:
        """Return symbol → frame, of the symbols that have candles. New ones cost one bulk read together."""
        missing = [symbol for symbol in symbols if not self.mirror.has(symbol, interval, count)]
        if missing:
            interval = self._add(missing, interval, count)
        if not interval or not symbols:
            return {}
        known = [symbol for symbol in symbols if self.mirror.has(symbol, interval, count)]
        pairs = self.mirror.many_rows(known, interval, count, include_current=True)
        return {symbol: shapes.ohlcv_frame(rows) for symbol, rows in pairs if len(rows)}

    def get_intraday_data(self, symbol: str, interval: str = "5m") -> pd.DataFrame:
        """Return as many candles as the store keeps of the interval: by default a whole day's."""
        try:
            count = find_interval(self.candle_store.store.settings.intervals, interval).keep
        except UnknownInterval:
            count = INTRADAY_ROWS
        return self.get_stock_data(symbol, interval, count)

    def get_current_price(self, symbol: str) -> float | None:
        """Return the last price, None without one."""
        return self.processor.get_latest_price(symbol=symbol)

    def get_current_ohlcv(self, symbol: str) -> dict[str, Any] | None:
        """Return the newest day candle as a dict, None without one."""
        return self.processor.get_day_ohlcv(symbol=symbol)

    def get_market_data(self) -> dict[str, dict[str, Any]]:
        """Return trading symbol → newest day candle, of all instruments that have one."""
        return self.processor.get_all_day_ohlcv()

    def is_data_available(self, symbol: str) -> bool:
        """Return whether the instrument has a day candle."""
        return self.candle_store.get_day_ohlcv(trading_symbol=symbol) is not None

    def get_available_symbols(self) -> list[str]:
        """Return the trading symbols of all known instruments."""
        return self.candle_store.get_all_symbols()

    def close(self) -> None:
        """End the mirror's thread."""
        self.mirror.close()

    def _add(self, symbols: Sequence[str], interval: str, count: int) -> str:
        """Mirror those of the symbols that exist; return the interval's name, empty if it is unknown."""
        try:
            name = find_interval(self.candle_store.store.settings.intervals, interval).name
        except UnknownInterval:
            return ""
        with self._adding:
            missing = [symbol for symbol in symbols if not self.mirror.has(symbol, name, count)]
            self.mirror.add(self.candle_store.known_of(missing), name, count)
        return name
