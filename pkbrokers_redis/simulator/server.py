"""A Kite websocket server on loopback: faithful enough that the official KiteTicker works unchanged.

One thread, one asyncio loop. Every client has its subscriptions and a bounded queue; who reads too slowly
is disconnected, as on Kite. `publish` pushes exact bytes, `outgoing` is where faults come in.
"""

from __future__ import annotations

import asyncio
import http
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import parse_qs, urlsplit

import msgspec
import numpy as np
import numpy.typing as npt
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from pkbrokers_redis import logs
from pkbrokers_redis.core.errors import PkbError
from pkbrokers_redis.kite.capture import KIND_BINARY, KIND_TEXT, CaptureWriter
from pkbrokers_redis.kite.layout import IST
from pkbrokers_redis.simulator.frames import MODE_QUOTE, NONE, frames_for
from pkbrokers_redis.simulator.market import Ints, Market
from pkbrokers_redis.simulator.requests import BadRequest, SetMode, Subscribe, parse_request

log = logs.get("simulator")

HEARTBEAT = b"\x00"
HEARTBEAT_SECONDS = 2.0
TOKENS_PER_CONNECTION_MAX = 3000
QUEUE_FRAMES_MAX = 512  # of one client, ~30 MB at worst; then it is disconnected
STEP_SECONDS_MAX, STEP_SECONDS_MIN = 0.05, 0.005
CLOSE_TOO_SLOW = 1008

# Refused handshakes and garbage are what this server is made for: no log line for each.
_quiet = logging.getLogger("pkbrokers_redis.simulator.websockets")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class SimulatorFailed(PkbError):
    """Raised when the simulator cannot start, as when its port is taken."""


@dataclass(slots=True)
class ServerStats:
    """Counters since the start; read them from any thread."""

    connections: int = 0
    refused: int = 0
    frames: int = 0  # binary ones handed to clients, heartbeats not counted
    packets: int = 0  # made by the market, whether or not anyone subscribed
    bad_requests: int = 0
    slow_disconnects: int = 0


@dataclass(eq=False, slots=True)
class _Client:
    link: ServerConnection
    modes: npt.NDArray[np.int8]  # by row of the market
    count: int = 0  # tokens subscribed
    queue: asyncio.Queue[bytes | str] = field(default_factory=lambda: asyncio.Queue(QUEUE_FRAMES_MAX))


class SimulatorServer:
    """`start()`, then `url`; `stop()` at the end. A market of None serves only what `publish` pushes.

    `access_token`: when set, another one (or enctoken) in the URL gets HTTP 403; may change while running.
    `connections_max`: beyond it, HTTP 429. `capture`: every frame sent to any client, for an independent
    check. `outgoing`: each market frame → the frames to send instead (drop, duplicate, reorder, damage).
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
    ) -> None:
        self.market = market
        self.host, self.port = host, port
        self.access_token = access_token
        self.connections_max = connections_max
        self.stats = ServerStats()
        self.outgoing = outgoing
        self._heartbeat_seconds = heartbeat_seconds
        self._capture = capture
        self._clock = clock
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
        """Clients connected now."""
        return len(self._clients)

    @property
    def subscriptions(self) -> int:
        """Tokens subscribed now, over all clients."""
        return sum(client.count for client in tuple(self._clients))

    def start(self) -> None:
        """Serve in a thread of its own; returns when the port is open. Raises SimulatorFailed."""
        self._thread = threading.Thread(target=self._run, name="simulator", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            reason = getattr(self._failure, "strerror", None) or type(self._failure).__name__
            raise SimulatorFailed(
                f"the simulator cannot listen on {self.host}:{self.port} ({reason})", "choose another port"
            ) from self._failure

    def stop(self) -> None:
        """Disconnect everyone and end the thread. A second call does nothing."""
        thread, loop, stop = self._thread, self._loop, self._stop
        if thread is None or not thread.is_alive() or loop is None or stop is None:
            return
        try:
            loop.call_soon_threadsafe(stop.set)
        except RuntimeError:
            pass  # it ended between the two lines
        thread.join()

    def publish(self, frame: bytes | str) -> None:
        """Push one exact frame (str: a text frame) to all clients, subscribed or not."""

        def push() -> None:
            for client in tuple(self._clients):
                self._enqueue(client, frame)

        self._call(push)

    def disconnect_all(self) -> None:
        """Cut every connection without a closing handshake, as a failing network would."""

        def cut() -> None:
            for client in tuple(self._clients):
                client.link.transport.abort()

        self._call(cut)

    def _call(self, action: Callable[[], None]) -> None:
        if self._loop is None:
            raise SimulatorFailed("the simulator is not running", "call start() first")
        self._loop.call_soon_threadsafe(action)

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
        async with serve(
            self._client,
            self.host,
            self.port,
            process_request=self._admit,
            compression=None,
            ping_interval=None,
            close_timeout=0.5,
            max_size=2**20,
            logger=_quiet,
        ) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            self._ready.set()
            tasks = [asyncio.create_task(self._beat())]
            if self.market is not None:
                tasks.append(asyncio.create_task(self._trade(self.market)))
            stopped = asyncio.create_task(self._stop.wait())
            await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in (stopped, *tasks):
                task.cancel()
            for client in tuple(self._clients):
                client.link.transport.abort()  # who stopped reading must not hold us up
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    def _admit(self, link: ServerConnection, request: Request) -> Response | None:
        query = parse_qs(urlsplit(request.path).query)
        given = (query.get("access_token") or query.get("enctoken") or [""])[0]
        if self.access_token is not None and given != self.access_token:
            self.stats.refused += 1
            return link.respond(http.HTTPStatus.FORBIDDEN, "the session is not valid\n")
        if self.connections_max is not None and len(self._clients) >= self.connections_max:
            self.stats.refused += 1
            return link.respond(http.HTTPStatus.TOO_MANY_REQUESTS, "too many connections\n")
        return None

    async def _client(self, link: ServerConnection) -> None:
        rows = len(self.market.tokens) if self.market is not None else 0
        client = _Client(link, np.zeros(rows, np.int8))
        self._clients.add(client)
        self.stats.connections += 1
        for text in self._greetings(rows):
            self._enqueue(client, text)
        writer = asyncio.create_task(self._write(client))
        try:
            async for message in link:
                self._answer(client, message)
        except ConnectionClosed:
            pass  # clients come and go
        finally:
            self._clients.discard(client)
            writer.cancel()

    def _greetings(self, count: int) -> list[str]:
        stamp = datetime.fromtimestamp(int(self._clock()), IST).isoformat()
        meta = {"type": "instruments_meta", "data": {"count": count, "etag": f'W/"sim-{count}"'}}
        return [_text(meta), _text({"type": "app_code", "timestamp": stamp})]

    async def _write(self, client: _Client) -> None:
        try:
            while True:
                frame = await client.queue.get()
                await client.link.send(frame)
                if self._capture is not None:
                    binary = isinstance(frame, bytes)
                    data = frame if isinstance(frame, bytes) else frame.encode()
                    self._capture.write(int(self._clock() * 1000), KIND_BINARY if binary else KIND_TEXT, data)
        except ConnectionClosed:
            pass  # the reader's side of this client cleans up

    def _enqueue(self, client: _Client, frame: bytes | str) -> None:
        try:
            client.queue.put_nowait(frame)
        except asyncio.QueueFull:
            self.stats.slow_disconnects += 1
            self._clients.discard(client)
            client.link.transport.abort()

    def _answer(self, client: _Client, message: bytes | str) -> None:
        request = parse_request(message)
        if isinstance(request, BadRequest):
            self._complain(client, request.reason)
            return
        market = self.market
        if market is None:
            return
        rows = np.array([row for row in map(market.row_of.get, request.tokens) if row is not None], np.int64)
        if isinstance(request, Subscribe):
            fresh = rows[client.modes[rows] == NONE]
            room = TOKENS_PER_CONNECTION_MAX - client.count
            if len(fresh) > room:
                self._complain(client, f"at most {TOKENS_PER_CONNECTION_MAX} instruments a connection")
                fresh = fresh[:room]
            client.modes[fresh] = MODE_QUOTE
            self._send_rows(client, market, fresh)  # the cached last tick
        elif isinstance(request, SetMode):
            client.modes[rows[client.modes[rows] != NONE]] = request.mode
        else:
            client.modes[rows] = NONE
        client.count = int(np.count_nonzero(client.modes))

    def _complain(self, client: _Client, reason: str) -> None:
        self.stats.bad_requests += 1
        self._enqueue(client, _text({"type": "error", "data": reason}))

    def _send_rows(self, client: _Client, market: Market, rows: Ints) -> None:
        for frame in frames_for(market, rows, client.modes):
            for sent in (frame,) if self.outgoing is None else self.outgoing(frame):
                self.stats.frames += 1
                self._enqueue(client, sent)

    async def _trade(self, market: Market) -> None:
        step_seconds = min(STEP_SECONDS_MAX, max(STEP_SECONDS_MIN, market.interval_ms / 1000))
        while True:
            started = time.monotonic()
            rows = market.step(int(self._clock() * 1000))
            self.stats.packets += len(rows)
            for client in tuple(self._clients):
                if client.count:
                    self._send_rows(client, market, rows)
            await asyncio.sleep(max(0.0, started + step_seconds - time.monotonic()))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_seconds)
            for client in tuple(self._clients):
                self._enqueue(client, HEARTBEAT)


def _text(content: object) -> str:
    return msgspec.json.encode(content).decode()
