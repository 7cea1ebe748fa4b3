"""The sockets of an ingest worker: one connection and one thread for each feed it reads, started and stopped
as feeds come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from pkbrokers_redis import logs
from pkbrokers_redis.kite.socket import ZerodhaWebSocketClient
from pkbrokers_redis.kite.text_frames import Invalid, ServerError, TextEvent
from pkbrokers_redis.kite.urls import url_for
from pkbrokers_redis.pipeline.assign import Feed
from pkbrokers_redis.settings import Settings

log = logs.get("ingest")

STOP_SECONDS_MAX = 1.0  # a socket ends within half of it; one stuck in a full inbox is left to itself


class _Reader(NamedTuple):
    socket: ZerodhaWebSocketClient
    stop: threading.Event
    thread: threading.Thread


class Readers:
    """`read(n)` starts feed n, `drop([n])` stops it. What a socket raises is handed to `on_failure`.

    `sessions` are the Settings of each api key; `on_frame(frame, at_ms)` is called in the readers' threads.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        sessions: Sequence[Settings],
        *,
        on_frame: Callable[[bytes, int], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._feeds = feeds
        self._sessions = sessions
        self._on_frame = on_frame
        self._on_failure = on_failure
        self._lock = threading.Lock()  # over _reading and _past
        self._reading: dict[int, _Reader] = {}
        self._past: dict[str, int] = {}  # the counters of sockets that ended
        self._once = logs.Once()

    def read(self, number: int) -> None:
        """Start to read a feed."""
        feed = self._feeds[number]
        session = self._sessions[feed.session]
        socket = ZerodhaWebSocketClient(
            lambda: url_for(session),
            feed.tokens,
            session.kite_mode,
            on_frame=self._on_frame,
            on_text=self._take_text,
        )
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(socket, stop), name=f"feed-{number}", daemon=True)
        with self._lock:
            self._reading[number] = _Reader(socket, stop, thread)
        thread.start()

    def drop(self, numbers: Collection[int]) -> None:
        """Stop to read feeds; returns when their connections are closed, as a rule."""
        with self._lock:
            readers = [self._reading.pop(number) for number in numbers]
        for reader in readers:
            reader.stop.set()
        for reader in readers:
            reader.thread.join(STOP_SECONDS_MAX)
        with self._lock:
            for reader in readers:
                _add(self._past, reader.socket.stats.as_dict())

    def figures(self) -> dict[str, int]:
        """The sockets' counters added up (`socket_…`), and how many are `connected` now."""
        with self._lock:
            sockets = [reader.socket for reader in self._reading.values()]
            totals = dict(self._past)
        for socket in sockets:
            _add(totals, socket.stats.as_dict())
        figures = {f"socket_{name}": value for name, value in totals.items()}
        return {**figures, "connected": sum(socket.state == "connected" for socket in sockets)}

    def _run(self, socket: ZerodhaWebSocketClient, stop: threading.Event) -> None:
        try:
            socket.run(stop)
        except BaseException as error:
            self._on_failure(error)

    def _take_text(self, event: TextEvent) -> None:
        """Kite's words: what it complains of is logged once. Orders and greetings are not ours."""
        kind = type(event).__name__
        if isinstance(event, ServerError | Invalid) and self._once.first((kind, str(event)[:80])):
            log.warning("kite_says", kind=kind, text=str(event)[:200])


def _add(totals: dict[str, int], more: dict[str, int]) -> None:
    for name, value in more.items():
        totals[name] = totals.get(name, 0) + value
