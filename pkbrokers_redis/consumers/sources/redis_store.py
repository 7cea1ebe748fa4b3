"""The store itself: its day candles, the one that forms among them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from pkbrokers_redis.consumers.bulk import read_bulk
from pkbrokers_redis.consumers.files.frames import Frames, cut, file_symbol, rows_frame
from pkbrokers_redis.consumers.sources.base import Context, Source
from pkbrokers_redis.consumers.store import CandleStore
from pkbrokers_redis.core.errors import UnknownSymbol
from pkbrokers_redis.core.intervals import DAY

INSTRUMENTS_A_CHUNK = 500


class StoreSource(Source):
    """Live in market hours; as many days as the store keeps."""

    name = "store"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._store: CandleStore | None = None

    def is_available(self) -> bool:
        self._store = self._store or self.context.store()
        if self._store.client.exists(self._store.keys.meta()):
            return True
        self.reason = "nothing has been written to the store yet"
        return False

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        store = self._store = self._store or self.context.store()
        instruments = store.instruments() if symbols is None else self._known(store, symbols)
        days = min(next(each.keep for each in store.settings.intervals if each.name == DAY), 10_000)
        frames: Frames = {}
        for first in range(0, len(instruments), INSTRUMENTS_A_CHUNK):
            some = instruments[first : first + INSTRUMENTS_A_CHUNK]
            bulk = read_bulk(store.client, store.keys, some, DAY, days, include_current=True)
            self.refused += bulk.rows_refused
            for i, (token, symbol) in enumerate(some):
                rows = bulk.rows[bulk.offsets[i] : bulk.offsets[i + 1]]
                frame = cut(rows_frame(rows, daily=True), start_date, end_date) if len(rows) else None
                if frame is not None and len(frame):
                    frames[file_symbol(token, symbol)] = frame
        return frames

    def _known(self, store: CandleStore, symbols: Sequence[str]) -> list[tuple[int, str]]:
        """Those of the symbols that the master has; the others are no reason to fail."""
        try:
            return list(dict(store.resolve_all(symbols)).items())
        except UnknownSymbol:
            found: dict[int, str] = {}
            for symbol in symbols:
                try:
                    found.update([store.resolve(symbol)])
                except UnknownSymbol:
                    self.refused += 1
            return list(found.items())

    def as_of_ms(self) -> float | None:
        return self.context.now_ms()
