"""The embedded server, which is used when `PKB_REDIS_URL` is unset.

A Valkey (or Redis) below `PKB_DATA_DIR`: started by the first process that needs it, shared by all processes,
and stopped after the last one has ended in whatever way. Its data stay. `monitor.py` explains how.

    <data_dir>/redis/            0700
        appendonlydir/           the data
        pkb.sock                 0700; in a 0700 folder of the temp folder when this path would be too long
        server.json, server.log  address and log of the running server
        *.lock                   see monitor.py

Other users of the machine can reach every port of 127.0.0.1, so the server listens on its socket only. With
`PKB_EMBEDDED_PORT` it also listens on TCP, and then requires the password in server.json (0600).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import select
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from pkbrokers_redis import logs
from pkbrokers_redis.errors import RedisUnavailable
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.embedded import monitor
from pkbrokers_redis.store.embedded.binary import find_binary, server_environment, server_options

LINGER_SECONDS = 1.0  # the server outlives its last user so long
SILENCE_SECONDS_MAX = 30.0  # a starting server that does not even answer LOADING for so long has failed
ATTACH_SECONDS_MAX = 600.0  # maximum wait for a server that loads many gigabytes
SOCKET_PATH_BYTES_MAX = 100  # sun_path holds 104 (macOS) or 108 (Linux), the final NUL included
STOP_TRIES_MAX = 3  # the monitor locks users.lock for an instant ten times a second

log = logs.get("store")


@dataclass(frozen=True, slots=True)
class EmbeddedInfo:
    """A running embedded server."""

    pid: int
    tcp_port: int  # 0: no TCP
    socket_path: Path
    kind: str
    password: str = field(default="", repr=False)  # empty: the server has none

    @property
    def url(self) -> str:
        """Return the URL for redis-py, with the password. `pkb redis-cli` opens a shell."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"unix://{login}{quote(str(self.socket_path))}"

    @property
    def is_open_to_all(self) -> bool:
        """Return whether other users of the machine have access, as with a port of earlier releases."""
        return self.tcp_port != 0 and not self.password

    def listens_as(self, port: int | None) -> bool:
        """Return whether the server listens as `PKB_EMBEDDED_PORT` states."""
        if port is None:
            return self.tcp_port == 0
        return bool(self.password) and self.tcp_port != 0 and port in (0, self.tcp_port)


class EmbeddedServer:
    """Keeps the embedded server running for this process, until `close`.

    Example:
        with attach(settings) as server:
            client = redis.Redis.from_url(server.url)
    """

    def __init__(self, info: EmbeddedInfo, users_lock: int, *, reattached: bool) -> None:
        self.info = info
        self.reattached = reattached
        self._users_lock: int | None = users_lock

    @property
    def url(self) -> str:
        """Return the URL for redis-py, with the password."""
        return self.info.url

    @property
    def socket_path(self) -> Path:
        """Return the path of the unix socket."""
        return self.info.socket_path

    @property
    def tcp_port(self) -> int:
        """Return the port on 127.0.0.1; 0 is no TCP."""
        return self.info.tcp_port

    @property
    def password(self) -> str:
        """Return the password, empty when the server has none."""
        return self.info.password

    @property
    def pid(self) -> int:
        """Return the server's process id."""
        return self.info.pid

    def close(self) -> None:
        """End the use. The server stops about a second after its last user. May be called twice."""
        descriptor, self._users_lock = self._users_lock, None
        if descriptor is not None:
            # Without LOCK_UN: a forked child may still use the server through its copy of the lock.
            os.close(descriptor)

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def store_folder(data_dir: Path) -> Path:
    """Return the folder of the embedded server of a data folder."""
    return data_dir.expanduser().absolute() / "redis"


def reader_data_dir(settings: Settings) -> tuple[Path, bool]:
    """Return the data folder that a reader uses, and whether it is the demo's.

    It is the demo's when a demo has run and no real store was ever created on this machine.
    """
    demo = settings.data_dir / "demo"
    if not store_folder(settings.data_dir).exists() and store_folder(demo).exists():
        return demo, True
    return settings.data_dir, False


def running(data_dir: Path) -> EmbeddedInfo | None:
    """Return the embedded server of a data folder when it answers. Start none and keep none running."""
    found = monitor.read_server_file(store_folder(data_dir))
    if found is None or not found["pid"]:
        return None
    if not monitor.answers(monitor.ask(found["socket_path"], b"PING", found["password"])):
        return None
    return EmbeddedInfo(
        found["pid"], found["tcp_port"], Path(found["socket_path"]), found["kind"], found["password"]
    )


def attach(
    settings: Settings, *, data_dir: Path | None = None, linger_seconds: float = LINGER_SECONDS
) -> EmbeddedServer:
    """Use the embedded server, and start it when it does not run.

    A running server without users is restarted when `PKB_EMBEDDED_PORT` has changed. A server in use stays
    as it is, with a warning.

    Args:
        settings: Name the data folder, the binary and the port.
        data_dir: Instead of the settings'.
        linger_seconds: How long the server outlives its last user.

    Raises:
        RedisUnavailable: It cannot start (no binary, no right to the folder, broken data), or it runs with a
            port and no password.
        RedisUnsuitable: The chosen binary is a Redis before 7.
    """
    data_dir = data_dir or settings.data_dir
    folder = store_folder(data_dir)
    try:
        _make_private(folder)
        users_lock = monitor.open_lock(folder / "users.lock")
        try:
            info, reattached = _attach_locked(settings, data_dir, folder, users_lock, linger_seconds)
        except BaseException:
            os.close(users_lock)
            raise
    except OSError as error:
        raise RedisUnavailable(
            f"the embedded server cannot use {folder} ({error.strerror or error})",
            "set PKB_DATA_DIR to a folder on a local disk that this user owns",
        ) from error
    return EmbeddedServer(info, users_lock, reattached=reattached)


def _attach_locked(
    settings: Settings, data_dir: Path, folder: Path, users_lock: int, linger_seconds: float
) -> tuple[EmbeddedInfo, bool]:
    deadline = time.monotonic() + ATTACH_SECONDS_MAX
    start_lock = monitor.open_lock(folder / "start.lock")
    monitor_lock = monitor.open_lock(folder / "monitor.lock")
    try:
        # One at a time. While users.lock is held shared, no monitor stops its server.
        _lock_within(start_lock, fcntl.LOCK_EX, deadline, folder)
        _stop_if_unused(settings, data_dir, users_lock)
        _lock_within(users_lock, fcntl.LOCK_SH, deadline, folder)
        reattached = True
        silent_since = time.monotonic()
        while True:
            info = running(data_dir)
            if info is not None:
                if reattached:
                    _check_port(settings, info, folder)
                return info, reattached
            if monitor.try_lock(monitor_lock, fcntl.LOCK_SH):
                fcntl.flock(monitor_lock, fcntl.LOCK_UN)
                reattached = False
                _launch(settings, folder, linger_seconds, deadline)
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > SILENCE_SECONDS_MAX or time.monotonic() > deadline:
                raise RedisUnavailable(
                    f"the embedded server in {folder} does not answer", f"see {folder / 'server.log'}"
                )
            else:
                time.sleep(0.01)  # it starts, restarts or ends: its monitor is running
    finally:
        # Explicitly: a child that another thread forked meanwhile has a copy, and would keep the lock.
        fcntl.flock(start_lock, fcntl.LOCK_UN)
        os.close(start_lock)
        os.close(monitor_lock)


def _stop_if_unused(settings: Settings, data_dir: Path, users_lock: int) -> None:
    """Stop an unused server that does not listen as stated. May leave `users_lock` locked."""
    info = running(data_dir)
    if info is None or info.listens_as(settings.embedded_port):
        return
    for _ in range(STOP_TRIES_MAX):
        if monitor.try_lock(users_lock, fcntl.LOCK_EX):
            monitor.ask(str(info.socket_path), b"SHUTDOWN", info.password)
            return
        time.sleep(0.005)


def _check_port(settings: Settings, info: EmbeddedInfo, folder: Path) -> None:
    """Refuse a server that other users of the machine can use. Warn when it does not listen as stated."""
    if info.is_open_to_all:
        raise RedisUnavailable(
            f"the embedded server in {folder} has a TCP port and no password (an earlier release's)",
            f"stop the programs that use it, or run `kill {info.pid}`; then start again",
        )
    if not info.listens_as(settings.embedded_port):
        stated = "unset" if settings.embedded_port is None else settings.embedded_port
        actual = f"listens on port {info.tcp_port}" if info.tcp_port else "has no TCP port"
        log.warning(
            "embedded_port_not_applied",
            reason=f"PKB_EMBEDDED_PORT is {stated}, the running server {actual}",
            hint="stop all programs that use it, then start again",
        )


def _lock_within(descriptor: int, operation: int, deadline: float, folder: Path) -> None:
    while not monitor.try_lock(descriptor, operation):
        if time.monotonic() > deadline:
            raise RedisUnavailable(
                f"another process has been starting the embedded server in {folder} for too long",
                f"see {folder / 'server.log'}",
            )
        time.sleep(0.01)


def _launch(settings: Settings, folder: Path, linger_seconds: float, deadline: float) -> None:
    """Start a monitor, and wait until it reports that its server answers (or that another was faster)."""
    socket_path = _socket_path(folder)
    plan = monitor.Plan(
        binary=str(find_binary(settings.embedded_server)),
        kind=settings.embedded_server,
        socket_path=str(socket_path),
        tcp_port=settings.embedded_port,
        options=server_options(folder, socket_path, compact=settings.compact),
        linger_seconds=linger_seconds,
    )
    command = [sys.executable or "python3", "-I", "-S", monitor.__file__, str(folder), json.dumps(plan)]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            env={**os.environ, **server_environment()},
            start_new_session=True,  # Ctrl-C in this terminal is not for the server
        )
    with process:
        assert process.stdout is not None  # noqa: S101  stdout=PIPE
        descriptor = process.stdout.fileno()
        buffer = b""
        while time.monotonic() < deadline:
            readable, _, _ = select.select([descriptor], [], [], SILENCE_SECONDS_MAX)
            chunk = os.read(descriptor, 65536) if readable else b""
            if not chunk:
                break
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for report in map(json.loads, lines):
                if report["state"] == "ready":
                    return
                if report["state"] == "failed":
                    raise _failure(report["reason"], folder)
    if monitor.read_server_file(folder) is None or running(folder.parent) is None:
        raise _failure("", folder)


def _failure(reason: str, folder: Path) -> RedisUnavailable:
    hint = f"see {folder / 'server.log'}"
    # Valkey and Redis cannot read each other's base file. These are their messages.
    if "base.rdb: make a backup" in reason or "RDB format version" in reason or "Wrong signature" in reason:
        reason = "its data is damaged, or was written by another kind of server"
        hint = f"correct PKB_EMBEDDED_SERVER, or move {folder} away"
    if reason.startswith("TCP port"):
        hint = "choose another PKB_EMBEDDED_PORT, or 0 for any that is free"
    return RedisUnavailable(f"the embedded server did not start ({reason or 'without a message'})", hint)


def _make_private(folder: Path) -> None:
    """Create a folder, 0700. Raise OSError when another user owns it, who could read Kite's session."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(1, "it belongs to another user")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)


def _socket_path(folder: Path) -> Path:
    path = folder / "pkb.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        return path
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"pkb-{os.geteuid()}-{digest}"
    _make_private(short)
    return short / "pkb.sock"
