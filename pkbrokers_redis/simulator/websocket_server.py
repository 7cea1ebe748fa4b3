"""A Kite websocket server on loopback: the official KiteTicker works with it unchanged.

`publish` sends exact bytes to every client. `outgoing` and `faults` change what the market sends.
`SimulatedKite` adds REST, login and history.
"""

from __future__ import annotations

import asyncio
import http
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import numpy as np
import numpy.typing as npt
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from pkbrokers_redis import logs
from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.kite.capture import KIND_BINARY, KIND_TEXT, CaptureWriter
from pkbrokers_redis.simulator.faults import STATUS_KINDS, Faults
from pkbrokers_redis.simulator.market import Ints, Market
from pkbrokers_redis.simulator.subscriptions import (
    MODE_QUOTE,
    NONE,
    InvalidRequest,
    frames_for,
    parse_request,
)

log = logs.get("simulator")

HEARTBEAT = b"\x00"
HEARTBEAT_SECONDS = 2.0
TOKENS_PER_CONNECTION_MAX = 3000
QUEUE_FRAMES_MAX = 512  # of one client, about 30 MB; a client beyond it is disconnected
STEP_SECONDS_MAX, STEP_SECONDS_MIN = 0.05, 0.005
STEPS_IN_A_ROW = 8  # then REST and the clients' requests get a turn
STEPS_MAX = 600  # of one round, when market time runs fast or the loop was blocked; the next round resumes

# Refused handshakes and garbage are part of the tests: the websockets library must not log each of them.
_quiet = logging.getLogger("pkbrokers_redis.simulator.websockets")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class SimulatorFailed(PkbError):
    """Raised when the simulator cannot start, for example because its port is in use."""


@dataclass(slots=True)
class ServerStats:
    """Counters since the start. Any thread may read them."""

    connections: int = 0
    refused: int = 0
    frames: int = 0  # binary ones queued for clients, without heartbeats
    packets: int = 0  # made by the market, with or without subscribers
    bad_requests: int = 0
    slow_disconnects: int = 0


@dataclass(eq=False, slots=True)
class _Client:
    """One connection: its subscriptions and its queue."""

    connection: ServerConnection
    modes: npt.NDArray[np.int8]  # by market row
    count: int = 0  # tokens subscribed
    queue: asyncio.Queue[bytes | str] = field(default_factory=lambda: asyncio.Queue(QUEUE_FRAMES_MAX))
    delayed: list[bytes] = field(default_factory=list)  # frames that the fault `reorder` holds back


class SimulatorServer:
    """The websocket server. `start()`, then `url`; `stop()` at the end.

    One thread with one asyncio loop runs it. Each client has a bounded queue; a client that reads too slowly
    is disconnected, as on Kite.

    Args:
        market: Where packets come from; None: clients get only what `publish` sends.
        host: The address to listen on.
        port: 0: a free one.
        access_token: If set, another one (or enctoken) in the URL gets HTTP 403. May change while running.
        connections_max: The most clients; the next one gets HTTP 429.
        heartbeat_seconds: The time between heartbeats, machine time.
        capture: Records every frame that is sent.
        outgoing: Maps each market frame to the frames to send instead.
        clock: Market time, epoch seconds.
        speed: How fast `clock` runs. Above 1 the market steps once per conflation interval.
        begin_ms: Market time of the first step, epoch ms; None: the clock's.
        faults: Faults on demand.
        authenticate: Returns whether the session in the URL's query is alive.
        recorder: Called with the rows of each market step and its time, epoch ms.
        services: What else runs in the same loop.

    Example:
        >>> server = SimulatorServer(None)
        >>> server.start()
        >>> server.url.startswith("ws://127.0.0.1:")
        True
        >>> server.stop()
    """

    def __init__(
        self,
        market: Market | None,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        access_token: str | None = None,
        connections_max: int | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        capture: CaptureWriter | None = None,
        outgoing: Callable[[bytes], Iterable[bytes]] | None = None,
        clock: Callable[[], float] = time.time,
        speed: float = 1.0,
        begin_ms: int | None = None,
        faults: Faults | None = None,
        authenticate: Callable[[dict[str, list[str]]], bool] | None = None,
        recorder: Callable[[Ints, int], None] | None = None,
        services: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> None:
        self.market = market
        self.host, self.port = host, port
        self.access_token = access_token
        self.connections_max = connections_max
        self.stats = ServerStats()
        self.outgoing = outgoing
        self._heartbeat_seconds = heartbeat_seconds
        self._capture = capture
        self._clock, self._speed = clock, speed
        self._faults = faults or Faults()
        self._authenticate, self._recorder, self._services = authenticate, recorder, services
        self._stepped_ms = begin_ms
        self._clients: set[_Client] = set()
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    # --- from any thread -----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """`ws://127.0.0.1:PORT`, for PKB_KITE_WS_URL or KiteTicker's `root`."""
        return f"ws://{self.host}:{self.port}"

    @property
    def clients(self) -> int:
        """The number of connected clients."""
        return len(self._clients)

    @property
    def subscriptions(self) -> int:
        """The number of subscribed tokens, over all clients."""
        return sum(client.count for client in tuple(self._clients))

    def start(self) -> None:
        """Serve in a thread of its own, and return when the port is open. Raise SimulatorFailed.

        After `stop` it may start again: the same port, the same market.
        """
        self._ready.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._run, name="simulator", daemon=True)
        self._thread.start()
        self._ready.wait()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            reason = getattr(self._failure, "strerror", None) or type(self._failure).__name__
            raise SimulatorFailed(
                f"the simulator cannot listen on {self.host}:{self.port} ({reason})", "choose another port"
            ) from self._failure

    def stop(self) -> None:
        """Disconnect every client and end the thread. A second call does nothing."""
        thread, loop, stop = self._thread, self._loop, self._stop
        if thread is None or not thread.is_alive() or loop is None or stop is None:
            return
        try:
            loop.call_soon_threadsafe(stop.set)
        except RuntimeError:
            pass  # the loop ended between the two lines
        thread.join()

    def publish(self, frame: bytes | str) -> None:
        """Send one exact frame (str: a text frame) to all clients, with or without subscriptions."""
        self._for_each_client(lambda client: self._enqueue(client, frame))

    def disconnect_all(self) -> None:
        """Close every connection without a closing handshake, as a failing network does."""
        self._for_each_client(_abort)

    def _for_each_client(self, action: Callable[[_Client], None]) -> None:
        def run() -> None:
            for client in tuple(self._clients):
                action(client)

        if self._loop is None:
            raise SimulatorFailed("the simulator is not running", "call start() first")
        self._loop.call_soon_threadsafe(run)

    # --- in the server's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self._failure = error
            if self._ready.is_set():
                log.exception("simulator_failed")
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        listening = serve(
            self._serve_client,
            self.host,
            self.port,
            process_request=self._check_handshake,
            compression=None,
            ping_interval=None,
            close_timeout=0.5,
            max_size=2**20,
            logger=_quiet,
        )
        async with self._services(), listening as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            self._ready.set()
            tasks = [asyncio.create_task(self._send_heartbeats())]
            if self.market is not None:
                tasks.append(asyncio.create_task(self._run_market(self.market)))
            stopped = asyncio.create_task(self._stop.wait())
            await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in (stopped, *tasks):
                task.cancel()
            for client in tuple(self._clients):
                _abort(client)  # a client that stopped reading must not delay the shutdown
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    def _check_handshake(self, connection: ServerConnection, request: Request) -> Response | None:
        """Return the refusal of a handshake, or None to accept it."""
        query = parse_qs(urlsplit(request.path).query)
        token = (query.get("access_token") or query.get("enctoken") or [""])[0]
        is_alive = self._authenticate is None or self._authenticate(query)
        if self.access_token is not None and token != self.access_token:
            status, reason = http.HTTPStatus.FORBIDDEN, "the session is not valid"
        elif (fault := self._faults.strike("ws", *STATUS_KINDS)) is not None:
            status, reason = http.HTTPStatus(int(fault.kind)), "refused"
        elif not is_alive:
            status, reason = http.HTTPStatus.FORBIDDEN, "refused"
        elif self.connections_max is not None and len(self._clients) >= self.connections_max:
            status, reason = http.HTTPStatus.TOO_MANY_REQUESTS, "too many connections"
        else:
            return None
        self.stats.refused += 1
        return connection.respond(status, f"{reason}\n")

    async def _serve_client(self, connection: ServerConnection) -> None:
        rows = len(self.market.tokens) if self.market is not None else 0
        client = _Client(connection, np.zeros(rows, np.int8))
        self._clients.add(client)
        self.stats.connections += 1
        for text in _first_messages(rows, self._clock()):
            self._enqueue(client, text)
        writer = asyncio.create_task(self._write(client))
        try:
            async for message in connection:
                self._handle_request(client, message)
        except ConnectionClosed:
            pass  # an ordinary end of a connection
        finally:
            self._clients.discard(client)
            writer.cancel()

    async def _write(self, client: _Client) -> None:
        try:
            while True:
                frame = await client.queue.get()
                await client.connection.send(frame)
                if self._capture is not None:
                    kind = KIND_BINARY if isinstance(frame, bytes) else KIND_TEXT
                    data = frame if isinstance(frame, bytes) else frame.encode()
                    self._capture.write(int(self._clock() * 1000), kind, data)
        except ConnectionClosed:
            pass  # `_serve_client` removes the client

    def _enqueue(self, client: _Client, frame: bytes | str) -> None:
        try:
            client.queue.put_nowait(frame)
        except asyncio.QueueFull:
            self.stats.slow_disconnects += 1
            self._clients.discard(client)
            _abort(client)

    def _handle_request(self, client: _Client, message: bytes | str) -> None:
        try:
            request = parse_request(message)
        except InvalidRequest as error:
            self._send_error(client, str(error))
            return
        market = self.market
        if market is None:
            return
        rows = np.array([row for row in map(market.row_of.get, request.tokens) if row is not None], np.int64)
        if request.action == "subscribe":
            fresh = rows[client.modes[rows] == NONE]
            room = TOKENS_PER_CONNECTION_MAX - client.count
            if len(fresh) > room:
                self._send_error(client, f"at most {TOKENS_PER_CONNECTION_MAX} instruments a connection")
                fresh = fresh[:room]
            client.modes[fresh] = MODE_QUOTE
            self._send_rows(client, market, fresh)  # Kite sends the last tick after a subscribe
        elif request.action == "mode":
            client.modes[rows[client.modes[rows] != NONE]] = request.mode
        else:
            client.modes[rows] = NONE
        client.count = int(np.count_nonzero(client.modes))

    def _send_error(self, client: _Client, reason: str) -> None:
        self.stats.bad_requests += 1
        self._enqueue(client, _text_frame({"type": "error", "data": reason}))

    def _send_rows(self, client: _Client, market: Market, rows: Ints) -> None:
        rows = self._faults.unmuted(rows, market.tokens)
        shown: Any = market
        for frame in frames_for(self._faults.spoil_packets(shown, rows), rows, client.modes):
            if self._faults.strike("ws", "drop"):
                _abort(client)
                return
            for changed in [frame] if self.outgoing is None else self.outgoing(frame):
                for sent in self._faults.damage(changed, client.delayed):
                    self.stats.frames += 1
                    self._enqueue(client, sent)

    async def _run_market(self, market: Market) -> None:
        step_seconds = min(STEP_SECONDS_MAX, max(STEP_SECONDS_MIN, market.interval_ms / 1000))
        while True:
            started = time.monotonic()
            now_ms = int(self._clock() * 1000)
            before_ms = now_ms if self._stepped_ms is None else self._stepped_ms
            stride_ms = int(market.interval_ms) if self._speed > 1 else 0
            for number, time_ms in enumerate(steps_between(before_ms, now_ms, stride_ms)):
                if number % STEPS_IN_A_ROW == STEPS_IN_A_ROW - 1:
                    await asyncio.sleep(0)
                self._step(market, time_ms)
            await asyncio.sleep(max(0.0, started + step_seconds - time.monotonic()))

    def _step(self, market: Market, now_ms: int) -> None:
        self._stepped_ms = now_ms
        market.held = self._faults.rows_of("zero_price_first", market.row_of)
        rows = np.union1d(market.step(now_ms), market.held)
        self.stats.packets += len(rows)
        if self._recorder is not None:
            self._recorder(rows, now_ms)
        for client in tuple(self._clients):
            if client.count:
                self._send_rows(client, market, rows)

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_seconds)
            if self._faults.stalled():
                continue
            for client in tuple(self._clients):
                self._enqueue(client, HEARTBEAT)


def steps_between(before_ms: int, now_ms: int, stride_ms: int) -> Iterator[int]:
    """Yield the times (epoch ms) after `before_ms` until now, every `stride_ms`; 0: only `now_ms`."""
    if stride_ms > 0:
        now_ms = min(now_ms, before_ms + STEPS_MAX * stride_ms)
        yield from range(before_ms + stride_ms, now_ms, stride_ms)
    yield now_ms


def _abort(client: _Client) -> None:
    client.connection.transport.abort()


def _first_messages(count: int, now_s: float) -> list[str]:
    """Return the text frames that Kite sends after a connect. `count` is the number of instruments."""
    stamp = datetime.fromtimestamp(int(now_s), IST).isoformat()
    meta = {"type": "instruments_meta", "data": {"count": count, "etag": f'W/"sim-{count}"'}}
    return [_text_frame(meta), _text_frame({"type": "app_code", "timestamp": stamp})]


def _text_frame(content: object) -> str:
    return msgspec.json.encode(content).decode()
