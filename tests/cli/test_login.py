"""`pkb login`: a session for all, and not a secret in anything that anybody can read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from pkbrokers_redis.settings import Settings
from pkbrokers_redis.simulator.accounts import Account
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.store.auth import load_session
from tests.cli.conftest import Pkb
from tests.kite.logins import APP, WEB, fields_of, secrets_of, simulated_kite
from tests.support import PKB, running_process, running_python, settings_env, wait_until


@pytest.fixture
def server_kind() -> str:
    return "valkey"  # which of them does not matter here


@pytest.fixture
def kite() -> Iterator[SimulatedKite]:
    with simulated_kite() as kite:
        yield kite


@pytest.fixture
def login_with(
    kite: SimulatedKite,
    make_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    client: redis.Redis,
) -> Callable[..., Settings]:
    """`login_with(*WEB)`: the environment has these credentials, and points at the server and the Kite."""

    def use(*names: str, **overrides: Any) -> Settings:
        settings = make_settings(**{**fields_of(kite, *names), **overrides})
        for name, value in settings_env(settings).items():
            monkeypatch.setenv(name, value)
        return settings

    return use


def request_token(kite: SimulatedKite) -> str:
    accounts = kite.accounts
    return accounts.finish_connect(accounts.begin_connect(accounts.first.api_key), accounts.first.api_key)


def test_with_all_credentials_the_login_needs_no_person(
    pkb: Pkb, login_with: Callable[..., Settings], client: redis.Redis
) -> None:
    settings = login_with(*WEB, *APP)
    ended = pkb("login")
    session = load_session(client, settings.keys)
    assert ended.code == 0 and "logged in as SIM001" in ended.out and "06:00 India time" in ended.out
    assert session is not None and session.kind == "access_token"
    assert session.token not in ended.out + ended.err


def test_a_request_token_is_taken_from_the_option_or_from_stdin(
    pkb: Pkb, login_with: Callable[..., Settings], kite: SimulatedKite, monkeypatch: pytest.MonkeyPatch
) -> None:
    login_with(*APP)
    assert pkb("login", "--request-token", request_token(kite)).code == 0
    answer = Path("answer")
    answer.write_text(f"https://app.local/?request_token={request_token(kite)}&status=success\n")
    with answer.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        ended = pkb("login", "--json")
    assert ended.code == 0 and f"{kite.login_url}/connect/login?v=3&api_key=" in ended.out
    assert json.loads(ended.out.splitlines()[-1])["kind"] == "access_token"


def test_without_a_token_or_credentials_the_error_has_a_hint(
    pkb: Pkb, login_with: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "PKB_KITE_USER_ID" in pkb("login").err
    login_with(*APP)
    Path("empty").touch()
    with Path("empty").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        ended = pkb("login")
    assert ended.code == 2 and "--request-token" in ended.err


def test_the_status_prints_age_and_end_and_never_the_token(
    pkb: Pkb, login_with: Callable[..., Settings], client: redis.Redis, kite: SimulatedKite
) -> None:
    settings = login_with(*WEB)
    before = pkb("login", "--status")
    assert before.code == 1 and "pkb login" in before.out
    pkb("login")
    session = load_session(client, settings.keys)
    assert session is not None
    for ended in (pkb("login", "--status"), pkb("login", "--status", "--json")):
        assert ended.code == 0 and "SIM001" in ended.out
        assert session.token not in ended.out + ended.err
    found = json.loads(ended.out)
    assert (found["kind"], found["source"]) == ("enctoken", "P:auth")
    assert 0 <= found["age_seconds"] < 3600 and found["expires_at"].endswith("T06:00:00+05:30")


def test_the_status_of_a_fixed_token_and_of_a_refusal(
    pkb: Pkb, login_with: Callable[..., Settings], client: redis.Redis
) -> None:
    settings = login_with(kite_api_key="key", kite_access_token="geheim")
    assert "PKB_KITE_ACCESS_TOKEN" in pkb("login", "--status").out
    client.hset(settings.keys.login(), mapping={"refused": "wrong password", "hint": "correct it"})
    ended = pkb("login", "--status")
    assert "wrong password: correct it" in ended.err and "geheim" not in ended.out + ended.err


def test_a_recording_uses_the_shared_session(pkb: Pkb, login_with: Callable[..., Settings]) -> None:
    login_with(*WEB, instruments="408065")
    assert "HTTP 403" in pkb("record", "none.cap", "--seconds", "20").err  # nobody has logged in yet
    assert pkb("login").code == 0
    ended = pkb("record", "some.cap", "--seconds", "0.5")
    assert ended.code == 0 and ", 0 reconnects" in ended.out, ended.err


def test_a_recording_prefers_the_shared_session_to_a_stale_token(
    pkb: Pkb, login_with: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    login_with(*WEB, instruments="408065")
    assert pkb("login").code == 0
    monkeypatch.setenv("PKB_KITE_API_KEY", "key")
    monkeypatch.setenv("PKB_KITE_ACCESS_TOKEN", "of-yesterday")
    ended = pkb("record", "some.cap", "--seconds", "0.5")
    assert ended.code == 0 and ", 0 reconnects" in ended.out, ended.err


WORKER = """
import threading
from pkbrokers_redis import logs
from pkbrokers_redis.kite.session import SessionManager
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.connect import connect
settings = load_settings()
logs.configure(settings)
manager = SessionManager(settings, lambda: connect(settings))
manager.renew(manager.current(), threading.Event())
"""


def command_lines(pid: int) -> str:
    """What `ps` shows of a process and its children."""
    process = psutil.Process(pid)
    return " ".join(" ".join(each.cmdline()) for each in [process, *process.children(recursive=True)])


def everything_in_redis(client: redis.Redis, besides: str) -> str:
    """All keys and values, whatever their type."""
    found: list[Any] = []
    for key in client.scan_iter(count=1000):
        if key != besides.encode():
            found += [key, client.dump(key)]
            kind: Any = client.type(key)
            found.append(
                {
                    b"hash": client.hgetall,
                    b"string": client.get,
                    b"stream": lambda name: client.xrevrange(name, count=100),
                    b"zset": lambda name: client.zrange(name, 0, -1),
                }.get(kind, client.type)(key)
            )
    return repr(found)


@pytest.mark.xdist_group("heavy")
def test_no_secret_is_in_anything_that_the_processes_write(
    login_with: Callable[..., Settings], kite: SimulatedKite, client: redis.Redis, tmp_path: Path
) -> None:
    """Logins that succeed and that fail, an ingest that renews its session, and a bug's traceback."""
    settings = login_with(*WEB, *APP, log_level="debug", instruments="408065,738561", sessions="always")
    account = kite.accounts.first
    secrets = secrets_of(account)
    said: list[str] = []

    def end(*command: str, **env: str) -> int:
        with running_process(*command, env=env) as process:
            said.append(command_lines(process.pid))
            output, _ = process.communicate(timeout=60)
            said.append(output)
            return process.returncode

    def forget_totp() -> None:  # so that nobody need wait half a minute
        account.totp_used = account.wrong_totps = 0
        client.hdel(settings.keys.login(), "totp_window")

    def note_session() -> None:
        session = load_session(client, settings.keys)
        assert session is not None
        secrets.append(session.token)

    assert end(*PKB, "login") == 0
    note_session()
    for wrong in ({"PKB_KITE_PASSWORD": "falsch-1"}, {"PKB_KITE_API_SECRET": "falsch-2"},
                  {"PKB_KITE_TOTP_SECRET": "KRUGKIDROVUWG2ZA"}):  # fmt: skip
        forget_totp()
        secrets.extend(wrong.values())
        assert end(*PKB, "login", **wrong) == 2
    kite.accounts.expire_all()
    kite.faults.add("html", path="/api/twofa", count=1)
    forget_totp()
    assert end(*PKB[:1], "-c", WORKER) == 1 and "Traceback" in said[-1]  # nobody caught it
    forget_totp()
    with running_python("-m", "workers.ingest", env=settings_env(settings)) as ingest:
        wait_until(lambda: kite.stats.connections > 0, timeout_seconds=40, what="an ingest that streams")
        note_session()
        wait_until(lambda: [*client.scan_iter("pkb:worker:ingest*")], what="its heartbeat")
        forget_totp()
        logins = kite.accounts.logins
        kite.expire_sessions()
        wait_until(lambda: kite.accounts.logins > logins, timeout_seconds=40, what="a session renewed")
        wait_until(lambda: load_session(client, settings.keys), what="the new session")
        note_session()
        said.append(command_lines(ingest.pid))
        said.append(everything_in_redis(client, settings.keys.auth()))
        ingest.terminate()
        output, _ = ingest.communicate(timeout=60)
        said.append(output)
    said += [path.read_text(errors="replace") for path in tmp_path.rglob("*.log")]
    everything = "\n".join(said)
    assert "logged_in" in everything and "login_failed" in everything  # that is, the logs were looked at
    assert len(set(secrets)) >= 8
    assert [secret for secret in secrets if secret in everything] == []


def test_no_repr_of_the_settings_shows_a_secret(
    kite: SimulatedKite, login_with: Callable[..., Settings]
) -> None:
    text = repr(login_with(*WEB, *APP))
    assert [secret for secret in secrets_of(Account()) if secret in text] == []
    assert os.environ["PKB_KITE_PASSWORD"] not in text
