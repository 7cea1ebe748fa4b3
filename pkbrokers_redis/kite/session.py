"""The Kite session that all processes share.

    current   P:auth, else PKB_KITE_ACCESS_TOKEN or PKB_KITE_ENCTOKEN, else a login
    renew     after a 403: mark the dead session, acquire P:login:lock, log in, write P:auth. Other processes
              wait for P:auth

Kite locks accounts after wrong attempts. So Redis counts the attempts of all processes: at most ATTEMPTS_MAX
in an outage. What Kite refuses (password, TOTP) is not tried again until a person runs `pkb login`.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.errors import KiteUnavailable, LoginNeeded, LoginRefused, PkbError, RedisUnavailable
from pkbrokers_redis.kite.auth import KiteAuthenticator
from pkbrokers_redis.kite.rest import session_in
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import auth
from pkbrokers_redis.store.auth import Session
from pkbrokers_redis.store.connect import describe, explain
from pkbrokers_redis.store.leases import LeaderLease

__all__ = ["KiteAuthenticator", "SessionManager"]

log = logs.get("session")
T = TypeVar("T")

ATTEMPTS_MAX = 3  # logins in an outage, over all processes
LASTED_SECONDS = 600.0  # a session that lived this long ended an outage; the next 403 begins another
LOCK_SECONDS = 90.0  # a login takes up to a TOTP's half minute and five requests
WAIT_SECONDS_MAX = 2 * LOCK_SECONDS  # for another process's login: its lock may have to expire first
POLL_SECONDS = 0.2
REQUEST_SECONDS = 10.0


class SessionManager:
    """Gives this process the shared Kite session. Thread-safe: one thread at a time talks to Redis and Kite.

    `current` and `renew` raise LoginNeeded, LoginRefused, KiteUnavailable, KiteThrottled, RedisUnavailable.

    Args:
        settings: The credentials of one api key.
        connect: Returns a client of the store.
        authenticator: Default: one for `settings`.
        now: The machine's clock, epoch seconds.

    Example:
        >>> client = connect(settings)                                          # doctest: +SKIP
        >>> session = SessionManager(settings, lambda: client).current()        # doctest: +SKIP
    """

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[], redis.Redis],
        *,
        authenticator: KiteAuthenticator | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._keys = settings.keys
        self._connect = connect
        self._client: redis.Redis | None = None
        self._now = now
        self._owner = f"login-{secrets.token_hex(6)}"
        self._lock = threading.Lock()
        self._refused_setting: Session | None = None  # the settings' session, once Kite refused it
        self.authenticator = authenticator or KiteAuthenticator(REQUEST_SECONDS, settings=settings, now=now)
        self.authenticator.memory = _SharedMemory(self)

    def current(self, stop: threading.Event | None = None) -> Session:
        """Return the session to use now.

        Args:
            stop: Ends a wait, with KiteUnavailable.

        Raises:
            RedisUnavailable: Redis is unavailable and the settings have no session.
        """
        stop = stop or threading.Event()
        with self._exclusive(stop):
            fallback = self._session_in_settings()
            try:
                shared = self._shared()
            except RedisUnavailable:
                if fallback is None:
                    raise
                shared = None
            return shared or fallback or self._log_in_or_wait(None, stop)

    def renew(self, failed: Session, stop: threading.Event) -> Session:
        """Return another session than `failed`, as soon as any process has one.

        Args:
            failed: The session that Kite answered with 403.
            stop: Ends a wait within about a second, with KiteUnavailable.
        """
        with self._exclusive(stop):
            if failed.is_same(session_in(self._settings)):
                self._refused_setting = failed
            self._redis(lambda client: auth.forget_session(client, self._keys, failed))
            shared = self._shared()
            if shared is not None and not shared.is_same(failed):
                return shared
            return self._session_in_settings() or self._log_in_or_wait(failed, stop)

    def log_in(self, stop: threading.Event | None = None, request_token: str = "") -> Session:
        """Log in for a person and share the session. Earlier refusals and attempts are ignored and reset.

        Args:
            stop: Ends a wait, with KiteUnavailable.
            request_token: The token, or the URL, of a login in the browser; "": a web login.
        """
        with self._exclusive(stop):
            if request_token:
                session = self.authenticator.exchange(request_token)
            else:
                session = self.authenticator.log_in(stop)
            saved = self._redis(lambda client: auth.save_session(client, self._keys, session))
            self._redis(lambda client: auth.clear_outage(client, self._keys))
            return saved

    # --- known sessions ------------------------------------------------------------------------------

    def _session_in_settings(self) -> Session | None:
        """Return the settings' session, unless Kite has refused it."""
        session = session_in(self._settings)
        return None if session is None or session.is_same(self._refused_setting) else session

    def _shared(self) -> Session | None:
        """Return the session in P:auth, if it belongs to an api key of the settings."""
        session = self._redis(lambda client: auth.load_session(client, self._keys))
        return session if session is not None and self._fits(session) else None

    def _fits(self, session: Session) -> bool:
        api_keys = [key.strip() for key in (self._settings.kite_api_key or "").split(",") if key.strip()]
        return session.kind == "enctoken" or not api_keys or session.api_key in api_keys

    # --- logging in ----------------------------------------------------------------------------------

    def _log_in_or_wait(self, failed: Session | None, stop: threading.Event) -> Session:
        if not self.authenticator.has_web_credentials:
            raise self._login_needed(failed)
        self.authenticator.check()
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while not stop.is_set() and time.monotonic() < deadline:
            if self._redis(lambda client: self._lock_lease(client).acquire()):
                try:
                    return self._log_in_with_lock(failed, stop)
                finally:
                    with contextlib.suppress(PkbError):  # the lock expires by itself
                        self._redis(lambda client: self._lock_lease(client).release())
            stop.wait(POLL_SECONDS)
            if (shared := self._shared()) is not None:
                return shared
        reason = "the login was interrupted" if stop.is_set() else "another worker's login does not end"
        raise KiteUnavailable(reason, "see its log, or run `pkb login`")

    def _lock_lease(self, client: redis.Redis) -> LeaderLease:
        return LeaderLease(client, self._keys.login_lock(), self._owner, LOCK_SECONDS)

    def _log_in_with_lock(self, failed: Session | None, stop: threading.Event) -> Session:
        """Return the previous lock holder's session, or make one attempt to log in."""
        stored = self._redis(lambda client: auth.load_session(client, self._keys))
        if stored is not None:
            if self._fits(stored):
                return stored
            raise LoginNeeded(
                "the shared session belongs to another api key",
                "give each api key its token: PKB_KITE_ACCESS_TOKEN takes a comma list",
            )
        now = self._now()
        state = self._redis(lambda client: auth.load_login_state(client, self._keys, now))
        if state.refused:
            raise LoginRefused(state.refused, state.hint)
        if failed is not None and failed.login_at and now - failed.login_at > LASTED_SECONDS:
            state = replace(state, attempts=0)
        if state.attempts >= ATTEMPTS_MAX:
            raise LoginRefused(
                f"{state.attempts} logins within an hour brought no session that lasts",
                "see the log for Kite's responses, then run `pkb login`",
            )

        def count_attempt() -> None:
            self._redis(lambda client: auth.note_attempt(client, self._keys, state, self._now()))

        try:
            session = self.authenticator.log_in(stop, count_attempt)
        except LoginRefused as error:
            refusal = error
            self._redis(lambda client: auth.note_refusal(client, self._keys, refusal, self._now()))
            log.error("login_refused", reason=error.message, hint=error.hint)
            raise
        except PkbError as error:
            log.warning("login_failed", reason=error.message, attempt=state.attempts + 1, of=ATTEMPTS_MAX)
            raise
        saved = self._redis(lambda client: auth.save_session(client, self._keys, session))
        log.info("logged_in", user=saved.user_id, kind=saved.kind)
        return saved

    def _login_needed(self, failed: Session | None) -> LoginNeeded:
        automatic = "set PKB_KITE_USER_ID, PKB_KITE_PASSWORD and PKB_KITE_TOTP_SECRET for automatic logins"
        if self._refused_setting is not None:
            kind = self._refused_setting.kind
            name = "PKB_KITE_ACCESS_TOKEN" if kind == "access_token" else "PKB_KITE_ENCTOKEN"
            message = f"Kite refuses {name}: the session has ended"
        else:
            message = "the Kite session has ended" if failed is not None else "there is no Kite session"
        return LoginNeeded(message, f"run `pkb login`, or {automatic}")

    @contextlib.contextmanager
    def _exclusive(self, stop: threading.Event | None) -> Iterator[None]:
        """Let one thread work; the wait for it ends with `stop`."""
        while not self._lock.acquire(timeout=POLL_SECONDS):
            if stop is not None and stop.is_set():
                raise KiteUnavailable("the login was interrupted", "run `pkb login`")
        try:
            yield
        finally:
            self._lock.release()

    def _redis(self, command: Callable[[redis.Redis], T]) -> T:
        """Run a command on the store. Raise PkbErrors instead of redis-py's; connect again after an error."""
        try:
            if self._client is None:
                self._client = self._connect()
            return command(self._client)
        except redis.RedisError as error:
            self._client = None
            raise explain(error, describe(self._settings)) from error


class _SharedMemory:
    """The window of the last TOTP in P:login, for all processes."""

    def __init__(self, manager: SessionManager) -> None:
        self._manager = manager

    def last_window(self) -> int:
        keys = self._manager._keys
        return self._manager._redis(lambda client: auth.load_login_state(client, keys, 0.0)).totp_window

    def use(self, window: int) -> None:
        keys = self._manager._keys
        self._manager._redis(lambda client: auth.note_totp_window(client, keys, window))
