"""The monitor: a small process that owns the embedded server, so that none of its users must.

    user ─┐ shared lock                    exclusive lock: no user is left
    user ─┼───────────────► users.lock ◄──────────────────────────────── monitor ──► server
    user ─┘                                                                  └─ PR_SET_PDEATHSIG

Every process that uses the server holds `users.lock` shared. The kernel drops that lock however the process
ends, kill -9 included, so the monitor needs no list of pids: when it can lock the file exclusively, no
process uses the server. It then waits a moment (consecutive commands must not restart the server), stops the
server cleanly and ends. When a monitor is killed, its server ends, too (by SIGTERM: it still flushes).

Locks, all flock(2) on files in the store's folder:

    start.lock    exclusive, while a user attaches: one starts the server, the rest find it
    users.lock    shared by each user; exclusive by the monitor from its decision to stop until its end, so
                  that a process that attaches meanwhile waits, and then starts a new server
    monitor.lock  exclusive, for the monitor's life
    server.lock   exclusive, inherited by the server: held until both monitor and server have ended

Started as a script by `server.attach`. It imports the standard library only, so that a start takes
milliseconds. It reports to its launcher on stdout, one JSON object per line: `{"state": "loading" | "ready"
| "failed", "reason": …}`.
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
REWRITE_NICENESS = 10  # of the process that rewrites the append-only file
STOP_SECONDS_MAX = 20.0  # a server that flushes longer is killed; the append-only file survives that
ORPHAN_SECONDS_MAX = 20.0  # how long a server without its monitor may take to end
CRASHES_MAX = 5  # restarts within CRASH_WINDOW_SECONDS; then the monitor ends
CRASH_WINDOW_SECONDS = 60.0
PORT_TRIES_MAX = 5
REPLY_BYTES_MAX = 1024  # of what `ask` reads
LOG_BYTES_MAX = 4 << 20  # at a start a longer server.log becomes server.log.1

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

# What `secrets.token_urlsafe(32)` makes: safe in a configuration line, an inline command and a URL.
_password = re.compile(r"[A-Za-z0-9_-]{43}")


class Plan(TypedDict):
    """What to run. `server.attach` passes it as JSON in argv, so it holds no secret: `ps` shows it."""

    binary: str
    kind: str
    socket_path: str
    tcp_port: int | None  # None: no TCP. 0: any free port
    options: list[str]
    linger_seconds: float


class ServerFile(TypedDict):
    """`server.json`, mode 0600. It is a hint: locks and the answer on the socket decide."""

    pid: int  # 0 while the server starts
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


def ask(socket_path: str, command: bytes, password: str = "", timeout_seconds: float = 1.0) -> bytes:
    """Return the first line of a server's reply to an inline command; empty when no server answers."""
    commands = [f"AUTH {password}".encode(), command] if password else [command]
    reply = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(socket_path)
            connection.sendall(b"".join(line + b"\r\n" for line in commands))
            while reply.count(b"\r\n") < len(commands) and len(reply) < REPLY_BYTES_MAX:
                chunk = connection.recv(REPLY_BYTES_MAX)
                if not chunk:
                    break
                reply += chunk
        except OSError:
            return b""
    lines = reply.split(b"\r\n")
    return lines[len(commands) - 1] if len(lines) >= len(commands) else b""


def answers(reply: bytes) -> bool:
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
            tcp_port=int(found["tcp_port"]),
            password=password,
            socket_path=str(found["socket_path"]),
            kind=str(found["kind"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


class ServerMonitor:
    """Starts one embedded server, restarts it after a crash, and stops it after its last user. One thread."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.log_path = folder / "server.log"
        self.stop_requested = False
        self.port = 0  # of the previous run; used again when it is free
        self.password = ""  # stays the same, because clients may hold it
        self.users_lock = open_lock(folder / "users.lock")
        self.monitor_lock = open_lock(folder / "monitor.lock")
        self.server_lock = open_lock(folder / "server.lock")
        self.tie_child_to_parent = _deathsig_setter()

    def run(self) -> int:
        """Start the server, report, and wait until no process uses it. Return the exit code."""
        if not try_lock(self.monitor_lock, fcntl.LOCK_EX):
            return 0  # another monitor was faster; the launcher will find its server
        if not self._end_orphan():
            self._report("failed", "a server from an earlier run does not end")
            return 1
        self.password = "" if self.plan["tcp_port"] is None else self._password()
        self._cap_log()
        try:
            return self._keep()
        finally:
            socket_folder = Path(self.plan["socket_path"]).parent
            if socket_folder != self.folder:  # in the temp folder; owned while monitor.lock is held
                with contextlib.suppress(OSError):
                    socket_folder.rmdir()

    def _keep(self) -> int:
        crashes: list[float] = []
        while True:
            server = self._start()
            if server is None:
                return 1
            exit_code = self._watch(server)
            now = time.monotonic()
            crashes = [at for at in crashes if now - at < CRASH_WINDOW_SECONDS] + [now]
            # Exit code 0 is a SHUTDOWN, by this process or another. Any other code is a crash or a kill, and
            # the users are still running: they lose a connection, but not their server.
            if exit_code == 0 or len(crashes) > CRASHES_MAX:
                return 0

    def _end_orphan(self) -> bool:
        """Acquire server.lock. A server whose monitor was killed holds it until it has shut down."""
        deadline = time.monotonic() + ORPHAN_SECONDS_MAX
        while not try_lock(self.server_lock, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                return False
            last = read_server_file(self.folder)
            ask(self.plan["socket_path"], b"SHUTDOWN", last["password"] if last else "")
            time.sleep(0.01)
        return True

    def _password(self) -> str:
        """Return the previous run's password, so that clients can reconnect ; or a new one."""
        import secrets  # its import takes longer than the rest of a start without TCP

        last = read_server_file(self.folder)
        return (last["password"] if last else "") or secrets.token_urlsafe(32)

    def _start(self) -> subprocess.Popen[bytes] | None:
        """Return a server that answers; None after reporting `failed`, or when no process waits any more."""
        for _ in range(PORT_TRIES_MAX):
            log_offset = self.log_path.stat().st_size if self.log_path.exists() else 0
            self.port = self._choose_port()
            # Before the server can answer: the earlier server's pid must not pass for this one's, and the
            # next monitor needs the password to end this server if this monitor is killed.
            self._write_server_file(0)
            try:
                server = self._spawn()
            except OSError as error:
                self._report("failed", f"cannot run {self.plan['binary']}: {error.strerror}")
                return None
            if self._wait_until_ready(server):
                self._write_server_file(server.pid)
                self._report("ready", "")
                return server
            reason = self._last_error(log_offset)
            if "ddress already in use" not in reason and "Failed listening" not in reason:
                self._report("failed", reason)
                return None
            if self.plan["tcp_port"]:
                self._report("failed", f"TCP port {self.port} on 127.0.0.1 is in use")
                return None
        self._report("failed", "no free TCP port on 127.0.0.1")
        return None

    def _spawn(self) -> subprocess.Popen[bytes]:
        monitor_pid = os.getpid()

        def before_exec() -> None:
            self.tie_child_to_parent()
            if os.getppid() != monitor_pid:  # killed between fork and prctl: no signal would ever come
                os._exit(1)

        # `-`: the configuration comes from stdin. Arguments can be read in `ps` by everybody.
        with self.log_path.open("ab") as log:
            server = subprocess.Popen(
                [self.plan["binary"], "-", "--port", str(self.port), *self.plan["options"]],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                pass_fds=(self.server_lock,),
                preexec_fn=before_exec,  # safe: this process has one thread
            )
        assert server.stdin is not None  # noqa: S101  stdin=PIPE
        with contextlib.suppress(BrokenPipeError), server.stdin as configuration:  # it has ended already
            configuration.write(f"requirepass {self.password}\n".encode() if self.password else b"")
        return server

    def _wait_until_ready(self, server: subprocess.Popen[bytes]) -> bool:
        """Return True when it answers. Wait for a server that loads a long file as long as a user waits."""
        reported = 0.0
        while server.poll() is None:
            reply = ask(self.plan["socket_path"], b"PING", self.password)
            if answers(reply):
                return True
            now = time.monotonic()
            if reply and now - reported > 1:
                reported = now
                self._report("loading", "")
            if self.stop_requested or self._is_unused():
                self._stop(server)
                return False
            time.sleep(0.005)
        return False

    def _watch(self, server: subprocess.Popen[bytes]) -> int:
        """Wait until the server has ended, by itself or because no process used it. Return its exit code."""
        idle_since: float | None = None
        while server.poll() is None:
            if self.stop_requested:
                return self._stop(server)
            now = time.monotonic()
            if not try_lock(self.users_lock, fcntl.LOCK_EX):
                idle_since = None
            elif now - (idle_since := idle_since or now) >= self.plan["linger_seconds"]:
                return self._stop(server)  # keeping the lock until this process ends
            else:
                fcntl.flock(self.users_lock, fcntl.LOCK_UN)
            _lower_rewrite_priority(server.pid)
            time.sleep(POLL_SECONDS)
        return server.returncode

    def _is_unused(self) -> bool:
        if not try_lock(self.users_lock, fcntl.LOCK_EX):
            return False
        fcntl.flock(self.users_lock, fcntl.LOCK_UN)
        return True

    def _stop(self, server: subprocess.Popen[bytes]) -> int:
        server.terminate()  # as SHUTDOWN: flushes and syncs the append-only file
        try:
            server.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        return 0

    def _choose_port(self) -> int:
        """Return the port to listen on; 0 is no TCP.

        For "any free port" the previous run's is preferred: a redis-cli in a shell's history still works.
        """
        if self.plan["tcp_port"] is None or self.plan["tcp_port"]:
            return self.plan["tcp_port"] or 0
        last = read_server_file(self.folder)
        for port in (self.port or (last["tcp_port"] if last else 0), 0):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with contextlib.suppress(OSError, OverflowError):
                    probe.bind(("127.0.0.1", port))
                    return int(probe.getsockname()[1])
        return 0  # no TCP at all; the unix socket serves

    def _write_server_file(self, pid: int) -> None:
        content = ServerFile(
            pid=pid,
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

    def _last_error(self, log_offset: int) -> str:
        """Return the last warnings in the log (` # `, without advice on the kernel), else its last lines."""
        with contextlib.suppress(OSError), self.log_path.open("rb") as log:
            log.seek(log_offset)
            lines = log.read(1 << 16).decode(errors="replace").strip().splitlines()
            warnings = [line.partition(" # ")[2] for line in lines if " # " in line and "WARNING" not in line]
            return " ".join((warnings or lines)[-2:])
        return ""

    def _cap_log(self) -> None:
        with contextlib.suppress(OSError):
            if self.log_path.stat().st_size > LOG_BYTES_MAX:
                self.log_path.replace(self.folder / "server.log.1")

    def _report(self, state: str, reason: str) -> None:
        with contextlib.suppress(OSError):  # the launcher may have been killed
            os.write(1, json.dumps({"state": state, "reason": reason}).encode() + b"\n")
            if state != "loading":
                with Path(os.devnull).open("wb") as null:
                    os.dup2(null.fileno(), 1)


def _lower_rewrite_priority(server_pid: int) -> None:
    """Lower the priority of the process that the server forks to rewrite its append-only file.

    It would occupy a core for seconds, and ticks would wait. Only Linux lists a process's children.
    """
    with contextlib.suppress(OSError, ValueError):
        for word in Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split():
            if os.getpriority(os.PRIO_PROCESS, int(word)) < REWRITE_NICENESS:
                os.setpriority(os.PRIO_PROCESS, int(word), REWRITE_NICENESS)


def _deathsig_setter() -> Callable[[], object]:
    """Return a function for the child that makes it end with this process; only Linux has it.

    Elsewhere a server outlives a killed monitor until the next `attach` ends it (server.lock).
    """
    if sys.platform != "linux":
        return lambda: None
    try:
        import ctypes  # not every Python build has it

        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (ImportError, OSError, AttributeError):
        return lambda: None
    return lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def main(folder: str, plan: str) -> int:
    """Detach from the launcher, then monitor the server until its end."""
    if os.fork():
        return 0  # the launcher waits for this process; the monitor must not be a child of a user
    os.umask(0o077)
    monitor = ServerMonitor(Path(folder), json.loads(plan))

    def end(_signal: int, _frame: object) -> None:
        monitor.stop_requested = True

    signal.signal(signal.SIGTERM, end)
    return monitor.run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
