"""`TickProcessor`: upstream's bridge from a queue of ticks to the candle store, with its answers."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore, get_candle_store
from pkbrokers_redis.errors import PkbError

if TYPE_CHECKING:
    import pandas as pd

log = logs.get("store")

WAIT_SECONDS = 0.1
TICKS_A_ROUND = 1_000  # what is in the queue goes out together, so a backlog shrinks by itself
JOIN_SECONDS = 5.0


class TickQueue(Protocol):
    """What is asked of a queue: `queue.Queue`'s and `multiprocessing.Queue`'s manners."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any: ...
    def get_nowait(self) -> Any: ...


class TickProcessor:
    """Takes ticks from `data_queue` in a thread, and answers for the candles they become.

    A tick is a dict (its `type` is "tick" or left out) or an object with upstream's field names.
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
        """Token → trading symbol, from the instrument master in Redis."""
        return self.candle_store.instrument_symbols

    def set_data_queue(self, data_queue: TickQueue) -> None:
        """Take ticks from this queue from now on."""
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
        """Stop the thread after what is in the queue has been sent; waits 5 s at most."""
        self._stop_event.set()
        if self._thread is not None:
            self._thread.join(timeout=JOIN_SECONDS)

    def process_tick(self, tick_data: Any) -> bool:
        """Send one tick; False for what is none."""
        return self.process_ticks_batch([tick_data]) == 1

    def process_ticks_batch(self, ticks: Sequence[Any]) -> int:
        """Send many; returns how many were taken."""
        good = [tick for tick in map(_as_dict, ticks) if tick is not None]
        try:
            taken = self.candle_store.process_ticks_batch(good) if good else 0
        except (PkbError, redis.RedisError) as error:
            self._refuse(error)
            return 0
        self.stats["ticks_processed"] += taken
        return taken

    def _refuse(self, error: Exception) -> None:
        self.stats["errors"] += 1
        why = " ".join(str(error).split())[:200] or type(error).__name__
        if self._once.first(why):
            log.error("ticks_refused", why=why)

    def _process_loop(self) -> None:
        while not self._stop_event.is_set() or not self._is_empty():
            some = self._take()
            if some:
                self.stats["ticks_received"] += len(some)
                try:
                    self.process_ticks_batch(some)
                except Exception as error:
                    # A queue holds anybody's objects: whatever these do, the next must still be sent.
                    self._refuse(error)
            elif self._stop_event.is_set():
                return

    def _take(self) -> list[Any]:
        """What is in the queue, at most TICKS_A_ROUND; waits a little for the first."""
        if self.data_queue is None:
            self._stop_event.wait(WAIT_SECONDS)
            return []
        some: list[Any] = []
        try:
            some.append(self.data_queue.get(timeout=WAIT_SECONDS))
            while len(some) < TICKS_A_ROUND:
                some.append(self.data_queue.get_nowait())
        except queue.Empty:
            pass
        except (
            Exception
        ) as error:  # the other side of a multiprocessing queue is gone, or sent what is unreadable
            self._refuse(error)
            self._stop_event.wait(WAIT_SECONDS)
        return some

    def _is_empty(self) -> bool:
        try:
            return self.data_queue is None or bool(getattr(self.data_queue, "empty", lambda: True)())
        except OSError:
            return True

    # -- reading ---------------------------------------------------------------------------------

    def get_candles(
        self,
        symbol: str | None = None,
        instrument_token: int | None = None,
        interval: str = "5m",
        count: int = 50,
    ) -> list[dict[str, Any]]:
        """The last `count` candles as dicts, the one that forms among them."""
        return self.candle_store.get_candles(instrument_token, symbol, interval, count)

    def get_candles_df(
        self,
        symbol: str | None = None,
        instrument_token: int | None = None,
        interval: str = "5m",
        count: int = 50,
    ) -> pd.DataFrame:
        """The same as a frame under `datetime`: open high low close volume."""
        return self.candle_store.get_ohlcv_dataframe(instrument_token, symbol, interval, count)

    def get_latest_price(
        self, symbol: str | None = None, instrument_token: int | None = None
    ) -> float | None:
        """The last price, None where there is none."""
        return self.candle_store.get_latest_price(instrument_token, symbol)

    def get_day_ohlcv(
        self, symbol: str | None = None, instrument_token: int | None = None
    ) -> dict[str, Any] | None:
        """The newest day candle."""
        return self.candle_store.get_day_ohlcv(instrument_token, symbol)

    def get_all_day_ohlcv(self) -> dict[str, dict[str, Any]]:
        """Trading symbol → newest day candle, of all that have one."""
        return {
            each["trading_symbol"]: each for each in self.candle_store.get_all_instruments_ohlcv().values()
        }

    def get_multi_timeframe_candles(
        self,
        symbol: str | None = None,
        instrument_token: int | None = None,
        intervals: Sequence[str] | None = None,
        count: int = 50,
    ) -> dict[str, list[dict[str, Any]]]:
        """Interval → candles; all intervals unless told."""
        names = intervals if intervals is not None else self.candle_store.store.intervals
        return {name: self.get_candles(symbol, instrument_token, name, count) for name in names}

    # -- exports and figures ---------------------------------------------------------------------

    def export_pickle(self, file_path: str | os.PathLike[str] | None = None) -> bool:
        """`export_to_pickle_format()` as a pickle; `stock_data_DDMMYYYY.pkl` in PKB_DATA_DIR unless told."""
        import pickle

        from pkbrokers_redis.files.atomic import replacing

        folder = self.candle_store.store.settings.data_dir
        name = time.strftime("stock_data_%d%m%Y.pkl", time.gmtime(time.time() + 19_800))  # Kolkata's date
        path = Path(file_path) if file_path is not None else folder / name
        try:
            with replacing(path) as file:
                pickle.dump(self.candle_store.export_to_pickle_format(), file, pickle.HIGHEST_PROTOCOL)
        except OSError as error:
            log.error("export_failed", path=str(path), why=str(error))
            return False
        return True

    def export_ticks_json(self, file_path: str | os.PathLike[str] | None = None) -> bool:
        """`export_to_ticks_json()` as a file; `ticks.json` in PKB_DATA_DIR unless told."""
        try:
            self.candle_store.save_ticks_json(file_path)
        except OSError as error:
            log.error("export_failed", path=str(file_path or "ticks.json"), why=str(error))
            return False
        return True

    def get_stats(self) -> dict[str, Any]:
        """`processor`: what this object did; `store`: the candle store's."""
        began = self.stats["start_time"]
        return {
            "processor": {
                **self.stats,
                "uptime_seconds": time.time() - began if began else 0,
                "instruments_mapped": len(self.instruments_map),
            },
            "store": self.candle_store.get_stats(),
        }


def _as_dict(tick: Any) -> dict[str, Any] | None:
    """A dict of a tick; None for other kinds of message."""
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
    """The process' tick processor, made when first asked for. Raises RedisUnavailable while Redis is away."""
    global _processor
    with _processor_lock:
        if _processor is None:
            _processor = TickProcessor()
        return _processor
