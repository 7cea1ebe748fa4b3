"""The users of docs/acl.conf on a real server: each can do its work, and nothing else."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
import rq

from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import RedisUnavailable
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.instruments import swap_master
from pkbrokers_redis.store.symbols import save_instruments
from tests.store.test_connect import SECRET, refusal
from tests.support import redis_server_binary, running_python, running_server, settings_env, wait_until

KEYS = Keys()
ACL = Path(__file__).resolve().parents[2] / "docs" / "acl.conf"


def settings_of(user: str, port: int, **overrides: Any) -> Settings:
    url = f"redis://{user}:change-me-{user}@127.0.0.1:{port}"
    return load_settings(redis_url=url, sessions="always", **overrides)


@pytest.fixture(params=["valkey", "redis"])
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """A server with that file."""
    if request.param == "redis" and redis_server_binary() is None:
        pytest.skip("no redis-server 7 or later on PATH")
    with running_server(tmp_path / "server", "--aclfile", str(ACL), kind=request.param) as found:
        yield found


def denials(port: int) -> list[tuple[str, str, str]]:
    """(user, why, object) of everything the server refused since its start."""
    with connect(settings_of("admin", port)) as admin:
        log: Any = admin.acl_log()
        return [(entry["username"], entry["reason"], entry["object"]) for entry in log]


@pytest.mark.xdist_group("heavy")
def test_every_role_does_its_work_with_its_own_user(port: int, tmp_path: Path) -> None:
    rows = universe(50)
    names = tmp_path / "tokens.txt"
    names.write_text("\n".join(str(row["instrument_token"]) for row in rows))
    with connect(settings_of("jobs", port)) as jobs:
        assert save_instruments(jobs, KEYS, rows).saved == 50
        queue = rq.Queue("pkb", connection=jobs)
        queue.enqueue("builtins.len", "four")
        assert rq.SimpleWorker([queue], connection=jobs).work(burst=True)
    kite = SimulatorServer(Market(rows, int(time.time() * 1000), rate=1_000))
    kite.start()
    common = {"PKB_KITE_WS_URL": kite.url, "PKB_INSTRUMENTS": str(names)}
    reading = settings_of("reader", port)
    with ExitStack() as stack:
        stack.callback(kite.stop)
        workers: list[subprocess.Popen[str]] = []
        for role, user in (("web", "web"), ("aggregate", "aggregator"), ("ingest", "ingest")):
            env = {**settings_env(settings_of(user, port)), **common, "PKB_WEB_PORT": "0"}
            workers.append(stack.enter_context(running_python("-m", f"workers.{role}", env=env)))
        reader = stack.enter_context(connect(reading, for_reading=True))
        store = CandleStore(reading, client=reader)
        followed = store.follow(block_seconds=0.01)

        def has_all() -> bool:
            return len(store.bulk(None, "1m", include_current=True).with_rows_only()) > 40

        wait_until(has_all, timeout_seconds=60, what="candles that a reader can read")
        symbol = f"{rows[0]['exchange']}:{rows[0]['tradingsymbol']}"
        wait_until(lambda: store.get_quote(symbol), what="a quote")
        assert list(followed) == [] and lag_entries(reader, KEYS) >= 0
        wait_until(lambda: list(reader.scan_iter(KEYS.worker("web-*"))), what="the web worker's heartbeat")
        for worker in reversed(workers):
            worker.send_signal(signal.SIGTERM)
            output, _ = worker.communicate(timeout=60)
            assert worker.returncode == 0, output
    assert denials(port) == []


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("reader", ("RPUSH", KEYS.candles(256, "1m"), "[]")),
        ("reader", ("HSET", KEYS.meta(), "shards", "4")),
        ("reader", ("FCALL", "pkb_lease", "2", KEYS.cursor(1), KEYS.lease(1), "me", "1000")),
        ("reader", ("HGETALL", KEYS.auth())),
        ("reader", ("FLUSHALL",)),
        ("reader", ("KEYS", "*")),
        ("web", ("HSET", KEYS.current(256), "1m", "[]")),
        ("web", ("HGETALL", KEYS.auth())),
        ("ingest", ("HSET", KEYS.current(256), "1m", "[]")),
        ("ingest", ("HSET", KEYS.cursor(1), "epoch", "9")),
        ("ingest", ("CONFIG", "SET", "appendonly", "no")),
        ("aggregator", ("HGETALL", KEYS.auth())),
        ("aggregator", ("HSET", KEYS.quote(256), "last_price", "1")),
        ("aggregator", ("FLUSHDB",)),
        ("jobs", ("RPUSH", KEYS.candles(256, "1m"), "[]")),
        ("jobs", ("SHUTDOWN",)),
    ],
)
@pytest.mark.parametrize("port", ["valkey"], indirect=True)
def test_user_is_refused_commands_and_keys_outside_its_rights(
    user: str, command: tuple[str, ...], port: int
) -> None:
    client = redis.Redis(port=port, username=user, password=f"change-me-{user}")
    with client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command)


def test_reassigned_token_is_deleted_with_the_rights_of_each_user(port: int) -> None:
    token = 45_000 << 8 | 2
    aggregator = settings_env(settings_of("aggregator", port))
    with ExitStack() as stack:
        admin, jobs = (stack.enter_context(connect(settings_of(user, port))) for user in ("admin", "jobs"))
        for name in ("NIFTY26N1724000CE", "NIFTY26N2426500PE"):
            row = {"instrument_token": str(token), "exchange": "NFO", "tradingsymbol": name}
            swap_master(jobs, KEYS, [row], ["NFO"])
        swap_master(jobs, KEYS, [], ["NFO"])
        held = (KEYS.quote(token), KEYS.candles(token, "1m"))
        admin.hset(held[0], "last_price", "920")
        admin.rpush(held[1], "[1785728700,1,1,1,1,1,null,1]")
        stack.enter_context(running_python("-m", "workers.aggregate", env=aggregator))
        wait_until(lambda: not admin.exists(*held), timeout_seconds=60, what="the aggregator to forget")
    assert denials(port) == []


@pytest.mark.parametrize("port", ["valkey"], indirect=True)
def test_default_user_is_off(port: int) -> None:
    assert "requires a password" in str(refusal(f"redis://127.0.0.1:{port}"))


@pytest.mark.parametrize("port", ["valkey"], indirect=True)
def test_worker_with_a_readers_user_fails_with_one_line(port: int) -> None:
    with running_python("-m", "workers.aggregate", env=settings_env(settings_of("reader", port))) as worker:
        output, _ = worker.communicate(timeout=60)
    assert worker.returncode == 2 and "Traceback" not in output
    assert "denies this user" in output.splitlines()[-1]


# -- TLS -----------------------------------------------------------------------------------------


@pytest.fixture
def tls_port(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """A real server behind TLS ends that a proxy terminates, and the certificate's file."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    try:
        subprocess.run(
            [*words.split(), "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with (
        running_server(tmp_path / "server", "--aclfile", str(ACL)) as plain,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        threading.Thread(target=_proxy, args=(listener, tls, plain), daemon=True).start()
        yield int(listener.getsockname()[1]), str(certificate)


def _proxy(listener: socket.socket, tls: ssl.SSLContext, plain: int) -> None:
    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            each.close()

    while True:
        try:
            accepted, _ = listener.accept()
        except OSError:
            return
        try:
            inner = tls.wrap_socket(accepted, server_side=True)
            outer = socket.create_connection(("127.0.0.1", plain))
        except OSError:  # a client that does not trust us
            accepted.close()
            continue
        for pair in ((inner, outer), (outer, inner)):
            threading.Thread(target=pump, args=pair, daemon=True).start()


def test_tls_with_a_named_certificate_works_and_without_is_one_line(tls_port: tuple[int, str]) -> None:
    port, certificate = tls_port
    url = f"rediss://ingest:change-me-ingest@localhost:{port}"
    with connect(load_settings(redis_url=f"{url}?ssl_ca_certs={quote(certificate)}")) as client:
        client.xadd(KEYS.ticks(0), {"a": "x" * 200_000})
        assert len(client.xrange(KEYS.ticks(0))[0][1][b"a"]) == 200_000  # type: ignore[index]
    error = refusal(f"rediss://ingest:{SECRET}@localhost:{port}")
    assert isinstance(error, RedisUnavailable)
    assert "certificate that is not trusted" in str(error) and "ssl_ca_certs" in error.hint
    error = refusal(f"rediss://ingest:{SECRET}@127.0.0.1:{port}?ssl_ca_certs={quote(certificate)}")
    assert "certificate" in str(error) and "host name" in error.hint
