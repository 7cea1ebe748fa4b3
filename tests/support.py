"""Helpers for tests: wait on predicates, start private servers, run child processes that always end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

from pkbrokers_redis.settings import Settings, env_name
from pkbrokers_redis.store.embedded import find_binary

T = TypeVar("T")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PKB = [sys.executable, "-c", "from pkbrokers_redis.cli.main import run; run()"]


def wait_until(
    predicate: Callable[[], T], *, timeout_seconds: float = 15.0, what: str = "", poll_seconds: float = 0.01
) -> T:
    """Return the first truthy value of `predicate()`. Raise AssertionError with `what` after the time limit.

    The limit only ends a broken program: leave it generous.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            waited_for = what or getattr(predicate, "__doc__", None) or "it"
            raise AssertionError(f"waited {timeout_seconds:g} s for {waited_for}; last seen: {value!r}")
        time.sleep(poll_seconds)


def is_alive(pid: int) -> bool:
    """Return whether the process runs; a zombie does not count."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def settings_env(settings: Settings) -> dict[str, str]:
    """The environment in which another process loads these settings (what differs from the defaults)."""
    env: dict[str, str] = {}
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if value is None or (value == field.default and field.default is not None):
            continue
        text = value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
        env[env_name(name)] = text
    return env


@contextlib.contextmanager
def running_process(
    *command: str | Path, env: dict[str, str] | None = None, stderr_too: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """A child in a process group of its own, killed with all its children at the end of the block.

    stdout is a text pipe; stderr is merged into it by default. `env` is added to the environment.
    """
    process = subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if stderr_too else subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def running_python(
    *arguments: str, env: dict[str, str] | None = None
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """`running_python("-m", "workers.ingest", env=settings_env(settings))`: this Python, always ended."""
    return running_process(sys.executable, *arguments, env=env)


def run_pkb(
    *arguments: str, env: dict[str, str] | None = None, timeout_seconds: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run `pkb ARGUMENTS` to its end, stdout and stderr apart. Kill it and its children at the limit."""
    with running_process(*PKB, *arguments, env=env, stderr_too=False) as process:
        out, err = process.communicate(timeout=timeout_seconds)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def running_server(folder: Path, *options: str, kind: str = "valkey") -> Iterator[int]:
    """Start a server with the given options (`"--requirepass", "x"`); yield its TCP port on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    folder.mkdir(parents=True, exist_ok=True)
    command: list[str | Path] = [
        find_binary(kind),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        folder,
        "--save",
        "",
    ]
    with running_process(*command, *options) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "eady to accept connections" in line:
                break
        else:
            raise AssertionError("the server did not start: " + "".join(lines))
        yield port


class Impostor:
    """A TCP server with a scripted reply to each RESP command: `reply_of(b"PING") -> b"+PONG\\r\\n"`.

    It plays servers that cannot be installed: an old Redis, a web server. `commands` holds what it received.
    """

    def __init__(self, reply_of: Callable[[bytes], bytes], *, tls: ssl.SSLContext | None = None) -> None:
        self.commands: list[bytes] = []
        impostor = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    while header := self.rfile.readline():
                        words = [header.strip()]
                        if header.startswith(b"*"):
                            words = [self._word() for _ in range(int(header[1:]))]
                        impostor.commands.append(b" ".join(words))
                        self.wfile.write(reply_of(words[0].upper()))

            def _word(self) -> bytes:
                length = int(self.rfile.readline()[1:])
                return self.rfile.read(length + 2)[:-2]

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

            def get_request(self) -> tuple[Any, Any]:
                connection, address = super().get_request()
                return (tls.wrap_socket(connection, server_side=True) if tls else connection), address

            def handle_error(self, request: Any, client_address: Any) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Impostor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def redis_server_binary() -> str | None:
    """`redis-server` on PATH where it is 7 or later."""
    found = shutil.which("redis-server")
    if found is None:
        return None
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    major = version.partition("v=")[2].partition(".")[0]
    return found if major.isdecimal() and int(major) >= 7 else None
