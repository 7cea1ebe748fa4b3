"""Kite's own history over REST: three requests a second for everybody, so only for symbols that are named."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

import numpy as np

from pkbrokers_redis.consumers.files.frames import KOLKATA_SECONDS, Frames, file_symbol, rows_frame
from pkbrokers_redis.consumers.sources.base import Context, Source
from pkbrokers_redis.core.errors import UnknownSymbol
from pkbrokers_redis.core.intervals import DAY
from pkbrokers_redis.core.model import CANDLE_FIELDS
from pkbrokers_redis.kite.history import KiteTickerHistory

SYMBOLS_MAX = 3_000  # 17 minutes of requests


class KiteSource(Source):
    """Needs a session (`pkb login`); asked only with `fetch_kite=True`."""

    name = "kite"
    is_remote = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._history: KiteTickerHistory | None = None

    def is_available(self) -> bool:
        return True  # whether there is a session shows when it is asked; its error says what to do

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        store = self.context.store()
        named = symbols if symbols is not None else [name for _, name in store.instruments()]
        if len(named) > SYMBOLS_MAX:
            self.reason = f"asked for {len(named):,} symbols, took the first {SYMBOLS_MAX:,}"
            named = named[:SYMBOLS_MAX]
        if self._history is None:
            self._history = KiteTickerHistory(settings=store.settings, client=store.client)
        first, last = _midnight_s(start_date), _midnight_s(end_date + timedelta(days=1))
        frames: Frames = {}
        for symbol in named:
            try:
                token, name = store.resolve(symbol)
            except UnknownSymbol:
                self.refused += 1
                continue
            rows = self._history.settled_rows(token, DAY, first, last)
            if rows:
                table = np.array([[*row[:6], 0.0, 0.0] for row in rows], np.float64).reshape(
                    -1, len(CANDLE_FIELDS)
                )
                frames[file_symbol(token, name)] = rows_frame(table, daily=True)
        return frames

    def as_of_ms(self) -> float | None:
        return self.context.now_ms()

    def close(self) -> None:
        if self._history is not None:
            self._history.close()


def _midnight_s(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) - KOLKATA_SECONDS
