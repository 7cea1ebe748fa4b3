"""Logging in at Kite, and sharing the session between processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyotp
import pytest
import redis
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry

from pkbrokers_redis.errors import (
    KiteThrottled,
    KiteUnavailable,
    LoginNeeded,
    LoginRefused,
    PkbError,
    RedisUnavailable,
    SettingsError,
)
from pkbrokers_redis.kite import session as session_module
from pkbrokers_redis.kite.rest import open_kite
from pkbrokers_redis.kite.session import ATTEMPTS_MAX, KiteAuthenticator, SessionManager
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.accounts import Account, Accounts
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.store.auth import Session, load_login_state, load_session, save_session
from tests.kite.logins import APP, WEB, everything_shown, fields_of, requests_to, secrets_of, simulated_kite

NEVER = threading.Event()


@pytest.fixture
def server_kind() -> str:
    return "valkey"  # which of them does not matter here


@pytest.fixture
def kite() -> Iterator[SimulatedKite]:
    with simulated_kite() as kite:
        yield kite


@pytest.fixture
def web(kite: SimulatedKite, make_settings: Callable[..., Settings]) -> Settings:
    """User id, password, TOTP secret."""
    return make_settings(**fields_of(kite, *WEB))


@pytest.fixture
def everything(kite: SimulatedKite, make_settings: Callable[..., Settings]) -> Settings:
    """And an app's key and secret."""
    return make_settings(**fields_of(kite, *WEB, *APP))


@pytest.fixture
def manager(web: Settings, client: redis.Redis) -> SessionManager:
    return SessionManager(web, lambda: client)


class SteppingEvent(threading.Event):
    """A stop event whose waits move a clock instead of taking time."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.now = start

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0
        return self.is_set()


# --- logging in ----------------------------------------------------------------------------------------


def test_a_web_login_gives_an_enctoken_for_market_data(web: Settings) -> None:
    found = KiteAuthenticator(settings=web).log_in()
    assert (found.kind, found.user_id) == ("enctoken", "SIM001")
    assert "NSE:INFY" in open_kite(web, found).ltp("NSE:INFY")


def test_a_web_login_with_an_app_gives_an_access_token(everything: Settings) -> None:
    found = KiteAuthenticator(settings=everything).log_in()
    assert (found.kind, found.api_key, found.user_id) == ("access_token", everything.kite_api_key, "SIM001")
    assert open_kite(everything, found).profile()["user_id"] == "SIM001"


def official_token(kite: SimulatedKite) -> str:
    """Return the request token of a login in the browser."""
    accounts = kite.accounts
    return accounts.finish_connect(accounts.begin_connect(accounts.first.api_key), accounts.first.api_key)


@pytest.mark.parametrize(
    "form", ["{}", " http://app.local/back?action=login&request_token={}&status=success\n"]
)
def test_a_request_token_or_its_redirect_url_is_exchanged(
    kite: SimulatedKite, make_settings: Callable[..., Settings], form: str
) -> None:
    settings = make_settings(**fields_of(kite, *APP))
    found = KiteAuthenticator(settings=settings).exchange(form.format(official_token(kite)))
    assert open_kite(settings, found).profile()["user_id"] == found.user_id == "SIM001"


def test_a_request_token_serves_once(kite: SimulatedKite, make_settings: Callable[..., Settings]) -> None:
    authenticator = KiteAuthenticator(settings=make_settings(**fields_of(kite, *APP)))
    token = official_token(kite)
    authenticator.exchange(token)
    with pytest.raises(LoginRefused, match=r"refuses the request token.*serves once") as caught:
        authenticator.exchange(token)
    assert token not in everything_shown(caught.value)


@pytest.mark.parametrize("text", ["", "two words", "https://x/?status=success", "x" * 300, "a\x00b"])
def test_text_that_is_no_request_token_is_not_sent(
    kite: SimulatedKite, make_settings: Callable[..., Settings], text: str
) -> None:
    with pytest.raises(LoginRefused, match="no request token"):
        KiteAuthenticator(settings=make_settings(**fields_of(kite, *APP))).exchange(text)
    assert requests_to(kite, "/session/token") == 0


def test_get_enctoken_returns_the_enctoken(kite: SimulatedKite, everything: Settings) -> None:
    account = kite.accounts.first
    nothing = everything.model_copy(update=dict.fromkeys(WEB))
    found = KiteAuthenticator(timeout=10, settings=nothing).get_enctoken(
        api_key="kitefront", username=account.user_id, password=account.password, totp=account.totp_secret
    )
    assert kite.accounts.with_enctoken(found) is not None
    with pytest.raises(LoginNeeded, match="PKB_KITE_USER_ID"):
        KiteAuthenticator(settings=nothing).get_enctoken()


REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "wrong password": ({"kite_password": "not-mine"}, "user id or the password.*PKB_KITE_PASSWORD"),
    "unknown user": ({"kite_user_id": "ZZ9999"}, "user id or the password.*PKB_KITE_USER_ID"),
    "wrong totp": (
        {"kite_totp_secret": pyotp.random_base32()},
        "TOTP .*4 attempts left.*PKB_KITE_TOTP_SECRET",
    ),
    "wrong api key": ({"kite_api_key": "nobodys"}, "does not know the api key.*PKB_KITE_API_KEY"),
    "wrong api secret": ({"kite_api_secret": "not-mine"}, "api secret.*PKB_KITE_API_SECRET"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_login_is_one_line_with_a_hint_and_no_secret(
    kite: SimulatedKite, make_settings: Callable[..., Settings], case: str
) -> None:
    wrong, words = REFUSALS[case]
    settings = make_settings(**{**fields_of(kite, *WEB, *APP), **wrong})
    with pytest.raises(LoginRefused, match=words) as caught:
        KiteAuthenticator(settings=settings).log_in()
    shown = everything_shown(caught.value)
    assert "\n" not in str(caught.value) and "pkb login" in str(caught.value)
    given = [value for name, value in wrong.items() if name not in ("kite_user_id", "kite_api_key")]
    assert [secret for secret in [*secrets_of(kite.accounts.first), *given] if str(secret) in shown] == []


def test_a_locked_account_error_names_how_to_unlock_it(kite: SimulatedKite, web: Settings) -> None:
    kite.accounts.first.wrong_passwords = 99
    with pytest.raises(LoginRefused, match=r"locked the account.*unlock it"):
        KiteAuthenticator(settings=web).log_in()


def test_an_unauthorised_app_error_names_the_page_to_open(kite: SimulatedKite, everything: Settings) -> None:
    kite.accounts.first.authorised = False
    with pytest.raises(LoginRefused, match=r"authorise this app first: open http://\S+api_key=\S+ in a"):
        KiteAuthenticator(settings=everything).log_in()


@pytest.mark.parametrize(
    ("fault", "path", "error", "words"),
    [
        ("html", "", KiteUnavailable, "a page instead of data.*maintenance"),
        ("html", "/connect/finish", KiteUnavailable, "a page instead of data"),
        ("garbage_json", "/api/twofa", KiteUnavailable, "a page instead of data"),
        ("garbage_json", "/session/token", KiteUnavailable, "a page instead of data"),
        ("429", "/api/login", KiteThrottled, "too often"),
        ("429", "/connect/finish", KiteThrottled, "too often"),
        ("503", "/api/twofa", KiteUnavailable, "has a problem"),
        ("503", "/session/token", KiteUnavailable, "has a problem"),
        ("drop", "/api/login", KiteUnavailable, "cannot be reached"),
        ("drop", "/session/token", KiteUnavailable, "cannot be reached"),
    ],
)
def test_an_unavailable_kite_differs_from_one_that_refuses(
    kite: SimulatedKite, everything: Settings, fault: str, path: str, error: type[PkbError], words: str
) -> None:
    kite.faults.add(fault, path=path)
    with pytest.raises(error, match=words) as caught:
        KiteAuthenticator(settings=everything).log_in()
    shown = everything_shown(caught.value)
    assert [secret for secret in secrets_of(kite.accounts.first) if secret in shown] == []


def test_a_login_at_a_hanging_kite_times_out(kite: SimulatedKite, web: Settings) -> None:
    kite.faults.add("slow", path="/api/login", delay_seconds=30)
    with pytest.raises(KiteUnavailable, match="timed out"):
        KiteAuthenticator(0.2, settings=web).log_in()


def test_a_login_at_an_unreachable_kite_is_one_line(kite: SimulatedKite, web: Settings) -> None:
    kite.stop()
    with pytest.raises(KiteUnavailable, match=r"127.0.0.1 cannot be reached .Connection refused"):
        KiteAuthenticator(settings=web).log_in()


def test_a_malformed_totp_secret_is_a_settings_error(web: Settings) -> None:
    settings = web.model_copy(update={"kite_totp_secret": SecretStr("not base32!")})
    with pytest.raises(SettingsError, match="PKB_KITE_TOTP_SECRET") as caught:
        KiteAuthenticator(settings=settings).log_in()
    assert "base32!" not in everything_shown(caught.value)


def test_a_second_login_waits_for_the_next_totp(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    clock = SteppingEvent(start=1_800_000_005.0)
    with simulated_kite(accounts=Accounts(now_s=lambda: clock.now)) as kite:
        settings = make_settings(**fields_of(kite, *WEB))
        for _ in range(2):  # another process, the same account: what they share is in Redis
            manager = SessionManager(settings, lambda: client, now=lambda: clock.now)
            manager.log_in(clock)
        assert kite.accounts.logins == 2
    assert 1_800_000_030 <= clock.now < 1_800_000_032


def test_a_totp_window_in_the_future_is_not_waited_for(web: Settings, client: redis.Redis) -> None:
    client.hset(web.keys.login(), "totp_window", int(time.time() / 30) + 1000)
    stop = SteppingEvent(time.time())
    assert SessionManager(web, lambda: client).log_in(stop).kind == "enctoken"


# --- sharing -------------------------------------------------------------------------------------------


def test_the_shared_session_precedes_the_settings_and_a_login(
    kite: SimulatedKite, web: Settings, client: redis.Redis
) -> None:
    manager = SessionManager(web, lambda: client)
    made = manager.current()
    assert made.is_same(load_session(client, web.keys)) and kite.accounts.logins == 1
    fixed = web.model_copy(update={"kite_access_token": SecretStr("fixed"), "kite_api_key": "key"})
    assert SessionManager(fixed, lambda: client).current().is_same(made)
    client.delete(web.keys.auth())
    assert SessionManager(fixed, lambda: client).current().token == "fixed"
    assert kite.accounts.logins == 1


def test_without_credentials_the_error_names_the_settings(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    with pytest.raises(LoginNeeded, match=r"no Kite session.*pkb login.*PKB_KITE_TOTP_SECRET"):
        SessionManager(make_settings(), lambda: client).current()


def test_a_refused_token_of_the_settings_names_pkb_login(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    settings = make_settings(kite_api_key="key", kite_access_token="geheim")
    manager = SessionManager(settings, lambda: client)
    with pytest.raises(LoginNeeded, match=r"refuses PKB_KITE_ACCESS_TOKEN.*pkb login") as caught:
        manager.renew(manager.current(), NEVER)
    assert "geheim" not in everything_shown(caught.value)
    with pytest.raises(LoginNeeded):
        manager.current()  # it is dead for good
    new = save_session(
        client, settings.keys, Session("key", access_token=SecretStr("new"), login_at=time.time())
    )
    assert manager.current().is_same(new)


def test_one_process_logs_in_and_the_rest_wait(
    kite: SimulatedKite, web: Settings, client: redis.Redis
) -> None:
    managers = [SessionManager(web, lambda: client) for _ in range(8)]
    with ThreadPoolExecutor(16) as pool:
        first = list(pool.map(lambda manager: manager.current(), managers * 2))
        assert kite.accounts.logins == 1 and all(session.is_same(first[0]) for session in first)
        kite.accounts.expire_all()
        kite.accounts.first.totp_used = 0  # so that the test need not wait half a minute
        client.hdel(web.keys.login(), "totp_window")
        second = list(pool.map(lambda manager: manager.renew(first[0], NEVER), managers * 2))
    assert kite.accounts.logins == 2 and all(session.is_same(second[0]) for session in second)
    assert not second[0].is_same(first[0])
    assert kite.accounts.with_enctoken(second[0].token) is not None


def test_a_late_403_of_the_old_session_returns_the_new_one_without_a_login(
    kite: SimulatedKite, manager: SessionManager, client: redis.Redis, web: Settings
) -> None:
    old = save_session(client, web.keys, Session("", enctoken=SecretStr("old"), login_at=time.time()))
    new = save_session(client, web.keys, Session("", enctoken=SecretStr("new"), login_at=time.time()))
    assert manager.renew(old, NEVER).is_same(new)
    assert kite.accounts.logins == 0


def test_a_refused_password_is_tried_once_over_all_processes(
    kite: SimulatedKite, web: Settings, client: redis.Redis
) -> None:
    wrong = web.model_copy(update={"kite_password": SecretStr("not-mine")})
    for _ in range(4):
        with pytest.raises(LoginRefused, match=r"user id or the password.*PKB_KITE_PASSWORD.*pkb login"):
            SessionManager(wrong, lambda: client).current()
    assert requests_to(kite, "/api/login") == 1
    assert "not-mine" not in repr(client.hgetall(web.keys.login()))
    # Even with the right password a person must say that it is right; then all is well.
    right = SessionManager(web, lambda: client)
    with pytest.raises(LoginRefused):
        right.current()
    made = right.log_in()
    assert right.current().is_same(made)
    assert load_login_state(client, web.keys, time.time()).refused == ""


def test_attempts_are_bounded_over_all_processes(
    kite: SimulatedKite, web: Settings, client: redis.Redis
) -> None:
    kite.faults.add("503", path="/api/login")
    for _ in range(ATTEMPTS_MAX):
        with pytest.raises(KiteUnavailable):
            SessionManager(web, lambda: client).current()
    for _ in range(3):
        with pytest.raises(LoginRefused, match=f"{ATTEMPTS_MAX} logins within an hour.*pkb login"):
            SessionManager(web, lambda: client).current()
    assert requests_to(kite, "/api/login") == ATTEMPTS_MAX


def test_an_unreached_kite_costs_no_attempt(kite: SimulatedKite, web: Settings, client: redis.Redis) -> None:
    kite.faults.add("html", path="/connect/login")
    for _ in range(ATTEMPTS_MAX + 1):
        with pytest.raises(KiteUnavailable):
            SessionManager(web, lambda: client).current()
    kite.faults.clear()
    assert SessionManager(web, lambda: client).current().kind == "enctoken"


def test_logins_for_short_lived_sessions_are_bounded(
    make_settings: Callable[..., Settings], client: redis.Redis
) -> None:
    clock = SteppingEvent(1_800_000_000.0)
    with simulated_kite(accounts=Accounts(now_s=lambda: clock.now)) as kite:
        manager = SessionManager(
            make_settings(**fields_of(kite, *WEB)), lambda: client, now=lambda: clock.now
        )
        found = manager.current(clock)
        for _ in range(ATTEMPTS_MAX + 2):
            clock.now += session_module.LASTED_SECONDS + 1
            found = manager.renew(found, clock)  # each 403 is an outage of its own
        for _ in range(ATTEMPTS_MAX - 1):
            found = manager.renew(found, clock)
        with pytest.raises(LoginRefused, match="brought no session that lasts"):
            manager.renew(found, clock)


def test_the_wait_for_a_dead_process_ends_with_its_lock(web: Settings, client: redis.Redis) -> None:
    client.set(web.keys.login_lock(), "a dead worker", px=300)
    assert SessionManager(web, lambda: client).current().kind == "enctoken"


def test_stop_ends_the_wait_for_another_login(web: Settings, client: redis.Redis) -> None:
    client.set(web.keys.login_lock(), "another", px=60_000)
    stop = threading.Event()
    manager = SessionManager(web, lambda: client)
    with ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(manager.current, stop) for _ in range(2)
        ]  # for the lock in Redis, and for the thread lock
        stop.set()
        for future in waiting:
            with pytest.raises(KiteUnavailable, match="interrupted"):
                future.result(timeout=30)


def test_the_session_of_another_api_key_is_neither_used_nor_replaced(
    everything: Settings, client: redis.Redis
) -> None:
    foreign = Session("another", access_token=SecretStr("foreign"), login_at=time.time())
    save_session(client, everything.keys, foreign)
    with pytest.raises(LoginNeeded, match=r"another api key.*PKB_KITE_ACCESS_TOKEN"):
        SessionManager(everything, lambda: client).current()
    loaded = load_session(client, everything.keys)
    assert loaded is not None and loaded.is_same(foreign)


def test_while_redis_is_unavailable_the_settings_session_is_used(
    make_settings: Callable[..., Settings],
) -> None:
    def unavailable() -> redis.Redis:
        raise RedisUnavailable("no Redis answers", "start it")

    fixed = make_settings(kite_api_key="key", kite_access_token="fixed")
    assert SessionManager(fixed, unavailable).current().token == "fixed"
    with pytest.raises(RedisUnavailable):
        SessionManager(make_settings(), unavailable).current()


def test_a_recovered_redis_is_connected_to_again(web: Settings, client: redis.Redis) -> None:
    broken = redis.Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0))
    clients = [broken, client]
    manager = SessionManager(web, lambda: clients.pop(0))
    with pytest.raises(RedisUnavailable):
        manager.current()
    assert manager.current().kind == "enctoken"


def test_each_account_has_its_own_credentials(make_settings: Callable[..., Settings]) -> None:
    other = Account(user_id="SIM002", password="other", totp_secret=pyotp.random_base32(), api_key="k2")
    with simulated_kite(accounts=Accounts(Account(), other)) as kite:
        mixed = {**fields_of(kite, *WEB), "kite_user_id": "sim002", "kite_password": "other"}
        with pytest.raises(LoginRefused, match="TOTP"):
            KiteAuthenticator(settings=make_settings(**mixed)).log_in()
        mixed["kite_totp_secret"] = other.totp_secret
        assert KiteAuthenticator(settings=make_settings(**mixed)).log_in().user_id == "SIM002"
