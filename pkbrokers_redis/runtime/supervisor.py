"""Supervise processes: `pkb up` and `pkb demo` run one process a role, restarted when it dies.

    start   last role first: readers are ready before writers
    death   restart after 0.2 s, 0.4 s … 30 s; from 0.2 s again once the process ran for 30 s
    exit 2  a user's mistake, which a restart would repeat: everything stops
    stop    first role first (ingest, then aggregators): SIGTERM, up to 10 s, then SIGKILL

Each process has one thread, which starts it, waits for its end and restarts it. On Linux the kernel kills
every process when the supervisor dies, even by `kill -9`. Signals are handled in a thread of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, BinaryIO, Literal, NamedTuple

from pkbrokers_redis import logs
from pkbrokers_redis.clock import Backoff

# A Python signal handler runs in the main thread, between two bytecodes, and late. `threading.Event.set()` is
# not safe there: the main thread may hold the event's own lock inside `wait()`. Therefore the interpreter
# writes the number of each signal into a pipe (`signal.set_wakeup_fd`), and a thread reads it and acts.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
END = b"\0"  # no signal has this number: it ends the thread


def ignore_signal(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: a handler for signals that `call_on_signals` handles through its pipe."""


@contextlib.contextmanager
def call_on_signals(
    action: Callable[[signal.Signals], None], signals: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Call `action` in a thread for each signal that arrives inside the `with` block, in the main thread.

    The former handlers are restored after the block. `action` may block and take locks.
    """
    _reset_after_fork()
    pipe_out, pipe_in = os.pipe()
    os.set_blocking(pipe_in, False)  # as set_wakeup_fd demands
    handlers = {number: signal.signal(number, ignore_signal) for number in signals}
    wakeup = signal.set_wakeup_fd(pipe_in, warn_on_full_buffer=False)

    def read_pipe() -> None:
        while (received := os.read(pipe_out, 1)) != END:
            if received[0] in handlers:
                action(signal.Signals(received[0]))

    thread = threading.Thread(target=read_pipe, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        # A forked child may still hold the pipe, so that closing it would not end the thread.
        os.set_blocking(pipe_in, True)
        os.write(pipe_in, END)
        thread.join()
        os.close(pipe_in)
        os.close(pipe_out)


def stop_on_signals(stop: threading.Event) -> contextlib.AbstractContextManager[None]:
    """Set `stop` on SIGTERM and SIGINT inside the `with` block. Use it in the main thread only."""
    return call_on_signals(lambda _: stop.set())


@functools.cache
def _reset_after_fork() -> None:
    """A forked child shares the pipe: its own signals must not reach the parent's thread."""

    def reset() -> None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)

    os.register_at_fork(after_in_child=reset)


EXIT_USER_ERROR = 2  # a restart would fail again
EXIT_TRY_AGAIN = 1  # a restart may succeed
SUPERVISED = "PKB_SUPERVISED"  # set in the environment of supervised processes: they tell 1 from 2
HEALTHY_SECONDS = 30.0  # after a run of this length the waits before a restart are short again
STOP_SECONDS_MAX = 10.0  # a worker commits its last batch and releases its shards in far less
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OUTPUT_SECONDS_MAX = 1.0  # wait for the last lines of a dead process; a child of its own may hold the pipe
LINE_BYTES_MAX = 65_536  # a longer line of a process's output is passed on in pieces
LAST_LINE_BYTES_MAX = 1000
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
ON_LINUX = sys.platform.startswith("linux")

State = Literal["starting", "running", "waiting", "stopped", "failed"]


class ProcessStatus(NamedTuple):
    """One supervised process. `exit_code` is its last one, negative for a signal; None before any."""

    role: str
    number: int
    state: State
    pid: int | None
    restarts: int
    exit_code: int | None
    last_line: str


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """A supervised role: `count` processes of the command `argv`."""

    name: str
    argv: tuple[str, ...]
    count: int = 1


def worker_argv(role: str) -> tuple[str, ...]:
    """Return the command of a role: `python -m workers.<role>` with this interpreter."""
    return (sys.executable, "-m", f"workers.{role}")


class Supervisor:
    """Keeps the processes of some roles running; `specs` are in the order of the data flow.

    A dead process is restarted after the first of `restart_seconds`; the wait doubles up to the second.
    """

    def __init__(
        self,
        specs: Sequence[RoleSpec],
        *,
        env: Mapping[str, str] | None = None,
        output: BinaryIO | None = None,
        restart_seconds: tuple[float, float] = (0.2, 30.0),
        stop_seconds_max: float = STOP_SECONDS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop_seconds_max = stop_seconds_max
        self._ended = threading.Event()  # by a signal or by a process that failed
        sink = sys.stderr.buffer if output is None else output
        lock = threading.Lock()  # over the sink

        def write(lines: bytes) -> None:
            # After a closed terminal the pipes must still be drained, or the processes block.
            with lock, contextlib.suppress(OSError, ValueError):
                sink.write(lines)
                sink.flush()

        env = {**(os.environ if env is None else env), SUPERVISED: "1"}
        self._roles = [
            [
                _Process(spec, number, env, write, Backoff(*restart_seconds), clock, self._ended.set)
                for number in range(spec.count)
            ]
            for spec in specs
        ]

    def start(self) -> None:
        """Start all processes, the last role first, and return at once. Call it once."""
        for role in reversed(self._roles):
            for process in role:
                process.thread.start()

    def stop(self) -> None:
        """Stop the roles in order and wait until all processes have ended. A second call does nothing."""
        for role in self._roles:
            for process in role:
                process.end(signal.SIGTERM)
            deadline = time.monotonic() + self._stop_seconds_max
            for process in role:
                process.join(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """Kill all processes now; none is started again."""
        for role in self._roles:
            for process in role:
                process.end(signal.SIGKILL)

    def run(self) -> int:
        """Start, wait for a signal or a failure, then stop; return the exit code: 0, or 2 after a failure.

        It runs in the main thread. A second signal kills the processes that have not stopped by then.
        """
        with call_on_signals(self._on_signal, SIGNALS):
            try:
                self.start()
                self._ended.wait()
            finally:
                self.stop()
        return 0 if self.failure is None else EXIT_USER_ERROR

    def statuses(self) -> list[ProcessStatus]:
        """Return the status of every process, role by role."""
        return [process.status() for role in self._roles for process in role]

    @property
    def failure(self) -> str | None:
        """The last line of a process that ended with exit code 2; None while there is none."""
        for status in self.statuses():
            if status.state == "failed":
                return status.last_line or f"{status.role} exited with {EXIT_USER_ERROR}"
        return None

    def _on_signal(self, _number: signal.Signals) -> None:
        if self._ended.is_set():
            self.kill()
        self._ended.set()


class _Process:
    """Starts a command, again after each death, until `end` is called or it exits with 2.

    `thread` starts the process, because PR_SET_PDEATHSIG means the death of the thread that forked. It is a
    daemon: when the supervisor crashes it must end, and the kernel then ends the processes.
    """

    def __init__(
        self,
        spec: RoleSpec,
        number: int,
        env: Mapping[str, str],
        write: Callable[[bytes], None],
        backoff: Backoff,
        clock: Callable[[], float],
        on_failed: Callable[[], None],
    ) -> None:
        self._spec, self._number, self._env, self._output = spec, number, env, write
        self._backoff, self._clock, self._on_failed = backoff, clock, on_failed
        self._log = logs.get("supervise").bind(role=spec.name, number=number)
        self._lock = threading.Lock()  # guards the fields below
        self._child: subprocess.Popen[bytes] | None = None
        self._closing = False  # do not start it again
        self._state: State = "starting"
        self._restarts = 0
        self._exit_code: int | None = None
        self._last_line = b""
        self._wake = threading.Event()  # ends a wait between two runs
        self.thread = threading.Thread(target=self._run, name=f"{spec.name}-{number}", daemon=True)

    def end(self, number: signal.Signals) -> None:
        """Send a signal, and do not start the process again. SIGKILL also kills its children."""
        with self._lock:
            self._closing = True
            self._wake.set()
            if self._child is None:
                return
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(self._child.pid, number)
                else:
                    os.kill(self._child.pid, number)  # a worker stops its own children in its own order

    def join(self, seconds: float) -> None:
        """Wait for the end; after `seconds` kill the process."""
        if self.thread.ident is None:  # never started
            return
        self.thread.join(seconds)
        if self.thread.is_alive():
            self._log.warning("process_killed", reason="it did not stop", waited_seconds=round(seconds, 1))
            self.end(signal.SIGKILL)
            self.thread.join()

    def status(self) -> ProcessStatus:
        with self._lock:
            pid = None if self._child is None else self._child.pid
            line = self._last_line.decode(errors="replace").strip()
            role, number = self._spec.name, self._number
            return ProcessStatus(role, number, self._state, pid, self._restarts, self._exit_code, line)

    def _run(self) -> None:
        while True:
            started = self._clock()
            exit_code = self._run_once()
            if exit_code == EXIT_USER_ERROR and not self._closing:
                self._log.error("process_failed", exit_code=exit_code)
                self._state = "failed"
                self._on_failed()
                return
            if exit_code is None or self._closing:
                break
            if self._clock() - started >= HEALTHY_SECONDS:
                self._backoff.reset()
            delay_seconds = self._backoff.next()
            self._log.warning("process_died", exit_code=exit_code, restart_in_seconds=delay_seconds)
            self._state = "waiting"
            if self._wake.wait(delay_seconds):
                break
            self._restarts += 1
        self._log.info("process_stopped", exit_code=exit_code)
        self._state = "stopped"

    def _run_once(self) -> int | None:
        """Run the process from start to exit; return its exit code, None if it must not start."""
        with self._lock:
            if self._closing:
                return None
            try:
                child = subprocess.Popen(
                    self._spec.argv,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    process_group=0,  # Ctrl-C in the terminal reaches the supervisor only
                    preexec_fn=die_with_parent(),
                )
            except OSError as error:
                self._last_line = f"cannot start {self._spec.argv[0]} ({error.strerror})".encode()
                permanent = isinstance(error, (FileNotFoundError, PermissionError))
                self._exit_code = EXIT_USER_ERROR if permanent else EXIT_TRY_AGAIN
                return self._exit_code
            self._child, self._state = child, "running"
        self._log.info("process_started", pid=child.pid)
        assert child.stdout is not None  # noqa: S101  stdout=PIPE
        reader = threading.Thread(target=self._copy_output, args=(child.stdout,), daemon=True)
        reader.start()
        if ON_LINUX:
            # Wait without reaping: the pid stays this child's until `child.wait()` below, under the lock.
            # So neither `end` nor `killpg` can hit another process.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        else:
            child.wait()
        with self._lock:
            if ON_LINUX:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # children that a crashed worker left
            self._child, self._exit_code = None, child.wait()
        reader.join(OUTPUT_SECONDS_MAX)
        return self._exit_code

    def _copy_output(self, pipe: IO[bytes]) -> None:
        """Pass on whole lines as they arrive, and remember the last one."""
        pending = b""
        with pipe:
            while chunk := os.read(pipe.fileno(), LINE_BYTES_MAX):
                lines, newline, pending = (pending + chunk).rpartition(b"\n")
                if newline:
                    self._write(lines)
                if len(pending) >= LINE_BYTES_MAX:
                    self._write(pending)
                    pending = b""
        if pending:
            self._write(pending)

    def _write(self, lines: bytes) -> None:
        self._output(lines + b"\n")
        last = lines.rstrip().rpartition(b"\n")[2]
        if last:
            self._last_line = last[:LAST_LINE_BYTES_MAX]


def die_with_parent() -> Callable[[], None] | None:
    """Return a `preexec_fn` that has the kernel kill the child when its parent dies; None outside Linux."""
    if not ON_LINUX:
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def in_the_child() -> None:
        # SIGKILL, not SIGTERM: a worker that hangs must not stay either, and a killed one loses nothing that
        # Redis acknowledged.
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # the parent died between fork and prctl: no signal will come
            os._exit(1)

    return in_the_child
