"""Where Kite's websocket is. Such a URL carries the session, which makes it a secret."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from pkbrokers_redis.core.errors import SettingsError
from pkbrokers_redis.settings import Settings

KITE_WS_URL = "wss://ws.kite.trade"
KITE_WEB_WS_URL = "wss://ws.zerodha.com/"  # of a web login, with an enctoken
KITE_WEB_ORIGIN = "https://kite.zerodha.com"


def url_for(
    settings: Settings,
    *,
    access_token: str | None = None,
    enctoken: str | None = None,
    user_id: str | None = None,
) -> str:
    """The websocket URL with its session, which makes it a secret: show `address_of(url)` instead.

    Arguments (a session kept in Redis) come before the settings, an access token before an enctoken. Raises
    SettingsError when there is no session and the server is Kite's own; a local one may need none.
    """
    if not (access_token or enctoken):
        if settings.kite_access_token is not None:
            access_token = settings.kite_access_token.get_secret_value()
        if settings.kite_enctoken is not None:
            enctoken = settings.kite_enctoken.get_secret_value()
    base = settings.kite_ws_url
    if access_token:
        return _with_query(base, {"api_key": settings.kite_api_key or "", "access_token": access_token})
    if enctoken:
        user = user_id or settings.kite_user_id or ""
        web = KITE_WEB_WS_URL if base.rstrip("/") == KITE_WS_URL else base
        return _with_query(web, {"api_key": "kitefront", "user_id": user, "enctoken": enctoken})
    if base.rstrip("/") == KITE_WS_URL:
        raise SettingsError("there is no Kite session", "run `pkb login`, or set PKB_KITE_ACCESS_TOKEN")
    return base


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
