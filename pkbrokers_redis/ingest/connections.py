"""The Kite session as the sockets use it: the newest one at each connect, another one after a 403.

open    at the start: there is a session, or an operator is told what to do
url     P:auth as it is now, else the last session that we had: Redis may be away
renew   after a 403: one worker logs in, the others wait (`kite/session.py`); whatever fails is one log
        line, and the socket looks for a session of others, slowly

The sockets of an ingest worker: one connection and one thread for each feed it reads, started and stopped
as feeds come and go, changed as instruments do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.errors import LoginNeeded, PkbError
from pkbrokers_redis.ingest.feeds import Feed
from pkbrokers_redis.ingest.liveness import FeedLife
from pkbrokers_redis.kite.rest import KITE_WS_URL, address_of, url_for
from pkbrokers_redis.kite.session import SessionManager
from pkbrokers_redis.kite.websocket import Invalid, ServerError, TextEvent, ZerodhaWebSocketClient
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.auth import Session, load_session

log = logs.get("ingest")


class FeedSession:
    """One api key's session, shared by its sockets (three at most). Methods may be called by any thread."""

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[], redis.Redis],
        *,
        keeper: SessionManager | None = None,
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._client: redis.Redis | None = None
        self._lock = threading.Lock()  # over _client
        self._keeper = keeper or SessionManager(settings, connect)
        self._told = ""  # the last complaint, told once
        self.session: Session | None = None  # None: a local server that asks for none

    @property
    def address(self) -> str:
        """Where the sockets connect to, for logs."""
        return address_of(url_for(self._settings, self.session))

    def open(self, stop: threading.Event) -> None:
        """Get a session. Raises PkbError where there is none and Kite wants one."""
        try:
            self.session = self._keeper.current(stop)
        except LoginNeeded:
            if self._settings.kite_ws_url.rstrip("/") == KITE_WS_URL:
                raise

    def newest(self) -> Session | None:
        """The session for the next connect. Never raises, never logs in."""
        shared = self._shared()
        if shared is not None:
            self.session = shared
        return self.session

    def renew(self, failed: Session | None, stop: threading.Event) -> None:
        """`failed` was refused: have another one made, or say once why there is none."""
        try:
            if failed is None:
                self.session = self._keeper.current(stop)
            else:
                self.session = self._keeper.renew(failed, stop)
            self._told = ""
        except PkbError as error:
            if not stop.is_set() and str(error) != self._told:
                self._told = str(error)
                log.error("no_session", why=error.message, hint=error.hint)

    def for_socket(self) -> SocketSession:
        """What one socket needs."""
        return SocketSession(self, self._settings)

    def _shared(self) -> Session | None:
        """P:auth, where it is of our api key; None also while Redis is away."""
        with self._lock:
            try:
                self._client = self._client or self._connect()
                session = load_session(self._client, self._settings.keys)
            except (redis.RedisError, PkbError):
                self._client = None
                return None
        ours = self._settings.kite_api_key
        fits = session is None or session.kind == "enctoken" or not ours or session.api_key == ours
        return session if fits else None


class SocketSession:
    """The session of one socket: remembers with which it connected, as that is the one a 403 is about."""

    def __init__(self, shared: FeedSession, settings: Settings) -> None:
        self._shared = shared
        self._settings = settings
        self._used: Session | None = None

    def url(self) -> str:
        """For the next connect. It holds the session: a secret."""
        self._used = self._shared.newest()
        return url_for(self._settings, self._used)

    def on_forbidden(self, stop: threading.Event) -> None:
        """Kite answered 403 to the last `url`."""
        self._shared.renew(self._used, stop)


STOP_SECONDS_MAX = 1.0  # a socket ends within half of it; one stuck in a full inbox is left to itself
TICKS_BYTES_MIN = 12  # the shortest frame that holds a packet: count, length, 8 bytes
VERDICT_SECONDS = 1.0  # how often a socket without ticks asks whether it is mute


@dataclass(eq=False)
class Reading:
    """A feed being read. `life` knows when it was heard, `is_mute` is the doctor's word to its socket."""

    feed: Feed
    life: FeedLife
    connected_ms: float = 0.0  # market time
    is_mute: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    socket: ZerodhaWebSocketClient = field(init=False)
    thread: threading.Thread = field(init=False)


class Readers:
    """`read` starts a feed, `change` gives it other instruments, `drop` stops it.

    `sessions` are those of each api key; `on_frame(frame, at_ms)` is called in the readers' threads and says
    whether the frame was kept; what a socket raises is handed to `on_failure`. `now_ms` is market time.
    """

    def __init__(
        self,
        sessions: Sequence[FeedSession],
        mode: str,
        *,
        now_ms: Callable[[], float],
        on_frame: Callable[[bytes, int], bool],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._sessions = sessions
        self._mode = mode
        self._now_ms = now_ms
        self._on_frame = on_frame
        self._on_failure = on_failure
        self._lock = threading.Lock()  # over _reading and _past
        self._reading: dict[int, Reading] = {}
        self._past: dict[str, int] = {}  # the counters of sockets that ended
        self._once = logs.Once()

    def read(self, feed: Feed, life: FeedLife) -> None:
        """Start to read a feed."""
        session = self._sessions[feed.session].for_socket()
        reading = Reading(feed, life)
        reading.socket = ZerodhaWebSocketClient(
            session.url,
            feed.tokens,
            self._mode,
            on_frame=lambda frame, at_ms: self._take(reading, frame, at_ms),
            on_text=self._take_text,
            on_heartbeat=life.heartbeat,
            on_state=lambda state: self._enter(reading, state),
            on_forbidden=session.on_forbidden,
            expects_ticks=lambda _: reading.is_mute,
            tickless_seconds=VERDICT_SECONDS,
            now_ms=self._now_ms,
        )
        name = f"feed-{feed.number}"
        reading.thread = threading.Thread(target=self._run, args=(reading,), name=name, daemon=True)
        with self._lock:
            self._reading[feed.number] = reading
        reading.thread.start()

    def change(self, feed: Feed) -> None:
        """The feed has other instruments now: subscribe and unsubscribe on its connection."""
        reading = self.of(feed.number)
        if reading is None:
            return
        before, after = set(reading.feed.tokens), set(feed.tokens)
        reading.feed = feed
        reading.socket.unsubscribe(before - after)  # first, for there are at most 3,000
        reading.socket.subscribe(after - before)
        log.info("feed_changed", feed=feed.number, added=len(after - before), removed=len(before - after))

    def drop(self, numbers: Collection[int]) -> list[Reading]:
        """Stop to read feeds; returns them when their connections are closed, as a rule."""
        with self._lock:
            readings = [self._reading.pop(number) for number in numbers if number in self._reading]
        for reading in readings:
            reading.stop.set()
        for reading in readings:
            reading.thread.join(STOP_SECONDS_MAX)
        with self._lock:
            for reading in readings:
                _add(self._past, reading.socket.stats.as_dict())
        return readings

    def all(self) -> list[Reading]:
        """The feeds being read."""
        with self._lock:
            return list(self._reading.values())

    def of(self, number: int) -> Reading | None:
        """One of them."""
        with self._lock:
            return self._reading.get(number)

    def figures(self) -> dict[str, int]:
        """The sockets' counters added up (`socket_…`), and how many are `connected` now."""
        with self._lock:
            sockets = [reading.socket for reading in self._reading.values()]
            totals = dict(self._past)
        for socket in sockets:
            _add(totals, socket.stats.as_dict())
        figures = {f"socket_{name}": value for name, value in totals.items()}
        return {**figures, "connected": sum(socket.state == "connected" for socket in sockets)}

    # --- in the readers' threads ---------------------------------------------------------------------

    def _run(self, reading: Reading) -> None:
        try:
            reading.socket.run(reading.stop)
        except BaseException as error:
            self._on_failure(error)

    def _take(self, reading: Reading, frame: bytes, at_ms: int) -> None:
        is_kept = self._on_frame(frame, at_ms)
        if len(frame) >= TICKS_BYTES_MIN:
            reading.life.tick(at_ms, is_kept)

    def _enter(self, reading: Reading, state: str) -> None:
        reading.is_mute = False
        if state == "connected":
            reading.connected_ms = self._now_ms()
        else:
            reading.life.lost()

    def _take_text(self, event: TextEvent) -> None:
        """Kite's words: what it complains of is logged once. Orders and greetings are not ours."""
        kind = type(event).__name__
        if isinstance(event, ServerError | Invalid) and self._once.first((kind, str(event)[:80])):
            log.warning("kite_says", kind=kind, text=str(event)[:200])


def _add(totals: dict[str, int], more: dict[str, int]) -> None:
    for name, value in more.items():
        totals[name] = totals.get(name, 0) + value
