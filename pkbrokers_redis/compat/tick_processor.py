"""`TickProcessor`: upstream's bridge from a queue of ticks to the candle store, with its results."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import KOLKATA
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore, get_candle_store
from pkbrokers_redis.errors import PkbError

if TYPE_CHECKING:
    import pandas as pd

log = logs.get("store")

WAIT_SECONDS = 0.1  # for the first tick of an empty queue
TICKS_PER_BATCH = 1_000  # what the queue holds is sent together, so that a backlog shrinks
JOIN_SECONDS = 5.0


class TickQueue(Protocol):
    """The methods used of a queue: those of `queue.Queue` and `multiprocessing.Queue`."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any: ...
    def get_nowait(self) -> Any: ...


class CandleReads:
    """Upstream's read methods, by `symbol` ("RELIANCE") or `instrument_token`, over `candle_store`."""

    candle_store: InMemoryCandleStore

    def get_candles(
        self,
        symbol: str | None = None,
        instrument_token: int | None = None,
        interval: str = "5m",
        count: int = 50,
    ) -> list[dict[str, Any]]:
        """Return the last `count` candles as dicts, oldest first, current one included."""
        return self.candle_store.get_candles(instrument_token, symbol, interval, count)

    def get_candles_df(
        self,
        symbol: str | None = None,
        instrument_token: int | None = None,
        interval: str = "5m",
        count: int = 50,
    ) -> pd.DataFrame:
        """Return `get_candles` as a frame under `datetime` (Asia/Kolkata): open high low close volume."""
        return self.candle_store.get_ohlcv_dataframe(instrument_token, symbol, interval, count)

    def get_day_ohlcv(
        self, symbol: str | None = None, instrument_token: int | None = None
    ) -> dict[str, Any] | None:
        """Return the newest day candle; None for an unknown instrument."""
        return self.candle_store.get_day_ohlcv(instrument_token, symbol)


class TickProcessor(CandleReads):
    """Read ticks from `data_queue` in a thread, and return the candles they become.

    A tick is a dict (its `type` is "tick" or missing) or an object with upstream's field names. Other objects
    are ignored.

    Args:
        data_queue: Where ticks come from; `set_data_queue` sets it later.
        auto_start: Start the thread at once.
        candle_store: Default: the process' `get_candle_store()`.

    Example:
        >>> ticks = queue.Queue()
        >>> processor = TickProcessor(ticks, auto_start=True)
        >>> ticks.put({"instrument_token": 408065, "last_price": 1512.5, "day_volume": 1200})
        >>> processor.stop()
    """

    def __init__(
        self,
        data_queue: TickQueue | None = None,
        auto_start: bool = False,
        *,
        candle_store: InMemoryCandleStore | None = None,
    ) -> None:
        self.candle_store = candle_store or get_candle_store()
        self.data_queue = data_queue
        self.stats: dict[str, Any] = {
            "ticks_received": 0,
            "ticks_processed": 0,
            "errors": 0,
            "start_time": None,
        }
        self._stop_event = threading.Event()
        self._thread: threading.Thread | None = None
        self._once = logs.Once()
        if auto_start and data_queue is not None:
            self.start()

    @property
    def instruments_map(self) -> dict[int, str]:
        """Return token → trading symbol, from the instrument master in Redis."""
        return self.candle_store.instrument_symbols

    def set_data_queue(self, data_queue: TickQueue) -> None:
        """Read ticks from this queue from now on."""
        self.data_queue = data_queue

    def start(self) -> None:
        """Start the thread; a second start does nothing."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._stop_event.clear()
        self.stats["start_time"] = time.time()
        self._thread = threading.Thread(target=self._process_loop, daemon=True, name="tick_processor")
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after the queue has been sent; wait 5 s at most."""
        self._stop_event.set()
        if self._thread is not None:
            self._thread.join(timeout=JOIN_SECONDS)

    def process_tick(self, tick_data: Any) -> bool:
        """Send one tick; return False if it is malformed."""
        return self.process_ticks_batch([tick_data]) == 1

    def process_ticks_batch(self, ticks: Sequence[Any]) -> int:
        """Send many ticks; return how many were accepted."""
        dicts = [tick for tick in map(_as_dict, ticks) if tick is not None]
        try:
            accepted = self.candle_store.process_ticks_batch(dicts) if dicts else 0
        except (PkbError, redis.RedisError) as error:
            self._count_error(error)
            return 0
        self.stats["ticks_processed"] += accepted
        return accepted

    def get_latest_price(
        self, symbol: str | None = None, instrument_token: int | None = None
    ) -> float | None:
        """Return the last price, None without one."""
        return self.candle_store.get_latest_price(instrument_token, symbol)

    def get_all_day_ohlcv(self) -> dict[str, dict[str, Any]]:
        """Return trading symbol → newest day candle, of all instruments that have one."""
        candles = self.candle_store.get_all_instruments_ohlcv().values()
        return {candle["trading_symbol"]: candle for candle in candles}

    def get_multi_timeframe_candles(
        self,
        symbol: str | None = None,
        instrument_token: int | None = None,
        intervals: Sequence[str] | None = None,
        count: int = 50,
    ) -> dict[str, list[dict[str, Any]]]:
        """Return interval → candles; `intervals` None selects all."""
        names = intervals if intervals is not None else self.candle_store.store.intervals
        return {name: self.get_candles(symbol, instrument_token, name, count) for name in names}

    def export_pickle(self, file_path: str | os.PathLike[str] | None = None) -> bool:
        """Write `export_to_pickle_format()` as a pickle; return False if the file cannot be written.

        The default is `stock_data_DDMMYYYY.pkl` in PKB_DATA_DIR, with the date in Asia/Kolkata.
        """
        from pkbrokers_redis.compat.shapes import write_pickle

        name = datetime.now(KOLKATA).strftime("stock_data_%d%m%Y.pkl")
        path = Path(file_path) if file_path is not None else self.candle_store.store.settings.data_dir / name
        try:
            write_pickle(path, self.candle_store.export_to_pickle_format())
        except OSError as error:
            log.error("export_failed", path=str(path), reason=str(error))
            return False
        return True

    def export_ticks_json(self, file_path: str | os.PathLike[str] | None = None) -> bool:
        """Write `export_to_ticks_json()`; return False if the file cannot be written.

        The default is `ticks.json` in PKB_DATA_DIR.
        """
        try:
            self.candle_store.save_ticks_json(file_path)
        except OSError as error:
            log.error("export_failed", path=str(file_path or "ticks.json"), reason=str(error))
            return False
        return True

    def get_stats(self) -> dict[str, Any]:
        """Return `processor`: what this object did, and `store`: the candle store's statistics."""
        started = self.stats["start_time"]
        processor = {
            **self.stats,
            "uptime_seconds": time.time() - started if started else 0,
            "instruments_mapped": len(self.instruments_map),
        }
        return {"processor": processor, "store": self.candle_store.get_stats()}

    def _process_loop(self) -> None:
        while not self._stop_event.is_set() or not self._is_empty():
            batch = self._read_queue()
            if batch:
                self.stats["ticks_received"] += len(batch)
                try:
                    self.process_ticks_batch(batch)
                except Exception as error:  # a queue holds any object; the next one must still be sent
                    self._count_error(error)
            elif self._stop_event.is_set():
                return

    def _read_queue(self) -> list[Any]:
        """Return what the queue holds, at most TICKS_PER_BATCH; wait a little for the first."""
        if self.data_queue is None:
            self._stop_event.wait(WAIT_SECONDS)
            return []
        batch: list[Any] = []
        try:
            batch.append(self.data_queue.get(timeout=WAIT_SECONDS))
            while len(batch) < TICKS_PER_BATCH:
                batch.append(self.data_queue.get_nowait())
        except queue.Empty:
            pass
        except Exception as error:  # the writer of a multiprocessing queue died, or an item is unreadable
            self._count_error(error)
            self._stop_event.wait(WAIT_SECONDS)
        return batch

    def _is_empty(self) -> bool:
        try:
            return self.data_queue is None or bool(getattr(self.data_queue, "empty", lambda: True)())
        except OSError:
            return True

    def _count_error(self, error: Exception) -> None:
        self.stats["errors"] += 1
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if self._once.first(reason):
            log.error("ticks_refused", reason=reason)


def _as_dict(tick: Any) -> dict[str, Any] | None:
    """Return a tick as a dict; None for another kind of message."""
    if isinstance(tick, Mapping):
        return dict(tick) if tick.get("type", "tick") == "tick" else None
    if is_dataclass(tick) and not isinstance(tick, type):
        return asdict(tick)
    if hasattr(tick, "_asdict"):
        return dict(tick._asdict())
    return None


_processor: TickProcessor | None = None
_processor_lock = threading.Lock()


def get_tick_processor() -> TickProcessor:
    """Return the process' tick processor, made on first use.

    Raises:
        RedisUnavailable: Redis cannot be reached.
    """
    global _processor
    with _processor_lock:
        if _processor is None:
            _processor = TickProcessor()
        return _processor
