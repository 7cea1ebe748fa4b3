"""The candle file of this machine (`LocalCandleDatabase`)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from pkbrokers_redis.consumers.candle_file import NAME
from pkbrokers_redis.consumers.database import LocalCandleDatabase
from pkbrokers_redis.consumers.files.frames import Frames
from pkbrokers_redis.consumers.sources.base import Context, Source

SYMBOLS_SINGLY_MAX = 200  # above it one pass over the file is faster


class SqliteSource(Source):
    """Days that `update_from_ticks` and jobs have written; as fresh as the last of them."""

    name = "sqlite"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._database: LocalCandleDatabase | None = None

    def is_available(self) -> bool:
        path = self.context.folder / NAME
        if self.context.settings.turso_url or path.exists():
            return True
        self.reason = f"there is no {NAME} in {self.context.folder}"
        return False

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        if self._database is None:
            self._database = LocalCandleDatabase(self.context.folder, self.context.settings)
        first, last = start_date.isoformat(), end_date.isoformat()
        if symbols is not None and len(symbols) <= SYMBOLS_SINGLY_MAX:
            frames: Frames = {}
            for symbol in symbols:
                frames |= self._database.get_daily_candles(symbol, first, last)
        else:
            frames = self._database.get_daily_candles(None, first, last)
            if symbols is not None:
                frames = {symbol: frames[symbol] for symbol in symbols if symbol in frames}
        return {symbol: frame.rename_axis("datetime") for symbol, frame in frames.items()}

    def as_of_ms(self) -> float | None:
        return self._database.last_update_ms() if self._database is not None else None

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
