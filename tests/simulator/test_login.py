"""The web login, page by page, as its public clients walk it."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator

import pyotp
import pytest
import requests
import websocket
from kiteconnect import KiteConnect

from pkbrokers_redis.simulator.accounts import Account, Accounts
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from tests.simulator.conftest import INFY
from tests.support import wait_until

UNREACHABLE = "http://127.0.0.1:1/app?from=kite"


class Browser:
    """One user's cookies, and authenticator app whose clock we set."""

    def __init__(self, kite: SimulatedKite, account: Account) -> None:
        self.kite, self.account = kite, account
        self.session = requests.Session()

    def get(self, path: str, **query: str) -> requests.Response:
        address = path if "://" in path else self.kite.login_url + path
        return self.session.get(address, params=query, allow_redirects=False, timeout=10)

    def post(self, path: str, **form: str) -> requests.Response:
        return self.session.post(self.kite.login_url + path, data=form, allow_redirects=False, timeout=10)

    def totp(self, at_s: float) -> str:
        return pyotp.TOTP(self.account.totp_secret).at(at_s)

    def password(self, password: str | None = None) -> requests.Response:
        return self.post(
            "/api/login", user_id=self.account.user_id, password=password or self.account.password
        )

    def log_in(self, at_s: float) -> requests.Response:
        request_id = self.password().json()["data"]["request_id"]
        return self.twofa(request_id, self.totp(at_s))

    def twofa(self, request_id: str, value: str) -> requests.Response:
        return self.post(
            "/api/twofa",
            user_id=self.account.user_id,
            request_id=request_id,
            twofa_value=value,
            twofa_type="totp",
        )


class ManualClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1_790_000_010.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def account() -> Account:
    return Account(redirect_url=UNREACHABLE)


@pytest.fixture
def browser(clock: ManualClock, account: Account) -> Iterator[Browser]:
    with SimulatedKite(universe(10), accounts=Accounts(account, now_s=clock)) as kite:
        yield Browser(kite, account)


def test_password_and_totp_give_an_enctoken_for_oms_and_websocket(
    browser: Browser, clock: ManualClock
) -> None:
    challenge = browser.password().json()["data"]
    assert challenge["user_id"] == browser.account.user_id
    assert challenge["twofa_type"] == "totp"
    assert browser.log_in(clock.now_s).json()["status"] == "success"
    enctoken = browser.session.cookies["enctoken"]
    assert {"public_token", "user_id", "kf_session"} <= set(browser.session.cookies.keys())
    headers = {"Authorization": f"enctoken {enctoken}"}

    def oms(path: str, **query: str) -> requests.Response:
        return requests.get(browser.kite.login_url + "/oms" + path, query, headers=headers, timeout=10)

    assert oms("/user/profile/full").json()["data"]["user_id"] == browser.account.user_id
    assert oms("/quote/ltp", i="NSE:INFY").json()["data"]["NSE:INFY"]["instrument_token"] == INFY
    day = {"from": "2026-01-05", "to": "2026-01-09", "oi": "1"}
    assert len(oms(f"/instruments/historical/{INFY}/day", **day).json()["data"]["candles"]) == 5
    query = urllib.parse.urlencode({"api_key": "kitefront", "user_id": "x", "enctoken": enctoken})
    websocket.create_connection(f"{browser.kite.ws_url}?{query}", timeout=10).close()

    browser.kite.accounts.expire_all()
    refused = oms("/user/profile")
    assert (refused.status_code, refused.json()["error_type"]) == (403, "TokenException")


def test_the_apps_login_ends_in_a_redirect_with_a_request_token(browser: Browser, clock: ManualClock) -> None:
    account = browser.account
    begun = browser.get("/connect/login", api_key=account.api_key, v="3")
    assert begun.status_code == 302
    pages = urllib.parse.urljoin(browser.kite.login_url, begun.headers["Location"])
    assert "sess_id=" in pages
    assert browser.get(pages).status_code == 200  # the login page
    browser.log_in(clock.now_s)
    finish = browser.get(pages + "&skip_session=true")
    assert finish.headers["Location"].startswith("/connect/finish?")
    arrived = browser.get(urllib.parse.urljoin(browser.kite.login_url, finish.headers["Location"]))
    address = arrived.headers["Location"]
    assert address.startswith(UNREACHABLE)
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(address).query)
    assert query["status"] == ["success"]
    client = KiteConnect(account.api_key, root=browser.kite.api_url)
    client.generate_session(query["request_token"][0], account.api_secret)
    assert client.profile()["user_id"] == account.user_id


def test_an_app_needs_the_users_consent_once(browser: Browser, clock: ManualClock) -> None:
    account = browser.account
    account.authorised = False
    pages = browser.get("/connect/login", api_key=account.api_key).headers["Location"]
    browser.log_in(clock.now_s)
    finish = browser.get(pages).headers["Location"]
    consent = browser.get(finish)
    assert consent.status_code == 200
    assert "Authorize" in consent.text
    given = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(finish).query))
    refused = browser.post("/connect/finish", **given, authorize="another")
    assert refused.status_code == 403
    agreed = browser.post("/connect/finish", **given, authorize=browser.session.cookies["public_token"])
    assert "request_token=" in agreed.headers["Location"]
    assert account.authorised


def test_a_totp_is_accepted_once(browser: Browser, clock: ManualClock) -> None:
    assert browser.log_in(clock.now_s).ok
    again = browser.log_in(clock.now_s)
    assert again.status_code == 403
    assert again.json()["error_type"] == "TwoFAException"
    assert again.json()["data"]["attempts_remaining"] == 4
    clock.now_s += 30
    assert browser.log_in(clock.now_s).ok


def test_the_totp_of_the_previous_window_is_accepted_and_an_older_one_is_refused(
    browser: Browser, clock: ManualClock
) -> None:
    assert browser.log_in(clock.now_s - 60).status_code == 403
    assert browser.log_in(clock.now_s - 30).ok


def test_wrong_totps_count_down_and_lock_the_account(browser: Browser) -> None:
    request_id = browser.password().json()["data"]["request_id"]
    left = [browser.twofa(request_id, "12345x").json()["data"] for _ in range(5)]
    assert [data["attempts_remaining"] for data in left] == [4, 3, 2, 1, 0]
    assert "locked" in browser.password().json()["message"]
    browser.account.unlock()
    assert browser.password().ok


def test_wrong_passwords_lock_the_account(browser: Browser) -> None:
    answers = [browser.password("wrong") for _ in range(5)]
    assert {answer.status_code for answer in answers} == {403}
    assert "locked" not in answers[-1].json()["message"]
    assert "locked" in browser.password().json()["message"]


def test_an_incomplete_login_is_an_input_exception(browser: Browser) -> None:
    for path, form in (
        ("/api/login", {"user_id": "SIM001"}),
        ("/api/twofa", {"user_id": "SIM001", "request_id": "x"}),
        ("/api/twofa", {"user_id": "SIM001", "request_id": "x", "twofa_value": "1", "twofa_type": "totp"}),
    ):
        assert browser.post(path, **form).json()["error_type"] == "InputException"
    assert browser.get("/connect/login", api_key="nobody").status_code == 400
    assert browser.get("/connect/finish", api_key="nobody", sess_id="x").status_code == 400


def test_expired_sessions_are_refused_at_the_next_connect_and_disconnected_on_request(
    browser: Browser,
) -> None:
    kite, account = browser.kite, browser.account
    token = kite.accounts.open_session()
    address = f"{kite.ws_url}?api_key={account.api_key}&access_token={token}"
    link = websocket.create_connection(address, timeout=10)
    wait_until(lambda: kite.server.clients == 1)
    kite.accounts.expire_all()
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(address, timeout=10)
    assert refused.value.status_code == 403
    assert kite.server.clients == 1
    kite.expire_sessions()
    wait_until(lambda: kite.server.clients == 0)
    link.shutdown()


def test_an_account_shows_no_secret_when_printed() -> None:
    account = Account()
    for secret in (account.password, account.totp_secret, account.api_secret):
        assert secret not in repr(account)
