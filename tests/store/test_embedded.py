"""The embedded server is shared while it is used, stops afterwards, and keeps its data."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from pkbrokers_redis.errors import PkbError, RedisUnavailable, RedisUnsuitable
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.embedded import (
    EmbeddedServer,
    attach,
    find_binary,
    running,
    store_folder,
)
from pkbrokers_redis.store.embedded_monitor import REWRITE_NICENESS
from tests.support import is_alive, redis_server_binary, running_process, wait_until

USER = """
import sys, time
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.embedded import attach
server = attach(load_settings(data_dir=sys.argv[1]), linger_seconds=0)
print(server.pid, server.reattached, flush=True)
time.sleep(600)
"""

Attach = Callable[..., EmbeddedServer]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def use(data_dir: Path) -> Iterator[Attach]:
    """`use(**settings)`: attach to the server of this test's folder; what is left attached is closed."""
    held: list[EmbeddedServer] = []

    def attach_here(**overrides: Any) -> EmbeddedServer:
        settings = load_settings(**{"data_dir": data_dir, **overrides})
        held.append(attach(settings, linger_seconds=0))
        return held[-1]

    yield attach_here
    for server in held:
        server.close()
    for server in held:
        wait_for_end(server.pid)


def client_of(server: EmbeddedServer) -> redis.Redis:
    return redis.Redis.from_url(server.url)


def wait_for_end(server_pid: int) -> None:
    wait_until(lambda: not is_alive(server_pid), what=f"the end of server {server_pid}")


def monitor_of(server: EmbeddedServer) -> psutil.Process:
    found = psutil.Process(server.pid).parent()
    assert found is not None and any("embedded_monitor.py" in word for word in found.cmdline())
    return found


@contextlib.contextmanager
def user_process(data_dir: Path) -> Iterator[tuple[int, int, bool]]:
    """Another process that attaches and stays: its pid, the server's pid, whether it reattached."""
    with running_process(sys.executable, "-c", USER, data_dir) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the user process died"
        server_pid, reattached = line.split()
        yield process.pid, int(server_pid), reattached == "True"


def listening_on(server: EmbeddedServer) -> list[tuple[str, int]]:
    """The TCP addresses that the server's process listens on."""
    return [
        tuple(each.laddr)
        for each in psutil.Process(server.pid).net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    ]


def as_an_earlier_release(server: EmbeddedServer) -> None:
    """Make a server with a TCP port what earlier releases started: one without a password."""
    with client_of(server) as client:
        client.config_set("requirepass", "")
    path = server.socket_path.parent / "server.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "password"}))


def test_server_answers_on_a_private_socket_only(use: Attach, server_kind: str) -> None:
    server = use(embedded_server=server_kind)
    with client_of(server) as client:
        assert client.ping()
        assert client.config_get("port") == {"port": "0"}
    assert listening_on(server) == []
    assert (server.tcp_port, server.password) == (0, "")
    assert not server.reattached
    assert stat.S_IMODE(server.socket_path.stat().st_mode) == 0o700
    assert stat.S_IMODE(server.socket_path.parent.stat().st_mode) == 0o700
    readable_by_others = [p for p in server.socket_path.parent.rglob("*") if p.stat().st_mode & 0o077]
    assert [p.name for p in readable_by_others if p.name != "server.log"] == []


def test_server_writes_an_append_only_file(use: Attach) -> None:
    with client_of(use()) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("save") == {"save": ""}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's children")
def test_rewrite_of_the_append_only_file_has_lower_priority(use: Attach, server_kind: str) -> None:
    server = use(embedded_server=server_kind)
    with client_of(server) as client:
        client.mset({f"key-{n}": n for n in range(100)})
        client.config_set("rdb-key-save-delay", 1_000_000)  # µs: the rewrite stays for us to look at
        client.bgrewriteaof()
        process = psutil.Process(server.pid)
        wait_until(
            lambda: any(each.nice() >= REWRITE_NICENESS for each in process.children()), what="a nicer child"
        )
        assert process.nice() == psutil.Process().nice()  # and no other
        for each in process.children():
            each.kill()


def test_compact_lists_are_a_setting(use: Attach) -> None:
    with client_of(use(compact=True)) as client:
        assert client.config_get("list-*")["list-max-listpack-size"] == "24"
        assert client.config_get("list-*")["list-compress-depth"] == "1"


def test_a_second_process_shares_the_server(use: Attach, data_dir: Path) -> None:
    server = use()
    with user_process(data_dir) as (_, server_pid, reattached):
        assert (server_pid, reattached) == (server.pid, True)


def test_attaching_twice_in_a_process_shares_it_and_the_last_close_ends_it(use: Attach) -> None:
    first, second = use(), use()
    assert second.reattached and first.pid == second.pid
    first.close()
    first.close()
    with client_of(second) as client:
        assert client.ping()
    second.close()
    wait_for_end(second.pid)


def test_server_outlives_its_last_user_for_a_moment(data_dir: Path) -> None:
    settings = load_settings(data_dir=data_dir)
    with attach(settings, linger_seconds=600) as first:
        monitor = monitor_of(first)
    time.sleep(0.3)  # a chance to do it wrong: the monitor looks every tenth of a second
    with attach(settings) as second:
        assert second.reattached and second.pid == first.pid
    monitor.terminate()
    wait_for_end(first.pid)


def test_the_data_stays_between_runs(use: Attach, server_kind: str) -> None:
    server = use(embedded_server=server_kind)
    with client_of(server) as client:
        client.rpush("kept", *range(1000))
    server.close()
    wait_for_end(server.pid)
    again = use(embedded_server=server_kind)
    with client_of(again) as client:
        assert client.llen("kept") == 1000
    assert not again.reattached


def test_tcp_on_request_requires_the_password(use: Attach, server_kind: str) -> None:
    server = use(embedded_server=server_kind, embedded_port=0)
    assert listening_on(server) == [("127.0.0.1", server.tcp_port)]
    with redis.Redis(port=server.tcp_port) as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    bare = redis.Redis(unix_socket_path=str(server.socket_path))
    with bare as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    with redis.Redis(port=server.tcp_port, password=server.password) as client:
        assert client.info("server")["process_id"] == server.pid
    with client_of(server) as client:
        assert client.ping()
    assert use(embedded_server=server_kind, embedded_port=0).reattached


def test_the_password_is_in_a_private_file_and_on_no_command_line(use: Attach) -> None:
    server = use(embedded_port=0)
    path = server.socket_path.parent / "server.json"
    assert len(server.password) == 43
    assert json.loads(path.read_text())["password"] == server.password
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for process in (psutil.Process(server.pid), monitor_of(server)):
        assert not any(server.password in word for word in process.cmdline())
    assert server.password not in repr(server)
    assert server.password not in (path.parent / "server.log").read_text()


def test_leftover_server_json_does_not_change_the_mode(use: Attach, data_dir: Path) -> None:
    folder = store_folder(data_dir)
    folder.mkdir(parents=True)
    (folder / "server.json.new").touch(0o666)
    use(embedded_port=0)
    assert stat.S_IMODE((folder / "server.json").stat().st_mode) == 0o600


def test_client_with_the_password_survives_restarts_of_server_and_monitor(use: Attach) -> None:
    server = use(embedded_port=0)
    os.kill(server.pid, signal.SIGKILL)

    def new_pid() -> int:
        with contextlib.suppress(redis.ConnectionError), client_of(server) as client:
            return int(client.info("server")["process_id"])
        return 0

    assert wait_until(new_pid, what="the restarted server") != server.pid
    second = use(embedded_port=0)
    monitor_of(second).kill()
    wait_for_end(second.pid)
    third = use(embedded_port=0)
    assert (third.password, third.tcp_port) == (server.password, server.tcp_port)
    with client_of(server) as client:
        assert client.ping()


def test_fixed_port_is_used_or_refused_in_one_line(use: Attach) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        error = refusal(use, embedded_port=port)
    assert str(port) in str(error) and "PKB_EMBEDDED_PORT" in error.hint
    assert use(embedded_port=port).tcp_port == port


def test_server_in_use_keeps_its_port_with_a_warning(use: Attach, capsys: pytest.CaptureFixture[str]) -> None:
    server = use()
    assert use(embedded_port=0).pid == server.pid
    (line,) = capsys.readouterr().err.splitlines()
    assert "embedded_port_not_applied" in line and "has no TCP port" in line
    assert listening_on(server) == []


def test_an_open_server_of_an_earlier_release_is_refused_while_it_is_used(use: Attach) -> None:
    server = use(embedded_port=0)
    as_an_earlier_release(server)
    for port in (None, 0, server.tcp_port):
        assert f"kill {server.pid}" in refusal(use, embedded_port=port).hint


def test_running_starts_no_server_and_keeps_none(use: Attach, data_dir: Path) -> None:
    assert running(data_dir) is None
    server = use()
    found = running(data_dir)
    assert found is not None and found.pid == server.pid
    server.close()
    wait_for_end(server.pid)
    assert running(data_dir) is None


def test_killing_the_only_user_ends_server_and_monitor(data_dir: Path) -> None:
    with user_process(data_dir) as (user_pid, server_pid, _):
        monitor = psutil.Process(server_pid).parent()
        assert monitor is not None
        os.kill(user_pid, signal.SIGKILL)
        wait_for_end(server_pid)
        wait_for_end(monitor.pid)


def test_killing_one_of_two_users_keeps_the_server_running(use: Attach, data_dir: Path) -> None:
    with user_process(data_dir) as (user_pid, server_pid, _):
        server = use()
        os.kill(user_pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(user_pid))
        monitor_of(server).suspend()  # it cannot have looked yet …
        monitor_of(server).resume()
        with client_of(server) as client:
            client.blpop("nothing", timeout=0.5)  # … and has looked twice by the end of this
            assert client.info("server")["process_id"] == server_pid


def test_a_killed_server_is_started_again_and_has_lost_nothing(use: Attach, server_kind: str) -> None:
    server = use(embedded_server=server_kind)
    with client_of(server) as client:
        for number in range(2000):
            client.rpush("written", number)
        os.kill(server.pid, signal.SIGKILL)
        wait_for_end(server.pid)
    again = use(embedded_server=server_kind)
    assert again.pid != server.pid
    with client_of(again) as client:
        assert client.llen("written") == 2000


def test_killed_server_is_restarted_for_attached_users(use: Attach) -> None:
    server = use()
    os.kill(server.pid, signal.SIGKILL)

    def new_pid() -> int:
        with contextlib.suppress(redis.ConnectionError), client_of(server) as client:
            return int(client.info("server")["process_id"])
        return 0

    assert wait_until(new_pid, what="the restarted server") != server.pid


def test_killed_monitor_ends_its_server(use: Attach) -> None:
    server = use()
    with client_of(server) as client:
        client.set("kept", "1")
    monitor_of(server).kill()
    wait_for_end(server.pid)
    again = use()
    assert again.pid != server.pid and not again.reattached
    with client_of(again) as client:
        assert client.get("kept") == b"1"


@pytest.mark.parametrize("port", [None, 0])
def test_server_that_outlives_its_monitor_ends_before_another_starts(
    use: Attach, data_dir: Path, port: int | None
) -> None:
    """As for a server that is slow to flush: two never share the files, whatever the next one listens on."""
    server = use(embedded_port=port)
    monitor, orphan = monitor_of(server), psutil.Process(server.pid)
    orphan.suspend()  # SIGTERM by PDEATHSIG waits
    monitor.kill()
    wait_for_end(monitor.pid)
    successor = threading.Thread(target=use)
    successor.start()
    time.sleep(1.3)  # beyond the second that the successor's first PING waits; a start takes far less
    orphan.resume()
    successor.join()
    log = (store_folder(data_dir) / "server.log").read_text()
    assert log.index("ready to exit") < log.rindex("is starting")
    assert listening_on(use()) == []


def test_terminated_monitor_stops_its_server_cleanly(use: Attach, data_dir: Path) -> None:
    server = use()
    monitor_of(server).terminate()
    wait_for_end(server.pid)
    assert "ready to exit" in (store_folder(data_dir) / "server.log").read_text()


def test_manual_shutdown_lasts_until_the_next_attach(use: Attach, data_dir: Path) -> None:
    server = use()
    monitor = monitor_of(server)
    with client_of(server) as client:
        client.shutdown(nosave=True)
    wait_for_end(monitor.pid)
    assert running(data_dir) is None
    assert use().pid != server.pid


def test_processes_that_start_at_once_get_one_server(data_dir: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(running_process(sys.executable, "-c", USER, data_dir)) for _ in range(4)
        ]
        lines = [process.stdout.readline().split() for process in processes if process.stdout]
    assert len({pid for pid, _ in lines}) == 1
    assert sorted(reattached for _, reattached in lines) == ["False", "True", "True", "True"]
    wait_for_end(int(lines[0][0]))


def test_process_that_attaches_during_a_stop_gets_a_lasting_server(use: Attach) -> None:
    chance = random.Random(7)
    pids = set()
    for _ in range(15):
        server = use()
        with client_of(server) as client:
            client.incr("visits")
            client.blpop("nothing", timeout=0.01)
            assert client.ping()
        pids.add(server.pid)
        server.close()
        time.sleep(chance.uniform(0, 0.25))  # around the monitor's poll: before, at and after the stop
    assert len(pids) > 1, "the monitor never stopped in between: the test has lost its aim"
    with client_of(use()) as client:
        assert client.get("visits") == b"15"


@pytest.mark.parametrize(
    "server_json",
    [
        b"\x00garbage{",
        b"[1, 2]",
        b'{"pid": "x"}',
        b'{"pid": OUR_PID, "tcp_port": 1, "socket_path": "/nowhere", "kind": "valkey"}',
        b'{"pid": 1, "tcp_port": 99999999, "socket_path": "", "kind": ""}',
        b'{"pid": 1, "tcp_port": 1, "password": "x y\\n", "socket_path": "", "kind": ""}',
    ],
)
def test_leftover_files_do_not_prevent_a_start(use: Attach, data_dir: Path, server_json: bytes) -> None:
    folder = store_folder(data_dir)
    folder.mkdir(parents=True, mode=0o755)
    (folder / "server.json").write_bytes(server_json.replace(b"OUR_PID", b"%d" % os.getpid()))
    for name in ("users.lock", "monitor.lock", "server.lock"):
        (folder / name).write_text("12345\n")
    with socket.socket(socket.AF_UNIX) as leftover:
        leftover.bind(str(folder / "pkb.sock"))
    server = use()
    assert not server.reattached
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with client_of(server) as client:
        assert client.ping()
    assert is_alive(os.getpid())


def test_previous_port_is_not_used_while_another_process_has_it(use: Attach) -> None:
    server = use(embedded_port=0)
    server.close()
    wait_for_end(server.pid)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", server.tcp_port))
        taken.listen()
        assert use(embedded_port=0).tcp_port not in (0, server.tcp_port)


def test_torn_append_only_file_loses_only_its_end(use: Attach, data_dir: Path) -> None:
    server = use()
    with client_of(server) as client:
        for number in range(100):
            client.rpush("written", number)
    server.close()
    wait_for_end(server.pid)
    (journal,) = store_folder(data_dir).glob("appendonlydir/*.incr.aof")
    os.truncate(journal, journal.stat().st_size - 5)
    with client_of(use()) as client:
        assert client.llen("written") == 99


def test_a_server_that_loads_is_waited_for(use: Attach, tmp_path: Path) -> None:
    server = use()
    with client_of(server) as client:
        for number in range(4):
            client.rpush("written", *range(number * 1000, number * 1000 + 1000))
            for each in range(1000):
                client.set(f"k:{each}", number)
    server.close()
    wait_for_end(server.pid)
    slow = tmp_path / "slow-server"
    slow.write_text(
        f'#!/bin/sh\ncase "$1" in --version) echo v=9.0.0;; '
        f'*) exec {find_binary("valkey")} "$@" --key-load-delay 150;; esac\n'
    )
    slow.chmod(0o755)
    with client_of(use(embedded_server=str(slow))) as client:
        assert client.llen("written") == 4000


def test_a_folder_too_deep_for_a_socket_path_gets_one_in_the_temp_folder(use: Attach, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a-folder-of-some-length"] * 5)
    server = use(data_dir=deep)
    assert len(str(server.socket_path)) < 104
    assert stat.S_IMODE(server.socket_path.parent.stat().st_mode) == 0o700
    with client_of(server) as client:
        assert client.ping()
    again = use(data_dir=deep)
    assert again.reattached
    server.close()
    again.close()
    wait_until(
        lambda: not server.socket_path.parent.exists(), what="the end of the folder in the temp folder"
    )


def test_path_may_hold_spaces_and_special_characters(use: Attach, tmp_path: Path) -> None:
    server = use(data_dir=tmp_path / 'Zerodha & Söhne\'s 100% "data"?#')
    with client_of(server) as client:
        assert client.ping()


def test_long_log_is_rotated(use: Attach, data_dir: Path) -> None:
    folder = store_folder(data_dir)
    folder.mkdir(parents=True)
    (folder / "server.log").write_bytes(b"x" * (5 << 20))
    use()
    assert (folder / "server.log").stat().st_size < 1 << 20
    assert (folder / "server.log.1").exists()


def refusal(use: Attach, **overrides: Any) -> PkbError:
    with pytest.raises(PkbError) as caught:
        use(**overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_missing_binary_is_one_line(use: Attach) -> None:
    error = refusal(use, embedded_server="/nowhere/redis-server")
    assert isinstance(error, RedisUnavailable) and "/nowhere/redis-server" in str(error)


def test_file_that_is_not_executable_is_one_line(use: Attach, tmp_path: Path) -> None:
    text = tmp_path / "notes"
    text.write_bytes(b"\x7fELFnot")
    text.chmod(0o755)
    assert "does not run" in str(refusal(use, embedded_server=str(text)))


def test_redis_6_is_refused_before_it_touches_the_data(use: Attach, tmp_path: Path, data_dir: Path) -> None:
    old = script(tmp_path / "redis-server", "echo Redis server v=6.2.14 sha=0:0")
    assert isinstance(refusal(use, embedded_server=old), RedisUnsuitable)
    assert not (store_folder(data_dir) / "appendonlydir").exists()


def test_server_that_fails_to_start_reports_its_reason(use: Attach, tmp_path: Path) -> None:
    broken = script(tmp_path / "broken", "echo 'no memory on this machine' >&2; exit 1")
    assert "no memory on this machine" in str(refusal(use, embedded_server=broken))


@pytest.mark.skipif(redis_server_binary() is None, reason="no redis-server 7 or later on PATH")
def test_data_of_another_kind_of_server_are_named(use: Attach) -> None:
    server = use(embedded_server="valkey")
    with client_of(server) as client:
        client.set("a", "1")
    server.close()
    wait_for_end(server.pid)
    assert "PKB_EMBEDDED_SERVER" in refusal(use, embedded_server="redis").hint
    with client_of(use(embedded_server="valkey")) as client:
        assert client.get("a") == b"1"


def test_a_data_folder_that_is_a_file_is_one_line(use: Attach, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    assert "PKB_DATA_DIR" in refusal(use).hint
