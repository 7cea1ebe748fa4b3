"""Text frames of Kite's websocket → typed events. Pure; nothing a server sends makes it raise.

    {"type": "order", "data": {…the postback…}}
    {"type": "error", "data": "…"}
    {"type": "message", "data": "…"}
    {"type": "instruments_meta", "data": {"count": 86481, "etag": "W/…"}}
    {"type": "app_code", "timestamp": "2025-08-04T13:50:28+05:30"}      no data key

The first three are documented (https://kite.trade/docs/connect/v3/websocket/), the others arrive on
every connect.

What one connection is subscribed to: the instruments wanted, and the messages that bring the server there.

    {"a": "subscribe", "v": [408065]}
    {"a": "mode", "v": ["full", [408065]]}      only what is subscribed takes a mode
    {"a": "unsubscribe", "v": [408065]}         tokens are JSON numbers

Source: https://kite.trade/docs/connect/v3/websocket/

The websocket client: connect, subscribe, receive; on any loss connect again. One per connection.

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
from typing import Any, ClassVar

import msgspec
import websocket

from pkbrokers_redis import logs
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.kite.rest import KITE_WEB_ORIGIN, address_of, url_for
from pkbrokers_redis.kite.transport import FrameTooLarge, describe, open_websocket, receive

EVIDENCE_CHARS_MAX = 200  # of a frame we do not understand, for the log


@dataclass(frozen=True, slots=True)
class OrderUpdate:
    """An order postback; `data` is Kite's object as it came."""

    kind: ClassVar[str] = "order"
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerError:
    """The server refuses something we asked for."""

    kind: ClassVar[str] = "error"
    text: str


@dataclass(frozen=True, slots=True)
class Notice:
    """A message or alert of the broker."""

    kind: ClassVar[str] = "message"
    text: str


@dataclass(frozen=True, slots=True)
class InstrumentsMeta:
    """Size and version of the instrument master as the server has it."""

    kind: ClassVar[str] = "instruments_meta"
    count: int | None
    etag: str | None


@dataclass(frozen=True, slots=True)
class AppCode:
    """Version stamp of Kite's web application."""

    kind: ClassVar[str] = "app_code"
    timestamp: str | None


@dataclass(frozen=True, slots=True)
class Unknown:
    """Well-formed, of a type that nobody has told us about."""

    kind: ClassVar[str] = "unknown"
    type: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """Not UTF-8, not JSON, or not of the shape its type has; `evidence` is its beginning."""

    kind: ClassVar[str] = "invalid"
    reason: str
    evidence: str


TextEvent = OrderUpdate | ServerError | Notice | InstrumentsMeta | AppCode | Unknown | Invalid
TEXT_KINDS = ("order", "error", "message", "instruments_meta", "app_code", "unknown", "invalid")

_json = msgspec.json.Decoder()


def parse_text(frame: bytes | str) -> TextEvent:
    """One text frame → its event; what it is not becomes `Invalid` with a reason."""
    try:
        content = _json.decode(frame)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return Invalid(f"no JSON ({type(error).__name__})", _evidence(frame))
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        return Invalid("no object with a type", _evidence(frame))
    return _event(content["type"], content, frame)


def _event(kind: str, content: dict[str, Any], frame: bytes | str) -> TextEvent:
    data = content.get("data")
    match kind:
        case "order":
            return OrderUpdate(data) if isinstance(data, dict) else _wrong(kind, frame)
        case "error":
            return ServerError(data) if isinstance(data, str) else _wrong(kind, frame)
        case "message":
            return Notice(data) if isinstance(data, str) else _wrong(kind, frame)
        case "instruments_meta":
            if not isinstance(data, dict):
                return _wrong(kind, frame)
            count, etag = data.get("count"), data.get("etag")
            return InstrumentsMeta(
                count if isinstance(count, int) and not isinstance(count, bool) else None,
                etag if isinstance(etag, str) else None,
            )
        case "app_code":
            stamp = content.get("timestamp")
            return AppCode(stamp if isinstance(stamp, str) else None)
    return Unknown(kind[:EVIDENCE_CHARS_MAX], _evidence(frame))


def _wrong(kind: str, frame: bytes | str) -> Invalid:
    return Invalid(f"{kind}: its data is of another type", _evidence(frame))


def _evidence(frame: bytes | str) -> str:
    if isinstance(frame, bytes):
        return frame[:EVIDENCE_CHARS_MAX].decode("utf-8", "backslashreplace")[:EVIDENCE_CHARS_MAX]
    return frame[:EVIDENCE_CHARS_MAX]


TOKENS_PER_CONNECTION_MAX = 3000
MODES = ("ltp", "quote", "full")

Message = dict[str, object]


class Subscriptions:
    """Any thread may change them; the one that owns the connection takes the messages and sends them.

    Bounded: at most 3,000 tokens, and `renew` drops what was not sent on an earlier connection.
    """

    def __init__(self, mode: str, batch_size: int) -> None:
        self._mode = known_mode(mode)
        self._batch_size = batch_size
        self._wanted: dict[int, str] = {}  # token → mode; what every new connection subscribes
        self._outbox: list[Message] = []
        self._lock = threading.Lock()  # over both

    def __len__(self) -> int:
        return len(self._wanted)

    @property
    def tokens(self) -> frozenset[int]:
        """The instruments wanted."""
        with self._lock:
            return frozenset(self._wanted)

    def add(self, tokens: Iterable[int], mode: str | None = None) -> None:
        """Want instruments, or change their mode. Raises SettingsError beyond 3,000 or for a strange mode."""
        mode = known_mode(mode or self._mode)
        fresh = [int(token) for token in dict.fromkeys(tokens)]
        with self._lock:
            count = len(self._wanted.keys() | set(fresh))
            if count > TOKENS_PER_CONNECTION_MAX:
                raise SettingsError(
                    f"{count} instruments are too many for one Kite connection",
                    f"give each connection at most {TOKENS_PER_CONNECTION_MAX}",
                )
            self._wanted.update(dict.fromkeys(fresh, mode))
            self._outbox += self._subscribe(fresh, mode)

    def remove(self, tokens: Iterable[int]) -> None:
        """Want them no more; strangers are ignored."""
        with self._lock:
            gone = [token for token in dict.fromkeys(tokens) if self._wanted.pop(token, None)]
            self._outbox += self._unsubscribe(gone)

    def repeat(self, tokens: Iterable[int]) -> None:
        """Unsubscribe and subscribe anew, for instruments that fell silent; strangers are ignored."""
        with self._lock:
            ours = [token for token in dict.fromkeys(tokens) if token in self._wanted]
            self._outbox += self._unsubscribe(ours) + self._by_mode(ours)

    def renew(self) -> None:
        """A new connection knows nothing: everything wanted replaces what waited to be sent."""
        with self._lock:
            self._outbox = self._by_mode(list(self._wanted))

    def take(self) -> list[Message]:
        """The messages to send now."""
        if not self._outbox:  # asked with every frame: no lock where there is nothing
            return []
        with self._lock:
            messages, self._outbox = self._outbox, []
            return messages

    def _by_mode(self, tokens: list[int]) -> list[Message]:
        messages: list[Message] = []
        for mode in MODES:
            messages += self._subscribe([token for token in tokens if self._wanted[token] == mode], mode)
        return messages

    def _subscribe(self, tokens: list[int], mode: str) -> list[Message]:
        messages: list[Message] = []
        for part in self._batches(tokens):
            messages.append({"a": "subscribe", "v": part})
            messages.append({"a": "mode", "v": [mode, part]})
        return messages

    def _unsubscribe(self, tokens: list[int]) -> list[Message]:
        return [{"a": "unsubscribe", "v": part} for part in self._batches(tokens)]

    def _batches(self, tokens: list[int]) -> list[list[int]]:
        return [tokens[start : start + self._batch_size] for start in range(0, len(tokens), self._batch_size)]


def known_mode(mode: str) -> str:
    """`mode` itself. Raises SettingsError for one that Kite does not have."""
    if mode not in MODES:
        raise SettingsError(f"{mode!r} is no Kite mode", "use ltp, quote or full")
    return mode


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
