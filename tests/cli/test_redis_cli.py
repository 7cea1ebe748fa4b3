"""`pkb redis-cli` and `pkb key`: the store in use, without looking up its socket or showing a password."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess

import pytest
import redis

from pkbrokers_redis.cli import redis_cli
from pkbrokers_redis.cli.redis_cli import cli_arguments, raw
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.embedded import attach
from pkbrokers_redis.store.meta import ensure_meta
from tests.cli.conftest import Pkb
from tests.client.contract import INFY, OPEN_S, push, row

needs_redis_cli = pytest.mark.skipif(not shutil.which("redis-cli"), reason="no redis-cli on PATH")


@pytest.fixture(params=[pytest.param("real", marks=needs_redis_cli), "built-in"])
def either_shell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with redis-cli, once as on a machine that has none."""
    if request.param == "built-in":
        monkeypatch.setattr(redis_cli, "PROGRAMS", ())
    return str(request.param)


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_a_command_runs_on_the_store_and_exits(
    pkb: Pkb, client: redis.Redis, store_env: Settings, either_shell: str
) -> None:
    push(client, store_env.keys, INFY, "5m", [row(OPEN_S), row(OPEN_S + 300)])
    key = store_env.keys.candles(INFY, "5m")
    assert pkb("redis-cli", "LRANGE", key, "-2", "-1") == (0, f"{row(OPEN_S)}\n{row(OPEN_S + 300)}\n", "")
    assert pkb("redis-cli", "llen", key).out == "2\n"
    assert pkb("redis-cli", "PING").out == "PONG\n"
    failed = pkb("redis-cli", "LRANGE", "pkb:symbols", "0", "-1")
    assert "WRONGTYPE" in failed.out


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_the_printed_lines_work_with_redis_cli_alone(
    pkb: Pkb, client: redis.Redis, store_env: Settings
) -> None:
    if not shutil.which("redis-cli"):
        pytest.skip("no redis-cli on PATH")
    push(client, store_env.keys, INFY, "1m", [row(OPEN_S)])
    ended = pkb("key", "INFY")
    assert ended.code == 0 and "pkb:{2}:candles:408065:5m" in ended.out
    (line,) = [line for line in ended.out.splitlines() if "LRANGE" in line]
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == row(OPEN_S)


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_keys_as_json(pkb: Pkb, store_env: Settings) -> None:
    found = json.loads(pkb("key", "408065", "--json").out)
    assert (found["token"], found["symbol"], found["shard"]) == (INFY, "NSE:INFY", 2)
    assert found["keys"]["current"] == "pkb:{2}:current:408065"
    assert found["keys"]["candles 5m"] == "pkb:{2}:candles:408065:5m"


def test_the_embedded_server_is_reached_too(pkb: Pkb, either_shell: str) -> None:
    with attach(load_settings()):
        assert pkb("redis-cli", "SET", "a", "1").out == "OK\n"
        assert pkb("redis-cli", "GET", "a").out == "1\n"


def test_the_embedded_servers_password_is_found_and_not_shown(
    pkb: Pkb, monkeypatch: pytest.MonkeyPatch, either_shell: str
) -> None:
    monkeypatch.setenv("PKB_EMBEDDED_PORT", "0")
    with attach(load_settings()) as server, connect(load_settings()) as client:
        assert pkb("redis-cli", "SET", "a", "1").out == "OK\n"
        ensure_meta(client, load_settings(), "2026-01-05T09:00:00+05:30")
        for words in (["key", "408065"], ["config"]):
            ended = pkb(*words)
            assert ended.code == 0 and server.password not in ended.out + ended.err
        assert "pkb redis-cli LRANGE" in pkb("key", "408065").out


def test_a_password_goes_by_the_environment_not_by_arguments() -> None:
    url = "rediss://jo:ge%20heim@cache.local:6380/3?ssl_ca_certs=/ca.pem"
    options, secrets = cli_arguments(redis.Redis.from_url(url))
    assert shlex.join(options) == "-h cache.local -p 6380 -n 3 --user jo --cacert /ca.pem --tls"
    assert secrets == {"REDISCLI_AUTH": "ge heim"}
    options, secrets = cli_arguments(redis.Redis.from_url("unix:///tmp/a.sock?db=2"))
    assert (options, secrets) == (["-s", "/tmp/a.sock", "-n", "2"], {})


def test_replies_are_bare_values_a_line_each() -> None:
    assert raw([b"a", [1, None], [b"x", [b"OK"]]]) == "a\n1\n\nx\nOK"
