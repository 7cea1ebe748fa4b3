"""The sockets of an ingest worker: one connection and one thread for each feed it reads, started and stopped
as feeds come and go, changed as instruments do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from pkbrokers_redis import logs
from pkbrokers_redis.kite.socket import ZerodhaWebSocketClient
from pkbrokers_redis.kite.text_frames import Invalid, ServerError, TextEvent
from pkbrokers_redis.pipeline.cut import Feed
from pkbrokers_redis.pipeline.feed_session import FeedSession
from pkbrokers_redis.pipeline.gaps import FeedLife

log = logs.get("ingest")

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
