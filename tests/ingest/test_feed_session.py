"""The sockets' session: the newest one at each connect, renewed by one after a 403, never worth a crash."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import redis
from pydantic import SecretStr

from pkbrokers_redis.errors import LoginNeeded, LoginRefused, PkbError
from pkbrokers_redis.ingest.connections import FeedSession, SocketSession
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.websocket import ZerodhaWebSocketClient
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.store.auth import Session, save_session
from tests.support import wait_until


@pytest.fixture
def server_kind() -> str:
    return "valkey"


@pytest.fixture
def kite() -> Iterator[SimulatedKite]:
    with SimulatedKite(universe(5)) as server:
        yield server


MakeSession = Callable[..., FeedSession]


@pytest.fixture
def make_session(
    make_settings: Callable[..., Settings],
    client: redis.Redis,
    kite: SimulatedKite,
    monkeypatch: pytest.MonkeyPatch,
) -> MakeSession:
    """A feed's session with the simulator's account; keywords change the settings."""
    for name, value in kite.environment().items():
        monkeypatch.setenv(name, value)
    return lambda **changes: FeedSession(make_settings(**changes), lambda: client)


def shared(kite: SimulatedKite, client: redis.Redis, keys: Keys) -> Session:
    """A session that somebody's `pkb login` made."""
    account = kite.accounts.first
    token = SecretStr(kite.accounts.open_session())
    session = Session(account.api_key, account.user_id, access_token=token, login_at=time.time())
    return save_session(client, keys, session)


def connects(session: SocketSession) -> bool:
    """Whether Kite lets the session in: one connect of a socket that gives up at the first 403."""
    stop = threading.Event()

    def refuse(_: threading.Event) -> None:
        stop.set()

    client = ZerodhaWebSocketClient(session.url, on_frame=lambda frame, at_ms: None, on_forbidden=refuse)
    thread = threading.Thread(target=client.run, args=(stop,), daemon=True)
    thread.start()
    wait_until(lambda: client.state == "connected" or stop.is_set())
    stop.set()
    thread.join(10)
    return client.stats.connects == 1


def test_a_local_server_may_need_no_session(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    session = FeedSession(make_settings(kite_ws_url="ws://127.0.0.1:9"), lambda: client)
    session.open(threading.Event())
    assert session.session is None and session.address == "ws://127.0.0.1:9"
    assert session.for_socket().url() == "ws://127.0.0.1:9"


def test_kite_itself_needs_one(make_settings: Callable[..., Settings], client: redis.Redis) -> None:
    with pytest.raises(LoginNeeded, match="pkb login"):
        FeedSession(make_settings(), lambda: client).open(threading.Event())


def test_without_any_session_it_logs_in_at_the_start(make_session: MakeSession, kite: SimulatedKite) -> None:
    session = make_session()
    session.open(threading.Event())
    assert kite.accounts.logins == 1 and connects(session.for_socket())


def test_the_settings_session_is_renewed_once_for_all_sockets(
    make_session: MakeSession, kite: SimulatedKite
) -> None:
    session = make_session(kite_access_token=SecretStr(kite.accounts.open_session()))
    session.open(threading.Event())
    first, second = session.for_socket(), session.for_socket()
    assert connects(first) and connects(second)
    kite.expire_sessions()
    assert not connects(first) and not connects(second)
    first.on_forbidden(threading.Event())
    second.on_forbidden(threading.Event())  # about the dead session, not about the new one
    assert kite.accounts.logins == 1
    assert connects(first) and connects(second)


def test_a_wrong_password_is_one_line_and_then_it_waits_for_others(
    make_session: MakeSession,
    kite: SimulatedKite,
    client: redis.Redis,
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dead = kite.accounts.open_session()
    session = make_session(kite_access_token=SecretStr(dead), kite_password=SecretStr("wrong-pass"))
    session.open(threading.Event())
    kite.expire_sessions()
    sockets = [session.for_socket() for _ in range(3)]
    for _ in range(3):
        for each in sockets:
            each.url()
            each.on_forbidden(threading.Event())
    assert kite.accounts.first.wrong_passwords == 1  # tried once, over all sockets and all 403s
    printed = capsys.readouterr().err
    assert printed.count("session_missing") == 1 and "wrong-pass" not in printed and dead not in printed
    shared(kite, client, settings.keys)  # `pkb login`
    assert all(map(connects, sockets))


def test_a_wrong_password_at_the_start_is_an_error_of_one_line(make_session: MakeSession) -> None:
    with pytest.raises(LoginRefused) as refused:
        make_session(kite_password=SecretStr("wrong-pass")).open(threading.Event())
    assert "wrong-pass" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_session_that_others_made_is_used_and_another_keys_is_not(
    make_session: MakeSession, kite: SimulatedKite, client: redis.Redis, settings: Settings
) -> None:
    session = make_session(kite_access_token=SecretStr(kite.accounts.open_session()))
    session.open(threading.Event())
    newer = shared(kite, client, settings.keys)
    assert newer.token in session.for_socket().url()
    save_session(
        client, settings.keys, Session("another", access_token=SecretStr("other"), login_at=time.time())
    )
    assert newer.token in session.for_socket().url()


def test_while_redis_is_away_the_last_session_serves(make_session: MakeSession, kite: SimulatedKite) -> None:
    session = make_session(kite_access_token=SecretStr(kite.accounts.open_session()))
    session.open(threading.Event())

    def away() -> redis.Redis:
        raise PkbError("away")

    session._client, session._connect = None, away
    assert connects(session.for_socket())
