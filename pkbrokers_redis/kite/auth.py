"""Logging in at Kite: from credentials to a session.

    official      login URL → a person logs in → request token → access token      api key, api secret
    web           user id, password, TOTP → enctoken                               no person needed
    web + api     the web login, then the app's request token → access token       no person needed

`KiteAuthenticator` makes one attempt. `session.SessionManager` decides who logs in, and when.

`WebLogin` walks Kite's own login page as a browser does:

    GET  /connect/login?v=3&api_key=…            302 to itself with sess_id; a cookie kf_session
    POST /api/login   user_id password           {"status": "success", "data": {"request_id", "twofa_type"}}
    POST /api/twofa   user_id request_id twofa_value twofa_type      cookies enctoken, public_token
    GET  /connect/login?…sess_id&skip_session    302 /connect/finish, 302 <redirect URL>?request_token=…

Zerodha does not document the web login. Its facts come from public clients (jugaad-trader, Kite-Trader,
PKBrokers, OpenAlgo). So every response is checked: one that is not JSON is a page (maintenance, a captcha).
Each refusal becomes one line with Kite's words in it, and without the password or the TOTP.
"""

from __future__ import annotations

import binascii
import re
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol
from urllib.parse import parse_qs, urlencode, urljoin, urlsplit

import pyotp
import requests
from pydantic import SecretStr

from pkbrokers_redis import logs
from pkbrokers_redis.errors import (
    KiteError,
    KiteUnavailable,
    LoginNeeded,
    LoginRefused,
    SessionExpired,
    SettingsError,
)
from pkbrokers_redis.kite.rest import (
    WEB_API_KEY,
    clean_text,
    first_api_key,
    open_kite,
    page_error,
    throttled_error,
    unreachable_error,
)
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.auth import TOTP_PERIOD_SECONDS, Session

REDIRECTS_MAX = 8
HEADERS = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) pkbrokers-redis",
    "Accept": "application/json, text/plain, */*",
    "X-Kite-Version": "3.0.0",
}
THEN_LOG_IN = "then run `pkb login`"
_REQUEST_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,256}")
_LOCKED_WORDS = ("locked", "blocked", "suspended", "disabled", "too many")


class Challenge(NamedTuple):
    """What Kite requires after the password."""

    request_id: str
    twofa_type: str


class WebLogin:
    """One web login. Call `open`, `send_password`, `send_totp` and, with an app's api key, `request_token`.

    Each step raises LoginRefused, KiteThrottled or KiteUnavailable.

    Args:
        login_url: PKB_KITE_LOGIN_URL. Requests go to this host only.
        timeout_seconds: Of each request.
        api_key: The app's api key; default: Kite's own web page.
    """

    def __init__(self, login_url: str, timeout_seconds: float, api_key: str = WEB_API_KEY) -> None:
        self._root = login_url.rstrip("/")
        self._host = urlsplit(self._root).hostname or "Kite"
        self._api_key = api_key
        self._timeout = timeout_seconds
        self._entry = f"{self._root}/connect/login?" + urlencode({"v": 3, "api_key": api_key})
        self._secrets: list[str] = []  # sent to Kite: no message may contain them
        self._http = requests.Session()
        self._http.headers.update(HEADERS)
        self._http.auth = lambda request: request  # keeps requests from reading ~/.netrc

    def open(self) -> None:
        """Get the visit's cookies, and the URL that later gives the request token."""
        for _ in range(REDIRECTS_MAX):
            response = self._send("GET", self._entry)
            if not (response.is_redirect and self._is_kite(url := self._location(response))):
                break
            self._entry = url
        if response.status_code == 429:
            raise throttled_error(self._host)
        if response.status_code >= 500:
            raise page_error(self._host, response.status_code)
        if response.status_code >= 400 and self._api_key != WEB_API_KEY:
            document = _json_of(response)
            if document is None:
                raise page_error(self._host, response.status_code)
            raise LoginRefused(
                f"Kite does not know the api key ({self._clean(document.get('message'))})",
                f"correct PKB_KITE_API_KEY, {THEN_LOG_IN}",
                status=response.status_code,
            )

    def send_password(self, user_id: str, password: str) -> Challenge:
        """Send the password. Return what Kite requires next, a TOTP."""
        self._secrets.append(password)
        data = self._post("api/login", {"user_id": user_id, "password": password, "type": "user_id"})
        kind = str(data.get("twofa_type") or "totp")
        kinds = data.get("twofa_types")
        offered = [str(name) for name in kinds] if isinstance(kinds, list) else []
        if "totp" not in (kind, *offered):
            raise LoginRefused(
                f"Kite requires a second factor of kind {clean_text(kind)}, not a TOTP",
                f"enable the external TOTP in Kite's profile, set PKB_KITE_TOTP_SECRET, {THEN_LOG_IN}",
            )
        return Challenge(str(data.get("request_id") or ""), "totp")

    def send_totp(self, user_id: str, challenge: Challenge, value: str) -> str:
        """Send the TOTP. Return the enctoken."""
        self._secrets.append(value)
        form = {
            "user_id": user_id,
            "request_id": challenge.request_id,
            "twofa_value": value,
            "twofa_type": challenge.twofa_type,
            "skip_session": "",
        }
        headers = {
            "Origin": self._root,
            "Referer": f"{self._root}/",
            "X-Kite-Userid": user_id.upper(),
            "X-Kite-App-Uuid": str(uuid.uuid4()),
        }
        self._post("api/twofa", form, headers)
        enctoken = next((cookie.value for cookie in self._http.cookies if cookie.name == "enctoken"), None)
        if not enctoken:
            raise KiteUnavailable(
                f"{self._host} accepted the TOTP but gave no session", "its login page may have changed"
            )
        return enctoken.strip('"')

    def request_token(self) -> str:
        """Follow the redirects to the app's URL and return the token in its query. The app is not called."""
        url = f"{self._entry}&skip_session=true"
        for _ in range(REDIRECTS_MAX):
            query = parse_qs(urlsplit(url).query)
            if token := query.get("request_token", [""])[0]:
                return token
            if not self._is_kite(url):
                reason = clean_text(" ".join(query.get("message", []) + query.get("status", [])))
                raise LoginRefused(
                    f"Kite redirected to the app without a request token ({reason})", THEN_LOG_IN
                )
            response = self._send("GET", url)
            if not response.is_redirect:
                self._raise_no_redirect(url, response)
            url = self._location(response)
        raise KiteUnavailable(f"{self._host} redirects in circles", "try again later")

    def _raise_no_redirect(self, url: str, response: requests.Response) -> NoReturn:
        """Raise why the redirects ended before the app's URL."""
        if response.status_code == 429:
            raise throttled_error(self._host)
        document = _json_of(response)
        if document is not None and document.get("status") == "error":
            raise LoginRefused(
                f"Kite gives no request token ({self._clean(document.get('message'))})",
                f"check PKB_KITE_API_KEY, {THEN_LOG_IN}",
                status=response.status_code,
            )
        if response.status_code >= 400:
            raise page_error(self._host, response.status_code)
        if urlsplit(url).path.endswith("/connect/finish") or "authorize" in url:
            raise LoginRefused(
                "Kite requires you to authorise this app first",
                f"open {self._root}/connect/login?v=3&api_key={self._api_key} in a browser, log in and "
                f"press Authorize once, {THEN_LOG_IN}",
            )
        raise KiteUnavailable(
            f"{self._host} did not keep the login", "its login page may have changed: try again later"
        )

    # --- HTTP ----------------------------------------------------------------------------------------

    def _send(self, method: str, url: str, **arguments: Any) -> requests.Response:
        try:
            return self._http.request(method, url, timeout=self._timeout, allow_redirects=False, **arguments)
        except (requests.RequestException, ValueError) as error:
            raise unreachable_error(self._host, error) from None

    def _post(self, path: str, form: dict[str, str], headers: dict[str, str] | None = None) -> dict[str, Any]:
        response = self._send("POST", f"{self._root}/{path}", data=form, headers=headers)
        status = response.status_code
        if status == 429:
            raise throttled_error(self._host)
        document = _json_of(response)
        if document is None or response.is_redirect:
            raise page_error(self._host, status)
        data = document.get("data")
        data = data if isinstance(data, dict) else {}
        if document.get("status") == "success" and status < 400:
            return data
        reason = self._clean(document.get("message"))
        if status >= 500:
            raise KiteUnavailable(f"Kite has a problem ({reason})", "try again later", status=status)
        raise _refusal(path, reason, data, status, str(document.get("error_type") or ""))

    def _location(self, response: requests.Response) -> str:
        return urljoin(response.url, response.headers.get("location", ""))

    def _is_kite(self, url: str) -> bool:
        """Return whether the URL is Kite's: no other host may get the cookies."""
        return urlsplit(url).netloc == urlsplit(self._root).netloc

    def _clean(self, text: object) -> str:
        words = clean_text(str(text or ""))
        for secret in self._secrets:
            words = words.replace(secret, logs.MASK) if secret else words
        return words


def _refusal(path: str, reason: str, data: dict[str, Any], status: int, kind: str) -> KiteError:
    """Return the error for a refused password or TOTP, with what to correct."""
    attempts = data.get("attempts_remaining")
    if isinstance(attempts, int) and not isinstance(attempts, bool):
        reason += f"; {attempts} attempts left"
    lowered = reason.lower()
    if "captcha" in lowered or data.get("captcha") is True:
        message, hint = "Kite requires a captcha", "log in once in a browser"
    elif any(word in lowered for word in _LOCKED_WORDS):
        message, hint = "Kite has locked the account", "unlock it at Kite (Forgot password)"
    elif path == "api/twofa":
        message, hint = "Kite refuses the TOTP", "correct PKB_KITE_TOTP_SECRET, or this machine's clock"
    else:
        message = "Kite refuses the user id or the password"
        hint = "correct PKB_KITE_USER_ID, PKB_KITE_PASSWORD"
    return LoginRefused(f"{message} ({reason})", f"{hint}, {THEN_LOG_IN}", status=status, kind=kind)


def _json_of(response: requests.Response) -> dict[str, Any] | None:
    try:
        document = response.json()
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


class TotpMemory(Protocol):
    """Remembers the 30-second window of the last TOTP: Kite accepts each code once."""

    def last_window(self) -> int:
        """Return the window as a number since the epoch; 0: none."""

    def use(self, window: int) -> None:
        """Store the window. Called before the code is sent."""


class _ProcessMemory:
    """A TotpMemory of this process alone."""

    def __init__(self) -> None:
        self._window = 0

    def last_window(self) -> int:
        return self._window

    def use(self, window: int) -> None:
        self._window = window


class KiteAuthenticator:
    """Logs in at Kite. No error of it contains a secret.

    Every method that logs in raises LoginNeeded or SettingsError for settings that are missing or unusable,
    and LoginRefused, KiteThrottled or KiteUnavailable for Kite's response.

    Args:
        timeout: Seconds, of each request.
        settings: Default: the environment's.
        now: The machine's clock, epoch seconds.
        memory: Where the last TOTP is remembered; default: in this process.

    Example:
        >>> session = KiteAuthenticator().log_in()                              # doctest: +SKIP
        >>> open_kite(load_settings(), session).profile()["user_id"]            # doctest: +SKIP
        'AB1234'
    """

    def __init__(
        self,
        timeout: float = 30,
        *,
        settings: Settings | None = None,
        now: Callable[[], float] = time.time,
        memory: TotpMemory | None = None,
    ) -> None:
        self.timeout = timeout
        self.settings = settings or load_settings()
        self.memory: TotpMemory = memory or _ProcessMemory()
        self._now = now

    # --- what the settings allow ---------------------------------------------------------------------

    @property
    def api_key(self) -> str:
        """The first api key of the settings, or ""."""
        return first_api_key(self.settings)

    @property
    def has_app(self) -> bool:
        """Whether the settings have an api key and its secret."""
        return bool(self.api_key and _value(self.settings.kite_api_secret))

    @property
    def has_web_credentials(self) -> bool:
        """Whether the settings have user id, password and TOTP secret, so that no person is needed."""
        settings = self.settings
        secrets = (settings.kite_password, settings.kite_totp_secret)
        return bool(settings.kite_user_id) and all(_value(secret) for secret in secrets)

    @property
    def login_url(self) -> str:
        """The page where a person logs in. Kite then redirects to the app's URL with `request_token=…`."""
        query = urlencode({"v": 3, "api_key": self.api_key})
        return f"{self.settings.kite_login_url.rstrip('/')}/connect/login?{query}"

    def check(self) -> None:
        """Raise SettingsError if the TOTP secret is malformed."""
        if self.settings.kite_totp_secret is not None:
            _totp(self.settings.kite_totp_secret.get_secret_value())

    # --- logging in ----------------------------------------------------------------------------------

    def log_in(
        self, stop: threading.Event | None = None, on_attempt: Callable[[], None] = lambda: None
    ) -> Session:
        """Log in without a person: a web login and, with an api key and secret, an access token.

        Waits up to 30 s for an unused TOTP.

        Args:
            stop: Ends the wait, with KiteUnavailable.
            on_attempt: Called before the password is sent.
        """
        if not self.has_web_credentials:
            raise LoginNeeded(
                "there is no Kite session, and an automatic login needs more settings",
                "run `pkb login`; or set PKB_KITE_USER_ID, PKB_KITE_PASSWORD and PKB_KITE_TOTP_SECRET",
            )
        settings, user_id = self.settings, (self.settings.kite_user_id or "").strip()
        totp = _totp(_value(settings.kite_totp_secret))
        visit = WebLogin(settings.kite_login_url, self.timeout, self.api_key if self.has_app else WEB_API_KEY)
        visit.open()
        self._wait_for_fresh_totp(stop)
        on_attempt()
        challenge = visit.send_password(user_id, _value(settings.kite_password))
        self._wait_for_fresh_totp(stop)  # the password request may have crossed into the next window
        now = self._now()
        self.memory.use(int(now // TOTP_PERIOD_SECONDS))
        enctoken = visit.send_totp(user_id, challenge, totp.at(int(now)))
        if self.has_app:
            return self.exchange(visit.request_token())
        return Session("", user_id.upper(), enctoken=SecretStr(enctoken), login_at=self._now())

    def exchange(self, request_token: str) -> Session:
        """Return the session of a request token, or of the URL that Kite redirected to."""
        if not self.has_app:
            raise LoginNeeded(
                "a request token needs an api key and its secret",
                "set PKB_KITE_API_KEY and PKB_KITE_API_SECRET",
            )
        token = request_token_in(request_token)
        kite = open_kite(self.settings, anonymous=True, timeout_seconds=self.timeout)
        kite.api_key = self.api_key
        try:
            data = kite.generate_session(token, _value(self.settings.kite_api_secret))
        except SessionExpired as error:
            raise _token_refused(error.message) from None
        except KiteError as error:
            if error.status is not None and 400 <= error.status < 429:
                raise _token_refused(error.message) from None
            raise
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):  # a malformed login time
            data = {}
        access_token = data.get("access_token") if isinstance(data, dict) else None
        if not isinstance(access_token, str) or not access_token:
            raise KiteUnavailable("Kite's response holds no access token", "try again later")
        user_id = str(data.get("user_id") or self.settings.kite_user_id or "")
        return Session(self.api_key, user_id, access_token=SecretStr(access_token), login_at=self._now())

    def get_enctoken(self, **credentials: str) -> str:
        """Return the enctoken of a web login. Nothing is stored. Upstream's method.

        Args:
            credentials: `username`, `password`, `totp` (the secret); the settings replace missing ones.
                `api_key` has no effect.
        """
        update: dict[str, object] = {"kite_api_secret": None}  # no access token instead of the enctoken
        for name, value in credentials.items():
            match name:
                case "username":
                    update["kite_user_id"] = value
                case "password":
                    update["kite_password"] = SecretStr(value)
                case "totp" | "totp_secret":
                    update["kite_totp_secret"] = SecretStr(value)
        authenticator = KiteAuthenticator(
            self.timeout,
            settings=self.settings.model_copy(update=update),
            now=self._now,
            memory=self.memory,
        )
        return authenticator.log_in().token

    def _wait_for_fresh_totp(self, stop: threading.Event | None) -> None:
        stop = stop or threading.Event()
        while (now := self._now()) // TOTP_PERIOD_SECONDS <= self.memory.last_window():
            ahead = self.memory.last_window() + 1 - now / TOTP_PERIOD_SECONDS
            if ahead > 2:  # the clock was set back, or Redis holds an impossible window
                return
            if stop.wait(min(ahead * TOTP_PERIOD_SECONDS + 0.05, 1.0)):
                raise KiteUnavailable("the login was interrupted", THEN_LOG_IN)


def request_token_in(text: str) -> str:
    """Return the request token of a pasted URL, or the text itself. Raise LoginRefused if it is neither."""
    text = text.strip()
    if "request_token=" in text:
        query = urlsplit(text).query or text
        text = parse_qs(query).get("request_token", [""])[0]
    if not _REQUEST_TOKEN.fullmatch(text):
        raise LoginRefused(
            "the text is no request token", "paste the whole URL that Kite redirected to (…?request_token=…)"
        )
    return text


def _token_refused(message: str) -> LoginRefused:
    words = message.partition("(")[2].rpartition(")")[0] or "no reason given"
    if "checksum" in words.lower():
        return LoginRefused(
            f"Kite refuses the api secret ({words})",
            f"correct PKB_KITE_API_SECRET: it must be the one of PKB_KITE_API_KEY, {THEN_LOG_IN}",
        )
    if "api_key" in words.lower():
        return LoginRefused(
            f"Kite does not know the api key ({words})", f"correct PKB_KITE_API_KEY, {THEN_LOG_IN}"
        )
    return LoginRefused(
        f"Kite refuses the request token ({words})",
        "it serves once, within minutes, for its own api key: open the login URL again",
    )


def _totp(secret: str) -> pyotp.TOTP:
    try:
        totp = pyotp.TOTP(secret.replace(" ", "").upper())
        totp.at(0)
    except (binascii.Error, ValueError, TypeError):
        raise SettingsError(
            "PKB_KITE_TOTP_SECRET is no TOTP secret",
            "use the base32 text (A-Z, 2-7) that Kite shows next to the QR code",
        ) from None
    return totp


def _value(secret: SecretStr | None) -> str:
    return "" if secret is None else secret.get_secret_value().strip()
