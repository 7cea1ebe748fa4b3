"""`ZerodhaWebSocketClient` and `ZerodhaWebSocketParser`: upstream's classes on this package's connection.

Kite accepts 3,000 instruments a connection and three connections an api key; upstream opened a connection for
each batch of 500. Here the batches share connections, and each tick carries its batch's index.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import SecretStr

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import KOLKATA
from pkbrokers_redis.compat.upstream_types import OPTIMAL_TOKEN_BATCH_SIZE, DepthEntry, Tick
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.kite.protocol import (
    FULL,
    INDEX_FULL,
    INDEX_QUOTE,
    PRICE_DIVISOR_OF,
    QUOTE,
    STRUCTS,
    parse_frame,
)
from pkbrokers_redis.kite.rest import url_for
from pkbrokers_redis.kite.websocket import CONNECTIONS_PER_KEY_MAX, TOKENS_PER_CONNECTION_MAX
from pkbrokers_redis.kite.websocket import ZerodhaWebSocketClient as Socket
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.auth import Session


class ZerodhaWebSocketParser:
    """Parse Kite's binary frames into `Tick` objects; `kite.protocol.parse_frame` gives arrays.

    Example:
        >>> ZerodhaWebSocketParser.parse_binary_message(b"\\x00")  # a heartbeat
        []
    """

    @staticmethod
    def parse_binary_message(message: bytes, websocket_index: int = -1, batch_index: int = -1) -> list[Tick]:
        """Return all ticks of a frame, in its order; unknown packets are skipped."""
        received_at = int(time.time())
        parsed = parse_frame(message, received_at * 1000)
        return [
            _tick(message[offset : offset + length], received_at, websocket_index, batch_index)
            for offset, length in zip(parsed.offsets, parsed.lengths, strict=True)
        ]


def _tick(packet: bytes, received_at: int, websocket_index: int, batch_index: int) -> Tick:
    wire = STRUCTS[len(packet)].unpack(packet)
    divisor = PRICE_DIVISOR_OF[wire[0] & 0xFF]
    tick = Tick(
        wire[0],
        wire[1] / divisor,
        exchange_timestamp=received_at,
        websocket_index=websocket_index,
        batch_index=batch_index,
    )
    if len(packet) in (INDEX_QUOTE, INDEX_FULL):
        tick.high_price, tick.low_price, tick.open_price, tick.prev_day_close = (
            value / divisor for value in wire[2:6]
        )
        if len(packet) == INDEX_FULL:
            tick.exchange_timestamp = wire[7] or received_at
    elif len(packet) in (QUOTE, FULL):
        tick.last_quantity, tick.avg_price = wire[2], wire[3] / divisor
        tick.day_volume, tick.buy_quantity, tick.sell_quantity = wire[4:7]
        tick.open_price, tick.high_price, tick.low_price, tick.prev_day_close = (
            value / divisor for value in wire[7:11]
        )
        if len(packet) == FULL:
            tick.last_trade_timestamp = wire[11] or None
            tick.oi, tick.oi_day_high, tick.oi_day_low = wire[12:15]
            tick.exchange_timestamp = wire[15] or received_at
            levels = [DepthEntry(wire[i], wire[i + 1] / divisor, wire[i + 2]) for i in range(16, 46, 3)]
            tick.depth = {"bid": levels[:5], "ask": levels[5:]}
    return tick


log = logs.get("kite")

TOKENS_MAX = TOKENS_PER_CONNECTION_MAX * CONNECTIONS_PER_KEY_MAX
PUT_SECONDS = 1.0  # how long to wait for room in a full queue before the tick is dropped and counted
JOIN_SECONDS = 5.0
POLL_SECONDS = 0.5


class ZerodhaWebSocketClient:
    """Send ticks from Kite to `watcher_queue` (as `Tick` objects) and `db_conn.insert_ticks` (as dicts).

    `start` blocks until `stop`, or until `ws_stop_event` is set. Each connection has a thread, which also
    puts its ticks. A full queue drops ticks, counted in `dropped`; `inserts_failed` counts calls of
    `insert_ticks` that raised. For candles, use `pkb ingest`, or give the queue to `TickProcessor`.

    Args:
        enctoken: A web session's token; default: the shared session in Redis or the settings.
        user_id: The user of `enctoken`.
        api_key: The api key of `enctoken`.
        token_batches: Lists of instrument tokens; default: PKB_INSTRUMENTS.
        watcher_queue: Receives `Tick` objects.
        db_conn: An object with `insert_ticks(list_of_dicts)`, perhaps `close_all()`.
        ws_stop_event: An event that ends `start`.
        settings: Default: from the environment.

    Example:
        >>> ticks = queue.Queue()
        >>> client = ZerodhaWebSocketClient(token_batches=[[408065]], watcher_queue=ticks)
        >>> threading.Thread(target=client.start, daemon=True).start()  # doctest: +SKIP
        >>> ticks.get().last_price  # doctest: +SKIP
        1512.5
    """

    def __init__(
        self,
        enctoken: str | None = None,
        user_id: str | None = None,
        api_key: str = "kitefront",
        token_batches: Sequence[Sequence[int]] = (),
        watcher_queue: Any = None,
        db_conn: Any = None,
        ws_stop_event: Any = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        self.user_id = user_id
        self.api_key = api_key
        self.token_batches = [list(batch) for batch in token_batches]
        self.watcher_queue = watcher_queue
        self.db_conn = db_conn
        self.ws_stop_event = ws_stop_event
        self.stop_event = threading.Event()
        self.dropped = 0
        self.inserts_failed = 0
        self.batch_last_tick_time: dict[int, float] = {}  # batch → when its last tick arrived, epoch seconds
        self._session = Session("", user_id or "", enctoken=SecretStr(enctoken)) if enctoken else None
        self._settings = settings or load_settings()
        self._batch_of: dict[int, int] = {}
        self._lock = threading.Lock()
        self._once = logs.Once()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Connect and receive until stopped.

        Raises:
            PkbError: No session, an unknown instrument, or more instruments than one api key may stream.
        """
        url = url_for(self._settings, self._session)  # raises here if there is no session, not in a thread
        if not self.token_batches:
            self.token_batches = self._build_batches()
        self._batch_of = {token: n for n, batch in enumerate(self.token_batches) for token in batch}
        tokens = list(self._batch_of)
        if len(tokens) > TOKENS_MAX:
            raise PkbError(
                f"{len(tokens):,} instruments are more than one Kite api key may stream ({TOKENS_MAX:,})",
                "give fewer in token_batches, or run `pkb ingest` with several api keys",
            )
        for first in range(0, len(tokens), TOKENS_PER_CONNECTION_MAX):
            chunk = tokens[first : first + TOKENS_PER_CONNECTION_MAX]
            socket = Socket(url, chunk, "full", on_frame=self._on_frame)
            name = f"kite-{len(self._threads)}"
            thread = threading.Thread(target=socket.run, args=(self.stop_event,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        while not self.stop_event.wait(POLL_SECONDS):
            if self.ws_stop_event is not None and self.ws_stop_event.is_set():
                self.stop()

    def stop(self) -> None:
        """End all connections, so that `start` returns."""
        self.stop_event.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=JOIN_SECONDS)
        if self.db_conn is not None and hasattr(self.db_conn, "close_all"):
            self.db_conn.close_all()

    def get_batch_last_tick_times(self) -> dict[int, float]:
        """Return batch → when its last tick arrived, epoch seconds."""
        with self._lock:
            return dict(self.batch_last_tick_time)

    def get_unhealthy_batches(self, current_time: float, stale_threshold: float) -> list[int]:
        """Return the batches without a tick for more than `stale_threshold` seconds before `current_time`."""
        times = self.get_batch_last_tick_times()
        return [batch for batch, last in times.items() if current_time - last > stale_threshold]

    def update_batch_tick_time(self, batch_index: int) -> None:
        """Record that a tick of that batch arrived now."""
        with self._lock:
            self.batch_last_tick_time[batch_index] = time.time()

    def _on_frame(self, frame: bytes, at_ms: int) -> None:
        ticks = ZerodhaWebSocketParser.parse_binary_message(frame)
        for tick in ticks:
            tick.websocket_index = tick.batch_index = self._batch_of.get(tick.instrument_token, -1)
        for batch in {tick.batch_index for tick in ticks}:
            self.update_batch_tick_time(batch)
        if self.watcher_queue is not None:
            for tick in ticks:
                try:
                    self.watcher_queue.put(tick, timeout=PUT_SECONDS)
                except queue.Full:
                    self.dropped += 1
                    if self._once.first("full"):
                        log.error("watcher_queue_full", hint="read it faster, or give it more room")
        if self.db_conn is not None and ticks:
            try:
                self.db_conn.insert_ticks([database_row(tick) for tick in ticks])
            except Exception as error:
                # The connection must survive any error of a caller's database.
                self.inserts_failed += 1
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                if self._once.first(reason):
                    log.error("insert_ticks_failed", reason=reason)

    def _build_batches(self) -> list[list[int]]:
        from pkbrokers_redis.store.connect import connect
        from pkbrokers_redis.store.meta import adopt_meta
        from pkbrokers_redis.store.symbols import resolve_many

        client = connect(self._settings, for_reading=True)
        try:
            keys = adopt_meta(client, self._settings).keys
            chosen = resolve_many(client, keys, self._settings.instruments or "nse-equity")
        finally:
            client.close()
        tokens = [token for token, _ in chosen]
        return [
            tokens[first : first + OPTIMAL_TOKEN_BATCH_SIZE]
            for first in range(0, len(tokens), OPTIMAL_TOKEN_BATCH_SIZE)
        ]


def database_row(tick: Tick) -> dict[str, Any]:
    """Return a tick as upstream passes it to `insert_ticks`: 0 for fields that the packet lacks."""
    names = "day_volume oi buy_quantity sell_quantity high_price low_price open_price prev_day_close"
    row: dict[str, Any] = {
        "instrument_token": tick.instrument_token,
        "timestamp": datetime.fromtimestamp(tick.exchange_timestamp or time.time(), KOLKATA),
        "last_price": tick.last_price,
        **{name: getattr(tick, name) or 0 for name in names.split()},
        "websocket_index": tick.websocket_index,
        "batch_index": tick.batch_index,
    }
    if tick.depth:
        row["depth"] = {
            side: [level._asdict() for level in tick.depth.get(side, [])] for side in ("bid", "ask")
        }
    return row
