"""Kite's own login page, as a browser does it: password, TOTP, and from there a request token.

    GET  /connect/login?v=3&api_key=…            302 to itself with sess_id; a cookie kf_session
    POST /api/login   user_id password           {"status": "success", "data": {"request_id", "twofa_type"}}
    POST /api/twofa   user_id request_id twofa_value twofa_type      cookies enctoken, public_token
    GET  /connect/login?…sess_id&skip_session    302 /connect/finish, 302 <redirect URL>?request_token=…

Zerodha does not document it; its facts are read from public clients (jugaad-trader, Kite-Trader, PKBrokers,
OpenAlgo). So every answer is taken with care: what is no JSON is a page (maintenance, a captcha), and every
refusal is one line of ours with Kite's words in it, never with ours (password, TOTP).

`KiteAuthenticator`: from credentials to a session. Two ways, and a third that combines them:

    official      login URL → a person logs in → request token → access token      api key, api secret
    web           user id, password, TOTP → enctoken                               nobody needed
    web + api     the web login, then the request token of the app → access token  nobody needed

One attempt each: who may try again, and when, is `session.SessionManager`'s to decide.
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
    clean_words,
    open_kite,
    page_instead,
    throttled,
    unreachable,
)
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.auth import TOTP_PERIOD_SECONDS, Session

REDIRECTS_MAX = 8
HEADERS = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) pkbrokers-redis",
    "Accept": "application/json, text/plain, */*",
    "X-Kite-Version": "3.0.0",
}
AGAIN = "then run `pkb login`"


class Challenge(NamedTuple):
    """What Kite wants after the password."""

    request_id: str
    twofa_type: str


class WebLogin:
    """One visit. Call the steps in order: `open`, `send_password`, `send_totp`, and, with an api key of
    Kite Connect, `request_token`. Each raises LoginRefused, KiteThrottled or KiteUnavailable."""

    def __init__(self, login_url: str, timeout_seconds: float, api_key: str = WEB_API_KEY) -> None:
        self._root = login_url.rstrip("/")
        self._host = urlsplit(self._root).hostname or "Kite"
        self._api_key = api_key
        self._timeout = timeout_seconds
        self._entry = f"{self._root}/connect/login?" + urlencode({"v": 3, "api_key": api_key})
        self._told: list[str] = []  # what no message may repeat
        self._http = requests.Session()
        self._http.headers.update(HEADERS)
        self._http.auth = lambda request: request  # nothing of ~/.netrc

    def open(self) -> None:
        """Get the cookies of a visit, and where the request token will be asked for."""
        for _ in range(REDIRECTS_MAX):
            response = self._get(self._entry)
            if not (response.is_redirect and self._is_ours(url := self._location(response))):
                break
            self._entry = url
        if response.status_code == 429:
            raise throttled(self._host)
        if response.status_code >= 500:
            raise page_instead(self._host, response.status_code)
        if response.status_code >= 400 and self._api_key != WEB_API_KEY:
            self._refuse_api_key(response)

    def send_password(self, user_id: str, password: str) -> Challenge:
        """Returns what Kite asks next."""
        self._told.append(password)
        data = self._post("api/login", {"user_id": user_id, "password": password, "type": "user_id"})
        kind = str(data.get("twofa_type") or "totp")
        kinds = data.get("twofa_types")
        offered = [str(each) for each in kinds] if isinstance(kinds, list) else []
        if "totp" not in (kind, *offered):
            raise LoginRefused(
                f"Kite wants a second factor of kind {clean_words(kind)}, not a TOTP",
                f"enable the external TOTP in Kite's profile, set PKB_KITE_TOTP_SECRET, {AGAIN}",
            )
        return Challenge(str(data.get("request_id") or ""), "totp")

    def send_totp(self, user_id: str, challenge: Challenge, value: str) -> str:
        """Returns the enctoken."""
        self._told.append(value)
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
        found = next((cookie.value for cookie in self._http.cookies if cookie.name == "enctoken"), None)
        if not found:
            raise KiteUnavailable(
                f"{self._host} takes the TOTP but gives no session", "its login page may have changed"
            )
        return found.strip('"')

    def request_token(self) -> str:
        """Walks the redirects to the app's own URL, which is not visited: the token is in its query."""
        url = f"{self._entry}&skip_session=true"
        for _ in range(REDIRECTS_MAX):
            query = parse_qs(urlsplit(url).query)
            if token := query.get("request_token", [""])[0]:
                return token
            if not self._is_ours(url):
                said = clean_words(" ".join(query.get("message", []) + query.get("status", [])))
                raise LoginRefused(f"Kite sends us to the app without a request token ({said})", AGAIN)
            response = self._get(url)
            if not response.is_redirect:
                self._explain_stop(url, response)
            url = self._location(response)
        raise KiteUnavailable(f"{self._host} redirects in circles", "try again later")

    # --- HTTP ----------------------------------------------------------------------------------------

    def _get(self, url: str) -> requests.Response:
        return self._send("GET", url)

    def _send(self, method: str, url: str, **arguments: Any) -> requests.Response:
        try:
            return self._http.request(method, url, timeout=self._timeout, allow_redirects=False, **arguments)
        except (requests.RequestException, ValueError) as error:
            raise unreachable(self._host, error) from None

    def _location(self, response: requests.Response) -> str:
        return urljoin(response.url, response.headers.get("location", ""))

    def _is_ours(self, url: str) -> bool:
        """Whether it is Kite itself: no other host may see what we send."""
        return urlsplit(url).netloc == urlsplit(self._root).netloc

    def _post(self, path: str, form: dict[str, str], headers: dict[str, str] | None = None) -> dict[str, Any]:
        response = self._send("POST", f"{self._root}/{path}", data=form, headers=headers)
        status = response.status_code
        if status == 429:
            raise throttled(self._host)
        document = _json_of(response)
        if document is None or response.is_redirect:
            raise page_instead(self._host, status)
        data = document.get("data")
        data = data if isinstance(data, dict) else {}
        if document.get("status") == "success" and status < 400:
            return data
        said = self._words(document.get("message"))
        if status >= 500:
            raise KiteUnavailable(f"Kite has a problem ({said})", "try again later", status=status)
        raise _refusal(path, said, data, status, str(document.get("error_type") or ""))

    def _words(self, text: object) -> str:
        said = clean_words(str(text or ""))
        for secret in self._told:
            said = said.replace(secret, logs.MASK) if secret else said
        return said

    # --- refusals ------------------------------------------------------------------------------------

    def _refuse_api_key(self, response: requests.Response) -> NoReturn:
        document = _json_of(response)
        if document is None:
            raise page_instead(self._host, response.status_code)
        raise LoginRefused(
            f"Kite does not know the api key ({self._words(document.get('message'))})",
            f"correct PKB_KITE_API_KEY, {AGAIN}",
            status=response.status_code,
        )

    def _explain_stop(self, url: str, response: requests.Response) -> NoReturn:
        """The redirects ended before the app's URL."""
        if response.status_code == 429:
            raise throttled(self._host)
        document = _json_of(response)
        if document is not None and document.get("status") == "error":
            raise LoginRefused(
                f"Kite gives no request token ({self._words(document.get('message'))})",
                f"check PKB_KITE_API_KEY, {AGAIN}",
                status=response.status_code,
            )
        if response.status_code >= 400:
            raise page_instead(self._host, response.status_code)
        if urlsplit(url).path.endswith("/connect/finish") or "authorize" in url:
            raise LoginRefused(
                "Kite asks you to authorise this app first",
                f"open {self._root}/connect/login?v=3&api_key={self._api_key} in a browser, log in and "
                f"press Authorize once, {AGAIN}",
            )
        raise KiteUnavailable(
            f"{self._host} does not keep us logged in", "its login page may have changed: try again later"
        )


def _refusal(path: str, said: str, data: dict[str, Any], status: int, kind: str) -> KiteError:
    left = data.get("attempts_remaining")
    said += f"; {left} attempts left" if isinstance(left, int) and not isinstance(left, bool) else ""
    lowered = said.lower()
    if "captcha" in lowered or data.get("captcha") is True:
        what, hint = "Kite wants a captcha", "log in once in a browser"
    elif any(word in lowered for word in ("locked", "blocked", "suspended", "disabled", "too many")):
        what, hint = "Kite has locked the account", "unlock it at Kite (Forgot password)"
    elif path == "api/twofa":
        what = "Kite refuses the TOTP"
        hint = "correct PKB_KITE_TOTP_SECRET, or this machine's clock"
    else:
        what = "Kite refuses the user id or the password"
        hint = "correct PKB_KITE_USER_ID, PKB_KITE_PASSWORD"
    return LoginRefused(f"{what} ({said})", f"{hint}, {AGAIN}", status=status, kind=kind)


def _json_of(response: requests.Response) -> dict[str, Any] | None:
    try:
        found = response.json()
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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
