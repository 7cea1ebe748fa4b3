"""A Kite websocket server on loopback: faithful enough that the official KiteTicker works unchanged.

One thread, one asyncio loop. Every client has its subscriptions and a bounded queue; whoever reads too slowly
is disconnected, as on Kite. `publish` pushes exact bytes; `outgoing` and `faults` are where faults come in.
`SimulatedKite` puts REST, login and history beside it.

The server's clients: who is connected, what they are told first, and the counters.
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
    BadRequest,
    SetMode,
    Subscribe,
    frames_for,
    parse_request,
)

log = logs.get("simulator")

HEARTBEAT = b"\x00"
HEARTBEAT_SECONDS = 2.0
TOKENS_PER_CONNECTION_MAX = 3000
STEP_SECONDS_MAX, STEP_SECONDS_MIN = 0.05, 0.005
STEPS_IN_A_ROW = 8  # then REST and the clients' requests get a turn

# KiteRefusal handshakes and garbage are what this server is made for: no log line for each.
_quiet = logging.getLogger("pkbrokers_redis.simulator.websockets")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class SimulatorFailed(PkbError):
    """Raised when the simulator cannot start, as when its port is taken."""


class SimulatorServer:
    """`start()`, then `url`; `stop()` at the end. A market of None serves only what `publish` pushes.

    `access_token`: when set, another one (or enctoken) in the URL gets HTTP 403; may change while running.
    `connections_max`: beyond it, HTTP 429. `capture`: every frame sent to any client, for an independent
    check. `outgoing`: each market frame → the frames to send instead (drop, duplicate, reorder, damage).
    `faults`: the same and more, on demand. `admit`: the URL's query → whether its session is alive.
    `recorder`: told the rows of each market step and its time, whoever listens. `beside`: what else lives in
    this loop. `clock`: market time in seconds, running at `speed`; beyond 1 each interval is one step, from
    `begin_ms` on if given.
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
        admit: Callable[[dict[str, list[str]]], bool] | None = None,
        recorder: Callable[[Ints, int], None] | None = None,
        beside: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
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
        self._faults, self._may_enter, self._recorder, self._beside = faults, admit, recorder, beside
        self._stepped_ms = begin_ms
        self._clients: set[Client] = set()
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
        """Serve in a thread of its own; returns when the port is open. Raises SimulatorFailed.

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
        listening = serve(
            self._client,
            self.host,
            self.port,
            process_request=self._admit,
            compression=None,
            ping_interval=None,
            close_timeout=0.5,
            max_size=2**20,
            logger=_quiet,
        )
        async with self._beside(), listening as server:
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
                client.link.transport.abort()  # a client that stopped reading must not hold us up
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    def _admit(self, link: ServerConnection, request: Request) -> Response | None:
        query = parse_qs(urlsplit(request.path).query)
        given = (query.get("access_token") or query.get("enctoken") or [""])[0]
        if self.access_token is not None and given != self.access_token:
            self.stats.refused += 1
            return link.respond(http.HTTPStatus.FORBIDDEN, "the session is not valid\n")
        fault = None if self._faults is None else self._faults.strike("ws", *STATUS_KINDS)
        if fault is not None or (self._may_enter is not None and not self._may_enter(query)):
            self.stats.refused += 1
            status = http.HTTPStatus.FORBIDDEN if fault is None else http.HTTPStatus(int(fault.kind))
            return link.respond(status, "refused\n")
        if self.connections_max is not None and len(self._clients) >= self.connections_max:
            self.stats.refused += 1
            return link.respond(http.HTTPStatus.TOO_MANY_REQUESTS, "too many connections\n")
        return None

    async def _client(self, link: ServerConnection) -> None:
        rows = len(self.market.tokens) if self.market is not None else 0
        client = Client(link, np.zeros(rows, np.int8))
        self._clients.add(client)
        self.stats.connections += 1
        for text in greetings(rows, self._clock()):
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

    async def _write(self, client: Client) -> None:
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

    def _enqueue(self, client: Client, frame: bytes | str) -> None:
        try:
            client.queue.put_nowait(frame)
        except asyncio.QueueFull:
            self.stats.slow_disconnects += 1
            self._clients.discard(client)
            client.link.transport.abort()

    def _answer(self, client: Client, message: bytes | str) -> None:
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

    def _complain(self, client: Client, reason: str) -> None:
        self.stats.bad_requests += 1
        self._enqueue(client, text_frame({"type": "error", "data": reason}))

    def _send_rows(self, client: Client, market: Market, rows: Ints) -> None:
        faults = self._faults
        if faults is not None:
            rows = faults.audible(rows, market.tokens)
        for frame in frames_for(market, rows, client.modes):
            if faults is not None and faults.strike("ws", "drop"):
                client.link.transport.abort()
                return
            sent = [frame] if self.outgoing is None else list(self.outgoing(frame))
            if faults is not None:
                sent = [each for one in sent for each in faults.damage(one, client.held)]
            for each in sent:
                self.stats.frames += 1
                self._enqueue(client, each)

    async def _trade(self, market: Market) -> None:
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
        rows = market.step(now_ms)
        self.stats.packets += len(rows)
        if self._recorder is not None:
            self._recorder(rows, now_ms)
        for client in tuple(self._clients):
            if client.count:
                self._send_rows(client, market, rows)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_seconds)
            if self._faults is not None and self._faults.stalled():
                continue
            for client in tuple(self._clients):
                self._enqueue(client, HEARTBEAT)


QUEUE_FRAMES_MAX = 512  # of one client, ~30 MB at worst; then it is disconnected
STEPS_MAX = 600  # of one round, when market time runs fast or we were held up; the next round goes on


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
class Client:
    """One connection: what it subscribed, and what waits to be sent."""

    link: ServerConnection
    modes: npt.NDArray[np.int8]  # by row of the market
    count: int = 0  # tokens subscribed
    queue: asyncio.Queue[bytes | str] = field(default_factory=lambda: asyncio.Queue(QUEUE_FRAMES_MAX))
    held: list[bytes] = field(default_factory=list)  # by a fault that changes the order; a frame or two


def greetings(count: int, now_s: float) -> list[str]:
    """The text frames that Kite sends first. `count` instruments, market time in epoch seconds."""
    stamp = datetime.fromtimestamp(int(now_s), IST).isoformat()
    meta = {"type": "instruments_meta", "data": {"count": count, "etag": f'W/"sim-{count}"'}}
    return [text_frame(meta), text_frame({"type": "app_code", "timestamp": stamp})]


def text_frame(content: object) -> str:
    """JSON for a text frame."""
    return msgspec.json.encode(content).decode()


def steps_between(before_ms: int, now_ms: int, stride_ms: int) -> Iterator[int]:
    """The times to step through until now: one, or (`stride_ms`) so that no interval is conflated away."""
    if stride_ms > 0:
        now_ms = min(now_ms, before_ms + STEPS_MAX * stride_ms)
        yield from range(before_ms + stride_ms, now_ms, stride_ms)
    yield now_ms
