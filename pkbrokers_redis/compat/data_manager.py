"""`InstrumentDataManager`: a year of days of every symbol, from whoever has them, with upstream's methods.

Sources are asked in an order that depends on the market's hours (`sources/table.py`), each only for what is
still missing: the days before, or the last session's row, as fresh as the hour demands. A source that fails
is skipped and the report says so. Of the days before the last session the first answer counts, of its own
day the one that was true last.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import load_sessions
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
FRESH_SECONDS = 120  # market hours: an older answer is not today's last word
COVERED = 0.9  # of all symbols with today's row: the rest no longer trade
NSE_SEGMENT = 1

Status = Literal["used", "not needed", "left out", "unavailable", "failed", "empty"]

log = logs.get("data manager")


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one source: `reason` says why it gave nothing, or what it left out.

    `as_of` is when its newest data was true (ISO, Kolkata; "" when it gave none), `age_seconds` how long ago
    that was when it was asked.
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
    """Where a symbol's last row comes from, and when it was true."""

    source: str
    as_of_ms: float


class InstrumentDataManager:
    """`execute()`, then `get_dataframe_for_symbol("INFY")`; `answers` tells what each source did.

    `settings`, `store`, `folder` (default: PKB_FILES_DIR) are made from the environment where not given.
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
        self._chosen = sources
        self._made: dict[str, Source] = {}
        self._frames: Frames = {}
        self._provenance: dict[str, Provenance] = {}
        self._pickle_data: dict[str, dict[str, list[Any]]] | None = None
        self._executed = False

    @property
    def local_pickle_path(self) -> Path:
        """Where `save_pickle` writes: today's `stock_data_DDMMYYYY.pkl`."""
        return self._context.folder / daily_name(self._today())

    def execute(
        self, fetch_kite: bool = False, skip_db: bool = False, symbols: Sequence[str] | None = None
    ) -> bool:
        """Ask the sources; whether anything was found. `symbols` None: all that they have.

        `fetch_kite` lets Kite's history be asked, `skip_db` leaves out the SQLite file.
        """
        self.answers, self._frames, self._provenance, self._pickle_data = [], {}, {}, None
        self._executed = True
        order = self._chosen or (MARKET_HOURS if self._is_open() else AFTER_HOURS)
        for name in order:
            if (name == "kite" and not fetch_kite) or (name == "sqlite" and skip_db):
                self.answers.append(Answer(name, "left out", reason="as asked"))
            else:
                self._ask(name, symbols)
        return bool(self._frames)

    @property
    def pickle_data(self) -> dict[str, dict[str, list[Any]]] | None:
        """Symbol → `{"data", "columns", "index"}` of all symbols; asks the sources when nobody has yet."""
        self._ensure()
        if self._pickle_data is None and self._frames:
            self._pickle_data = {symbol: split_frame(frame) for symbol, frame in self._frames.items()}
        return self._pickle_data

    def get_data_for_symbol(self, tradingsymbol: str) -> dict[str, list[Any]] | None:
        """`{"data": [[o, h, l, c, v], …], "columns", "index": ISO texts}`; None for a symbol nobody has."""
        frame = self.get_dataframe_for_symbol(tradingsymbol)
        return None if frame is None else split_frame(frame)

    def get_dataframe_for_symbol(self, tradingsymbol: str) -> pd.DataFrame | None:
        """`open high low close volume` under `datetime` (Kolkata midnights); None for an unknown one."""
        self._ensure()
        name = tradingsymbol.strip()
        return self._frames.get(name, self._frames.get(name.upper().removeprefix("NSE:")))

    def get_source_for_symbol(self, tradingsymbol: str) -> Provenance | None:
        """Who gave the symbol's last row, and how old it is."""
        self._ensure()
        name = tradingsymbol.strip()
        return self._provenance.get(name, self._provenance.get(name.upper().removeprefix("NSE:")))

    def symbols(self) -> list[str]:
        """All symbols that were found."""
        self._ensure()
        return list(self._frames)

    def save_pickle(self, path: str | Path | None = None) -> Path:
        """Write what was found, in the split shape; the path."""
        self._ensure()
        target = Path(path) if path else self.local_pickle_path
        with replacing(target) as file:
            pickled = PickledDict(file)
            for symbol, frame in self._frames.items():
                pickled.add(symbol, split_frame(frame.tail(DAILY_ROWS_MAX)))
            pickled.finish()
        return target

    def close(self) -> None:
        """Give back what the sources hold."""
        for source in self._made.values():
            source.close()
        self._made.clear()
        if self._owns_store and self._store is not None:
            self._store.close()
            self._store = None

    def __enter__(self) -> InstrumentDataManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ensure(self) -> None:
        if not self._executed:
            self.execute()

    def _open_store(self) -> CandleStore:
        if self._store is None:
            self._store = CandleStore(self.settings)
        return self._store

    def _ask(self, name: str, symbols: Sequence[str] | None) -> None:
        """One source: its answer merged and reported, whatever happens."""
        started = time.monotonic()
        refused, reason = 0, ""
        try:
            source = self._source(name)
            missing = self._missing(symbols, source)
            if missing is not None and not missing:
                self.answers.append(Answer(name, "not needed"))
                return
            source.reason, source.refused = "", 0
            if not source.is_available():
                self.answers.append(Answer(name, "unavailable", reason=source.reason))
                return
            today = self._today()
            frames = source.fetch_data(missing, today - timedelta(days=HISTORY_DAYS), today)
            refused, reason = source.refused, source.reason
            as_of_ms = self._merge(source, frames)
        except Exception as error:
            # A source is somebody's file: whatever it does, the others must still be asked.
            reason = error.message if isinstance(error, PkbError) else f"{type(error).__name__}: {error}"
            reason = logs.mask(" ".join(reason.split()))[:200]
            log.warning("a source failed", source=name, reason=reason)
            self.answers.append(Answer(name, "failed", reason=reason))
            return
        took = time.monotonic() - started
        if not frames:
            self.answers.append(Answer(name, "empty", refused=refused, took_seconds=took, reason=reason))
            return
        rows = sum(map(len, frames.values()))
        as_of = datetime.fromtimestamp(as_of_ms / 1000, UTC).isoformat(timespec="seconds")
        age_seconds = max(0.0, (self._now_ms() - as_of_ms) / 1000)
        answer = Answer(name, "used", len(frames), rows, as_of, age_seconds, refused, took, reason)
        self.answers.append(answer)
        log.info("candles found", source=name, symbols=len(frames), rows=rows, age_seconds=round(age_seconds))

    def _source(self, name: str) -> Source:
        if name not in self._made:
            try:
                self._made[name] = SOURCES[name](self._context)
            except KeyError:
                raise PkbError(f"unknown source {name!r}", "use one of " + ", ".join(SOURCES)) from None
        return self._made[name]

    def _missing(self, symbols: Sequence[str] | None, source: Source) -> list[str] | None:
        """The symbols to ask this source for; None: all it has; []: nothing."""
        expected, true_ms = self._expected_day(), self._true_ms_min()
        if symbols is None:
            if not self._frames:
                return None
            done = sum(self._is_current(symbol, expected, true_ms) for symbol in self._frames)
            history = any(len(frame) > 1 for frame in self._frames.values())
            return [] if done >= COVERED * len(self._frames) and (history or not source.has_history) else None
        return [
            symbol
            for symbol in symbols
            if not self._is_current(symbol, expected, true_ms)
            or (source.has_history and len(self._frames.get(symbol, ())) <= 1)
        ]

    def _is_current(self, symbol: str, expected: date, true_ms: float) -> bool:
        """Whether the symbol's last row is that of the last session, and was true at `true_ms` or later."""
        frame = self._frames.get(symbol)
        if frame is None or frame.index[-1].date() < expected:
            return False
        return self._provenance[symbol].as_of_ms >= true_ms

    def _true_ms_min(self) -> float:
        """From when on the last session's row is its last word: its end, in market hours minutes ago."""
        if self._is_open():
            return self._now_ms() - FRESH_SECONDS * 1000
        sessions, schedule = self._calendar()
        windows = sessions.on_date(schedule, self._expected_day()).windows
        return float(windows[-1][1]) if windows else 0.0

    def _merge(self, source: Source, frames: Frames) -> float:
        """Lay an answer beside what is there. When its newest data was true, epoch ms."""
        told_ms = source.as_of_ms()
        since = self._expected_day()
        newest_ms = 0.0
        for symbol, frame in frames.items():
            row_ms = frame.index[-1].timestamp() * 1000
            as_of_ms = row_ms if told_ms is None else told_ms
            newest_ms = max(newest_ms, as_of_ms)
            known = self._frames.get(symbol)
            if known is None:
                self._frames[symbol] = frame
                self._provenance[symbol] = Provenance(source.name, as_of_ms)
                continue
            fresher = as_of_ms > self._provenance[symbol].as_of_ms
            if fresher and frame.index[-1] >= known.index[-1]:
                self._provenance[symbol] = Provenance(source.name, as_of_ms)
            self._frames[symbol] = _merged(known, frame, since, fresher)
        return newest_ms

    def _today(self) -> date:
        return datetime.fromtimestamp(self._now_ms() / 1000 + KOLKATA_SECONDS, UTC).date()

    def _is_open(self) -> bool:
        sessions, schedule = self._calendar()
        return bool(sessions.is_open(schedule, int(self._now_ms())))

    def _expected_day(self) -> date:
        """The date of the last session that has begun."""
        sessions, schedule = self._calendar()
        day, now_ms = self._today(), self._now_ms()
        windows = sessions.on_date(schedule, day).windows
        if windows and windows[0][0] <= now_ms:
            return day
        return sessions.session_near(schedule, day, -1) or day

    def _calendar(self) -> Any:
        if not hasattr(self, "_sessions"):
            self._sessions = load_sessions(
                self.settings.sessions, self.settings.timezone, self.settings.calendar
            )
        return self._sessions, self._sessions.schedule_of(NSE_SEGMENT)


def _merged(known: pd.DataFrame, new: pd.DataFrame, since: date, fresher: bool) -> pd.DataFrame:
    """Both tables' days; of one that both have, ours, but from `since` on the fresher one's."""
    is_newer = fresher and len(cut(new, since, None)) > 0
    ours = cut(known, None, since - timedelta(days=1)) if is_newer else known
    both = pd.concat([ours, new[~new.index.isin(ours.index)]]).sort_index()
    both["volume"] = whole(both["volume"].astype(float))
    return both
