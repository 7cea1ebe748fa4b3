"""`InstrumentDataManager`: a year of day candles of every symbol from several sources, by upstream's methods.

The order of the sources depends on the market's hours (`sources`). Each source is read only for what is still
missing: the days before, or the last session's row, as fresh as the hour demands. A source that fails is
skipped, and `answers` says so. Of the days before the last session the first source counts; of its own day,
the source that was true last.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import Sessions, load_sessions
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import market_clock
from pkbrokers_redis.compat.sources import AFTER_HOURS, MARKET_HOURS, SOURCES
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.files.atomic import replacing
from pkbrokers_redis.files.frames import KOLKATA_SECONDS, Frames, cut, whole
from pkbrokers_redis.files.pickles import DAILY_ROWS_MAX, PickledDict, daily_name, split_frame
from pkbrokers_redis.files.published import Context, Source
from pkbrokers_redis.settings import Settings, load_settings

HISTORY_DAYS = 365
FRESH_SECONDS = 120  # in market hours an older answer is not current
COVERED_SHARE = 0.9  # of all symbols with the last session's row: the rest no longer trades
NSE_SEGMENT = 1

Status = Literal["used", "not needed", "left out", "unavailable", "failed", "empty"]

log = logs.get("data manager")


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one source: `reason` says why it gave nothing, or what it left out.

    `as_of` is when its newest data was true (ISO; empty without data), `age_seconds` how long ago that was
    when the source was read.
    """

    source: str
    status: Status
    symbols: int = 0
    rows: int = 0
    as_of: str = ""
    age_seconds: float | None = None
    refused: int = 0
    took_seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Provenance:
    """The source of a symbol's last row, and when that row was true (epoch ms)."""

    source: str
    as_of_ms: float


class InstrumentDataManager:
    """A year of day candles of every symbol; `answers` says what each source did.

    Args:
        settings: Default: from the environment.
        store: Default: a store of its own.
        folder: Where the files are; default: PKB_FILES_DIR.
        sources: Names of SOURCES in the order to read; default: by the market's hours.

    Example:
        >>> manager = InstrumentDataManager()
        >>> manager.execute()
        True
        >>> manager.get_dataframe_for_symbol("INFY")["close"].tolist()
        [1512.5]
    """

    def __init__(
        self,
        settings: Settings | None = None,
        store: CandleStore | None = None,
        folder: str | Path | None = None,
        sources: Sequence[str] | None = None,
    ) -> None:
        self.settings = settings or load_settings()
        self.answers: list[Answer] = []
        self._store, self._owns_store = store, store is None
        self._now_ms = market_clock(self.settings)
        base = Path(folder) if folder else self.settings.files_folder
        self._context = Context(self.settings, base, self._now_ms, self._open_store)
        self._order = sources
        self._sources: dict[str, Source] = {}
        self._frames: Frames = {}
        self._provenance: dict[str, Provenance] = {}
        self._pickle_data: dict[str, dict[str, list[Any]]] | None = None
        self._executed = False

    @property
    def local_pickle_path(self) -> Path:
        """Return where `save_pickle` writes: today's `stock_data_DDMMYYYY.pkl`."""
        return self._context.folder / daily_name(self._today())

    def execute(
        self, fetch_kite: bool = False, skip_db: bool = False, symbols: Sequence[str] | None = None
    ) -> bool:
        """Read the sources.

        Args:
            fetch_kite: Also read Kite's history.
            skip_db: Leave out the SQLite file.
            symbols: Default: all symbols that the sources have.

        Returns:
            Whether any candles were found.
        """
        self.answers, self._frames, self._provenance, self._pickle_data = [], {}, {}, None
        self._executed = True
        order = self._order or (MARKET_HOURS if self._is_open() else AFTER_HOURS)
        for name in order:
            if (name == "kite" and not fetch_kite) or (name == "sqlite" and skip_db):
                self.answers.append(Answer(name, "left out", reason="as requested"))
                continue
            try:
                self.answers.append(self._read(name, symbols))
            except Exception as error:  # a source reads any user's file; the next must still be read
                reason = error.message if isinstance(error, PkbError) else f"{type(error).__name__}: {error}"
                reason = logs.mask(" ".join(reason.split()))[:200]
                log.warning("source_failed", source=name, reason=reason)
                self.answers.append(Answer(name, "failed", reason=reason))
        return bool(self._frames)

    @property
    def pickle_data(self) -> dict[str, dict[str, list[Any]]] | None:
        """Return symbol → `{"data", "columns", "index"}` of all symbols; read the sources if necessary."""
        self._ensure_executed()
        if self._pickle_data is None and self._frames:
            self._pickle_data = {symbol: split_frame(frame) for symbol, frame in self._frames.items()}
        return self._pickle_data

    def get_data_for_symbol(self, tradingsymbol: str) -> dict[str, list[Any]] | None:
        """Return `{"data": [[o, h, l, c, v], …], "columns", "index": ISO}`; None for an unknown symbol."""
        frame = self.get_dataframe_for_symbol(tradingsymbol)
        return None if frame is None else split_frame(frame)

    def get_dataframe_for_symbol(self, tradingsymbol: str) -> pd.DataFrame | None:
        """Return `open high low close volume` under `datetime` (midnights, Asia/Kolkata); None if unknown."""
        self._ensure_executed()
        return self._frames.get(self._name_of(tradingsymbol))

    def get_source_for_symbol(self, tradingsymbol: str) -> Provenance | None:
        """Return the source of the symbol's last row, and when that row was true; None if unknown."""
        self._ensure_executed()
        return self._provenance.get(self._name_of(tradingsymbol))

    def symbols(self) -> list[str]:
        """Return all symbols that were found."""
        self._ensure_executed()
        return list(self._frames)

    def save_pickle(self, path: str | Path | None = None) -> Path:
        """Write what was found as `{symbol: {"data", "columns", "index"}}`; return the path."""
        self._ensure_executed()
        target = Path(path) if path else self.local_pickle_path
        with replacing(target) as file:
            pickled = PickledDict(file)
            for symbol, frame in self._frames.items():
                pickled.add(symbol, split_frame(frame.tail(DAILY_ROWS_MAX)))
            pickled.finish()
        return target

    def close(self) -> None:
        """Close the sources and the store that it opened."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()
        if self._owns_store and self._store is not None:
            self._store.close()
            self._store = None

    def __enter__(self) -> InstrumentDataManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading the sources ---------------------------------------------------------------------

    def _ensure_executed(self) -> None:
        if not self._executed:
            self.execute()

    def _name_of(self, symbol: str) -> str:
        name = symbol.strip()
        return name if name in self._frames else name.upper().removeprefix("NSE:")

    def _open_store(self) -> CandleStore:
        if self._store is None:
            self._store = CandleStore(self.settings)
        return self._store

    def _read(self, name: str, symbols: Sequence[str] | None) -> Answer:
        """Read one source and merge what it has."""
        started = time.monotonic()
        source = self._source(name)
        missing = self._missing(symbols, source)
        if missing is not None and not missing:
            return Answer(name, "not needed")
        source.reason, source.refused = "", 0
        if not source.is_available():
            return Answer(name, "unavailable", reason=source.reason)
        today = self._today()
        frames = source.fetch_data(missing, today - timedelta(days=HISTORY_DAYS), today)
        refused, reason = source.refused, source.reason
        as_of_ms = self._merge(source, frames)
        took = time.monotonic() - started
        if not frames:
            return Answer(name, "empty", refused=refused, took_seconds=took, reason=reason)
        rows = sum(map(len, frames.values()))
        as_of = datetime.fromtimestamp(as_of_ms / 1000, UTC).isoformat(timespec="seconds")
        age_seconds = max(0.0, (self._now_ms() - as_of_ms) / 1000)
        log.info("candles_found", source=name, symbols=len(frames), rows=rows, age_seconds=round(age_seconds))
        return Answer(name, "used", len(frames), rows, as_of, age_seconds, refused, took, reason)

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            if name not in SOURCES:
                raise PkbError(f"unknown source {name!r}", "use one of " + ", ".join(SOURCES))
            self._sources[name] = SOURCES[name](self._context)
        return self._sources[name]

    def _missing(self, symbols: Sequence[str] | None, source: Source) -> list[str] | None:
        """Return the symbols to read from this source; None for all it has, [] for none."""
        expected, true_ms = self._expected_day(), self._true_ms_min()
        if symbols is not None:
            return [
                symbol
                for symbol in symbols
                if not self._is_current(symbol, expected, true_ms)
                or (source.has_history and len(self._frames.get(symbol, ())) <= 1)
            ]
        if not self._frames:
            return None
        current = sum(self._is_current(symbol, expected, true_ms) for symbol in self._frames)
        has_history = not source.has_history or any(len(frame) > 1 for frame in self._frames.values())
        return [] if has_history and current >= COVERED_SHARE * len(self._frames) else None

    def _is_current(self, symbol: str, expected: date, true_ms: float) -> bool:
        """Return whether the last row is the last session's, and was true at `true_ms` or later."""
        frame = self._frames.get(symbol)
        if frame is None or frame.index[-1].date() < expected:
            return False
        return self._provenance[symbol].as_of_ms >= true_ms

    def _true_ms_min(self) -> float:
        """Return from when on the last session's row is current: its end; in market hours minutes ago."""
        if self._is_open():
            return self._now_ms() - FRESH_SECONDS * 1000
        windows = self._sessions.on_date(self._schedule, self._expected_day()).windows
        return float(windows[-1][1]) if windows else 0.0

    def _merge(self, source: Source, frames: Frames) -> float:
        """Merge a source's frames; return when its newest data was true, epoch ms."""
        stated_ms = source.as_of_ms()
        since = self._expected_day()
        newest_ms = 0.0
        for symbol, frame in frames.items():
            as_of_ms = frame.index[-1].timestamp() * 1000 if stated_ms is None else stated_ms
            newest_ms = max(newest_ms, as_of_ms)
            known = self._frames.get(symbol)
            if known is None:
                self._frames[symbol] = frame
                self._provenance[symbol] = Provenance(source.name, as_of_ms)
                continue
            is_fresher = as_of_ms > self._provenance[symbol].as_of_ms
            if is_fresher and frame.index[-1] >= known.index[-1]:
                self._provenance[symbol] = Provenance(source.name, as_of_ms)
            self._frames[symbol] = _merged(known, frame, since, is_fresher)
        return newest_ms

    # -- time ------------------------------------------------------------------------------------

    @cached_property
    def _sessions(self) -> Sessions:
        return load_sessions(self.settings.sessions, self.settings.timezone, self.settings.calendar)

    @property
    def _schedule(self) -> int:
        return self._sessions.schedule_of(NSE_SEGMENT)

    def _today(self) -> date:
        return datetime.fromtimestamp(self._now_ms() / 1000 + KOLKATA_SECONDS, UTC).date()

    def _is_open(self) -> bool:
        return bool(self._sessions.is_open(self._schedule, int(self._now_ms())))

    def _expected_day(self) -> date:
        """Return the date of the last session that has begun."""
        day = self._today()
        windows = self._sessions.on_date(self._schedule, day).windows
        if windows and windows[0][0] <= self._now_ms():
            return day
        return self._sessions.session_near(self._schedule, day, -1) or day


def _merged(known: pd.DataFrame, new: pd.DataFrame, since: date, is_fresher: bool) -> pd.DataFrame:
    """Return both frames' days. A day in both is the known one, from `since` on the fresher one."""
    if is_fresher and len(cut(new, since, None)) > 0:
        known = cut(known, None, since - timedelta(days=1))
    both = pd.concat([known, new[~new.index.isin(known.index)]]).sort_index()
    both["volume"] = whole(both["volume"].astype(float))
    return both
