"""Where Kite's websocket is. Such a URL carries the session, which makes it a secret."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from pydantic import SecretStr

from pkbrokers_redis.core.errors import LoginNeeded
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
