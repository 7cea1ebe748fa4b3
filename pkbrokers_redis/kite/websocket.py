"""The websocket client of Kite's ticker: connect, subscribe, receive; after any loss connect again.

    {"a": "subscribe", "v": [408065]}
    {"a": "mode", "v": ["full", [408065]]}      only what is subscribed takes a mode
    {"a": "unsubscribe", "v": [408065]}         tokens are JSON numbers

Facts of Kite (https://kite.trade/docs/connect/v3/websocket/): at most 3,000 tokens a connection and 3
connections per key; a heartbeat of one byte arrives every couple of seconds even without a subscription; 403
is a dead session, 429 too many connections.

What the library websocket-client lacks:

* it accepts a frame of any size: `_BoundedFrames` refuses one beyond its bound before reading it;
* a server that sends single bytes blocks its reader: `receive` returns, and the next call resumes;
* its connect blocks in DNS, TCP and TLS: `open_websocket` also waits for a stop event;
* its exceptions may contain the URL, and so the session: `describe` returns a text without it.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import websocket

from pkbrokers_redis import logs
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.kite.protocol import TextEvent, parse_text
from pkbrokers_redis.kite.rest import KITE_WEB_ORIGIN, address_of

log = logs.get("kite")

TOKENS_PER_CONNECTION_MAX = 3000
CONNECTIONS_PER_KEY_MAX = 3
MODES = ("ltp", "quote", "full")
KITE_HEADERS = {"X-Kite-Version": "3", "User-Agent": "pkbrokers-redis"}

BACKOFF_BASE_SECONDS, BACKOFF_CAP_SECONDS = 0.5, 30.0
HEALTHY_SECONDS = 10.0  # a connection that lived this long restarts the backoff
FORBIDDEN_SECONDS, FORBIDDEN_CAP_SECONDS = 15.0, 300.0  # Kite locks accounts that retry a dead session often
SESSION_CHECK_SECONDS = 2.0  # meanwhile: whether another process has logged in
THROTTLED_SECONDS = 60.0
FRAME_BYTES_MAX = 16 * 2**20  # 3,000 full packets are 560 KB

Message = dict[str, object]


class Subscriptions:
    """What one connection is subscribed to. Any thread changes it; the connection's thread sends the
    messages.

    Bounds: 3,000 tokens; `renew` drops what was not sent on an earlier connection.
    """

    def __init__(self, mode: str, batch_size: int) -> None:
        """Prepare; `batch_size` is the number of tokens in one message. Raises SettingsError for the mode."""
        self._mode = check_mode(mode)
        self._batch_size = batch_size
        self._modes: dict[int, str] = {}  # token → mode; what every new connection subscribes
        self._outbox: list[Message] = []
        self._lock = threading.Lock()  # over both

    def __len__(self) -> int:
        return len(self._modes)

    @property
    def tokens(self) -> frozenset[int]:
        """The subscribed instruments."""
        with self._lock:
            return frozenset(self._modes)

    def add(self, tokens: Iterable[int], mode: str | None = None) -> None:
        """Subscribe instruments, or change their mode. Raises SettingsError beyond 3,000 or for the mode."""
        mode = check_mode(mode or self._mode)
        fresh = [int(token) for token in dict.fromkeys(tokens)]
        with self._lock:
            count = len(self._modes.keys() | set(fresh))
            if count > TOKENS_PER_CONNECTION_MAX:
                raise SettingsError(
                    f"{count} instruments are too many for one Kite connection",
                    f"give each connection at most {TOKENS_PER_CONNECTION_MAX}",
                )
            self._modes.update(dict.fromkeys(fresh, mode))
            self._outbox += self._subscribe(fresh, mode)

    def remove(self, tokens: Iterable[int]) -> None:
        """Unsubscribe instruments; unknown ones are ignored."""
        with self._lock:
            removed = [token for token in dict.fromkeys(tokens) if self._modes.pop(token, None)]
            self._outbox += self._unsubscribe(removed)

    def repeat(self, tokens: Iterable[int]) -> None:
        """Unsubscribe and subscribe silent instruments; unknown ones are ignored."""
        with self._lock:
            known = [token for token in dict.fromkeys(tokens) if token in self._modes]
            self._outbox += self._unsubscribe(known) + self._by_mode(known)

    def renew(self) -> None:
        """Subscribe everything on a new connection, instead of what waited to be sent."""
        with self._lock:
            self._outbox = self._by_mode(list(self._modes))

    def take(self) -> list[Message]:
        """Return the messages to send now."""
        if not self._outbox:  # called with every frame: no lock where there is nothing
            return []
        with self._lock:
            messages, self._outbox = self._outbox, []
            return messages

    def _by_mode(self, tokens: list[int]) -> list[Message]:
        messages: list[Message] = []
        for mode in MODES:
            messages += self._subscribe([token for token in tokens if self._modes[token] == mode], mode)
        return messages

    def _subscribe(self, tokens: list[int], mode: str) -> list[Message]:
        messages: list[Message] = []
        for batch in self._batches(tokens):
            messages.append({"a": "subscribe", "v": batch})
            messages.append({"a": "mode", "v": [mode, batch]})
        return messages

    def _unsubscribe(self, tokens: list[int]) -> list[Message]:
        return [{"a": "unsubscribe", "v": batch} for batch in self._batches(tokens)]

    def _batches(self, tokens: list[int]) -> list[list[int]]:
        return [tokens[start : start + self._batch_size] for start in range(0, len(tokens), self._batch_size)]


def check_mode(mode: str) -> str:
    """Return `mode`. Raises SettingsError for one that Kite does not have."""
    if mode not in MODES:
        raise SettingsError(f"{mode!r} is no Kite mode", "use ltp, quote or full")
    return mode


@dataclass(slots=True)
class SocketStats:
    """Counters since the client was made; any thread may read them."""

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
    stale: int = 0  # connections given up because they were silent
    oversized: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return asdict(self)


def backoff_seconds(attempt: int, rng: random.Random) -> float:
    """Return the wait before connect number `attempt` in a row (from 0): exponential, with full jitter."""
    ceiling = min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2.0 ** min(attempt, 16))
    return max(0.05, rng.random() * ceiling)


class ZerodhaWebSocketClient:
    """Receives the frames of up to 3,000 instruments on one connection.

    All callbacks are called in the thread of `run`; what they raise ends `run`.

    Args:
        url: of the websocket; a function is called for each connect, so that a new session is used.
        tokens: the instruments to subscribe.
        mode: `ltp`, `quote` or `full`.
        on_frame: gets every binary frame but heartbeats, and its receive time (epoch ms).
        on_text: gets every text frame.
        on_heartbeat: gets the receive time of each heartbeat.
        on_state: gets every change of `state`.
        on_forbidden: is called on 403 and may renew the session, or raise.
        expects_ticks: is called after each `tickless_seconds` without a tick; True makes it reconnect.
        headers: of the handshake.
        batch_size: tokens in one message.
        now_ms: the clock that stamps frames; time-outs use the machine's.
        rng: of the backoff's jitter.
        connect_seconds: time-out of a connect.
        stale_seconds: without any frame the connection is given up.
        tickless_seconds: see `expects_ticks`.
        forbidden_seconds: first wait after a 403 without a new session.
        throttled_seconds: wait after a 429.
        frame_bytes_max: a longer frame ends the connection.

    Raises:
        SettingsError: more than 3,000 tokens, or a mode that Kite does not have.

    Attributes:
        state: `stopped`, `connecting`, `connected`, `waiting`, `forbidden` (403) or `throttled` (429).
        stats: counters.

    Example:
        >>> stop = threading.Event()
        >>> client = ZerodhaWebSocketClient(url, [408065], on_frame=lambda frame, at_ms: print(len(frame)))
        >>> threading.Thread(target=client.run, args=(stop,)).start()
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
        self._end_reason = ""  # why this connection is to end
        self.state = "stopped"
        self.stats = SocketStats()
        self.subscribe(tokens)

    # -- any thread, connected or not --------------------------------------------------------------------

    @property
    def tokens(self) -> frozenset[int]:
        """The instruments subscribed, or to be subscribed by the next connect."""
        return self._subscriptions.tokens

    def subscribe(self, tokens: Iterable[int], mode: str | None = None) -> None:
        """Add instruments, or change their mode, within half a second and on every reconnect.

        Raises:
            SettingsError: more than 3,000 on this connection, or a mode that Kite does not have.
        """
        self._subscriptions.add(tokens, mode)

    def unsubscribe(self, tokens: Iterable[int]) -> None:
        """Remove instruments within half a second; unknown ones are ignored."""
        self._subscriptions.remove(tokens)

    def resubscribe(self, tokens: Iterable[int]) -> None:
        """Unsubscribe and subscribe silent instruments; unknown ones are ignored."""
        self._subscriptions.repeat(tokens)

    def reconnect(self, reason: str) -> None:
        """Replace this connection within half a second; without one nothing happens."""
        if self.state == "connected":
            self._end_reason = reason

    # -- the loop ----------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Receive until `stop` is set; return within about a second of it.

        Losses and refusals are counted and logged, and end with a new connection.
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
        """Connect and receive; return how long to wait before the next one, None for the usual backoff."""
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
        except Exception as error:  # the library lets more through: those of a cookie's or a URL's parser
            self.stats.errors += 1
            log.warning("websocket_connect_failed", server=server, reason=describe(error))
            return self._handle_refusal(getattr(error, "status_code", None), url, stop)
        if link is None:
            return None
        self.stats.connects += 1
        self._forbidden_in_a_row = 0
        try:
            self._subscriptions.renew()
            self._end_reason = ""
            self._enter("connected")
            log.info("websocket_connected", server=server, instruments=len(self._subscriptions))
            reason = self._receive(link, stop)
        finally:
            link.close(timeout=0)
            # close() leaves the socket open when the server closed first
            link.shutdown()  # type: ignore[no-untyped-call]
        if reason:
            self.stats.errors += 1
            log.warning("websocket_lost", server=server, reason=reason)
        return None

    def _handle_refusal(self, status: int | None, url: str, stop: threading.Event) -> float | None:
        """Return how long to wait after a handshake that failed with this HTTP status."""
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
            return None  # a new session: try it soon, once
        wait_seconds = min(FORBIDDEN_CAP_SECONDS, self._forbidden_seconds * 2.0**doublings)
        refused = self._url()
        while wait_seconds > SESSION_CHECK_SECONDS and not stop.wait(SESSION_CHECK_SECONDS):
            wait_seconds -= SESSION_CHECK_SECONDS
            if self._url() != refused:
                return None  # another process has logged in
        return wait_seconds

    def _receive(self, link: websocket.WebSocket, stop: threading.Event) -> str:
        """Receive until `stop` ("") or until the connection is of no more use (why, for the log)."""
        stats = self.stats
        received_at = ticked_at = time.monotonic()
        while not stop.is_set():
            if self._end_reason:
                return self._end_reason
            opcode, data = -1, b""
            try:
                # Only this thread sends: a TLS connection is not for two.
                for message in self._subscriptions.take():
                    link.send(msgspec.json.encode(message).decode())
            except (websocket.WebSocketException, OSError) as error:
                return describe(error)  # half of a message may have been sent
            try:
                opcode, data = receive(link)
            except websocket.WebSocketTimeoutException:
                pass  # nothing yet: check the clocks below
            except (websocket.WebSocketException, OSError) as error:
                stats.oversized += isinstance(error, FrameTooLarge)
                return describe(error)
            now, at_ms = time.monotonic(), int(self._now_ms())
            if opcode == websocket.ABNF.OPCODE_BINARY:
                received_at = now
                stats.frames += 1
                stats.bytes += len(data)
                if len(data) == 1:
                    stats.heartbeats += 1
                    if self._on_heartbeat is not None:
                        self._on_heartbeat(at_ms)
                else:
                    ticked_at = now
                    self._on_frame(data, at_ms)
            elif opcode == websocket.ABNF.OPCODE_TEXT:
                received_at = now
                self._receive_text(data)
            elif opcode == websocket.ABNF.OPCODE_CLOSE:
                return "the server closed the connection"
            if now - received_at > self._stale_seconds:
                stats.stale += 1
                return "silent, not even a heartbeat"
            if now - ticked_at > self._tickless_seconds:
                ticked_at = now
                expects = self._expects_ticks
                if len(self._subscriptions) and expects is not None and expects(at_ms):
                    stats.stale += 1
                    return "heartbeats but no ticks while the market is open"
        return ""

    def _receive_text(self, data: bytes) -> None:
        event = parse_text(data)
        self.stats.text_events += 1
        self.stats.text_invalid += event.kind == "invalid"
        if self._on_text is not None:
            self._on_text(event)


POLL_SECONDS = 0.25  # how long a read or a wait may ignore a stop


class FrameTooLarge(websocket.WebSocketException):
    """Raised when the server announces a frame, or a fragmented message, beyond the bound."""


class _BoundedFrames(websocket.frame_buffer):
    """The library's frame reader with a size bound, and a deadline beyond which a read is postponed.

    A frame that arrived in part stays in the reader: the next read resumes it. (Reading more than the
    library's 16 KB at once was measured and gains nothing: ~25 µs a 90 KB frame.)
    """

    def __init__(self, link: websocket.WebSocket, frame_bytes_max: int) -> None:
        super().__init__(self._recv_in_time, skip_utf8_validation=True)
        self._link = link
        self._bytes_max = frame_bytes_max
        self.deadline = 0.0  # monotonic

    def _recv_in_time(self, size: int) -> bytes:
        if time.monotonic() > self.deadline:
            raise websocket.WebSocketTimeoutException("postponed")
        data: bytes = self._link._recv(size)  # type: ignore[no-untyped-call]
        return data

    def recv_length(self) -> None:
        super().recv_length()
        if (self.length or 0) > self._bytes_max:
            raise FrameTooLarge


class _BoundedMessage(websocket.continuous_frame):
    """The library's joiner of fragments, with the same bound for the whole."""

    def __init__(self, message_bytes_max: int) -> None:
        super().__init__(fire_cont_frame=False, skip_utf8_validation=True)
        self._bytes_max = message_bytes_max

    def add(self, frame: Any) -> None:
        if self.cont_data and len(self.cont_data[1]) + len(frame.data) > self._bytes_max:
            raise FrameTooLarge
        super().add(frame)


def open_websocket(
    url: str,
    stop: threading.Event,
    *,
    headers: Mapping[str, str],
    origin: str | None = None,
    frame_bytes_max: int,
    timeout_seconds: float,
) -> websocket.WebSocket | None:
    """Return a connected websocket whose reads time out after POLL_SECONDS; None when `stop` is set first.

    Raise Exception what websocket-client, ssl or the socket raise. Show `describe(error)`, never its own
    text; TimeoutError after `timeout_seconds`.
    """
    # No SO_RCVBUF: a fixed size is capped low on most systems and switches the kernel's own tuning off.
    link = websocket.WebSocket(skip_utf8_validation=True)
    link.frame_buffer = _BoundedFrames(link, frame_bytes_max)
    link.cont_frame = _BoundedMessage(frame_bytes_max)
    link.settimeout(timeout_seconds)
    failures: list[BaseException] = []
    done, abandoned = threading.Event(), threading.Event()

    def connect() -> None:
        try:
            # No redirects: the URL carries the session, and Kite sends none.
            link.connect(  # type: ignore[no-untyped-call]
                url, header=dict(headers), origin=origin, redirect_limit=0
            )
        except BaseException as error:
            answer = link.handshake_response
            if answer is None or answer.status == 101:
                failures.append(error)
            else:  # a redirect, which the library reports without its status
                failures.append(websocket.WebSocketBadStatusException("", answer.status))
        if abandoned.is_set():
            _wake(link)
        done.set()

    # In a thread of its own, as nothing interrupts a name look-up.
    threading.Thread(target=connect, name="kite-connect", daemon=True).start()
    deadline = time.monotonic() + timeout_seconds
    while not done.wait(0.02):
        if stop.is_set() or time.monotonic() > deadline:
            abandoned.set()
            _wake(link)
            if stop.is_set():
                return None
            raise TimeoutError
    if failures:
        raise failures[0]
    link.settimeout(POLL_SECONDS)
    return link


def receive(link: websocket.WebSocket) -> tuple[int, bytes]:
    """Return the next message as `(opcode, data)`; wait for at most about 2 × POLL_SECONDS.

    Raise WebSocketTimeoutException: no message is whole by then. Its first part is kept for the next call.
    """
    if isinstance(link.frame_buffer, _BoundedFrames):
        link.frame_buffer.deadline = time.monotonic() + POLL_SECONDS
    opcode, data = link.recv_data(control_frame=True)
    return opcode, data


def _wake(link: websocket.WebSocket) -> None:
    """End a connect that is in its handshake; one still in DNS or TCP ends by itself."""
    held = link.sock
    if held is None:
        return
    try:
        held.shutdown(socket.SHUT_RDWR)  # close() alone does not end another thread's read
        held.close()
    except OSError:
        pass  # it was closed already


def describe(error: BaseException) -> str:
    """Return an error as text without the URL: its kind, and the system's or HTTP's own code."""
    if isinstance(error, websocket.WebSocketBadStatusException):
        return f"HTTP {error.status_code}"
    if isinstance(error, FrameTooLarge):
        return "a frame beyond the size bound"
    if isinstance(error, websocket.WebSocketConnectionClosedException):
        return "connection lost"
    if isinstance(error, TimeoutError | websocket.WebSocketTimeoutException):
        return "timed out"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate refused ({error.verify_message})"
    if isinstance(error, socket.gaierror | websocket.WebSocketAddressException):
        return "host name not found"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return type(error).__name__
