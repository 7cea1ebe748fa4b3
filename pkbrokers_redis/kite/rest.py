"""Where Kite's websocket is. Such a URL carries the session, which makes it a secret.

Kite's REST API: the official `kiteconnect.KiteConnect`, with our settings and our errors.

    kite = open_kite(settings, session)
    kite.profile(); kite.quote("NSE:INFY"); kite.historical_data(408065, …)

All of kiteconnect's methods, unchanged; what differs is what they raise:

    TokenException 403              SessionExpired     renew the session (kite/session.py)
    429                             KiteThrottled      wait
    5xx, HTML, timeouts, no network KiteUnavailable    try again later
    anything else                   KiteError          with Kite's own words

None of them holds a secret, nor does their cause: a requests exception quotes the URL, and that of a logout
carries the token, so it is not chained. A web session (enctoken) works too: the same API lies at
`<login>/oms`, behind another Authorization header (data of public clients, not documented by Zerodha).
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

import requests
from kiteconnect import KiteConnect
from kiteconnect.exceptions import KiteException, TokenException
from pydantic import SecretStr

from pkbrokers_redis import logs
from pkbrokers_redis.errors import KiteError, KiteThrottled, KiteUnavailable, LoginNeeded, SessionExpired
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.auth import Session

KITE_WS_URL = "wss://ws.kite.trade"
KITE_WEB_WS_URL = "wss://ws.zerodha.com/"  # of a web login, with an enctoken
KITE_WEB_ORIGIN = "https://kite.zerodha.com"
WEB_API_KEY = "kitefront"  # what Kite's own web page says it is


def session_in(settings: Settings) -> Session | None:
    """The session that the settings carry: PKB_KITE_ACCESS_TOKEN, else PKB_KITE_ENCTOKEN.

    Of comma lists (several api keys) the first: `assign.sessions_of` makes one Settings of each.
    """
    api_key = (settings.kite_api_key or "").partition(",")[0].strip()
    user_id = settings.kite_user_id or ""
    if access_token := _first_of(settings.kite_access_token):
        return Session(api_key, user_id, access_token=SecretStr(access_token))
    if enctoken := _first_of(settings.kite_enctoken):
        return Session("", user_id, enctoken=SecretStr(enctoken))
    return None


def url_for(settings: Settings, session: Session | None = None) -> str:
    """The websocket URL with its session, which makes it a secret: show `address_of(url)` instead.

    Without `session` the one in the settings. Raises LoginNeeded when there is none and the server is
    Kite's own; a local one may need none.
    """
    session = session or session_in(settings)
    base = settings.kite_ws_url
    if session is None:
        if base.rstrip("/") == KITE_WS_URL:
            raise LoginNeeded("there is no Kite session", "run `pkb login`, or set PKB_KITE_ACCESS_TOKEN")
        return base
    if session.kind == "access_token":
        api_key = session.api_key or settings.kite_api_key or ""
        return _with_query(base, {"api_key": api_key, "access_token": session.token})
    user = session.user_id or settings.kite_user_id or ""
    web = KITE_WEB_WS_URL if base.rstrip("/") == KITE_WS_URL else base
    return _with_query(web, {"api_key": WEB_API_KEY, "user_id": user, "enctoken": session.token})


def _first_of(secret: SecretStr | None) -> str:
    return secret.get_secret_value().partition(",")[0].strip() if secret is not None else ""


def _with_query(base: str, query: Mapping[str, str]) -> str:
    parts = urlsplit(base)
    text = urlencode(query, quote_via=quote)
    return urlunsplit(parts._replace(query=f"{parts.query}&{text}" if parts.query else text))


def address_of(url: str) -> str:
    """`wss://ws.kite.trade` of a URL: what of it may be shown."""
    parts = urlsplit(url)
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}"


CONNECT_SECONDS, READ_SECONDS = 5.0, 15.0
INSTRUMENTS_SECONDS = 60.0  # ~8 MB of CSV
POOL_CONNECTIONS = 4
MESSAGE_LENGTH_MAX = 160  # of Kite's own words in a line of ours


class Kite(KiteConnect):  # type: ignore[misc]  # kiteconnect has no types
    """KiteConnect for a session of ours. Make it with `open_kite`; one a thread, as requests wants it."""

    def __init__(self, api_key: str, root: str, session: Session | None, timeout: Any) -> None:
        parts = urlsplit(root)
        super().__init__(api_key, root=urlunsplit(parts._replace(path="", query="")), timeout=timeout)
        # kiteconnect joins absolute paths to the root, which loses a path of the root's: put it before each.
        self._routes = {name: parts.path.rstrip("/") + path for name, path in KiteConnect._routes.items()}
        self.timeout: Any = timeout
        self.host = parts.hostname or root
        self.session = session
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=POOL_CONNECTIONS)
        self.reqsession.mount("https://", adapter)
        self.reqsession.mount("http://", adapter)
        # As `auth` and not as a header: else requests would put a password of ~/.netrc in its place.
        self.reqsession.auth = self._authorize

    def set_access_token(self, access_token: str) -> None:
        """As KiteConnect's; from now on this token is sent."""
        self.session = None
        super().set_access_token(access_token)

    def instruments_csv(self, exchange: str | None = None) -> bytes:
        """The instrument master as Kite sends it, whole or of one exchange. `instruments()` parses it row by
        row, 50 times slower than we do, and one bad row loses all."""
        before, self.timeout = self.timeout, (CONNECT_SECONDS, INSTRUMENTS_SECONDS)
        try:
            if exchange is None:
                found = self._get("market.instruments.all")
            else:
                found = self._get("market.instruments", url_args={"exchange": exchange})
        finally:
            self.timeout = before
        if not isinstance(found, bytes):
            raise KiteUnavailable(f"{self.host} sends no instruments CSV", "try again later")
        return found

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        session, token = self.session, self.access_token
        if session is not None and session.kind == "enctoken":
            request.headers["Authorization"] = f"enctoken {session.token}"
        elif session is not None:
            request.headers["Authorization"] = f"token {session.api_key or self.api_key}:{session.token}"
        elif token:
            request.headers["Authorization"] = f"token {self.api_key}:{token}"
        return request

    def _request(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._request(*args, **kwargs)
        except requests.RequestException as error:
            raise unreachable(self.host, error) from None
        except KiteException as error:
            raise self._refusal(error) from None
        except UnicodeEncodeError:  # of a header, the only thing that is not percent-encoded
            raise KiteError(
                "the session's token holds a character that no HTTP header can carry",
                "correct PKB_KITE_ACCESS_TOKEN, or run `pkb login`",
            ) from None
        except (KeyError, AttributeError, TypeError, ValueError, RecursionError):
            # No content-type, JSON that is no object or too deep, an error without a message.
            raise page_instead(self.host, None) from None

    def _refusal(self, error: Any) -> KiteError:
        status = error.code if isinstance(error.code, int) else None
        if status == 429:
            return throttled(self.host)
        text = str(error)
        if text.startswith(
            ("Unknown Content-Type", "Couldn't parse")
        ):  # kiteconnect's own, quoting all of it
            return page_instead(self.host, None)
        said = self.clean(text)
        if isinstance(error, TokenException):
            told = f"Kite refuses the session ({said})"
            return SessionExpired(told, "run `pkb login`", status=status, kind="TokenException")
        if status is not None and status >= 500:
            return KiteUnavailable(
                f"Kite has a problem ({said})", "try again later", status=status, kind=type(error).__name__
            )
        return KiteError(f"Kite refuses the request ({said})", "", status=status, kind=type(error).__name__)

    def clean(self, text: str) -> str:
        """Words of a server on one line, short, and without what we sent in confidence."""
        for secret in (self.session.token if self.session else "", self.access_token or ""):
            text = text.replace(secret, logs.MASK) if secret else text
        return clean_words(text)


def open_kite(
    settings: Settings,
    session: Session | None = None,
    *,
    timeout_seconds: float = READ_SECONDS,
    anonymous: bool = False,
) -> Kite:
    """The REST client of a session; without one, of the session in the settings.

    `anonymous` sends none: to exchange a request token, or for the instruments, which Kite gives to anybody.
    """
    if session is None and not anonymous:
        session = session_in(settings)
    api_key = (session.api_key if session else "") or settings.kite_api_key or ""
    root = settings.kite_api_url
    if session is not None and session.kind == "enctoken":
        root = settings.kite_login_url.rstrip("/") + "/oms"
    return Kite(api_key, root, session, (CONNECT_SECONDS, timeout_seconds))


def clean_words(text: str) -> str:
    """Words of a server: one line, printable, short, masked."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[:2000]).split())
    return logs.mask(line)[:MESSAGE_LENGTH_MAX] or "no reason given"


def throttled(host: str) -> KiteThrottled:
    """429."""
    return KiteThrottled(f"{host} says that we ask too often", "wait a minute", status=429)


def page_instead(host: str, status: int | None) -> KiteUnavailable:
    """HTML where JSON should be: maintenance, a proxy's page, a captcha."""
    code = f" with HTTP {status}" if status else ""
    return KiteUnavailable(
        f"{host} answers{code} with a page instead of data",
        "Kite may be in maintenance: try again later; check PKB_KITE_API_URL and PKB_KITE_LOGIN_URL",
        status=status,
    )


def unreachable(host: str, error: BaseException) -> KiteUnavailable:
    """A requests error in words of our own: its text may quote the URL, and that may hold the session."""
    return KiteUnavailable(f"{host} cannot be reached ({_reason(error)})", "check the network, try again")


def _reason(error: BaseException) -> str:
    if isinstance(error, requests.Timeout):
        return "timed out"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy fails"
    if isinstance(error, requests.TooManyRedirects):
        return "it redirects in circles"
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.MissingSchema):
        return "its address is no URL"
    seen: set[int] = set()
    cause: Any = error
    while cause is not None and id(cause) not in seen:  # requests wraps urllib3 wraps the system's
        seen.add(id(cause))
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"certificate refused: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return "TLS failed"
        if isinstance(cause, socket.gaierror):
            return "host name not found"
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        if isinstance(cause, UnicodeError):
            return "its answer cannot be read"
        inside = (getattr(cause, "reason", None), *cause.args)
        inner = next((each for each in inside if isinstance(each, BaseException)), None)
        cause = inner or cause.__cause__ or cause.__context__
    return "connection lost"
