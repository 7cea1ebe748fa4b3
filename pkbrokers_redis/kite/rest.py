"""Kite's REST API: the official `kiteconnect.KiteConnect`, with this package's settings and errors.

    kite = open_kite(settings, session)
    kite.profile(); kite.quote("NSE:INFY"); kite.historical_data(408065, …)

All methods are kiteconnect's. Their errors are:

    TokenException 403              SessionExpired     renew the session (kite/session.py)
    429                             KiteThrottled      wait
    5xx, HTML, timeouts, no network KiteUnavailable    try again later
    anything else                   KiteError          with Kite's own words

No error contains a secret. Causes are not chained, because the text of a requests exception has the URL, and
the URL of a logout has the token. A web session (enctoken) has the same API at `<login>/oms`, with another
Authorization header (known from public clients, not documented by Zerodha).

The second section makes websocket URLs. Such a URL contains the session, so it is a secret too.
"""

from __future__ import annotations

import os
import socket
import ssl
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

CONNECT_SECONDS, READ_SECONDS = 5.0, 15.0
INSTRUMENTS_SECONDS = 60.0  # to read about 8 MB of CSV
POOL_CONNECTIONS = 4
MESSAGE_LENGTH_MAX = 160  # of Kite's words in an error message

KITE_WS_URL = "wss://ws.kite.trade"
KITE_WEB_WS_URL = "wss://ws.zerodha.com/"  # for an enctoken
KITE_WEB_ORIGIN = "https://kite.zerodha.com"
WEB_API_KEY = "kitefront"  # the api key of Kite's own web page

# kiteconnect's own errors that quote a whole response.
_PARSE_ERRORS = ("Unknown Content-Type", "Couldn't parse")


def open_kite(
    settings: Settings,
    session: Session | None = None,
    *,
    timeout_seconds: float = READ_SECONDS,
    anonymous: bool = False,
) -> Kite:
    """Return a REST client.

    Args:
        settings: The addresses and the api key.
        session: The session to send; None: the one in the settings.
        timeout_seconds: The longest wait for a response.
        anonymous: Send no session: for exchanging a request token, and for the public instrument list.
    """
    if session is None and not anonymous:
        session = session_in(settings)
    api_key = (session.api_key if session else "") or settings.kite_api_key or ""
    root = settings.kite_api_url
    if session is not None and session.kind == "enctoken":
        root = settings.kite_login_url.rstrip("/") + "/oms"
    return Kite(api_key, root, session, (CONNECT_SECONDS, timeout_seconds))


class Kite(KiteConnect):  # type: ignore[misc]  # kiteconnect has no types
    """KiteConnect for a `Session`. Make it with `open_kite`; each thread needs its own."""

    def __init__(self, api_key: str, root: str, session: Session | None, timeout: Any) -> None:
        parts = urlsplit(root)
        super().__init__(api_key, root=urlunsplit(parts._replace(path="", query="")), timeout=timeout)
        # kiteconnect's routes are absolute and replace the root's path: each route gets it as a prefix.
        self._routes = {name: parts.path.rstrip("/") + path for name, path in KiteConnect._routes.items()}
        self.timeout: Any = timeout
        self.host = parts.hostname or root
        self.session = session
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=POOL_CONNECTIONS)
        self.reqsession.mount("https://", adapter)
        self.reqsession.mount("http://", adapter)
        # An `auth` and not a header: requests would replace a header with a password of ~/.netrc.
        self.reqsession.auth = self._authorize

    def set_access_token(self, access_token: str) -> None:
        """Send this token from now on, instead of the session."""
        self.session = None
        super().set_access_token(access_token)

    def instruments_csv(self, exchange: str | None = None) -> bytes:
        """Return the instrument master as Kite sends it.

        kiteconnect's `instruments()` parses each row 50 times slower, and one malformed row loses all.

        Args:
            exchange: One exchange; None: all.

        Raises:
            KiteError: Kite refused the request, or the response is no CSV.
        """
        before, self.timeout = self.timeout, (CONNECT_SECONDS, INSTRUMENTS_SECONDS)
        try:
            if exchange is None:
                content = self._get("market.instruments.all")
            else:
                content = self._get("market.instruments", url_args={"exchange": exchange})
        finally:
            self.timeout = before
        if not isinstance(content, bytes):
            raise KiteUnavailable(f"{self.host} sent no instruments CSV", "try again later")
        return content

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
            raise unreachable_error(self.host, error) from None
        except KiteException as error:
            raise self._error_of(error) from None
        except UnicodeEncodeError:  # from a header: everything else is percent-encoded
            raise KiteError(
                "the session's token holds a character that no HTTP header can carry",
                "correct PKB_KITE_ACCESS_TOKEN, or run `pkb login`",
            ) from None
        except (KeyError, AttributeError, TypeError, ValueError, RecursionError):
            # No content-type, JSON that is no object or too deep, an error without a message.
            raise page_error(self.host, None) from None

    def _error_of(self, error: Any) -> KiteError:
        status = error.code if isinstance(error.code, int) else None
        text, kind = str(error), type(error).__name__
        if status == 429:
            return throttled_error(self.host)
        if text.startswith(_PARSE_ERRORS):
            return page_error(self.host, None)
        for secret in (self.session.token if self.session else "", self.access_token or ""):
            text = text.replace(secret, logs.MASK) if secret else text
        words = clean_text(text)
        if isinstance(error, TokenException):
            message, hint = f"Kite refuses the session ({words})", "run `pkb login`"
            return SessionExpired(message, hint, status=status, kind="TokenException")
        if status is not None and status >= 500:
            return KiteUnavailable(
                f"Kite has a problem ({words})", "try again later", status=status, kind=kind
            )
        return KiteError(f"Kite refuses the request ({words})", "", status=status, kind=kind)


# --- the settings' session, and websocket URLs -----------------------------------------------------------


def first_api_key(settings: Settings) -> str:
    """Return the first api key of the settings, or ""."""
    return (settings.kite_api_key or "").partition(",")[0].strip()


def session_in(settings: Settings) -> Session | None:
    """Return the session in the settings: PKB_KITE_ACCESS_TOKEN, else PKB_KITE_ENCTOKEN.

    Comma lists (several api keys) give their first entry.
    """
    user_id = settings.kite_user_id or ""
    if access_token := _first_of(settings.kite_access_token):
        return Session(first_api_key(settings), user_id, access_token=SecretStr(access_token))
    if enctoken := _first_of(settings.kite_enctoken):
        return Session("", user_id, enctoken=SecretStr(enctoken))
    return None


def url_for(settings: Settings, session: Session | None = None) -> str:
    """Return the websocket URL with its session. It is a secret: print `address_of(url)` instead.

    Args:
        settings: The address and the user id.
        session: None: the one in the settings; a server that is not Kite's own may need none.

    Raises:
        LoginNeeded: There is no session and the server is Kite's own.
    """
    session = session or session_in(settings)
    base = settings.kite_ws_url
    is_kites_own = base.rstrip("/") == KITE_WS_URL
    if session is None:
        if is_kites_own:
            raise LoginNeeded("there is no Kite session", "run `pkb login`, or set PKB_KITE_ACCESS_TOKEN")
        return base
    if session.kind == "access_token":
        query = {"api_key": session.api_key or settings.kite_api_key or "", "access_token": session.token}
    else:
        user_id = session.user_id or settings.kite_user_id or ""
        query = {"api_key": WEB_API_KEY, "user_id": user_id, "enctoken": session.token}
        base = KITE_WEB_WS_URL if is_kites_own else base
    parts = urlsplit(base)
    text = urlencode(query, quote_via=quote)
    return urlunsplit(parts._replace(query=f"{parts.query}&{text}" if parts.query else text))


def _first_of(secret: SecretStr | None) -> str:
    return secret.get_secret_value().partition(",")[0].strip() if secret is not None else ""


def address_of(url: str) -> str:
    """Return the part of a URL that may be printed: `wss://ws.kite.trade`."""
    parts = urlsplit(url)
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}"


# --- errors ----------------------------------------------------------------------------------------------


def clean_text(text: str) -> str:
    """Return a server's words as one printable, short line with masked secrets."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[:2000]).split())
    return logs.mask(line)[:MESSAGE_LENGTH_MAX] or "no reason given"


def throttled_error(host: str) -> KiteThrottled:
    """Return the error for HTTP 429."""
    return KiteThrottled(f"{host} received requests too often", "wait a minute", status=429)


def page_error(host: str, status: int | None) -> KiteUnavailable:
    """Return the error for HTML where JSON should be: maintenance, a proxy's page, a captcha."""
    code = f" with HTTP {status}" if status else ""
    return KiteUnavailable(
        f"{host} answers{code} with a page instead of data",
        "Kite may be in maintenance: try again later; check PKB_KITE_API_URL and PKB_KITE_LOGIN_URL",
        status=status,
    )


def unreachable_error(host: str, error: BaseException) -> KiteUnavailable:
    """Return the error for a failed connection, without the text of `error`: it may quote a secret URL."""
    return KiteUnavailable(f"{host} cannot be reached ({_reason(error)})", "check the network, try again")


_REASONS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (requests.Timeout, "timed out"),
    (requests.exceptions.ProxyError, "the proxy fails"),
    (requests.TooManyRedirects, "it redirects in circles"),
    ((requests.exceptions.InvalidURL, requests.exceptions.MissingSchema), "its address is no URL"),
)


def _reason(error: BaseException) -> str:
    for kinds, reason in _REASONS:
        if isinstance(error, kinds):
            return reason
    visited: set[int] = set()
    cause: Any = error
    while cause is not None and id(cause) not in visited:  # requests wraps urllib3 wraps the system's error
        visited.add(id(cause))
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"certificate refused: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return "TLS failed"
        if isinstance(cause, socket.gaierror):
            return "host name not found"
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        if isinstance(cause, UnicodeError):
            return "its response cannot be read"
        nested = (getattr(cause, "reason", None), *cause.args)
        inner = next((value for value in nested if isinstance(value, BaseException)), None)
        cause = inner or cause.__cause__ or cause.__context__
    return "connection lost"
