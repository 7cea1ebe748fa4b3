"""`KiteTokenWatcher`: upstream's all-in-one on Redis: watch tokens, and read their candles.

    log in → instruments → subscribe → process → reconnect

It runs the roles that `pkb up` starts as processes, as threads of this process: the same roles with the same
heartbeats, which share feeds and shards with all others on this Redis. They also share one interpreter lock:
for thousands of instruments use processes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pkbrokers_redis import logs
from pkbrokers_redis.aggregate.worker import run_aggregate
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore
from pkbrokers_redis.compat.tick_processor import CandleReads, TickProcessor
from pkbrokers_redis.compat.upstream_types import OPTIMAL_TOKEN_BATCH_SIZE
from pkbrokers_redis.ingest.worker import run_ingest
from pkbrokers_redis.kite.instruments import KiteInstruments
from pkbrokers_redis.runtime.roles import Role, open_store
from pkbrokers_redis.settings import Settings, load_settings

log = logs.get("watcher")

DEFAULT_INSTRUMENTS = "nse-equity,indices"  # what upstream watches without tokens
ROLE_STOP_SECONDS = 10.0  # of each role: ingest first, so that the aggregator still applies its last ticks
STOP_SECONDS_MAX = 25.0  # how long `stop` waits for `watch` to return
POLL_SECONDS = 0.1
CLIENT_QUEUE_MAX = 50_000  # ticks of a caller's client that wait, as upstream


class KiteTokenWatcher(CandleReads):
    """Stream instruments from Kite into Redis and make their candles, with threads of this process.

    Nothing is kept in this process: another process that reaches Redis reads the same candles.

    Args:
        tokens: Instrument tokens to watch; default: PKB_INSTRUMENTS, else all shares of NSE and the indices.
        watcher_queue: Where `client` puts its ticks.
        client: Another source of ticks with `start()` and `stop()`; no connection to Kite is opened then.
        json_output_path: Where `stop` writes ticks.json; None: no file.
        shared_stats: A dict that receives the candle store's statistics.
        settings: Default: from the environment.
        aggregate: False leaves the candles to aggregators in other processes.

    Example:
        >>> watcher = KiteTokenWatcher(tokens=[408065])
        >>> threading.Thread(target=watcher.watch).start()  # doctest: +SKIP
        >>> watcher.get_candles("INFY", interval="5m")[-1]["close"]
        1512.5
        >>> watcher.stop()
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
        size = OPTIMAL_TOKEN_BATCH_SIZE
        self.token_batches = [chosen[n : n + size] for n in range(0, len(chosen), size)]
        self.client = client
        self.json_output_path = json_output_path
        self.shared_stats = shared_stats if shared_stats is not None else {}
        self.ws_stop_event: Any = None
        settings = settings or load_settings()
        instruments = ",".join(map(str, chosen)) or settings.instruments or DEFAULT_INSTRUMENTS
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
    def candle_store(self) -> InMemoryCandleStore:  # type: ignore[override]  # opened on first use
        """Return the candles in Redis. Raises RedisUnavailable."""
        with self._store_lock:
            if self._store is None:
                self._store = InMemoryCandleStore(shared_stats=self.shared_stats, settings=self._settings)
            return self._store

    def watch(self, test_mode: bool = False) -> None:
        """Log in if necessary, subscribe, and run until `stop`; reconnect and renew the session meanwhile.

        Return when stopped: from another thread, by a stop event or queue, or Ctrl-C. `test_mode` is
        upstream's and has no effect.

        Raises:
            PkbError: No session, an unknown instrument, Redis unavailable at the start.
        """
        self._ended.clear()
        listener = threading.Thread(target=self._listen, name="stop-listener", daemon=True)
        listener.start()
        try:
            if self.client is None:
                _run_pipeline(self._settings, self._stop, self._aggregate)
            else:
                self._run_client()
        except KeyboardInterrupt:
            log.info("interrupted")
        finally:
            self._stop.set()
            self._ended.set()
            listener.join()

    def stop(self) -> None:
        """End `watch`; all ticks received are in Redis when this returns."""
        self._stop.set()
        if self.client is not None:
            self.client.stop()
        self._ended.wait(STOP_SECONDS_MAX)
        if self.json_output_path is not None:
            self.export_candle_store(json_path=self.json_output_path)

    def set_ws_stop_event(self, event: Any) -> None:
        """Set an event of the caller (threading's or multiprocessing's) that ends `watch`."""
        self.ws_stop_event = event

    def set_stop_queue(self, stop_queue: Any) -> None:
        """Set a queue of the caller: "STOP" in it ends `watch`."""
        self._stop_queue = stop_queue

    def get_all_day_ohlcv(self) -> dict[Any, dict[str, Any]]:
        """Return token → newest day candle of all instruments."""
        return self.candle_store.get_all_instruments_ohlcv(interval="day")

    def get_candle_store_stats(self) -> dict[str, Any]:
        """Return the counters, under upstream's names (`ticks_processed`, `candles_created`, …)."""
        return self.candle_store.get_stats()

    def export_candle_store(self, pickle_path: str | None = None, json_path: str | None = None) -> None:
        """Write ticks.json to `json_path` (default: PKB_DATA_DIR), and candles to `pickle_path` if given."""
        from pkbrokers_redis.compat.shapes import write_pickle

        self.candle_store.save_ticks_json(json_path)
        if pickle_path:
            write_pickle(Path(pickle_path), self.candle_store.export_to_pickle_format())

    def _run_client(self) -> None:
        """Send the ticks of the caller's client from its queue into the streams."""
        if self._watcher_queue is None:
            own_queue = getattr(self.client, "watcher_queue", None)
            self._watcher_queue = own_queue or queue.Queue(maxsize=CLIENT_QUEUE_MAX)
        processor = TickProcessor(self._watcher_queue, candle_store=self.candle_store)
        processor.start()
        try:
            self.client.start()
            self._stop.wait()
        finally:
            processor.stop()

    def _listen(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            if self.ws_stop_event is not None and self.ws_stop_event.is_set():
                self._request_stop("stop event")
            try:
                if self._stop_queue is not None and self._stop_queue.get_nowait() == "STOP":
                    self._request_stop("stop queue")
            except queue.Empty:
                pass

    def _request_stop(self, reason: str) -> None:
        log.info("stop_requested", reason=reason)
        self._stop.set()
        if self.client is not None:
            self.client.stop()


class _RoleThread:
    """A role in a thread. Its end sets `ended`; `failure` is the exception it raised."""

    def __init__(self, name: str, role: Role, settings: Settings, ended: threading.Event) -> None:
        self.failure: BaseException | None = None
        self._role = role
        self._settings = settings
        self._ended = ended
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the role and wait for it."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(ROLE_STOP_SECONDS)

    def _run(self) -> None:
        try:
            self._role(self._settings, self._stop)
        except BaseException as error:
            self.failure = error
        finally:
            self._ended.set()


def _run_pipeline(settings: Settings, stop: threading.Event, aggregate: bool) -> None:
    """Stream the instruments of `settings` until `stop` is set; raise what a role raises."""
    _sync_master_if_missing(settings)
    ended = threading.Event()
    threads = [_RoleThread("ingest", partial(run_ingest, restartable=False), settings, ended)]
    if aggregate:
        threads.append(_RoleThread("aggregate", run_aggregate, settings, ended))
    try:
        for thread in reversed(threads):  # the reader of the streams before their writer
            thread.start()
        while not (stop.is_set() or ended.is_set()):
            stop.wait(POLL_SECONDS)
    finally:
        for thread in threads:
            thread.stop()
    for thread in threads:
        if thread.failure is not None:
            raise thread.failure


def _sync_master_if_missing(settings: Settings) -> None:
    """Fetch the instrument master if there is none and the instruments are not all tokens."""
    if all(part.strip().isdecimal() for part in settings.instruments.split(",") if part.strip()):
        return
    client = open_store(settings)
    try:
        if not client.exists(settings.keys.symbols()):
            synced = KiteInstruments(settings=settings, client=client).sync()
            log.info("instruments_fetched", rows=synced.rows)
    finally:
        client.close()
