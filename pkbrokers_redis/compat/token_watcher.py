"""`KiteTokenWatcher`: upstream's all-in-one, on Redis. Watch tokens, and ask for their candles."""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkbrokers_redis import logs
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore
from pkbrokers_redis.compat.in_process import run_pipeline
from pkbrokers_redis.compat.tick_processor import TickProcessor
from pkbrokers_redis.settings import Settings, load_settings

if TYPE_CHECKING:
    import pandas as pd

log = logs.get("watcher")

BATCH_TOKENS = 500  # upstream's batches
EVERYTHING = "nse-equity,indices"  # what upstream watches when it is given no tokens
STOP_SECONDS_MAX = 25.0
LOOK_SECONDS = 0.1


class KiteTokenWatcher:
    """Streams instruments from Kite into Redis and makes their candles, with threads of this process.

    `tokens`: what to watch; none: PKB_INSTRUMENTS, else all shares of NSE and the indices. `client`: another
    source of ticks with `start()` and `stop()`, which puts them into `watcher_queue`; then no connection of
    our own is opened. `json_output_path`: where `stop` writes ticks.json, none: nowhere. `shared_stats` is
    kept as upstream keeps it. `aggregate=False` leaves the candles to aggregators elsewhere.

    Nothing is kept in this process: another one that reaches Redis sees the same candles.
    """

    def __init__(
        self,
        tokens: Sequence[int] = (),
        watcher_queue: Any = None,
        client: Any = None,
        json_output_path: str | None = None,
        shared_stats: dict[str, Any] | None = None,
        *,
        settings: Settings | None = None,
        aggregate: bool = True,
    ) -> None:
        chosen = list(dict.fromkeys(int(token) for token in tokens))
        self.token_batches = [chosen[n : n + BATCH_TOKENS] for n in range(0, len(chosen), BATCH_TOKENS)]
        self.client = client
        self.json_output_path = json_output_path
        self.shared_stats = shared_stats if shared_stats is not None else {}
        self.ws_stop_event: Any = None
        settings = settings or load_settings()
        instruments = ",".join(map(str, chosen)) or settings.instruments or EVERYTHING
        self._settings = settings.model_copy(update={"instruments": instruments})
        self._aggregate = aggregate
        self._watcher_queue = watcher_queue
        self._stop_queue: Any = None
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._ended.set()
        self._store: InMemoryCandleStore | None = None
        self._store_lock = threading.Lock()

    @property
    def candle_store(self) -> InMemoryCandleStore:
        """The candles in Redis. Raises RedisUnavailable while Redis is away."""
        with self._store_lock:
            if self._store is None:
                self._store = InMemoryCandleStore(shared_stats=self.shared_stats, settings=self._settings)
            return self._store

    # --- the life ------------------------------------------------------------------------------------

    def watch(self, test_mode: bool = False) -> None:
        """Log in where needed, subscribe, and stay until `stop`; lost connections and sessions are mended.

        Returns when stopped (from another thread, by a stop event or queue, or Ctrl-C). Raises PkbError for
        what a person must mend. `test_mode` is upstream's and means nothing here.
        """
        self._ended.clear()
        listener = threading.Thread(target=self._listen, name="stop-listener", daemon=True)
        listener.start()
        try:
            if self.client is None:
                run_pipeline(self._settings, self._stop, aggregate=self._aggregate)
            else:
                self._run_client()
        except KeyboardInterrupt:
            log.info("interrupted")
        finally:
            self._stop.set()
            self._ended.set()
            listener.join()

    def stop(self) -> None:
        """End `watch`, in good order: what was received is in Redis when this returns."""
        self._stop.set()
        if self.client is not None:
            self.client.stop()
        self._ended.wait(STOP_SECONDS_MAX)
        if self.json_output_path is not None:
            self.export_candle_store(json_path=self.json_output_path)

    def set_ws_stop_event(self, event: Any) -> None:
        """An event of the caller's (threading's or multiprocessing's) that ends `watch` when it is set."""
        self.ws_stop_event = event

    def set_stop_queue(self, stop_queue: Any) -> None:
        """A queue of the caller's: the word "STOP" in it ends `watch`."""
        self._stop_queue = stop_queue

    def _run_client(self) -> None:
        """Somebody else's connection: its ticks go from the queue into the streams."""
        if self._watcher_queue is None:
            self._watcher_queue = getattr(self.client, "watcher_queue", None) or queue.Queue(maxsize=50_000)
        processor = TickProcessor(self._watcher_queue, candle_store=self.candle_store)
        processor.start()
        try:
            self.client.start()
            self._stop.wait()
        finally:
            processor.stop()

    def _listen(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            if self.ws_stop_event is not None and self.ws_stop_event.is_set():
                self._tell_all_to_stop("stop event")
            try:
                if self._stop_queue is not None and self._stop_queue.get_nowait() == "STOP":
                    self._tell_all_to_stop("stop queue")
            except queue.Empty:
                pass

    def _tell_all_to_stop(self, why: str) -> None:
        log.info("told_to_stop", by=why)
        self._stop.set()
        if self.client is not None:
            self.client.stop()

    # --- the candles ---------------------------------------------------------------------------------

    def get_candles(
        self,
        symbol: str | None = None,
        instrument_token: int | None = None,
        interval: str = "5m",
        count: int = 50,
    ) -> list[dict[str, Any]]:
        """The last candles of an instrument, by `symbol` ("RELIANCE") or `instrument_token`, oldest first."""
        return self.candle_store.get_candles(
            instrument_token=instrument_token, trading_symbol=symbol, interval=interval, count=count
        )

    def get_candles_df(
        self,
        symbol: str | None = None,
        instrument_token: int | None = None,
        interval: str = "5m",
        count: int = 50,
    ) -> pd.DataFrame:
        """The same as a frame: index `datetime` (Asia/Kolkata), columns open high low close volume."""
        return self.candle_store.get_ohlcv_dataframe(
            instrument_token=instrument_token, trading_symbol=symbol, interval=interval, count=count
        )

    def get_day_ohlcv(
        self, symbol: str | None = None, instrument_token: int | None = None
    ) -> dict[str, Any] | None:
        """Today's open, high, low, close and volume; None for what is not known."""
        return self.candle_store.get_day_ohlcv(instrument_token=instrument_token, trading_symbol=symbol)

    def get_all_day_ohlcv(self) -> dict[Any, dict[str, Any]]:
        """Today's figures of all instruments."""
        return self.candle_store.get_all_instruments_ohlcv(interval="day")

    def get_candle_store_stats(self) -> dict[str, Any]:
        """Counters, under upstream's names (`ticks_processed`, `candles_created`, …)."""
        return self.candle_store.get_stats()

    def export_candle_store(self, pickle_path: str | None = None, json_path: str | None = None) -> None:
        """Write ticks.json to `json_path` (none: its usual place), and candles to `pickle_path` if given."""
        from pkbrokers_redis.files.atomic import replacing

        self.candle_store.save_ticks_json(json_path)
        if pickle_path:
            with replacing(Path(pickle_path)) as file:
                file.write(pickle.dumps(self.candle_store.export_to_pickle_format()))
