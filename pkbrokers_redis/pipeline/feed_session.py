"""The Kite session as the sockets use it: the newest one at each connect, another one after a 403.

open    at the start: there is a session, or an operator is told what to do
url     P:auth as it is now, else the last session that we had: Redis may be away
renew   after a 403: one worker logs in, the others wait (`kite/session.py`); whatever fails is one log
        line, and the socket looks for a session of others, slowly
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.core.errors import LoginNeeded, PkbError
from pkbrokers_redis.kite.session import SessionKeeper
from pkbrokers_redis.kite.urls import KITE_WS_URL, address_of, url_for
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
        keeper: SessionKeeper | None = None,
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._client: redis.Redis | None = None
        self._lock = threading.Lock()  # over _client
        self._keeper = keeper or SessionKeeper(settings, connect)
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
                log.error("no_session", why=error.message, mend=error.mend)

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
