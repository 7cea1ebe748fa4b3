"""The official KiteConnect with one-line errors by kind, none with a secret."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from pydantic import SecretStr

from pkbrokers_redis.errors import KiteError, KiteThrottled, KiteUnavailable, PkbError, SessionExpired
from pkbrokers_redis.kite.auth import KiteAuthenticator, WebLogin
from pkbrokers_redis.kite.rest import open_kite
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.store.auth import Session
from tests.kite.logins import APP, everything_shown, fields_of, simulated_kite

SECRET = "geheimes-token"


@pytest.fixture
def kite() -> Iterator[SimulatedKite]:
    with simulated_kite() as kite:
        yield kite


@pytest.fixture
def settings(kite: SimulatedKite) -> Settings:
    return load_settings(**fields_of(kite, *APP))


@pytest.fixture
def session(kite: SimulatedKite) -> Session:
    account = kite.accounts.first
    return Session(account.api_key, access_token=SecretStr(kite.accounts.open_session()))


Answer = tuple[int, str, bytes]  # status, content type ("" for none; a Location where it is a path), body


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Settings]]:
    """A server that always gives the same answer, and the settings that point at it."""
    servers: list[HTTPServer] = []

    def start(answer: Answer) -> Settings:
        status, kind, body = answer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                if kind:
                    self.send_header("Location" if kind.startswith("/") else "Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_DELETE(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None: ...

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        return load_settings(
            kite_api_url=url, kite_login_url=url, kite_api_key="key", kite_api_secret=SecretStr(SECRET)
        )

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_both_kinds_of_session_are_accepted(
    kite: SimulatedKite, settings: Settings, session: Session
) -> None:
    web = kite.accounts.open_web_session()
    for one in (session, Session("", web.user_id, enctoken=SecretStr(web.enctoken))):
        assert open_kite(settings, one).profile()["user_id"] == "SIM001"


def test_the_settings_session_is_the_default_and_anonymous_sends_none(
    kite: SimulatedKite, settings: Settings, session: Session
) -> None:
    fixed = settings.model_copy(update={"kite_access_token": SecretStr(session.token)})
    assert open_kite(fixed).profile()["user_id"] == "SIM001"
    anonymous = open_kite(fixed, anonymous=True)
    with pytest.raises(SessionExpired):
        anonymous.profile()
    assert anonymous.instruments_csv("NSE").startswith(b"instrument_token,")


def test_a_password_in_netrc_does_not_replace_the_session(
    settings: Settings, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert open_kite(settings, session).profile()["user_id"] == "SIM001"


def test_a_token_set_later_is_used_and_a_session_is_generated_as_kiteconnect_does(
    kite: SimulatedKite, settings: Settings
) -> None:
    accounts = kite.accounts
    token = accounts.finish_connect(accounts.begin_connect(accounts.first.api_key), accounts.first.api_key)
    client = open_kite(settings, anonymous=True)
    client.generate_session(token, accounts.first.api_secret)
    assert client.profile()["user_id"] == "SIM001"
    assert client.invalidate_access_token() is True
    with pytest.raises(SessionExpired):
        client.profile()


def test_an_api_url_with_a_path_keeps_it(settings: Settings, session: Session) -> None:
    deeper = settings.model_copy(update={"kite_api_url": settings.kite_login_url + "/oms/"})
    with pytest.raises(SessionExpired):  # /oms requires an enctoken
        open_kite(deeper, session).profile()


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("403", SessionExpired, "refuses the session.*pkb login"),
        ("429", KiteThrottled, "too often"),
        ("500", KiteUnavailable, "has a problem"),
        ("502", KiteUnavailable, "has a problem"),
        ("503", KiteUnavailable, "has a problem"),
        ("html", KiteUnavailable, "page instead of data"),
        ("garbage_json", KiteUnavailable, "page instead of data"),
        ("drop", KiteUnavailable, "cannot be reached"),
    ],
)
def test_each_failure_is_one_line_of_its_kind(
    kite: SimulatedKite, settings: Settings, session: Session, fault: str, error: type[PkbError], words: str
) -> None:
    kite.faults.add(fault)
    with pytest.raises(error, match=words) as caught:
        open_kite(settings, session).invalidate_access_token()  # its URL carries the token
    assert session.token not in everything_shown(caught.value)


def test_another_refusal_has_kites_words(settings: Settings, session: Session) -> None:
    with pytest.raises(KiteError, match=r"refuses the request .invalid token") as caught:
        open_kite(settings, session).historical_data(1, "2026-01-05", "2026-01-06", "minute")
    assert caught.value.status == 400


def test_a_slow_kite_times_out(kite: SimulatedKite, settings: Settings, session: Session) -> None:
    kite.faults.add("slow", delay_seconds=30)
    with pytest.raises(KiteUnavailable, match="timed out"):
        open_kite(settings, session, timeout_seconds=0.2).profile()


JSON = "application/json"
ECHO = b'{"status":"error","error_type":"InputException","message":"no \\u001b[31m ' + SECRET.encode() + b'"}'


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((200, "", b"hello"), KiteUnavailable),
        ((200, JSON, b"[1, 2]"), KiteUnavailable),
        ((200, JSON, b'{"status": "success"}'), KiteUnavailable),
        ((200, JSON, b'{"status": "error"}'), KiteUnavailable),
        ((403, JSON, b'{"status": "error", "error_type": 7, "message": "x"}'), KiteUnavailable),
        ((418, "text/html", b"<html>" + SECRET.encode()), KiteUnavailable),
        ((400, JSON, ECHO), KiteError),
        ((302, "text/html", b""), KiteUnavailable),
        ((302, "/entretien-\xe9", b""), KiteUnavailable),
        ((200, JSON, b"[" * 100_000), KiteUnavailable),
    ],
)
def test_hostile_responses_are_one_line_without_a_secret(
    serve: Callable[[Answer], Settings], answer: Answer, error: type[KiteError]
) -> None:
    session = Session("key", access_token=SecretStr(SECRET))
    with pytest.raises(error) as caught:
        open_kite(serve(answer), session).profile()
    shown = everything_shown(caught.value)
    assert SECRET not in shown and "\x1b" not in shown
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("answer", [(302, "/entretien-\xe9", b""), (200, JSON, b"[" * 100_000)])
def test_a_malformed_login_page_is_one_line(serve: Callable[[Answer], Settings], answer: Answer) -> None:
    visit = WebLogin(serve(answer).kite_login_url, 5.0)
    with pytest.raises(KiteUnavailable) as caught:
        visit.open()
        visit.send_password("AB1234", SECRET)
    assert SECRET not in everything_shown(caught.value)


def test_a_malformed_login_time_is_one_line(serve: Callable[[Answer], Settings]) -> None:
    body = b'{"status": "success", "data": {"access_token": "a", "login_time": "9999999999999999999"}}'
    with pytest.raises(KiteUnavailable, match="no access token"):
        KiteAuthenticator(settings=serve((200, JSON, body))).exchange("a-request-token")


def test_a_token_unfit_for_a_header_is_named_and_not_shown(serve: Callable[[Answer], Settings]) -> None:
    token = SECRET + "\u2019"
    with pytest.raises(KiteError, match=r"no HTTP header can carry.*PKB_KITE_ACCESS_TOKEN") as caught:
        open_kite(serve((200, JSON, b"{}")), Session("key", access_token=SecretStr(token))).profile()
    assert not isinstance(caught.value, KiteUnavailable)
    assert SECRET not in everything_shown(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://no-such-host.invalid"])
def test_an_unreachable_server_is_one_line(url: str) -> None:
    with pytest.raises(KiteUnavailable, match="cannot be reached") as caught:
        session = Session("key", access_token=SecretStr(SECRET))
        open_kite(load_settings(kite_api_url=url), session).invalidate_access_token()
    assert SECRET not in everything_shown(caught.value)
