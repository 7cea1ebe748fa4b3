"""Kite's own history over REST: three requests a second for everybody, so only for symbols that are named.

The pickles of days that upstream publishes each evening, from this machine's folder or from afar.

The store itself: its day candles, the one that forms among them.

The candle file of this machine (`LocalCandleDatabase`).

ticks.json: the day so far of every symbol, from this machine's file or a published one.

The sources, one row each, and the order in which they are asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

import numpy as np

from pkbrokers_redis.candles.model import CANDLE_FIELDS, DAY
from pkbrokers_redis.client.bulk import read_bulk
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import UnknownSymbol
from pkbrokers_redis.files.candle_file import NAME as DATABASE_NAME
from pkbrokers_redis.files.frames import KOLKATA_SECONDS, Frames, cut, file_symbol, rows_frame
from pkbrokers_redis.files.pickles import DAILY_LATEST, ReadFrames, daily_name, read_frames
from pkbrokers_redis.files.published import Context, Published, Source, fetch, folder_of
from pkbrokers_redis.files.sqlite import LocalCandleDatabase
from pkbrokers_redis.files.ticks_json import BYTES_MAX, NAME, ReadTicks, read_ticks_json
from pkbrokers_redis.files.unpickler import PICKLE_BYTES_MAX
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
            rows = self._history.cached_rows(token, DAY, first, last)
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


DAYS_BACK = 10  # as far as upstream looks for the last evening's file: the longest row of holidays


def candidates(now_ms: float) -> list[str]:
    """File names, the best first: the dated ones of the last days, then the undated one."""
    today = datetime.fromtimestamp(now_ms / 1000 + KOLKATA_SECONDS, UTC).date()
    return [*(daily_name(today - timedelta(days=n)) for n in range(DAYS_BACK)), DAILY_LATEST]


class PickleSource(Source):
    """`stock_data_DDMMYYYY.pkl` or `daily_candles.pkl` in the data folder, read by our unpickler."""

    name = "pickle"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._as_of_ms: float | None = None

    def is_available(self) -> bool:
        if any((self.context.folder / name).exists() for name in candidates(self.context.now_ms())):
            return True
        self.reason = f"there is no stock_data_….pkl in {self.context.folder}"
        return False

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        paths = [self.context.folder / name for name in candidates(self.context.now_ms())]
        path = next(path for path in paths if path.exists())
        self._as_of_ms = path.stat().st_mtime * 1000
        return self._chosen(read_frames(path), symbols, start_date, end_date)

    def _chosen(
        self, found: ReadFrames, symbols: Sequence[str] | None, start_date: date, end_date: date
    ) -> Frames:
        self.refused += found.refused
        self.reason = found.why
        names = found.frames if symbols is None else [name for name in symbols if name in found.frames]
        frames = {name: cut(found.frames[name], start_date, end_date) for name in names}
        return {name: frame for name, frame in frames.items() if len(frame)}

    def as_of_ms(self) -> float | None:
        return self._as_of_ms


class RemotePickleSource(Published, PickleSource):
    """The published ones."""

    name = "remote pickle"

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        folder = folder_of(self.context.settings) or ""
        for name in candidates(self.context.now_ms()):
            fetched = fetch(folder, name, PICKLE_BYTES_MAX)
            if fetched is not None:
                self._as_of_ms = fetched.written_ms
                return self._chosen(read_frames(fetched.data), symbols, start_date, end_date)
        self.reason = "there is no stock_data_….pkl at PKB_FILES_URL"
        return {}


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


SYMBOLS_SINGLY_MAX = 200  # above it one pass over the file is faster


class SqliteSource(Source):
    """Days that `update_from_ticks` and jobs have written; as fresh as the last of them."""

    name = "sqlite"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._database: LocalCandleDatabase | None = None

    def is_available(self) -> bool:
        path = self.context.folder / DATABASE_NAME
        if self.context.settings.turso_url or path.exists():
            return True
        self.reason = f"there is no {DATABASE_NAME} in {self.context.folder}"
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


ZIPPED = NAME + ".zip"  # as upstream publishes it


class TicksFileSource(Source):
    """The file beside the pickles, if `pkb snapshot ticks` or somebody else writes one."""

    name = "ticks.json"
    has_history = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._as_of_ms: float | None = None

    def is_available(self) -> bool:
        path = self.context.folder / NAME
        if path.exists():
            return True
        self.reason = f"there is no {NAME} in {self.context.folder}"
        return False

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        return self._chosen(read_ticks_json(self.context.folder / NAME), symbols, start_date, end_date)

    def _chosen(
        self, found: ReadTicks, symbols: Sequence[str] | None, start_date: date, end_date: date
    ) -> Frames:
        self.refused += found.refused
        self.reason = found.why
        self._as_of_ms = found.as_of_ms
        wanted = (
            found.frames
            if symbols is None
            else {name: found.frames[name] for name in symbols if name in found.frames}
        )
        frames = {symbol: cut(frame, start_date, end_date) for symbol, frame in wanted.items()}
        return {symbol: frame for symbol, frame in frames.items() if len(frame)}

    def as_of_ms(self) -> float | None:
        return self._as_of_ms


class RemoteTicksSource(Published, TicksFileSource):
    """The published one."""

    name = "remote ticks.json"

    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        folder = folder_of(self.context.settings) or ""
        fetched = fetch(folder, NAME, BYTES_MAX) or fetch(folder, ZIPPED, BYTES_MAX)
        if fetched is None:
            self.reason = f"there is no {NAME} at PKB_FILES_URL"
            return {}
        return self._chosen(read_ticks_json(fetched.data), symbols, start_date, end_date)


# name → class
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

# While the market is open what is fresh comes first; pickles are yesterday's, for days nobody else has.
MARKET_HOURS = ("sqlite", "store", "kite", "ticks.json", "remote ticks.json", "pickle", "remote pickle")
# After hours the evening's files are complete; the others fill what they lack.
AFTER_HOURS = ("pickle", "remote pickle", "sqlite", "store", "kite", "ticks.json", "remote ticks.json")
