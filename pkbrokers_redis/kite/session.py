"""The session that all processes share: who has one, who renews it, who waits.

    current   P:auth, else PKB_KITE_ACCESS_TOKEN or PKB_KITE_ENCTOKEN, else a login of our own
    renew     after a 403: mark the dead session, take P:login:lock, log in, write P:auth; the others wait

Kite locks accounts, so that attempts are counted in Redis, over all processes: at most ATTEMPTS_MAX in an
outage, and what Kite refuses (password, TOTP) is not tried again before a person ran `pkb login`.
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
from redis.exceptions import ResponseError

from pkbrokers_redis import logs
from pkbrokers_redis.errors import KiteUnavailable, LoginNeeded, LoginRefused, PkbError, RedisUnavailable
from pkbrokers_redis.kite.auth import KiteAuthenticator
from pkbrokers_redis.kite.rest import session_in
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import auth
from pkbrokers_redis.store.auth import Session
from pkbrokers_redis.store.commit import load_functions
from pkbrokers_redis.store.connect import describe, explain
from pkbrokers_redis.store.lease import release_lease, try_lease

__all__ = ["KiteAuthenticator", "SessionManager"]

log = logs.get("session")
T = TypeVar("T")

ATTEMPTS_MAX = 3  # logins in an outage, over all processes
LASTED_SECONDS = 600.0  # a session that lived this long ended an outage; the next 403 begins another
LOCK_SECONDS = 90.0  # a login takes up to a TOTP's half minute and five requests
WAIT_SECONDS_MAX = 2 * LOCK_SECONDS  # for another's login: its lock may have to run out first
LOOK_SECONDS = 0.2
REQUEST_SECONDS = 10.0


class SessionManager:
    """One a process; its methods may be called from any thread, and one thread works at a time."""

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[], redis.Redis],
        *,
        authenticator: KiteAuthenticator | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`settings` of one api key. `connect` gives a client of the store; `now` is the machine's clock."""
        self._settings = settings
        self._keys = settings.keys
        self._connect = connect
        self._client: redis.Redis | None = None
        self._now = now
        self._owner = f"login-{secrets.token_hex(6)}"
        self._lock = threading.Lock()
        self._dead: Session | None = None  # the one of the settings, once Kite refused it
        self.authenticator = authenticator or KiteAuthenticator(REQUEST_SECONDS, settings=settings, now=now)
        self.authenticator.memory = _SharedMemory(self)

    def current(self, stop: threading.Event | None = None) -> Session:
        """The session to use now. Raises LoginNeeded, LoginRefused, KiteUnavailable, KiteThrottled, and
        RedisUnavailable where the settings hold none either."""
        stop = stop or threading.Event()
        with self._alone(stop):
            own = self._own()
            try:
                shared = self._shared()
            except RedisUnavailable:
                if own is None:
                    raise
                shared = None
            return shared or own or self._log_in_or_wait(None, stop)

    def renew(self, failed: Session, stop: threading.Event) -> Session:
        """Another session than `failed`, which Kite answered with 403. Raises as `current`.

        Returns as soon as any process has one; returns within about a second of `stop`, by KiteUnavailable.
        """
        with self._alone(stop):
            if failed.is_same(session_in(self._settings)):
                self._dead = failed
            self._ask(lambda client: auth.forget_session(client, self._keys, failed))
            shared = self._shared()
            if shared is not None and not shared.is_same(failed):
                return shared
            if (own := self._own()) is not None:
                return own
            return self._log_in_or_wait(failed, stop)

    def log_in(self, stop: threading.Event | None = None, request_token: str = "") -> Session:
        """A login that a person asked for: heeds no earlier refusal, counts nothing, shares the session."""
        with self._alone(stop):
            if request_token:
                session = self.authenticator.exchange(request_token)
            else:
                session = self.authenticator.log_in(stop)
            saved = self._ask(lambda client: auth.save_session(client, self._keys, session))
            self._ask(lambda client: auth.clear_outage(client, self._keys))
            return saved

    # --- where a session may come from ---------------------------------------------------------------

    def _own(self) -> Session | None:
        """The settings' session, unless Kite has refused it."""
        own = session_in(self._settings)
        return None if own is None or own.is_same(self._dead) else own

    def _shared(self) -> Session | None:
        """P:auth, when it is of our api key."""
        session = self._ask(lambda client: auth.load_session(client, self._keys))
        return session if session is not None and self._fits(session) else None

    def _fits(self, session: Session) -> bool:
        ours = [key.strip() for key in (self._settings.kite_api_key or "").split(",") if key.strip()]
        return session.kind == "enctoken" or not ours or session.api_key in ours

    # --- logging in ----------------------------------------------------------------------------------

    def _log_in_or_wait(self, failed: Session | None, stop: threading.Event) -> Session:
        if not self.authenticator.has_web_credentials:
            raise self._needs_a_person(failed)
        self.authenticator.check()
        key = self._keys.login_lock()
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while not stop.is_set() and time.monotonic() < deadline:
            if self._ask(lambda client: _try_lock(client, key, self._owner)):
                try:
                    return self._log_in(failed, stop)
                finally:
                    self._let_go(key)
            stop.wait(LOOK_SECONDS)
            if (shared := self._shared()) is not None:
                return shared
        why = "the login was interrupted" if stop.is_set() else "another worker's login does not end"
        raise KiteUnavailable(why, "see its log, or run `pkb login`")

    def _log_in(self, failed: Session | None, stop: threading.Event) -> Session:
        """With the lock: look once more, then one attempt."""
        stored = self._ask(lambda client: auth.load_session(client, self._keys))
        if stored is not None:
            if self._fits(stored):
                return stored  # the lock's last holder was faster
            raise LoginNeeded(
                "the shared session belongs to another api key",
                "give each api key its token: PKB_KITE_ACCESS_TOKEN takes a comma list",
            )
        now = self._now()
        state = self._ask(lambda client: auth.load_login_state(client, self._keys, now))
        if state.refused:
            raise LoginRefused(state.refused, state.hint)
        if failed is not None and failed.login_at and now - failed.login_at > LASTED_SECONDS:
            state = replace(state, attempts=0)
        if state.attempts >= ATTEMPTS_MAX:
            raise LoginRefused(
                f"{state.attempts} logins within an hour brought no session that lasts",
                "see the log for Kite's answers, then run `pkb login`",
            )

        def note() -> None:
            self._ask(lambda client: auth.note_attempt(client, self._keys, state, self._now()))

        try:
            session = self.authenticator.log_in(stop, note)
        except LoginRefused as error:
            refusal = error
            self._ask(lambda client: auth.note_refusal(client, self._keys, refusal, self._now()))
            log.error("login_refused", why=error.message, hint=error.hint)
            raise
        except PkbError as error:
            log.warning("login_failed", why=error.message, attempt=state.attempts + 1, of=ATTEMPTS_MAX)
            raise
        saved = self._ask(lambda client: auth.save_session(client, self._keys, session))
        log.info("logged_in", user=saved.user_id, kind=saved.kind)
        return saved

    def _needs_a_person(self, failed: Session | None) -> LoginNeeded:
        automatic = "set PKB_KITE_USER_ID, PKB_KITE_PASSWORD and PKB_KITE_TOTP_SECRET to log in by ourselves"
        if self._dead is not None:
            name = "PKB_KITE_ACCESS_TOKEN" if self._dead.kind == "access_token" else "PKB_KITE_ENCTOKEN"
            return LoginNeeded(
                f"Kite refuses {name}: the session has ended", f"run `pkb login`, or {automatic}"
            )
        what = "the Kite session has ended" if failed is not None else "there is no Kite session"
        return LoginNeeded(what, f"run `pkb login`, or {automatic}")

    @contextlib.contextmanager
    def _alone(self, stop: threading.Event | None) -> Iterator[None]:
        """One thread at a time; who waits still hears `stop`."""
        while not self._lock.acquire(timeout=LOOK_SECONDS):
            if stop is not None and stop.is_set():
                raise KiteUnavailable("the login was interrupted", "run `pkb login`")
        try:
            yield
        finally:
            self._lock.release()

    # --- Redis ---------------------------------------------------------------------------------------

    def _ask(self, question: Callable[[redis.Redis], T]) -> T:
        """One exchange with the store. Raises RedisUnavailable and the like, never redis-py's own errors."""
        try:
            if self._client is None:
                self._client = self._connect()
            return question(self._client)
        except redis.RedisError as error:
            self._client = None
            raise explain(error, describe(self._settings)) from error

    def _let_go(self, key: str) -> None:
        try:
            self._ask(lambda client: release_lease(client, key, self._owner))
        except PkbError:
            pass  # it runs out


class _SharedMemory:
    """The TOTP used last, for all processes: in P:login."""

    def __init__(self, keeper: SessionManager) -> None:
        self._keeper = keeper

    def last_window(self) -> int:
        keys = self._keeper._keys
        return self._keeper._ask(lambda client: auth.load_login_state(client, keys, 0.0)).totp_window

    def use(self, window: int) -> None:
        keys = self._keeper._keys
        self._keeper._ask(lambda client: auth.note_totp_window(client, keys, window))


def _try_lock(client: redis.Redis, key: str, owner: str) -> bool:
    try:
        return try_lease(client, key, owner, int(LOCK_SECONDS * 1000))
    except ResponseError as error:
        if "unction not found" not in str(error):
            raise
        load_functions(client)  # the first command on a new store
        return try_lease(client, key, owner, int(LOCK_SECONDS * 1000))
