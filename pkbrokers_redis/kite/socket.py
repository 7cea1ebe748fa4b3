"""The websocket client: connect, subscribe, receive; on any loss connect again. One per connection.

Facts of Kite (https://kite.trade/docs/connect/v3/websocket/): at most 3,000 tokens a connection and 3
connections per key; tokens must be JSON numbers; a mode is set only after subscribing; a heartbeat of one
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
from pkbrokers_redis.kite.subscriptions import TOKENS_PER_CONNECTION_MAX, Subscriptions
from pkbrokers_redis.kite.text_frames import TextEvent, parse_text
from pkbrokers_redis.kite.transport import FrameTooLarge, describe, open_websocket, receive
from pkbrokers_redis.kite.urls import KITE_WEB_ORIGIN, address_of, url_for

__all__ = [
    "TOKENS_PER_CONNECTION_MAX",
    "SocketStats",
    "ZerodhaWebSocketClient",
    "backoff_seconds",
    "url_for",
]

log = logs.get("kite")

CONNECTIONS_PER_KEY_MAX = 3
KITE_HEADERS = {"X-Kite-Version": "3", "User-Agent": "pkbrokers-redis"}

BACKOFF_BASE_SECONDS, BACKOFF_CAP_SECONDS = 0.5, 30.0
HEALTHY_SECONDS = 10.0  # a connection that lived this long starts the backoff anew
FORBIDDEN_SECONDS, FORBIDDEN_CAP_SECONDS = 15.0, 300.0  # Kite locks out who hammers a dead session
SESSION_LOOK_SECONDS = 2.0  # while we wait so long: whether somebody has logged in
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

    `on_frame(frame, at_ms)` gets every binary frame but heartbeats, `on_heartbeat(at_ms)` those,
    `on_text(event)` every text frame, `on_state(state)` every change of `state`, all in the thread of `run`:
    what they raise ends `run`. `url` may be a function, called for each connect, so that a new session is
    picked up. `on_forbidden(stop)` is called on 403 and may renew the session or raise.
    `expects_ticks(at_ms)` is asked after each `tickless_seconds` without a tick: True says that heartbeats
    alone are silence too, and the connection is given up. `now_ms` stamps frames (epoch ms); time-outs are
    the machine's.
    """

    def __init__(
        self,
        url: str | Callable[[], str],
        tokens: Iterable[int] = (),
        mode: str = "full",
        *,
        on_frame: Callable[[bytes, int], None],
        on_text: Callable[[TextEvent], None] | None = None,
        on_heartbeat: Callable[[int], None] | None = None,
        on_state: Callable[[str], None] | None = None,
        on_forbidden: Callable[[threading.Event], None] | None = None,
        expects_ticks: Callable[[int], bool] | None = None,
        headers: Mapping[str, str] = KITE_HEADERS,
        batch_size: int = 500,
        now_ms: Callable[[], float] = lambda: time.time() * 1000,
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
        self._on_heartbeat = on_heartbeat
        self._on_state = on_state
        self._on_forbidden = on_forbidden
        self._expects_ticks = expects_ticks
        self._headers = dict(headers)
        self._now_ms = now_ms
        self._rng = rng or random.Random()
        self._connect_seconds = connect_seconds
        self._stale_seconds = stale_seconds
        self._tickless_seconds = tickless_seconds
        self._forbidden_seconds = forbidden_seconds
        self._throttled_seconds = throttled_seconds
        self._frame_bytes_max = frame_bytes_max

        self._subscriptions = Subscriptions(mode, batch_size)
        self._forbidden_in_a_row = 0
        self._given_up = ""  # why this connection is to end
        self.state = "stopped"  # stopped, connecting, connected, waiting, forbidden, throttled
        self.stats = SocketStats()
        self.subscribe(tokens)

    # --- from any thread, connected or not -----------------------------------------------------------

    @property
    def tokens(self) -> frozenset[int]:
        """The instruments subscribed, or to be subscribed on the next connect."""
        return self._subscriptions.tokens

    def subscribe(self, tokens: Iterable[int], mode: str | None = None) -> None:
        """Add instruments (or change their mode), within half a second and on every reconnect.

        Raises SettingsError beyond 3,000 on this connection, or for a mode Kite does not have.
        """
        self._subscriptions.add(tokens, mode)

    def unsubscribe(self, tokens: Iterable[int]) -> None:
        """Drop instruments, within half a second and on every reconnect; strangers are ignored."""
        self._subscriptions.remove(tokens)

    def resubscribe(self, tokens: Iterable[int]) -> None:
        """Unsubscribe and subscribe anew, for instruments that fell silent; strangers are ignored."""
        self._subscriptions.repeat(tokens)

    def reconnect(self, why: str) -> None:
        """Give this connection up and open another, within half a second. Nothing where there is none."""
        if self.state == "connected":
            self._given_up = why

    # --- the loop ------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Receive until `stop` is set; returns within about a second of it.

        Losses and refusals are counted, logged and mended here. What the callbacks raise comes through.
        """
        attempt = 0
        try:
            while not stop.is_set():
                self._enter("connecting")
                started = time.monotonic()
                wait_seconds = self._one_connection(stop)
                if time.monotonic() - started >= HEALTHY_SECONDS:
                    attempt = 0
                if wait_seconds is None:
                    self._enter("waiting")
                    wait_seconds = backoff_seconds(attempt, self._rng)
                attempt += 1
                if not stop.wait(wait_seconds):
                    self.stats.reconnects += 1
        finally:
            self._enter("stopped")

    def _enter(self, state: str) -> None:
        self.state = state
        if self._on_state is not None:
            self._on_state(state)

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
        except Exception as error:  # the library lets others through: those of a cookie's or a URL's parser
            self.stats.errors += 1
            log.warning("websocket_connect_failed", server=server, reason=describe(error))
            status = getattr(error, "status_code", None)
            return self._refused(status, url, stop)
        if link is None:
            return None
        self.stats.connects += 1
        self._forbidden_in_a_row = 0
        try:
            self._subscriptions.renew()
            self._given_up = ""
            self._enter("connected")
            log.info("websocket_connected", server=server, instruments=len(self._subscriptions))
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
            self._enter("throttled")
            self.stats.throttled += 1
            return self._throttled_seconds * (1 + self._rng.random() / 4)
        if status not in (401, 403):
            return None
        self._enter("forbidden")
        self.stats.forbidden += 1
        if self._on_forbidden is not None:
            self._on_forbidden(stop)
        doublings = min(self._forbidden_in_a_row, 16)
        self._forbidden_in_a_row += 1
        if self._url() != url and doublings == 0:
            return None  # there is a new session: try it soon, and once
        wait_seconds = min(FORBIDDEN_CAP_SECONDS, self._forbidden_seconds * 2.0**doublings)
        refused = self._url()
        while wait_seconds > SESSION_LOOK_SECONDS and not stop.wait(SESSION_LOOK_SECONDS):
            wait_seconds -= SESSION_LOOK_SECONDS
            if self._url() != refused:
                return None  # somebody has logged in
        return wait_seconds

    def _receive(self, link: websocket.WebSocket, stop: threading.Event) -> str:
        """Frames until `stop` ("") or until the connection is of no more use (why, for the log)."""
        stats = self.stats
        heard = ticked = time.monotonic()
        while not stop.is_set():
            if self._given_up:
                return self._given_up
            opcode, data = -1, b""
            try:
                # Only this thread sends, as a TLS connection is not for two.
                for message in self._subscriptions.take():
                    link.send(msgspec.json.encode(message).decode())
            except (websocket.WebSocketException, OSError) as error:
                return describe(error)  # a message may have gone out by half
            try:
                opcode, data = receive(link)
            except websocket.WebSocketTimeoutException:
                pass  # nothing yet: look at the clocks below
            except (websocket.WebSocketException, OSError) as error:
                stats.oversized += isinstance(error, FrameTooLarge)
                return describe(error)
            now, at_ms = time.monotonic(), int(self._now_ms())
            if opcode == websocket.ABNF.OPCODE_BINARY:
                heard = now
                stats.frames += 1
                stats.bytes += len(data)
                if len(data) == 1:
                    stats.heartbeats += 1
                    if self._on_heartbeat is not None:
                        self._on_heartbeat(at_ms)
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
                expects = self._expects_ticks
                if len(self._subscriptions) and expects is not None and expects(at_ms):
                    stats.stale += 1
                    return "heartbeats but no ticks while the market is open"
        return ""

    def _take_text(self, data: bytes) -> None:
        event = parse_text(data)
        self.stats.text_events += 1
        self.stats.text_invalid += event.kind == "invalid"
        if self._on_text is not None:
            self._on_text(event)
