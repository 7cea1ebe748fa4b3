"""The monitor: a small process that owns the embedded server, so that none of its users must.

    user ─┐ shared lock                    exclusive lock: no user is left
    user ─┼───────────────► users.lock ◄──────────────────────────────── monitor ──► server
    user ─┘                                                                  └─ PR_SET_PDEATHSIG

Locks, both flock(2) on files in the store's folder. The kernel drops them however a process ends:

    users.lock    shared by each user; exclusive by the monitor from its decision to stop until its end, so
                  that a process that attaches meanwhile waits, and then starts a new server
    server.lock   exclusive, by the monitor and inherited by the server: held until both have ended
    monitor.lock  exclusive, for the monitor's life: a server whose monitor was killed must not be used

When a monitor is killed, its server ends, too (by SIGTERM: it still flushes), or the next user ends it.
`embedded.attach` runs this file as a script. It imports the standard library only, so that a start takes
milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

POLL_SECONDS = 0.1  # delay until the monitor notices that the last user left or the server died
REWRITE_NICENESS = 10  # of the process that rewrites the append-only file (docs/decisions/0020)
STOP_SECONDS_MAX = 20.0  # a server that flushes longer is killed; the append-only file survives that
STARTS_MAX = 100  # a server that crashes more often is not restarted
REPLY_BYTES_MAX = 1024  # of what `ask` reads
LOCK_IS_TAKEN = 3  # exit code: another monitor was faster

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

# What `secrets.token_urlsafe(32)` makes: safe in a configuration line, an inline command and a URL.
_password = re.compile(r"[A-Za-z0-9_-]{43}")


class Plan(TypedDict):
    """What to run. `embedded.attach` passes it as JSON in argv, so it holds no secret: `ps` shows it."""

    binary: str
    kind: str
    socket_path: str
    tcp_port: int | None  # None: no TCP. 0: any free port
    options: list[str]
    linger_seconds: float


class ServerFile(TypedDict):
    """`server.json`, mode 0600. It is a hint: locks and the answer on the socket decide."""

    pid: int
    monitor_pid: int  # 0: an earlier release's
    tcp_port: int  # 0: no TCP
    password: str  # empty without TCP; earlier releases had none with TCP either
    socket_path: str
    kind: str


def try_lock(descriptor: int, operation: int) -> bool:
    """Try `fcntl.LOCK_SH` or `LOCK_EX` once. Return False when another process prevents it."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_lock(path: Path) -> int:
    """Return a descriptor to lock `path` with. Children inherit it only on request."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def ping(socket_path: str, password: str) -> bytes:
    """Return the first line of a server's reply to PING; empty when no server answers within a second."""
    commands = [f"AUTH {password}".encode(), b"PING"] if password else [b"PING"]
    reply = b""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        connection.connect(socket_path)
        connection.sendall(b"".join(line + b"\r\n" for line in commands))
        while reply.count(b"\r\n") < len(commands) and len(reply) < REPLY_BYTES_MAX:
            chunk = connection.recv(REPLY_BYTES_MAX)
            if not chunk:
                break
            reply += chunk
    lines = reply.split(b"\r\n")
    return lines[len(commands) - 1] if len(lines) > len(commands) else b""


def is_ready(reply: bytes) -> bool:
    """Return whether a reply to PING is from a server that accepts commands."""
    return bool(reply) and not reply.startswith((b"-LOADING", b"-NOAUTH"))


def read_server_file(folder: Path) -> ServerFile | None:
    """Read `server.json`. Return None when it is absent or malformed."""
    try:
        found = json.loads((folder / "server.json").read_bytes())
        password = str(found.get("password", ""))
        if password and not _password.fullmatch(password):
            return None
        return ServerFile(
            pid=int(found["pid"]),
            monitor_pid=int(found.get("monitor_pid", 0)),
            tcp_port=int(found["tcp_port"]),
            password=password,
            socket_path=str(found["socket_path"]),
            kind=str(found["kind"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


class ServerMonitor:
    """Starts one embedded server, restarts it after a crash, and stops it after its last user. One thread."""

    def __init__(self, folder: Path, plan: Plan, server_lock: int) -> None:
        self.folder = folder
        self.plan = plan
        self.server_lock = server_lock
        self.users_lock = open_lock(folder / "users.lock")
        self.monitor_lock = open_lock(folder / "monitor.lock")
        fcntl.flock(self.monitor_lock, fcntl.LOCK_EX)
        self.stop_requested = False
        self.used_at = time.monotonic()
        self.set_death_signal = _death_signal_setter()
        # Clients hold the previous run's port and password, a redis-cli in a shell's history too.
        self.port, self.password = 0, ""
        if plan["tcp_port"] is not None:
            import secrets  # its import takes longer than the rest of a start without TCP

            last = read_server_file(folder)
            self.port = last["tcp_port"] if last else 0
            self.password = (last["password"] if last else "") or secrets.token_urlsafe(32)

    def run(self) -> None:
        """Keep the server running until no process uses it."""
        try:
            for _ in range(STARTS_MAX):
                self.port = self._choose_port()
                # A failed start and a SHUTDOWN exit with a code. After a crash or a kill the users are still
                # running: they lose a connection, but not their server.
                if self._wait_for_end(self._start()) >= 0:
                    return
        finally:
            socket_folder = Path(self.plan["socket_path"]).parent
            if socket_folder != self.folder:  # in the temp folder; owned while server.lock is held
                with contextlib.suppress(OSError):
                    socket_folder.rmdir()

    def _choose_port(self) -> int:
        """Return the stated port, or for "any" the previous run's if it is free; 0 is no TCP."""
        if self.plan["tcp_port"] is None or self.plan["tcp_port"]:
            return self.plan["tcp_port"] or 0
        for port in (self.port, 0):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with contextlib.suppress(OSError, OverflowError):
                    probe.bind(("127.0.0.1", port))
                    return int(probe.getsockname()[1])
        return 0  # the unix socket serves

    def _start(self) -> subprocess.Popen[bytes]:
        monitor_pid = os.getpid()

        def before_exec() -> None:
            self.set_death_signal()
            if os.getppid() != monitor_pid:  # killed between fork and prctl: no signal would ever come
                os._exit(1)

        # `-`: the configuration comes from stdin. Arguments can be read in `ps` by everybody.
        server = subprocess.Popen(
            [self.plan["binary"], "-", "--port", str(self.port), *self.plan["options"]],
            stdin=subprocess.PIPE,
            cwd=self.folder,
            pass_fds=(self.server_lock,),
            preexec_fn=before_exec,  # safe: this process has one thread
        )
        self._write_server_file(server.pid)  # the server cannot answer before it has its password
        assert server.stdin is not None  # noqa: S101  stdin=PIPE
        with contextlib.suppress(BrokenPipeError), server.stdin as configuration:  # it has ended already
            configuration.write(f"requirepass {self.password}\n".encode() if self.password else b"")
        return server

    def _wait_for_end(self, server: subprocess.Popen[bytes]) -> int:
        """Wait for the server's end, or stop it after its last user. Return its exit code (-n: signal n)."""
        while server.poll() is None:
            now = time.monotonic()
            if not try_lock(self.users_lock, fcntl.LOCK_EX):
                self.used_at = now
            elif now - self.used_at >= self.plan["linger_seconds"]:
                self.stop_requested = True  # keeping the lock until this process ends
            else:
                fcntl.flock(self.users_lock, fcntl.LOCK_UN)
            if self.stop_requested:
                server.terminate()  # as SHUTDOWN: flushes and syncs the append-only file
                try:
                    server.wait(STOP_SECONDS_MAX)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()
                return 0
            _lower_rewrite_priority(server.pid)
            time.sleep(POLL_SECONDS)
        return server.returncode

    def _write_server_file(self, pid: int) -> None:
        content = ServerFile(
            pid=pid,
            monitor_pid=os.getpid(),
            tcp_port=self.port,
            password=self.password,
            socket_path=self.plan["socket_path"],
            kind=self.plan["kind"],
        )
        fresh = self.folder / "server.json.new"
        fresh.unlink(missing_ok=True)  # a leftover would keep its mode
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123  a descriptor
            file.write(json.dumps(content) + "\n")
        fresh.replace(self.folder / "server.json")


def _lower_rewrite_priority(server_pid: int) -> None:
    """Give the server's fork that rewrites its file what a core has left. Only Linux lists children."""
    with contextlib.suppress(OSError, ValueError):
        for child in Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split():
            os.setpriority(os.PRIO_PROCESS, int(child), REWRITE_NICENESS)


def _death_signal_setter() -> Callable[[], object]:
    """Return a function for the child that makes it end with this process; only Linux has it."""
    if sys.platform != "linux":
        return lambda: None
    try:
        import ctypes  # not every Python build has it

        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (ImportError, OSError, AttributeError):
        return lambda: None
    return lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def main(folder: str, plan: str) -> int:
    """Lock the server, detach from the launcher, then monitor the server until its end."""
    os.umask(0o077)
    server_lock = open_lock(Path(folder) / "server.lock")
    if not try_lock(server_lock, fcntl.LOCK_EX):
        return LOCK_IS_TAKEN
    if os.fork():
        return 0  # the launcher waits for this process; the monitor must not be a child of a user
    monitor = ServerMonitor(Path(folder), json.loads(plan), server_lock)

    def end(_signal: int, _frame: object) -> None:
        monitor.stop_requested = True

    signal.signal(signal.SIGTERM, end)
    monitor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
