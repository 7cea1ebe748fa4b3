"""The websockets of an ingest worker: one connection and one thread per feed, and what is known of each.

    FeedSession      an api key's Kite session, shared by its sockets
    FeedLiveness     until when a feed was received without a hole, and the outages that are over
    FeedConnection   a feed being read: socket, thread, liveness
    Connections      opens, changes and closes them; frames go into the frame buffer

A session is the newest one at each connect. After a 403 one worker of all logs in while the others wait
(`kite.session`); a failure is one log line, and the socket looks for a session of another process, slowly.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.errors import LoginNeeded, PkbError
from pkbrokers_redis.ingest.buffer import FrameBuffer
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.kite.protocol import TextEvent
from pkbrokers_redis.kite.rest import KITE_WS_URL, address_of, url_for
from pkbrokers_redis.kite.session import SessionManager
from pkbrokers_redis.kite.websocket import ZerodhaWebSocketClient
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.auth import Session, load_session

log = logs.get("ingest")

MUTE_MS_MIN = 5_000  # heartbeats alone for less are no silence
USUAL_SILENCES = 4  # … nor for less than so many of the feed's usual silences
USUAL_HALF_LIFE_MS = 60_000
USUAL_MS_MAX = 600_000  # longer silences are nights and outages, not the feed's rhythm
OUTAGES_MAX = 1_000  # of a feed, not yet reported; then the last ones are united
STOP_SECONDS_MAX = 1.0  # a socket ends within half of it; one that waits for a full buffer is left behind
TICKS_BYTES_MIN = 12  # the shortest frame with a packet: count, length, 8 bytes
MUTE_CHECK_SECONDS = 1.0  # how often a socket without ticks asks whether it is mute


class FeedSession:
    """One api key's session, shared by its sockets (three at most). Any thread may call it."""

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[], redis.Redis],
        *,
        manager: SessionManager | None = None,
    ) -> None:
        """Prepare; `connect` returns a client of the store that gives up soon."""
        self._settings = settings
        self._connect = connect
        self._client: redis.Redis | None = None
        self._lock = threading.Lock()  # over _client
        self._manager = manager or SessionManager(settings, connect)
        self._last_error = ""  # logged once
        self.session: Session | None = None  # None: a local server that needs none

    @property
    def address(self) -> str:
        """Where the sockets connect to, without secrets, for logs."""
        return address_of(url_for(self._settings, self.session))

    def open(self, stop: threading.Event) -> None:
        """Get a session. Raises PkbError where there is none and Kite needs one."""
        try:
            self.session = self._manager.current(stop)
        except LoginNeeded:
            if self._settings.kite_ws_url.rstrip("/") == KITE_WS_URL:
                raise

    def newest(self) -> Session | None:
        """Return the session for the next connect: that in Redis, else the last one. Never logs in."""
        with self._lock:
            try:
                self._client = self._client or self._connect()
                shared = load_session(self._client, self._settings.keys)
            except (redis.RedisError, PkbError):
                self._client = shared = None
        api_key = self._settings.kite_api_key
        if shared is not None and (shared.kind == "enctoken" or not api_key or shared.api_key == api_key):
            self.session = shared
        return self.session

    def renew(self, failed: Session | None, stop: threading.Event) -> None:
        """Replace a session that Kite refused, or log once why that is impossible."""
        try:
            self.session = self._manager.renew(failed, stop) if failed else self._manager.current(stop)
            self._last_error = ""
        except PkbError as error:
            if not stop.is_set() and str(error) != self._last_error:
                self._last_error = str(error)
                log.error("session_missing", reason=error.message, hint=error.hint)

    def for_socket(self) -> SocketSession:
        """Return what one socket needs."""
        return SocketSession(self, self._settings)


class SocketSession:
    """The session of one socket. It remembers which one it used: a 403 is about that one."""

    def __init__(self, shared: FeedSession, settings: Settings) -> None:
        self._shared = shared
        self._settings = settings
        self._used: Session | None = None

    def url(self) -> str:
        """Return the URL for the next connect. It holds the session: a secret."""
        self._used = self._shared.newest()
        return url_for(self._settings, self._used)

    def on_forbidden(self, stop: threading.Event) -> None:
        """Renew the session: Kite answered 403 to the last `url`."""
        self._shared.renew(self._used, stop)


class Outage(NamedTuple):
    """Nothing was received of a feed in [from_ms, to_ms), market time."""

    from_ms: int
    to_ms: int


class FeedLiveness:
    """When one feed was received, and its outages. Its connection's thread writes, others read.

        last sign of life ─┐                     ┌─ first tick frame after it
        ───●───●───●───●───[      outage         )●───●───

    A sign of life is any frame, heartbeats too. Where ticks have been missing for far longer than usual, the
    last tick counts: heartbeats prove a connection, not a subscription. A frame that could not be kept
    (memory and disk full) counts as not received. All times are market time, epoch ms.
    """

    def __init__(self, received_to_ms: float | None = None) -> None:
        """Begin; `received_to_ms` is what the feed's last reader recorded, None if there was none."""
        self._down_ms = received_to_ms  # since when an outage lasts, None if none does
        self._frame_ms = 0.0  # the last frame, 0 before any
        self._outages: deque[Outage] = deque()
        self.ticked_ms = 0.0  # the last tick frame, 0 before any
        self.usual_ms = 0.0  # the longest recent silence between tick frames

    def note_tick(self, at_ms: float, is_kept: bool = True) -> None:
        """Record a frame with ticks; `is_kept` says that it will reach Redis."""
        if not is_kept:
            self.note_loss()
            return
        if self._down_ms is not None:
            outage = Outage(int(self._down_ms), int(at_ms))
            if len(self._outages) >= OUTAGES_MAX:
                outage = Outage(self._outages.pop().from_ms, outage.to_ms)
            self._outages.append(outage)
            self._down_ms = None
        elif self.ticked_ms:
            silence_ms = at_ms - self.ticked_ms
            if 0 <= silence_ms < USUAL_MS_MAX:
                self.usual_ms = max(silence_ms, self.usual_ms * 0.5 ** (silence_ms / USUAL_HALF_LIFE_MS))
        self._frame_ms = self.ticked_ms = at_ms

    def note_heartbeat(self, at_ms: float) -> None:
        """Record a heartbeat."""
        if self._down_ms is None:
            self._frame_ms = at_ms

    def note_loss(self) -> None:
        """Record a lost connection or frame: an outage begins, unless one lasts already."""
        if self._down_ms is None and self._frame_ms:
            self._down_ms = self.received_to_ms

    @property
    def received_to_ms(self) -> float:
        """Until when the feed was received without a hole; 0 before any frame."""
        if self._down_ms is not None:
            return self._down_ms
        return self.ticked_ms if self._frame_ms - self.ticked_ms > self.mute_ms else self._frame_ms

    @property
    def mute_ms(self) -> float:
        """A silence of ticks that is longer than this is unusual."""
        return max(MUTE_MS_MIN, USUAL_SILENCES * self.usual_ms)

    @property
    def first_outage(self) -> Outage | None:
        """The oldest outage that is over and not yet reported."""
        return self._outages[0] if self._outages else None

    def drop_outage(self) -> None:
        """Forget the first outage: it is reported."""
        self._outages.popleft()


@dataclass(eq=False)
class FeedConnection:
    """A feed being read. `is_mute` is set by the watchdog and makes the socket reconnect."""

    feed: Feed
    liveness: FeedLiveness
    connected_ms: float = 0.0  # market time
    is_mute: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    socket: ZerodhaWebSocketClient = field(init=False)
    thread: threading.Thread = field(init=False)


class Connections:
    """The connections of one worker. `open`, `change` and `close` in the leases' thread, the rest in any.

    Each connection's thread (`feed-<n>`) runs its socket and puts frames into the buffer.
    """

    def __init__(
        self,
        sessions: Sequence[FeedSession],
        mode: str,
        buffer: FrameBuffer,
        *,
        now_ms: Callable[[], float],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Prepare; `now_ms` is market time, `on_failure` is called with what a connection's thread raises."""
        self._sessions = sessions
        self._mode = mode
        self._buffer = buffer
        self._now_ms = now_ms
        self._on_failure = on_failure
        self._lock = threading.Lock()  # over the next two
        self._connections: dict[int, FeedConnection] = {}
        self._closed_totals: Counter[str] = Counter()  # the counters of sockets that ended
        self._once = logs.Once()

    def open(self, feed: Feed, liveness: FeedLiveness) -> None:
        """Start to read a feed."""
        session = self._sessions[feed.session].for_socket()
        connection = FeedConnection(feed, liveness)
        connection.socket = ZerodhaWebSocketClient(
            session.url,
            feed.tokens,
            self._mode,
            on_frame=lambda frame, at_ms: self._receive(connection, frame, at_ms),
            on_text=self._log_text,
            on_heartbeat=liveness.note_heartbeat,
            on_state=lambda state: self._enter(connection, state),
            on_forbidden=session.on_forbidden,
            expects_ticks=lambda _: connection.is_mute,
            tickless_seconds=MUTE_CHECK_SECONDS,
            now_ms=self._now_ms,
        )
        name = f"feed-{feed.number}"
        connection.thread = threading.Thread(target=self._run, args=(connection,), name=name, daemon=True)
        with self._lock:
            self._connections[feed.number] = connection
        connection.thread.start()

    def change(self, feed: Feed) -> None:
        """Subscribe and unsubscribe on a feed's connection: it has other instruments now."""
        with self._lock:
            connection = self._connections.get(feed.number)
        if connection is None:
            return
        before, after = set(connection.feed.tokens), set(feed.tokens)
        connection.feed = feed
        connection.socket.unsubscribe(before - after)  # first: a connection takes at most 3,000
        connection.socket.subscribe(after - before)
        log.info("feed_changed", feed=feed.number, added=len(after - before), removed=len(before - after))

    def close(self, numbers: Collection[int]) -> list[FeedConnection]:
        """Stop to read feeds; return their connections, which are closed as a rule."""
        with self._lock:
            connections = [self._connections.pop(n) for n in numbers if n in self._connections]
        for connection in connections:
            connection.stop.set()
        for connection in connections:
            connection.thread.join(STOP_SECONDS_MAX)
        with self._lock:
            for connection in connections:
                self._closed_totals.update(connection.socket.stats.as_dict())
        return connections

    def all(self) -> list[FeedConnection]:
        """Return the connections of the feeds being read."""
        with self._lock:
            return list(self._connections.values())

    def figures(self) -> dict[str, int]:
        """Return the sockets' counters added up (`socket_…`), and how many are `connected` now."""
        with self._lock:
            totals = self._closed_totals.copy()
        sockets = [connection.socket for connection in self.all()]
        for socket in sockets:
            totals.update(socket.stats.as_dict())
        figures = {f"socket_{name}": value for name, value in totals.items()}
        return {**figures, "connected": sum(socket.state == "connected" for socket in sockets)}

    # -- connections' threads ----------------------------------------------------------------------------

    def _run(self, connection: FeedConnection) -> None:
        try:
            connection.socket.run(connection.stop)
        except BaseException as error:
            self._on_failure(error)

    def _receive(self, connection: FeedConnection, frame: bytes, at_ms: int) -> None:
        is_kept = self._buffer.put(frame, at_ms)
        if len(frame) >= TICKS_BYTES_MIN:
            connection.liveness.note_tick(at_ms, is_kept)

    def _enter(self, connection: FeedConnection, state: str) -> None:
        connection.is_mute = False
        if state == "connected":
            connection.connected_ms = self._now_ms()
        else:
            connection.liveness.note_loss()

    def _log_text(self, event: TextEvent) -> None:
        """Log what Kite complains of, once. Orders and greetings do not concern ingest."""
        text = str(event.data or f"{event.reason}: {event.evidence}")[:200]
        if event.kind in ("error", "invalid") and self._once.first((event.kind, text[:80])):
            log.warning("kite_error", kind=event.kind, text=text)
