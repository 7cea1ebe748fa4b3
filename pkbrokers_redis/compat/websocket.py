"""Upstream PKBrokers' parser by name and shape, on our `kite.wire`: there is no second parser.

`ZerodhaWebSocketClient` with upstream's constructor and methods, on our socket and parser.

Kite takes 3,000 instruments per connection and three connections per key; upstream opened one per batch of
500. Here the batches share connections, and each tick still says which batch its instrument came from.
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
from pkbrokers_redis.compat.upstream_types import DepthEntry, Tick
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
    """Kite's binary frames → `Tick` objects. For whole arrays of ticks use `kite.wire.parse_frame`."""

    @staticmethod
    def parse_binary_message(message: bytes, websocket_index: int = -1, batch_index: int = -1) -> list[Tick]:
        """All ticks of a frame, in its order. Any bytes are fine; a heartbeat gives an empty list."""
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

BATCH_TOKENS = 500  # upstream's batches
TOKENS_MAX = TOKENS_PER_CONNECTION_MAX * CONNECTIONS_PER_KEY_MAX
PUT_SECONDS = 1.0  # how long a full queue is waited for, before the tick is dropped and counted
JOIN_SECONDS = 5.0
POLL_SECONDS = 0.5


class ZerodhaWebSocketClient:
    """Ticks from Kite into `watcher_queue` (as `Tick` objects) and `db_conn.insert_ticks` (as dicts).

    `start` blocks until `stop`, or until `ws_stop_event` is set. Without `token_batches` it takes what
    PKB_INSTRUMENTS names. A full queue drops ticks, which `dropped` counts; `inserts_failed` counts the calls
    of `insert_ticks` that raised. Ticks that are to become candles go through `pkb ingest`, or from the queue
    into `TickProcessor`.
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
        self.batch_last_tick_time: dict[int, float] = {}  # batch → when its last tick came, epoch seconds
        self._session = Session("", user_id or "", enctoken=SecretStr(enctoken)) if enctoken else None
        self._settings = settings or load_settings()
        self._batch_of: dict[int, int] = {}
        self._lock = threading.Lock()
        self._once = logs.Once()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Connect and receive until stopped.

        Raises PkbError: no session, an unknown instrument, more than one api key may stream.
        """
        url = url_for(self._settings, self._session)  # a missing session shows here, not in a thread
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
            some = tokens[first : first + TOKENS_PER_CONNECTION_MAX]
            socket = Socket(url, some, "full", on_frame=self._on_frame)
            number = len(self._threads)
            thread = threading.Thread(
                target=socket.run, args=(self.stop_event,), name=f"kite-{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        while not self.stop_event.wait(POLL_SECONDS):
            if self.ws_stop_event is not None and self.ws_stop_event.is_set():
                self.stop()

    def stop(self) -> None:
        """End all connections; `start` returns."""
        self.stop_event.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=JOIN_SECONDS)
        if self.db_conn is not None and hasattr(self.db_conn, "close_all"):
            self.db_conn.close_all()

    def get_batch_last_tick_times(self) -> dict[int, float]:
        """Batch → when its last tick came, epoch seconds."""
        with self._lock:
            return dict(self.batch_last_tick_time)

    def get_unhealthy_batches(self, current_time: float, stale_threshold: float) -> list[int]:
        """Batches without a tick for more than `stale_threshold` seconds before `current_time`."""
        times = self.get_batch_last_tick_times()
        return [batch for batch, last in times.items() if current_time - last > stale_threshold]

    def update_batch_tick_time(self, batch_index: int) -> None:
        """A tick of that batch has come now."""
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
                # Whatever a caller's database raises, the connection must go on.
                self.inserts_failed += 1
                why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                if self._once.first(why):
                    log.error("insert_ticks_failed", why=why)

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
        return [tokens[first : first + BATCH_TOKENS] for first in range(0, len(tokens), BATCH_TOKENS)]


def database_row(tick: Tick) -> dict[str, Any]:
    """A tick as upstream hands it to `insert_ticks`: 0 for what the packet did not have."""
    depth = tick.depth or {}
    row: dict[str, Any] = {
        "instrument_token": tick.instrument_token,
        "timestamp": datetime.fromtimestamp(tick.exchange_timestamp or time.time(), KOLKATA),
        "last_price": tick.last_price,
        "day_volume": tick.day_volume or 0,
        "oi": tick.oi or 0,
        "buy_quantity": tick.buy_quantity or 0,
        "sell_quantity": tick.sell_quantity or 0,
        "high_price": tick.high_price or 0,
        "low_price": tick.low_price or 0,
        "open_price": tick.open_price or 0,
        "prev_day_close": tick.prev_day_close or 0,
        "websocket_index": tick.websocket_index,
        "batch_index": tick.batch_index,
    }
    if depth:
        row["depth"] = {
            side: [
                {"price": level.price, "quantity": level.quantity, "orders": level.orders}
                for level in depth.get(side, [])
            ]
            for side in ("bid", "ask")
        }
    return row
