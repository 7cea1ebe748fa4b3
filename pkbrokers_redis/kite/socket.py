"""The websocket client: connect, subscribe, receive; on any loss connect again. One a connection.

Facts of Kite (https://kite.trade/docs/connect/v3/websocket/): at most 3,000 tokens a connection and 3
connections a key; tokens must be JSON numbers; a mode is set only after subscribing; a heartbeat of one
byte comes every couple of seconds even without a subscription; 403 is a dead session, 429 too many
connections.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import msgspec
import websocket

from pkbrokers_redis import logs
from pkbrokers_redis.core.errors import SettingsError
from pkbrokers_redis.kite.text_frames import TextEvent, parse_text
from pkbrokers_redis.kite.transport import FrameTooLarge, describe, open_websocket, receive
from pkbrokers_redis.kite.urls import KITE_WEB_ORIGIN, address_of, url_for

__all__ = ["SocketStats", "ZerodhaWebSocketClient", "backoff_seconds", "url_for"]

log = logs.get("kite")

TOKENS_PER_CONNECTION_MAX = 3000
CONNECTIONS_PER_KEY_MAX = 3
MODES = ("ltp", "quote", "full")
KITE_HEADERS = {"X-Kite-Version": "3", "User-Agent": "pkbrokers-redis"}

BACKOFF_BASE_SECONDS, BACKOFF_CAP_SECONDS = 0.5, 30.0
HEALTHY_SECONDS = 10.0  # a connection that lived this long starts the backoff anew
FORBIDDEN_SECONDS, FORBIDDEN_CAP_SECONDS = 15.0, 300.0  # Kite locks out who hammers a dead session
THROTTLED_SECONDS = 60.0
FRAME_BYTES_MAX = 16 * 2**20  # 3,000 full packets are 560 KB


@dataclass(slots=True)
class SocketStats:
    """Counters since the client was made; read them from any thread."""

    frames: int = 0  # binary, heartbeats included
    bytes: int = 0
    heartbeats: int = 0
    text_events: int = 0
    text_invalid: int = 0
    connects: int = 0
    reconnects: int = 0
    errors: int = 0  # failed connects and lost connections
    forbidden: int = 0
    throttled: int = 0
    stale: int = 0  # connections given up by the watchdog
    oversized: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)


def backoff_seconds(attempt: int, rng: random.Random) -> float:
    """Wait before connect number `attempt` in a row (from 0): exponential, with full jitter."""
    ceiling = min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2.0 ** min(attempt, 16))
    return max(0.05, rng.random() * ceiling)


class ZerodhaWebSocketClient:
    """Receives frames of up to 3,000 instruments on one connection.

    `on_frame(frame, at_ms)` gets every binary frame but heartbeats, `on_text(event)` every text frame, both
    in the thread of `run`: what they raise ends `run`. `url` may be a function, called for each connect, so
    that a new session is picked up. `on_forbidden(stop)` is called on 403 and may renew the session or raise.
    `expects_ticks(at_ms)` says whether the market trades: heartbeats alone are then silence too.
    """

    def __init__(
        self,
        url: str | Callable[[], str],
        tokens: Iterable[int] = (),
        mode: str = "full",
        *,
        on_frame: Callable[[bytes, int], None],
        on_text: Callable[[TextEvent], None] | None = None,
        on_forbidden: Callable[[threading.Event], None] | None = None,
        expects_ticks: Callable[[int], bool] | None = None,
        headers: Mapping[str, str] = KITE_HEADERS,
        batch_size: int = 500,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        connect_seconds: float = 10.0,
        stale_seconds: float = 10.0,
        tickless_seconds: float = 60.0,
        forbidden_seconds: float = FORBIDDEN_SECONDS,
        throttled_seconds: float = THROTTLED_SECONDS,
        frame_bytes_max: int = FRAME_BYTES_MAX,
    ) -> None:
        self._url = url if callable(url) else lambda: url
        self._on_frame = on_frame
        self._on_text = on_text
        self._on_forbidden = on_forbidden
        self._expects_ticks = expects_ticks
        self._headers = dict(headers)
        self._batch_size = batch_size
        self._clock = clock
        self._rng = rng or random.Random()
        self._connect_seconds = connect_seconds
        self._stale_seconds = stale_seconds
        self._tickless_seconds = tickless_seconds
        self._forbidden_seconds = forbidden_seconds
        self._throttled_seconds = throttled_seconds
        self._frame_bytes_max = frame_bytes_max

        self._mode = _known_mode(mode)
        self._wanted: dict[int, str] = {}  # token → mode; what every new connection subscribes
        # Messages to send; only run()'s thread sends, as a TLS connection is not for two threads.
        self._outbox: list[dict[str, object]] = []
        self._lock = threading.Lock()  # over _wanted and _outbox
        self._forbidden_in_a_row = 0
        self.state = "stopped"  # stopped, connecting, connected, waiting, forbidden, throttled
        self.stats = SocketStats()
        self.subscribe(tokens)

    # --- subscriptions: any thread, connected or not -------------------------------------------------

    @property
    def tokens(self) -> frozenset[int]:
        """The instruments subscribed, or to be subscribed on the next connect."""
        with self._lock:
            return frozenset(self._wanted)

    def subscribe(self, tokens: Iterable[int], mode: str | None = None) -> None:
        """Add instruments (or change their mode), within half a second and on every reconnect.

        Raises SettingsError beyond 3,000 on this connection, or for a mode Kite does not have.
        """
        mode = _known_mode(mode or self._mode)
        fresh = [int(token) for token in dict.fromkeys(tokens)]
        with self._lock:
            count = len(self._wanted.keys() | set(fresh))
            if count > TOKENS_PER_CONNECTION_MAX:
                raise SettingsError(
                    f"{count} instruments are too many for one Kite connection",
                    f"give each connection at most {TOKENS_PER_CONNECTION_MAX}",
                )
            self._wanted.update(dict.fromkeys(fresh, mode))
            self._outbox += self._subscribe_messages(fresh, mode)

    def unsubscribe(self, tokens: Iterable[int]) -> None:
        """Drop instruments, within half a second and on every reconnect; strangers are ignored."""
        with self._lock:
            gone = [token for token in dict.fromkeys(tokens) if self._wanted.pop(token, None)]
            self._outbox += [{"a": "unsubscribe", "v": part} for part in self._batches(gone)]

    def _batches(self, tokens: list[int]) -> list[list[int]]:
        return [tokens[start : start + self._batch_size] for start in range(0, len(tokens), self._batch_size)]

    def _subscribe_messages(self, tokens: list[int], mode: str) -> list[dict[str, object]]:
        messages: list[dict[str, object]] = []
        for part in self._batches(tokens):
            messages.append({"a": "subscribe", "v": part})
            messages.append({"a": "mode", "v": [mode, part]})  # only what is subscribed takes a mode
        return messages

    def _fill_outbox_anew(self) -> None:
        """A new connection knows nothing: everything wanted replaces what waited to be sent."""
        with self._lock:
            self._outbox = []
            for mode in MODES:
                tokens = [token for token, each in self._wanted.items() if each == mode]
                self._outbox += self._subscribe_messages(tokens, mode)

    def _send_outbox(self, link: websocket.WebSocket) -> None:
        with self._lock:
            messages, self._outbox = self._outbox, []
        for message in messages:
            link.send(msgspec.json.encode(message).decode())

    # --- the loop ------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Receive until `stop` is set; returns within about a second of it.

        Losses and refusals are counted, logged and mended here. What the callbacks raise comes through.
        """
        attempt = 0
        try:
            while not stop.is_set():
                self.state = "connecting"
                started = time.monotonic()
                wait_seconds = self._one_connection(stop)
                if time.monotonic() - started >= HEALTHY_SECONDS:
                    attempt = 0
                if wait_seconds is None:
                    self.state = "waiting"
                    wait_seconds = backoff_seconds(attempt, self._rng)
                attempt += 1
                if not stop.wait(wait_seconds):
                    self.stats.reconnects += 1
        finally:
            self.state = "stopped"

    def _one_connection(self, stop: threading.Event) -> float | None:
        """One connection's life. Returns how long to wait before the next, None for the usual backoff."""
        url = self._url()
        server = address_of(url)
        try:
            link = open_websocket(
                url,
                stop,
                headers=self._headers,
                origin=KITE_WEB_ORIGIN if "enctoken=" in url else None,
                frame_bytes_max=self._frame_bytes_max,
                timeout_seconds=self._connect_seconds,
            )
        except (websocket.WebSocketException, OSError, ValueError) as error:
            self.stats.errors += 1
            log.warning("websocket_connect_failed", server=server, reason=describe(error))
            status = getattr(error, "status_code", None)
            return self._refused(status, url, stop)
        if link is None:
            return None
        self.stats.connects += 1
        self._forbidden_in_a_row = 0
        try:
            self._fill_outbox_anew()
            self.state = "connected"
            log.info("websocket_connected", server=server, instruments=len(self._wanted))
            reason = self._receive(link, stop)
        finally:
            link.close(timeout=0)
            link.shutdown()  # type: ignore[no-untyped-call]  # close() leaves the socket open when the server closed first
        if reason:
            self.stats.errors += 1
            log.warning("websocket_lost", server=server, reason=reason)
        return None

    def _refused(self, status: int | None, url: str, stop: threading.Event) -> float | None:
        if status == 429:
            self.state = "throttled"
            self.stats.throttled += 1
            return self._throttled_seconds * (1 + self._rng.random() / 4)
        if status not in (401, 403):
            return None
        self.state = "forbidden"
        self.stats.forbidden += 1
        if self._on_forbidden is not None:
            self._on_forbidden(stop)
        doublings = min(self._forbidden_in_a_row, 16)
        self._forbidden_in_a_row += 1
        if self._url() != url and doublings == 0:
            return None  # there is a new session: try it soon, and once
        return min(FORBIDDEN_CAP_SECONDS, self._forbidden_seconds * 2.0**doublings)

    def _receive(self, link: websocket.WebSocket, stop: threading.Event) -> str:
        """Frames until `stop` ("") or until the connection is of no more use (why, for the log)."""
        stats = self.stats
        heard = ticked = time.monotonic()
        while not stop.is_set():
            opcode, data = -1, b""
            try:
                if self._outbox:
                    self._send_outbox(link)
            except (websocket.WebSocketException, OSError) as error:
                return describe(error)  # a message may have gone out by half
            try:
                opcode, data = receive(link)
            except websocket.WebSocketTimeoutException:
                pass  # nothing yet: look at the clocks below
            except (websocket.WebSocketException, OSError) as error:
                stats.oversized += isinstance(error, FrameTooLarge)
                return describe(error)
            now, at_ms = time.monotonic(), int(self._clock() * 1000)
            if opcode == websocket.ABNF.OPCODE_BINARY:
                heard = now
                stats.frames += 1
                stats.bytes += len(data)
                if len(data) == 1:
                    stats.heartbeats += 1
                else:
                    ticked = now
                    self._on_frame(data, at_ms)
            elif opcode == websocket.ABNF.OPCODE_TEXT:
                heard = now
                self._take_text(data)
            elif opcode == websocket.ABNF.OPCODE_CLOSE:
                return "the server closed the connection"
            if now - heard > self._stale_seconds:
                stats.stale += 1
                return "silent, not even a heartbeat"
            if now - ticked > self._tickless_seconds:
                ticked = now
                if self._wanted and self._expects_ticks is not None and self._expects_ticks(at_ms):
                    stats.stale += 1
                    return "heartbeats but no ticks while the market is open"
        return ""

    def _take_text(self, data: bytes) -> None:
        event = parse_text(data)
        self.stats.text_events += 1
        self.stats.text_invalid += event.kind == "invalid"
        if self._on_text is not None:
            self._on_text(event)


def _known_mode(mode: str) -> str:
    if mode not in MODES:
        raise SettingsError(f"{mode!r} is no Kite mode", "use ltp, quote or full")
    return mode
