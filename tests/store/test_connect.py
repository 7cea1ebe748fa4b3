"""From a URL to a client, or to one line without a secret in it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
from hypothesis import example, given
from hypothesis import strategies as st

from pkbrokers_redis.errors import PkbError, RedisUnavailable, RedisUnsuitable, SettingsError
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store import connect as connecting
from pkbrokers_redis.store.connect import connect, describe, explain
from pkbrokers_redis.store.embedded import reader_data_dir, running, store_folder
from tests.support import Impostor, running_server, wait_until

SECRET = "s3cr3t-Pa55"


def refusal(url: str, **arguments: Any) -> PkbError:
    """What connecting there says; checked to be one line, to name a way out, and to keep the secret."""
    with pytest.raises(PkbError) as caught:
        connect(load_settings(redis_url=url), **arguments)
    error = caught.value
    assert "\n" not in str(error) and error.hint
    links: list[BaseException] = [error]
    while links[-1].__cause__ is not None:
        links.append(links[-1].__cause__)
    assert not [link for link in links if SECRET in str(link) or SECRET in repr(link)]
    return error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def modern(command: bytes) -> bytes:
    """A Redis 7, as far as connecting goes."""
    return {b"FUNCTION": b"*0\r\n", b"PING": b"+PONG\r\n"}.get(command, b"+OK\r\n")


def test_replies_are_bytes(settings: Settings) -> None:
    with connect(settings) as client:
        client.set("a", "1")
        assert client.get("a") == b"1"


def test_a_url_cannot_change_the_shape_of_replies(make_settings: Callable[..., Settings]) -> None:
    url = make_settings().redis_url
    assert url is not None
    shaped = make_settings(redis_url=f"{url.get_secret_value()}?decode_responses=True&protocol=3")
    with connect(shaped) as client:
        client.set("a", "1")
        assert client.get("a") == b"1"


def test_writers_never_retry_a_command_and_readers_do(settings: Settings) -> None:
    writer, reader = connect(settings), connect(settings, for_reading=True)
    for client, attempts in ((writer, 0), (reader, connecting.READER_RETRIES)):
        assert client.get_connection_kwargs()["retry"].get_retries() == attempts
        client.close()


def test_a_lost_reply_to_a_write_is_not_sent_again() -> None:
    """The connection dies after the command arrived: the entry may be in the stream already."""

    def reply_of(command: bytes) -> bytes:
        if command == b"XADD":
            raise ConnectionAbortedError
        return modern(command)

    with Impostor(reply_of) as server:
        client = connect(load_settings(redis_url=f"redis://127.0.0.1:{server.port}"))
        with pytest.raises(redis.ConnectionError):
            client.xadd("s", {"a": 1})
        assert sum(command.startswith(b"XADD") for command in server.commands) == 1


def test_without_a_url_the_embedded_server_runs_as_long_as_the_client(tmp_path: Path) -> None:
    settings = load_settings(data_dir=tmp_path)
    client = connect(settings)
    assert client.ping()
    assert running(tmp_path) is not None
    assert describe(settings) == f"the embedded server in {tmp_path / 'redis'}"
    pipeline = client.pipeline()
    del client
    gc.collect()
    pipeline.ping()
    assert pipeline.execute() == [True]
    del pipeline
    gc.collect()
    wait_until(lambda: running(tmp_path) is None, what="the embedded server's end")


def test_reader_uses_the_demos_store_and_a_worker_creates_its_own(tmp_path: Path) -> None:
    demo = connect(load_settings(data_dir=tmp_path / "demo"))
    demo.set("where", "demo")
    reader = connect(load_settings(data_dir=tmp_path), for_reading=True)
    assert reader.get("where") == b"demo"
    worker = connect(load_settings(data_dir=tmp_path))
    assert worker.get("where") is None
    assert store_folder(tmp_path).exists()


def test_unreachable_server_is_one_line() -> None:
    port = free_port()
    error = refusal(f"redis://:{SECRET}@127.0.0.1:{port}/0")
    assert isinstance(error, RedisUnavailable)
    assert f"127.0.0.1:{port}" in str(error) and "refused" in str(error)


def test_unknown_host_is_one_line() -> None:
    assert isinstance(refusal(f"redis://:{SECRET}@no-such-host.invalid:6379"), RedisUnavailable)


@pytest.mark.parametrize("host", ["a" * 70 + ".in", "..", "%00"])
def test_invalid_host_name_is_one_line(host: str) -> None:
    assert isinstance(refusal(f"redis://:{SECRET}@{host}:6379"), PkbError)


def test_missing_socket_is_one_line(tmp_path: Path) -> None:
    error = refusal(f"unix://:{SECRET}@{tmp_path}/no.sock?db=0")
    assert f"unix://{tmp_path}/no.sock" in str(error) and "No such file" in str(error)


def test_wrong_or_missing_password_is_one_line(tmp_path: Path) -> None:
    with running_server(tmp_path / "guarded", "--requirepass", SECRET) as port:
        place = f"127.0.0.1:{port}"
        with connect(load_settings(redis_url=f"redis://:{SECRET}@{place}")) as client:
            assert client.ping()
            client.acl_setuser(
                "narrow", enabled=True, passwords=[f"+{SECRET}"], categories=["+@read"], keys=["pkb:*"]
            )
            client.hset("pkb:meta", "shards", "8")
        assert "requires a password" in str(refusal(f"redis://{place}"))
        assert "refuses the user or password" in str(refusal(f"redis://:{SECRET}x@{place}"))
        assert "refuses the user or password" in str(refusal(f"redis://nobody:{SECRET}@{place}"))
        narrow = f"redis://narrow:{SECRET}@{place}"
        assert "denies this user" in str(refusal(narrow))
        with connect(load_settings(redis_url=narrow), for_reading=True) as client:
            assert client.hget("pkb:meta", "shards") == b"8"


def test_a_password_where_none_is_set_is_one_line(tmp_path: Path) -> None:
    with running_server(tmp_path / "open") as port:
        assert "no password set" in str(refusal(f"redis://:{SECRET}@127.0.0.1:{port}"))


def test_a_database_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with running_server(tmp_path / "open") as port:
        assert isinstance(refusal(f"redis://127.0.0.1:{port}/99"), PkbError)


@pytest.mark.parametrize("for_reading", [False, True])
def test_a_redis_without_functions_is_refused(for_reading: bool) -> None:
    def redis_6(command: bytes) -> bytes:
        if command == b"FUNCTION":
            return b"-ERR unknown command `FUNCTION`, with args beginning with: `LIST`, \r\n"
        return modern(command)

    with Impostor(redis_6) as server:
        error = refusal(f"redis://127.0.0.1:{server.port}", for_reading=for_reading)
    assert isinstance(error, RedisUnsuitable)
    assert "Functions" in str(error) and "Redis 7" in error.hint


def test_a_server_that_loads_is_waited_for() -> None:
    answers = iter([b"-LOADING Redis is loading the dataset in memory\r\n"] * 3)

    def reply_of(command: bytes) -> bytes:
        return next(answers, modern(command)) if command == b"FUNCTION" else modern(command)

    with Impostor(reply_of) as server:
        assert connect(load_settings(redis_url=f"redis://127.0.0.1:{server.port}"))
        assert sum(command.startswith(b"FUNCTION") for command in server.commands) == 4


def test_server_that_never_finishes_loading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "LOADING_SECONDS_MAX", 0.2)
    with Impostor(lambda _: b"-LOADING Redis is loading the dataset in memory\r\n") as server:
        assert "loading" in str(refusal(f"redis://127.0.0.1:{server.port}"))


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        (b"-MISCONF Errors writing to the AOF file: No space left on device\r\n", "cannot save"),
        (b"-DENIED Redis is running in protected mode because\r\n", "DENIED"),
        (b"-ERR max number of clients reached\r\n", "no connection left"),
        (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", "out of memory"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not Redis"),
        (b"", "does not answer in time"),
    ],
)
def test_a_server_that_refuses_is_one_line(reply: bytes, wanted: str) -> None:
    with Impostor(lambda _: reply) as server:
        error = refusal(f"redis://127.0.0.1:{server.port}", socket_timeout_seconds=0.5)
    assert isinstance(error, RedisUnavailable) and wanted in str(error)


@pytest.mark.parametrize("for_reading", [True, False])
def test_a_server_that_hangs_is_asked_once_and_named(
    for_reading: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting, "ANSWER_SECONDS", 0.2)
    with Impostor(lambda _: b"") as server:
        error = refusal(f"redis://127.0.0.1:{server.port}", for_reading=for_reading)
        asked = [each for each in server.commands if each.startswith(b"FUNCTION")]
    assert "does not answer in time" in str(error)
    assert len(asked) <= 1


def test_an_embedded_server_that_hangs_is_given_up(tmp_path: Path) -> None:
    settings = load_settings(data_dir=tmp_path)
    with connect(settings) as client:
        pid = int(client.info("server")["process_id"])
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(RedisUnavailable, match="does not answer in time"):
                connect(settings, for_reading=True, socket_timeout_seconds=0.5)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert client.ping()


def test_a_server_that_hangs_up_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            for _ in range(3):
                listener.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        assert isinstance(refusal(f"redis://127.0.0.1:{listener.getsockname()[1]}"), RedisUnavailable)


def test_tls_to_a_server_without_it_is_one_line(tmp_path: Path) -> None:
    with running_server(tmp_path / "plain") as port:
        error = refusal(f"rediss://:{SECRET}@127.0.0.1:{port}", socket_timeout_seconds=2)
    assert isinstance(error, RedisUnavailable)
    assert "TLS" in str(error)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_untrusted_certificate_is_one_line_and_a_named_one_is_trusted(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    )
    names = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [*command.split(), *names, "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with Impostor(modern, tls=tls) as server:
        url = f"rediss://:{SECRET}@localhost:{server.port}"
        assert "certificate" in str(refusal(url))
        assert connect(load_settings(redis_url=f"{url}?ssl_ca_certs={quote(str(certificate))}"))
        assert "No such file" in str(refusal(f"{url}?ssl_ca_certs=/nowhere.pem"))


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        f"http://user:{SECRET}@host",
        f"{SECRET}",
        f"redis://:{SECRET}@host:port",
        f"redis://:{SECRET}/x@host:6379",
        f"redis://:{SECRET}#x@host:6379",
        f"redis://:x?{SECRET}@host:6379",
        f"redis://:{SECRET}@host:6379/database",
        f"redis://:{SECRET}@host:123456",
        f"redis://:{SECRET}@[::1:6379",
        f"redis://:{SECRET}@host:6379?socket_timeout=soon",
        f"redis://:{SECRET}@host:6379?no_such_option={SECRET}",
        f"redis+cluster:/{SECRET}",
        f"unix://:{SECRET}/x@/tmp/redis.sock",
        "unix://relative/path.sock",
        "unix://",
    ],
)
def test_malformed_url_is_one_line(url: str) -> None:
    assert isinstance(refusal(url), SettingsError)
    assert SECRET not in describe(load_settings(redis_url=url))


@given(password=st.text(min_size=6, max_size=20))
@example(password="0000@/")
def test_no_password_is_ever_described(password: str) -> None:
    marked = f"Q{password}Z7q"
    for url in (f"redis://:{marked}@host:6379/0", f"unix://:{marked}@/run/redis.sock"):
        assert "Z7q" not in describe(load_settings(redis_url=url))


def test_the_place_is_described_without_the_password() -> None:
    settings = load_settings(redis_url=f"rediss://me:{SECRET}@cache.local:6380/2?socket_timeout=3")
    assert describe(settings) == "rediss://cache.local:6380/2"


def test_every_error_of_redis_py_has_an_explanation() -> None:
    for error in (
        redis.ConnectionError("x"),
        redis.TimeoutError("x"),
        redis.ResponseError("BUSY x"),
        OSError(),
    ):
        explained = explain(error, "here")
        assert isinstance(explained, PkbError) and explained.hint and "here" in str(explained)
    assert "replica" in str(
        explain(redis.ReadOnlyError("You can't write against a read only replica."), "here")
    )


def test_connecting_to_a_silent_host_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "CONNECT_SECONDS_MAX", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        crowd = []
        for _ in range(4):  # fill the accept queue: further SYNs get no answer
            crowd.append(socket.socket())
            crowd[-1].setblocking(False)
            crowd[-1].connect_ex(listener.getsockname())
        error = refusal(f"redis://127.0.0.1:{listener.getsockname()[1]}", socket_timeout_seconds=0.5)
        for each in crowd:
            each.close()
    assert "in time" in str(error)


def test_readers_use_the_demo_only_while_no_real_store_exists(tmp_path: Path) -> None:
    settings = load_settings(data_dir=tmp_path)
    assert reader_data_dir(settings) == (tmp_path, False)
    store_folder(tmp_path / "demo").mkdir(parents=True)
    assert reader_data_dir(settings) == (tmp_path / "demo", True)
    store_folder(tmp_path).mkdir()
    assert reader_data_dir(settings) == (tmp_path, False)
