"""The simulator's users, apps and sessions.

The official flow exchanges a request token (single use, minutes) for an access token; the web login gives an
enctoken. A new session of the same user and kind ends the previous one, as on Kite. Sessions end by
`expire_all`, never by the clock: Kite chooses that hour, and clients must trust the 403.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import pyotp

from pkbrokers_redis.simulator.responses import KiteRefusal

REQUEST_TOKEN_SECONDS: Final = 120.0
ATTEMPTS_MAX: Final = 5  # wrong passwords, and wrong TOTPs, until the account is locked
PENDING_MAX: Final = 1000  # logins begun, request tokens not used; the oldest are dropped
TOTP_STEP_SECONDS: Final = 30
LOCKED = "The account is locked after too many wrong attempts. Reset the password to unlock it."


@dataclass(slots=True)
class Account:
    """One user with one app. The defaults are the simulator's test account.

    Attributes:
        redirect_url: Where the app gets the request token; "": a page of the simulator that shows it.
        authorised: Whether the user has agreed to the app before. If not, the login ends at a consent page.
        totp_used: The 30-second window of the last TOTP accepted.
    """

    user_id: str = "SIM001"
    password: str = field(default="sim-password", repr=False)
    totp_secret: str = field(default="JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP", repr=False)
    api_key: str = "simkey0000000001"
    api_secret: str = field(default="simsecret00000000000000000000001", repr=False)
    user_name: str = "Simulated User"
    redirect_url: str = ""
    authorised: bool = True
    wrong_passwords: int = 0
    wrong_totps: int = 0
    totp_used: int = field(default=0, repr=False)

    @property
    def locked(self) -> bool:
        """Whether too many attempts were wrong."""
        return max(self.wrong_passwords, self.wrong_totps) >= ATTEMPTS_MAX

    def unlock(self) -> None:
        """Forget the wrong attempts."""
        self.wrong_passwords = self.wrong_totps = 0


class WebSession(NamedTuple):
    """The cookies of a web login."""

    user_id: str
    enctoken: str
    public_token: str


class _Pending(NamedTuple):
    owner: str  # user id, or api key
    at_s: float


class Accounts:
    """All users and their sessions. Thread-safe: a test may change them at any time.

    Args:
        accounts: The users; default: the test account.
        now_s: Machine time, epoch seconds, which authenticator apps use.
        request_token_seconds: How long a request token is valid.

    Attributes:
        logins: Completed web logins.
        exchanges: Request tokens exchanged for an access token.
    """

    def __init__(
        self,
        *accounts: Account,
        now_s: Callable[[], float] = time.time,
        request_token_seconds: float = REQUEST_TOKEN_SECONDS,
    ) -> None:
        self.users = {account.user_id: account for account in accounts or (Account(),)}
        self.request_token_seconds = request_token_seconds
        self.logins = 0
        self.exchanges = 0
        self._now_s = now_s
        self._lock = threading.RLock()
        self._request_ids: dict[str, _Pending] = {}  # the password was right, the TOTP is missing
        self._connects: dict[str, _Pending] = {}  # sess_id → api key
        self._request_tokens: dict[str, _Pending] = {}
        self._access: dict[str, str] = {}  # access token → user id
        self._web: dict[str, WebSession] = {}  # by enctoken

    @property
    def first(self) -> Account:
        """The account of `SimulatedKite.environment()`."""
        return next(iter(self.users.values()))

    # --- for tests ------------------------------------------------------------------------------------

    def expire_all(self) -> None:
        """End every session, as Kite does in the early morning."""
        with self._lock:
            self._access.clear()
            self._web.clear()

    def open_session(self, user_id: str | None = None) -> str:
        """Return an access token without a login."""
        with self._lock:
            return self._new_access(self.users[user_id] if user_id else self.first)

    def open_web_session(self, user_id: str | None = None) -> WebSession:
        """Return a web session without a login."""
        with self._lock:
            return self._new_web(self.users[user_id] if user_id else self.first)

    # --- the web login --------------------------------------------------------------------------------

    def check_password(self, user_id: str, password: str) -> str:
        """Return the request id for the TOTP step. Raise KiteRefusal."""
        with self._lock:
            account = self.users.get(user_id.upper())
            if account is None:
                raise KiteRefusal(403, "Invalid username or password.", "UserException")
            if account.locked:
                raise KiteRefusal(403, LOCKED, "UserException")
            if not hmac.compare_digest(account.password, password):
                account.wrong_passwords += 1
                raise KiteRefusal(403, "Invalid username or password.", "UserException")
            account.wrong_passwords = 0
            request_id = secrets.token_hex(16)
            self._keep(self._request_ids, request_id, account.user_id)
            return request_id

    def check_totp(self, user_id: str, request_id: str, value: str) -> WebSession:
        """Return a web session. A TOTP is accepted once. Raise KiteRefusal."""
        with self._lock:
            pending = self._request_ids.get(request_id)
            if pending is None or pending.owner != user_id.upper():
                raise KiteRefusal(400, "Invalid `request_id`. Please log in again.", "InputException")
            account = self.users[pending.owner]
            if account.locked:
                raise KiteRefusal(403, LOCKED, "UserException")
            window = self._totp_window(account, value)
            if window <= account.totp_used:
                account.wrong_totps += 1
                left = max(0, ATTEMPTS_MAX - account.wrong_totps)
                raise KiteRefusal(403, "Invalid TOTP", "TwoFAException", {"attempts_remaining": left})
            account.totp_used, account.wrong_totps = window, 0
            del self._request_ids[request_id]
            self.logins += 1
            return self._new_web(account)

    def _totp_window(self, account: Account, value: str) -> int:
        """Return the 30-second window of this TOTP: the current or the previous one; 0 if neither."""
        totp, now = pyotp.TOTP(account.totp_secret), int(self._now_s()) // TOTP_STEP_SECONDS
        for window in (now, now - 1):
            if hmac.compare_digest(totp.generate_otp(window).encode(), value.encode()):
                return window
        return 0

    # --- the app's login ------------------------------------------------------------------------------

    def app(self, api_key: str) -> Account | None:
        """Return the account whose app has this key."""
        return next((account for account in self.users.values() if account.api_key == api_key), None)

    def begin_connect(self, api_key: str) -> str:
        """Return a `sess_id` for the app's login pages. Raise KiteRefusal for an unknown key."""
        with self._lock:
            if self.app(api_key) is None:
                raise KiteRefusal(400, "Invalid `api_key`.")
            sess_id = secrets.token_urlsafe(24)
            self._keep(self._connects, sess_id, api_key)
            return sess_id

    def connect_app(self, sess_id: str, api_key: str) -> Account:
        """Return the account of a login in progress. Raise KiteRefusal."""
        pending = self._connects.get(sess_id)
        account = self.app(api_key)
        if pending is None or pending.owner != api_key or account is None:
            raise KiteRefusal(400, "Invalid session. Begin the login again.")
        return account

    def finish_connect(self, sess_id: str, api_key: str) -> str:
        """Return a request token. Raise KiteRefusal."""
        with self._lock:
            self.connect_app(sess_id, api_key)
            del self._connects[sess_id]
            token = secrets.token_urlsafe(24)
            self._keep(self._request_tokens, token, api_key)
            return token

    def exchange(self, api_key: str, request_token: str, checksum: str) -> tuple[Account, str]:
        """Return the account of a request token and its new access token. Raise KiteRefusal."""
        with self._lock:
            account = self.app(api_key)
            if account is None:
                raise KiteRefusal(403, "Invalid `api_key`.")
            text = api_key + request_token + account.api_secret
            if not hmac.compare_digest(hashlib.sha256(text.encode()).hexdigest(), checksum):
                raise KiteRefusal(403, "Invalid `checksum`.")
            pending = self._request_tokens.pop(request_token, None)
            late = pending is None or self._now_s() - pending.at_s > self.request_token_seconds
            if pending is None or late or pending.owner != api_key:
                raise KiteRefusal(403, "Token is invalid or has expired.")
            self.exchanges += 1
            return account, self._new_access(account)

    # --- sessions -------------------------------------------------------------------------------------

    def with_access(self, api_key: str, access_token: str) -> Account | None:
        """Return the account of a live access token whose app has this key."""
        with self._lock:
            account = self.users.get(self._access.get(access_token, ""))
            return account if account is not None and account.api_key == api_key else None

    def with_enctoken(self, enctoken: str) -> WebSession | None:
        """Return the web session, if it is alive."""
        with self._lock:
            return self._web.get(enctoken)

    def end_access(self, api_key: str, access_token: str) -> None:
        """Log out. Raise KiteRefusal if there is no such session."""
        with self._lock:
            if self.with_access(api_key, access_token) is None:
                raise KiteRefusal(403)
            del self._access[access_token]

    def _new_access(self, account: Account) -> str:
        self._access = {token: user for token, user in self._access.items() if user != account.user_id}
        token = secrets.token_urlsafe(24)
        self._access[token] = account.user_id
        return token

    def _new_web(self, account: Account) -> WebSession:
        self._web = {token: web for token, web in self._web.items() if web.user_id != account.user_id}
        # As Kite's, an enctoken holds characters that a URL must quote.
        session = WebSession(account.user_id, f"{secrets.token_urlsafe(48)}+/==", secrets.token_urlsafe(24))
        self._web[session.enctoken] = session
        return session

    def _keep(self, pending: dict[str, _Pending], name: str, owner: str) -> None:
        while len(pending) >= PENDING_MAX:
            del pending[next(iter(pending))]
        pending[name] = _Pending(owner, self._now_s())
