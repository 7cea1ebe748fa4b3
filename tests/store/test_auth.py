"""P:auth: a session that all share, that runs out, and that only its own failure ends."""

from __future__ import annotations

import time
from datetime import datetime

import pytest
import redis
from pydantic import SecretStr

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.errors import LoginRefused, WrongKeyType
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import auth
from pkbrokers_redis.store.auth import Session, expires_at, forget_session, load_session, save_session

NOW = time.time()


@pytest.fixture
def server_kind() -> str:
    return "valkey"  # which of them does not matter here


def session(text: str = "token-one") -> Session:
    # Of this moment: one of the tests' beginning may have ended at six since.
    return Session("key", "AB1234", access_token=SecretStr(text), login_at=time.time())


@pytest.mark.parametrize(
    ("login", "end"),
    [
        ("2026-11-23T09:00:00+05:30", "2026-11-24T06:00:00+05:30"),
        ("2026-11-23T05:59:59+05:30", "2026-11-23T06:00:00+05:30"),
        ("2026-11-23T06:00:00+05:30", "2026-11-24T06:00:00+05:30"),
        ("2026-11-22T20:00:00+00:00", "2026-11-23T06:00:00+05:30"),  # 01:30 in India
    ],
)
def test_a_session_ends_at_the_first_six_in_the_morning_in_india(login: str, end: str) -> None:
    found = expires_at(datetime.fromisoformat(login).timestamp())
    assert datetime.fromtimestamp(found, IST).isoformat() == end


def test_saved_session_is_loaded_and_expires(client: redis.Redis, settings: Settings) -> None:
    saved = save_session(client, settings.keys, session())
    loaded = load_session(client, settings.keys)
    assert loaded is not None and loaded.is_same(saved) and loaded.id == saved.id != ""
    assert (loaded.user_id, loaded.kind, loaded.token) == ("AB1234", "access_token", "token-one")
    assert abs(loaded.login_at - saved.login_at) <= 1 and loaded.expires_at == expires_at(saved.login_at)
    assert 0 < client.ttl(settings.keys.auth()) <= 24 * 3600  # type: ignore[operator]


def test_a_new_session_replaces_all_of_the_old_one(client: redis.Redis, settings: Settings) -> None:
    save_session(client, settings.keys, session())
    save_session(
        client, settings.keys, Session("", "AB1234", enctoken=SecretStr("enc"), login_at=time.time())
    )
    loaded = load_session(client, settings.keys)
    assert loaded is not None and (loaded.kind, loaded.token, loaded.api_key) == ("enctoken", "enc", "")


def test_no_repr_shows_a_token() -> None:
    for each in (session("geheim"), Session("", "U", enctoken=SecretStr("geheim"))):
        assert "geheim" not in repr(each) + str(each) + f"{each}"


def test_refused_session_is_not_loaded_again(client: redis.Redis, settings: Settings) -> None:
    saved = save_session(client, settings.keys, session())
    forget_session(client, settings.keys, saved)
    assert load_session(client, settings.keys) is None
    forget_session(client, settings.keys, saved)  # the next worker says so too
    assert load_session(client, settings.keys) is None


def test_slow_worker_does_not_refuse_a_newer_session(client: redis.Redis, settings: Settings) -> None:
    dead = save_session(client, settings.keys, session("dead"))
    alive = save_session(client, settings.keys, session("alive"))
    forget_session(client, settings.keys, dead)
    forget_session(client, settings.keys, session("out of the settings"))
    loaded = load_session(client, settings.keys)
    assert loaded is not None and loaded.is_same(alive)


def test_refusal_of_an_expired_session_expires_too(client: redis.Redis, settings: Settings) -> None:
    saved = save_session(client, settings.keys, session())
    client.delete(settings.keys.auth())
    forget_session(client, settings.keys, saved)
    assert load_session(client, settings.keys) is None
    assert client.ttl(settings.keys.auth()) > 0  # type: ignore[operator]


@pytest.mark.parametrize(
    "fields",
    [
        {"access_token": ""},
        {"id": "1", "login_at": "never"},
        {"nonsense": "x"},
        {"id": "1", "refused": "1", "access_token": "t"},
    ],
)
def test_malformed_session_hash_is_no_session(
    client: redis.Redis, settings: Settings, fields: dict[str, str]
) -> None:
    client.hset(settings.keys.auth(), mapping=fields)  # type: ignore[arg-type]
    assert load_session(client, settings.keys) is None


def test_key_of_another_type_is_named(client: redis.Redis, settings: Settings) -> None:
    client.set(settings.keys.auth(), "x")
    with pytest.raises(WrongKeyType, match="pkb:auth holds a string"):
        load_session(client, settings.keys)


def test_attempts_count_within_an_hour_and_a_login_ends_a_refusal(
    client: redis.Redis, settings: Settings
) -> None:
    keys = settings.keys
    for attempts in range(2):
        state = auth.load_login_state(client, keys, NOW)
        assert state.attempts == attempts
        auth.note_attempt(client, keys, state, NOW)
    auth.note_refusal(client, keys, LoginRefused("wrong password", "correct it"), NOW)
    auth.note_totp_window(client, keys, 59_000_000)
    state = auth.load_login_state(client, keys, NOW + 60)
    assert (state.attempts, state.refused, state.hint) == (2, "wrong password", "correct it")
    assert auth.load_login_state(client, keys, NOW + auth.OUTAGE_SECONDS + 1).attempts == 0
    save_session(client, keys, session())
    state = auth.load_login_state(client, keys, NOW)
    assert (state.attempts, state.refused) == (2, "")  # a session that dies at once is no end of an outage
    auth.clear_outage(client, keys)
    assert auth.load_login_state(client, keys, NOW).attempts == 0
    assert auth.load_login_state(client, keys, NOW).totp_window == 59_000_000


def test_malformed_login_state_is_empty(client: redis.Redis, settings: Settings) -> None:
    fields = {"attempts": "many", "attempted_at": "1e99", "totp_window": "9" * 40}
    client.hset(settings.keys.login(), mapping=fields)  # type: ignore[arg-type]
    assert auth.load_login_state(client, settings.keys, NOW) == auth.LoginState()
