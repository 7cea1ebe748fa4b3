"""Kite's own login page, as a browser does it: password, TOTP, and from there a request token.

    GET  /connect/login?v=3&api_key=…            302 to itself with sess_id; a cookie kf_session
    POST /api/login   user_id password           {"status": "success", "data": {"request_id", "twofa_type"}}
    POST /api/twofa   user_id request_id twofa_value twofa_type      cookies enctoken, public_token
    GET  /connect/login?…sess_id&skip_session    302 /connect/finish, 302 <redirect URL>?request_token=…

Zerodha does not document it; its facts are read from public clients (jugaad-trader, Kite-Trader, PKBrokers,
OpenAlgo). So every answer is taken with care: what is no JSON is a page (maintenance, a captcha), and every
refusal is one line of ours with Kite's words in it, never with ours (password, TOTP).
"""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qs, urlencode, urljoin, urlsplit

import requests

from pkbrokers_redis import logs
from pkbrokers_redis.core.errors import KiteError, KiteUnavailable, LoginRefused
from pkbrokers_redis.kite.rest import clean_words, page_instead, throttled, unreachable
from pkbrokers_redis.kite.urls import WEB_API_KEY

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
        what, mend = "Kite wants a captcha", "log in once in a browser"
    elif any(word in lowered for word in ("locked", "blocked", "suspended", "disabled", "too many")):
        what, mend = "Kite has locked the account", "unlock it at Kite (Forgot password)"
    elif path == "api/twofa":
        what = "Kite refuses the TOTP"
        mend = "correct PKB_KITE_TOTP_SECRET, or this machine's clock"
    else:
        what = "Kite refuses the user id or the password"
        mend = "correct PKB_KITE_USER_ID, PKB_KITE_PASSWORD"
    return LoginRefused(f"{what} ({said})", f"{mend}, {AGAIN}", status=status, kind=kind)


def _json_of(response: requests.Response) -> dict[str, Any] | None:
    try:
        found = response.json()
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
