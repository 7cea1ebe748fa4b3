"""The places that day candles come from, and the order in which `InstrumentDataManager` reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pandas as pd

from pkbrokers_redis.candles.model import CANDLE_FIELDS, DAY
from pkbrokers_redis.client.bulk import read_bulk
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import UnknownSymbol
from pkbrokers_redis.files.candle_file import NAME as DATABASE_NAME
from pkbrokers_redis.files.frames import KOLKATA_SECONDS, Frames, cut, file_symbol, rows_frame
from pkbrokers_redis.files.pickle_reader import PICKLE_BYTES_MAX
from pkbrokers_redis.files.pickles import DAILY_LATEST, ReadFrames, daily_name, read_frames
from pkbrokers_redis.files.published import Context, Published, Source, fetch, folder_of
from pkbrokers_redis.files.sqlite import LocalCandleDatabase
from pkbrokers_redis.files.ticks_json import BYTES_MAX, NAME, ReadTicks, read_ticks_json
from pkbrokers_redis.kite.history import KiteTickerHistory

SYMBOLS_MAX = 3_000  # asked of Kite's history: 17 minutes of requests
SYMBOLS_SINGLY_MAX = 200  # of the candle file: above it one pass over the file is faster
INSTRUMENTS_PER_READ = 500  # of the store
DAYS_MAX = 10_000  # of one instrument
PICKLE_DAYS_MAX = 10  # as far as upstream looks for the last evening's file: the longest run of holidays
ZIPPED = NAME + ".zip"  # as upstream publishes ticks.json


class StoreSource(Source):
    """The day candles of Redis: live in market hours, as many days as the store keeps."""

    name = "store"

    def is_available(self) -> bool:
        """Return whether the store has been written to."""
        store = self.context.store()
        if store.client.exists(store.keys.meta()):
            return True
        self.reason = "nothing has been written to the store yet"
        return False

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        """Read the symbols in bulk."""
        store = self.context.store()
        instruments = store.instruments() if symbols is None else self._known(store, symbols)
        day = next(interval for interval in store.settings.intervals if interval.name == DAY)
        days = min(day.keep, DAYS_MAX)
        frames: Frames = {}
        for first in range(0, len(instruments), INSTRUMENTS_PER_READ):
            chunk = instruments[first : first + INSTRUMENTS_PER_READ]
            bulk = read_bulk(store.client, store.keys, chunk, DAY, days, include_current=True)
            self.refused += bulk.rows_refused
            for i, (token, symbol) in enumerate(chunk):
                rows = bulk.rows[bulk.offsets[i] : bulk.offsets[i + 1]]
                if len(rows):
                    frames[file_symbol(token, symbol)] = rows_frame(rows, daily=True)
        return _select(frames, None, start_date, end_date)

    def _known(self, store: CandleStore, symbols: Sequence[str]) -> list[tuple[int, str]]:
        """Return the symbols that the master has; count the others."""
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
        """Return the present."""
        return self.context.now_ms()


class KiteSource(Source):
    """Kite's day history over REST, 3 requests a second for all processes; needs `fetch_kite=True`."""

    name = "kite"
    is_remote = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._history: KiteTickerHistory | None = None

    def is_available(self) -> bool:
        """Return True: a missing session shows in the first request, whose error says what to do."""
        return True

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        """Fetch each symbol, at most SYMBOLS_MAX."""
        store = self.context.store()
        names = symbols if symbols is not None else [name for _, name in store.instruments()]
        if len(names) > SYMBOLS_MAX:
            self.reason = f"requested {len(names):,} symbols, fetched the first {SYMBOLS_MAX:,}"
            names = names[:SYMBOLS_MAX]
        if self._history is None:
            self._history = KiteTickerHistory(settings=store.settings, client=store.client)
        first, last = _midnight_s(start_date), _midnight_s(end_date + timedelta(days=1))
        frames: Frames = {}
        for symbol in names:
            try:
                token, name = store.resolve(symbol)
            except UnknownSymbol:
                self.refused += 1
                continue
            rows = [[*row[:6], 0.0, 0.0] for row in self._history.cached_rows(token, DAY, first, last)]
            if rows:
                table = np.array(rows, np.float64).reshape(-1, len(CANDLE_FIELDS))
                frames[file_symbol(token, name)] = rows_frame(table, daily=True)
        return frames

    def as_of_ms(self) -> float | None:
        """Return the present."""
        return self.context.now_ms()

    def close(self) -> None:
        """Close the connection to Kite."""
        if self._history is not None:
            self._history.close()


class SqliteSource(Source):
    """This machine's candle file (`LocalCandleDatabase`), as fresh as its last update."""

    name = "sqlite"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._database: LocalCandleDatabase | None = None

    def is_available(self) -> bool:
        """Return whether there is a file, or a shared database."""
        if self.context.settings.turso_url:
            return True
        return _exists(self, DATABASE_NAME)

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        """Read the symbols singly, or all in one pass."""
        if self._database is None:
            self._database = LocalCandleDatabase(self.context.folder, self.context.settings)
        first, last = start_date.isoformat(), end_date.isoformat()
        frames: Frames = {}
        if symbols is not None and len(symbols) <= SYMBOLS_SINGLY_MAX:
            for symbol in symbols:
                frames |= self._database.get_daily_candles(symbol, first, last)
        else:
            frames = self._database.get_daily_candles(None, first, last)
            if symbols is not None:
                frames = {symbol: frames[symbol] for symbol in symbols if symbol in frames}
        return {symbol: frame.rename_axis("datetime") for symbol, frame in frames.items()}

    def as_of_ms(self) -> float | None:
        """Return when the file was last updated."""
        return self._database.last_update_ms() if self._database is not None else None

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()


class _FileSource(Source):
    """A source that reads one file whole."""

    _as_of_ms: float | None = None

    def as_of_ms(self) -> float | None:
        """Return when the file was true."""
        return self._as_of_ms

    def _frames(
        self, found: ReadFrames | ReadTicks, symbols: Sequence[str] | None, start_date: date, end_date: date
    ) -> Frames:
        self.refused += found.refused
        self.reason = found.why
        return _select(found.frames, symbols, start_date, end_date)


class PickleSource(_FileSource):
    """`stock_data_DDMMYYYY.pkl` or `daily_candles.pkl` in the data folder, read by an allow-list."""

    name = "pickle"

    def is_available(self) -> bool:
        """Return whether there is such a file."""
        if any((self.context.folder / name).exists() for name in self._names()):
            return True
        self.reason = f"there is no stock_data_….pkl in {self.context.folder}"
        return False

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        """Read the newest file."""
        paths = [self.context.folder / name for name in self._names()]
        path = next(path for path in paths if path.exists())
        self._as_of_ms = path.stat().st_mtime * 1000
        return self._frames(read_frames(path), symbols, start_date, end_date)

    def _names(self) -> list[str]:
        """Return the file names, the best first: the last days' dated ones, then the undated one."""
        today = datetime.fromtimestamp(self.context.now_ms() / 1000 + KOLKATA_SECONDS, UTC).date()
        return [*(daily_name(today - timedelta(days=n)) for n in range(PICKLE_DAYS_MAX)), DAILY_LATEST]


class RemotePickleSource(Published, PickleSource):
    """The pickles published at PKB_FILES_URL."""

    name = "remote pickle"

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        """Fetch the newest file."""
        folder = folder_of(self.context.settings) or ""
        for name in self._names():
            fetched = fetch(folder, name, PICKLE_BYTES_MAX)
            if fetched is not None:
                self._as_of_ms = fetched.written_ms
                return self._frames(read_frames(fetched.data), symbols, start_date, end_date)
        self.reason = "there is no stock_data_….pkl at PKB_FILES_URL"
        return {}


class TicksFileSource(_FileSource):
    """ticks.json in the data folder: the day so far of every symbol."""

    name = "ticks.json"
    has_history = False

    def is_available(self) -> bool:
        """Return whether there is a file."""
        return _exists(self, NAME)

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        """Read the file."""
        found = read_ticks_json(self.context.folder / NAME)
        self._as_of_ms = found.as_of_ms
        return self._frames(found, symbols, start_date, end_date)


class RemoteTicksSource(Published, TicksFileSource):
    """The ticks.json published at PKB_FILES_URL."""

    name = "remote ticks.json"

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        """Fetch the file, or its zip."""
        folder = folder_of(self.context.settings) or ""
        fetched = fetch(folder, NAME, BYTES_MAX) or fetch(folder, ZIPPED, BYTES_MAX)
        if fetched is None:
            self.reason = f"there is no {NAME} at PKB_FILES_URL"
            return {}
        found = read_ticks_json(fetched.data)
        self._as_of_ms = found.as_of_ms
        return self._frames(found, symbols, start_date, end_date)


SOURCES: dict[str, type[Source]] = {
    source.name: source
    for source in (
        SqliteSource,
        StoreSource,
        KiteSource,
        TicksFileSource,
        RemoteTicksSource,
        PickleSource,
        RemotePickleSource,
    )
}

# While the market is open, fresh sources first: pickles are of yesterday and add the days before.
MARKET_HOURS = ("sqlite", "store", "kite", "ticks.json", "remote ticks.json", "pickle", "remote pickle")
# After hours the evening's files are complete; the other sources add what they lack.
AFTER_HOURS = ("pickle", "remote pickle", "sqlite", "store", "kite", "ticks.json", "remote ticks.json")


def _exists(source: Source, name: str) -> bool:
    if (source.context.folder / name).exists():
        return True
    source.reason = f"there is no {name} in {source.context.folder}"
    return False


def _select(
    frames: Mapping[str, pd.DataFrame], symbols: Sequence[str] | None, start_date: date, end_date: date
) -> Frames:
    """Return the frames of these symbols (None: all) between two dates, without empty ones."""
    names = frames if symbols is None else [name for name in symbols if name in frames]
    selected = {name: cut(frames[name], start_date, end_date) for name in names}
    return {name: frame for name, frame in selected.items() if len(frame)}


def _midnight_s(day: date) -> int:
    """Return a date's midnight in Asia/Kolkata, epoch seconds."""
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) - KOLKATA_SECONDS
