"""`HighPerformanceDataProvider`: what a screener asks, from a mirror in its own process.

The first question about an instrument and interval reads it from Redis and mirrors it; each one after that is
answered from memory, and the mirror keeps itself current.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pkbrokers_redis.candles.model import DAY, find_interval
from pkbrokers_redis.client import dataframes
from pkbrokers_redis.client.mirror import Mirror
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore, get_candle_store
from pkbrokers_redis.compat.tick_processor import TickProcessor
from pkbrokers_redis.errors import UnknownInterval

if TYPE_CHECKING:
    import pandas as pd

INTRADAY_ROWS = 100  # of an interval the store does not say how many it keeps


class HighPerformanceDataProvider:
    """Upstream's methods, arguments and frames. What is not known is an empty frame or None, as there.

    Imports pandas when it is made, so that the first read need not. Any thread may use it. Frames are the
    caller's own: changing one changes nothing else. `mirror` tells how far behind it is (`lag_ms`).
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
        """The last `count` candles, the one that forms among them, under `datetime` (Asia/Kolkata)."""
        if not self.mirror.has(symbol, interval, count):
            interval = self._mirror([symbol], interval, count)
            if not interval:
                return dataframes.ohlcv_frame(dataframes.NO_ROWS)
        return dataframes.ohlcv_frame(self.mirror.rows(symbol, interval, count, include_current=True))

    def get_stocks_data(
        self, symbols: Sequence[str], interval: str = DAY, count: int = 100
    ) -> dict[str, pd.DataFrame]:
        """Symbol → frame, of those that have candles. One bulk read for all that are new to the mirror."""
        missing = [symbol for symbol in symbols if not self.mirror.has(symbol, interval, count)]
        if missing:
            interval = self._mirror(missing, interval, count)
        found: dict[str, pd.DataFrame] = {}
        if not interval:
            return found
        known = [symbol for symbol in symbols if self.mirror.has(symbol, interval, count)]
        for symbol, rows in self.mirror.many_rows(known, interval, count, include_current=True):
            if len(rows):
                found[symbol] = dataframes.ohlcv_frame(rows)
        return found

    def get_intraday_data(self, symbol: str, interval: str = "5m") -> pd.DataFrame:
        """As many candles as the store keeps of the interval: a whole day's, by default."""
        try:
            count = find_interval(self.candle_store.store.settings.intervals, interval).keep
        except UnknownInterval:
            count = INTRADAY_ROWS
        return self.get_stock_data(symbol, interval, count)

    def get_current_price(self, symbol: str) -> float | None:
        """The last price, None where there is none."""
        return self.processor.get_latest_price(symbol=symbol)

    def get_current_ohlcv(self, symbol: str) -> dict[str, Any] | None:
        """The newest day candle as a dict, None where there is none."""
        return self.processor.get_day_ohlcv(symbol=symbol)

    def get_market_data(self) -> dict[str, dict[str, Any]]:
        """Trading symbol → newest day candle, of all that have one."""
        return self.processor.get_all_day_ohlcv()

    def is_data_available(self, symbol: str) -> bool:
        """Whether there are candles of it."""
        return self.candle_store.get_day_ohlcv(trading_symbol=symbol) is not None

    def get_available_symbols(self) -> list[str]:
        """The trading symbols of all instruments known."""
        return self.candle_store.get_all_symbols()

    def close(self) -> None:
        """End the mirror's thread."""
        self.mirror.close()

    def _mirror(self, symbols: Sequence[str], interval: str, count: int) -> str:
        """Mirror those that exist; returns the interval's name, "" for one there is not."""
        try:
            name = find_interval(self.candle_store.store.settings.intervals, interval).name
        except UnknownInterval:
            return ""
        with self._adding:
            wanted = [symbol for symbol in symbols if not self.mirror.has(symbol, name, count)]
            self.mirror.add(self.candle_store.known_of(wanted), name, count)
        return name if len(symbols) > 1 or self.mirror.has(symbols[0], name, count) else ""
