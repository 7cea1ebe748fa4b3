"""`KiteAuthenticator`: from credentials to a session. Two ways, and a third that combines them:

    official      login URL → a person logs in → request token → access token      api key, api secret
    web           user id, password, TOTP → enctoken                               nobody needed
    web + api     the web login, then the request token of the app → access token  nobody needed

One attempt each: who may try again, and when, is `session.SessionKeeper`'s to decide.
"""

from __future__ import annotations

import binascii
import re
import threading
import time
from collections.abc import Callable
from typing import Protocol
from urllib.parse import parse_qs, urlencode, urlsplit

import pyotp
from pydantic import SecretStr

from pkbrokers_redis.core.errors import (
    KiteError,
    KiteUnavailable,
    LoginNeeded,
    LoginRefused,
    SessionExpired,
    SettingsError,
)
from pkbrokers_redis.kite.rest import open_kite
from pkbrokers_redis.kite.urls import WEB_API_KEY
from pkbrokers_redis.kite.web_login import AGAIN, WebLogin
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.auth import TOTP_PERIOD_SECONDS, Session

_REQUEST_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,256}")


class TotpMemory(Protocol):
    """Remembers the half minute whose TOTP was used: Kite takes each code once."""

    def last_window(self) -> int:
        """Half minutes since the epoch; 0 when none was used."""

    def use(self, window: int) -> None:
        """Called before the code is sent."""


class _OwnMemory:
    """Without Redis: this process remembers."""

    def __init__(self) -> None:
        self._window = 0

    def last_window(self) -> int:
        return self._window

    def use(self, window: int) -> None:
        self._window = window


class KiteAuthenticator:
    """Logs in at Kite. Raises LoginNeeded or SettingsError for settings that are missing or unusable,
    LoginRefused, KiteThrottled and KiteUnavailable for what Kite answers; none of them holds a secret."""

    def __init__(
        self,
        timeout: float = 30,
        *,
        settings: Settings | None = None,
        now: Callable[[], float] = time.time,
        memory: TotpMemory | None = None,
    ) -> None:
        """`timeout` in seconds, of each request. `now` is the machine's clock, epoch seconds."""
        self.timeout = timeout
        self.settings = settings or load_settings()
        self.memory: TotpMemory = memory or _OwnMemory()
        self._now = now

    # --- what the settings allow ---------------------------------------------------------------------

    @property
    def api_key(self) -> str:
        """The (first) api key, or ""."""
        return (self.settings.kite_api_key or "").partition(",")[0].strip()

    @property
    def has_app(self) -> bool:
        """Whether there are an api key and its secret: the official flow."""
        return bool(self.api_key and _value(self.settings.kite_api_secret))

    @property
    def has_web_credentials(self) -> bool:
        """Whether user id, password and TOTP secret are there: nobody is needed to log in."""
        settings = self.settings
        secrets = (settings.kite_password, settings.kite_totp_secret)
        return bool(settings.kite_user_id) and all(_value(secret) for secret in secrets)

    @property
    def login_url(self) -> str:
        """Where a person logs in; Kite then redirects to the app's URL with `request_token=…`."""
        query = urlencode({"v": 3, "api_key": self.api_key})
        return f"{self.settings.kite_login_url.rstrip('/')}/connect/login?{query}"

    def check(self) -> None:
        """Raises SettingsError when the TOTP secret cannot be one."""
        if self.settings.kite_totp_secret is not None:
            _totp(self.settings.kite_totp_secret.get_secret_value())

    # --- logging in ----------------------------------------------------------------------------------

    def log_in(
        self, stop: threading.Event | None = None, on_attempt: Callable[[], None] = lambda: None
    ) -> Session:
        """A new session without a person: web login, and on to an access token with an api key and secret.

        `on_attempt` is called before Kite sees the password. Waits up to 30 s for a fresh TOTP.
        """
        if not self.has_web_credentials:
            raise LoginNeeded(
                "there is no Kite session, and logging in by ourselves needs more settings",
                "run `pkb login`; or set PKB_KITE_USER_ID, PKB_KITE_PASSWORD and PKB_KITE_TOTP_SECRET",
            )
        settings, user_id = self.settings, (self.settings.kite_user_id or "").strip()
        totp = _totp(_value(settings.kite_totp_secret))
        visit = WebLogin(settings.kite_login_url, self.timeout, self.api_key if self.has_app else WEB_API_KEY)
        visit.open()
        self._wait_for_fresh_totp(stop)
        on_attempt()
        challenge = visit.send_password(user_id, _value(settings.kite_password))
        self._wait_for_fresh_totp(stop)  # the password may have taken us into another half minute
        now = self._now()
        self.memory.use(int(now // TOTP_PERIOD_SECONDS))
        enctoken = visit.send_totp(user_id, challenge, totp.at(int(now)))
        if self.has_app:
            return self.exchange(visit.request_token())
        return Session("", user_id.upper(), enctoken=SecretStr(enctoken), login_at=self._now())

    def exchange(self, request_token: str) -> Session:
        """A request token, or the URL that Kite redirected to, for a session with an access token."""
        if not self.has_app:
            raise LoginNeeded(
                "a request token needs an api key and its secret",
                "set PKB_KITE_API_KEY and PKB_KITE_API_SECRET",
            )
        token = request_token_in(request_token)
        kite = open_kite(self.settings, anonymous=True, timeout_seconds=self.timeout)
        kite.api_key = self.api_key
        try:
            found = kite.generate_session(token, _value(self.settings.kite_api_secret))
        except SessionExpired as error:
            raise _token_refused(error.message) from None
        except KiteError as error:
            if error.status is not None and 400 <= error.status < 429:
                raise _token_refused(error.message) from None
            raise
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):  # a time that is none
            found = {}
        access_token = found.get("access_token") if isinstance(found, dict) else None
        if not isinstance(access_token, str) or not access_token:
            raise KiteUnavailable("Kite's answer holds no access token", "try again later")
        user_id = str(found.get("user_id") or self.settings.kite_user_id or "")
        return Session(self.api_key, user_id, access_token=SecretStr(access_token), login_at=self._now())

    def get_enctoken(self, **credentials: str) -> str:
        """The enctoken of a web login, as upstream's: `api_key`, `username`, `password`, `totp` (the secret).

        Without arguments, or for those that are missing, the settings are used. Nothing is stored.
        """
        update: dict[str, object] = {"kite_api_secret": None}  # without the app: its enctoken is wanted
        for name, value in credentials.items():
            match name:
                case "username":
                    update["kite_user_id"] = value
                case "password":
                    update["kite_password"] = SecretStr(value)
                case "totp" | "totp_secret":
                    update["kite_totp_secret"] = SecretStr(value)
        alone = KiteAuthenticator(
            self.timeout,
            settings=self.settings.model_copy(update=update),
            now=self._now,
            memory=self.memory,
        )
        return alone.log_in().token

    def _wait_for_fresh_totp(self, stop: threading.Event | None) -> None:
        stop = stop or threading.Event()
        while (now := self._now()) // TOTP_PERIOD_SECONDS <= self.memory.last_window():
            ahead = self.memory.last_window() + 1 - now / TOTP_PERIOD_SECONDS
            if ahead > 2:  # the clock was set back, or Redis holds nonsense: do not wait for ever
                return
            if stop.wait(min(ahead * TOTP_PERIOD_SECONDS + 0.05, 1.0)):
                raise KiteUnavailable("the login was interrupted", AGAIN)


def request_token_in(text: str) -> str:
    """The request token of a pasted URL, or the text itself. Raises LoginRefused for what is neither."""
    text = text.strip()
    if "request_token=" in text:
        query = urlsplit(text).query or text
        text = parse_qs(query).get("request_token", [""])[0]
    if not _REQUEST_TOKEN.fullmatch(text):
        raise LoginRefused(
            "that is no request token", "paste the whole URL that Kite redirected to (…?request_token=…)"
        )
    return text


def _token_refused(said: str) -> LoginRefused:
    words = said.partition("(")[2].rpartition(")")[0] or "no reason given"
    if "checksum" in words.lower():
        return LoginRefused(
            f"Kite refuses the api secret ({words})",
            f"correct PKB_KITE_API_SECRET: it must be the one of PKB_KITE_API_KEY, {AGAIN}",
        )
    if "api_key" in words.lower():
        return LoginRefused(f"Kite does not know the api key ({words})", f"correct PKB_KITE_API_KEY, {AGAIN}")
    return LoginRefused(
        f"Kite refuses the request token ({words})",
        "it serves once, within minutes, and its own api key: open the login URL anew",
    )


def _totp(secret: str) -> pyotp.TOTP:
    try:
        totp = pyotp.TOTP(secret.replace(" ", "").upper())
        totp.at(0)
    except (binascii.Error, ValueError, TypeError):
        raise SettingsError(
            "PKB_KITE_TOTP_SECRET is no TOTP secret",
            "use the base32 text (A-Z, 2-7) that Kite shows beside the QR code",
        ) from None
    return totp


def _value(secret: SecretStr | None) -> str:
    return "" if secret is None else secret.get_secret_value().strip()
