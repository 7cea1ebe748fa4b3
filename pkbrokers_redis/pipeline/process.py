"""One supervised process over all its lives, and the thread that looks after it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, BinaryIO, Literal, NamedTuple

from pkbrokers_redis import logs

EXIT_USER_ERROR = 2  # final: another try would meet it again
EXIT_TRY_AGAIN = 1  # as a crash: what is away may come back
SUPERVISED = "PKB_SUPERVISED"  # in the environment of our processes: they tell the two apart for us
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
class Backoff:
    """How long to wait before a dead process is started again, in seconds."""

    first_seconds: float = 0.2
    most_seconds: float = 30.0
    healthy_seconds: float = 30.0  # whoever ran for so long begins anew at `first_seconds`

    def delay(self, previous_seconds: float | None, ran_seconds: float) -> float:
        """The wait after a process that ran `ran_seconds` died; `previous_seconds` was the last wait."""
        if previous_seconds is None or ran_seconds >= self.healthy_seconds:
            return self.first_seconds
        return min(previous_seconds * 2, self.most_seconds)


class Output:
    """Where the processes' lines go, one whole line at a time. A sink that fails loses lines, no process."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self._lock = threading.Lock()

    def write(self, lines: bytes) -> None:
        with self._lock:
            try:
                self._sink.write(lines)
                self._sink.flush()
            except (OSError, ValueError):
                pass  # a closed terminal: the pipes must still be drained, or the processes block


class Process:
    """Starts `argv`, again after each death, until asked to stop or until it exits with 2.

    `on_failed` is called from the process's thread when it exits with 2 or cannot be started at all.
    """

    def __init__(
        self,
        role: str,
        number: int,
        argv: tuple[str, ...],
        *,
        env: Mapping[str, str] | None,
        output: Output,
        backoff: Backoff,
        clock: Callable[[], float],
        on_failed: Callable[[], None],
    ) -> None:
        self._role, self._number, self._argv, self._env = role, number, argv, env
        self._output, self._backoff, self._clock, self._on_failed = output, backoff, clock, on_failed
        self._log = logs.get("supervise").bind(role=role, number=number)
        self._lock = threading.Lock()  # guards what follows
        self._child: subprocess.Popen[bytes] | None = None
        self._closing = False  # no further start
        self._state: State = "starting"
        self._restarts = 0
        self._exit_code: int | None = None
        self._last_line = b""
        self._wake = threading.Event()  # ends a wait between two lives
        # A daemon: a supervisor that crashes must end, and the kernel then ends its children. It starts
        # the child itself, because PR_SET_PDEATHSIG means the death of the thread that forked.
        self._thread = threading.Thread(target=self._look_after, name=f"{role}-{number}", daemon=True)

    def start(self) -> None:
        """Start the process and return at once. Call it once."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """SIGTERM, and no further start."""
        self._signal(signal.SIGTERM)
        self._wake.set()

    def kill(self) -> None:
        """SIGKILL to the process and its children, and no further start."""
        self._signal(signal.SIGKILL)

    def join(self, seconds: float) -> None:
        """Wait for the end; after `seconds` kill."""
        if self._thread.ident is None:  # never started
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._log.warning("killed: did not stop", waited_seconds=round(seconds, 1))
            self.kill()
            self._thread.join()

    def status(self) -> ProcessStatus:
        """How it stands."""
        with self._lock:
            pid = None if self._child is None else self._child.pid
            line = self._last_line.decode(errors="replace").strip()
            return ProcessStatus(
                self._role, self._number, self._state, pid, self._restarts, self._exit_code, line
            )

    def _signal(self, number: signal.Signals) -> None:
        with self._lock:
            self._closing = True
            if self._child is None:
                return
            try:
                if number == signal.SIGKILL:
                    os.killpg(self._child.pid, number)
                else:
                    os.kill(self._child.pid, number)  # a worker stops its own children in its own order
            except ProcessLookupError:
                pass  # died this instant

    def _look_after(self) -> None:
        delay_seconds: float | None = None
        while True:
            began = self._clock()
            exit_code = self._live_once()
            if exit_code == EXIT_USER_ERROR and not self._closing:
                self._log.error("failed", exit_code=exit_code)
                self._state = "failed"
                self._on_failed()
                return
            if exit_code is None or self._closing:
                break
            delay_seconds = self._backoff.delay(delay_seconds, self._clock() - began)
            self._log.warning("died", exit_code=exit_code, restart_in_seconds=delay_seconds)
            self._state = "waiting"
            if self._wake.wait(delay_seconds):
                break
            self._restarts += 1
        self._log.info("stopped", exit_code=exit_code)
        self._state = "stopped"

    def _live_once(self) -> int | None:
        """One life from start to exit code; None if it must not begin."""
        with self._lock:
            if self._closing:
                return None
            try:
                child = self._spawn()
            except OSError as error:
                self._last_line = f"cannot start {self._argv[0]} ({error.strerror})".encode()
                permanent = isinstance(error, (FileNotFoundError, PermissionError))
                self._exit_code = EXIT_USER_ERROR if permanent else 1
                return self._exit_code
            self._child, self._state = child, "running"
        self._log.info("started", pid=child.pid)
        assert child.stdout is not None  # noqa: S101  stdout=PIPE
        reader = threading.Thread(target=self._pass_on, args=(child.stdout,), daemon=True)
        reader.start()
        exit_code = self._await_exit(child)
        reader.join(OUTPUT_SECONDS_MAX)
        return exit_code

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._argv,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C in the terminal is for the supervisor, which stops things in order
            preexec_fn=die_with_parent(),
        )

    def _await_exit(self, child: subprocess.Popen[bytes]) -> int:
        if ON_LINUX:
            # Wait without reaping: until we reap it, under the lock, nobody else can get its pid, so
            # that neither a stop nor the clean-up of its group can hit a stranger.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # what a crashed worker left behind
                return self._reap(child)
        child.wait()
        with self._lock:
            return self._reap(child)

    def _reap(self, child: subprocess.Popen[bytes]) -> int:
        self._child, self._exit_code = None, child.wait()
        return self._exit_code

    def _pass_on(self, pipe: IO[bytes]) -> None:
        """Hand on whole lines as they come, and remember the last one."""
        pending = b""
        with pipe:
            while chunk := os.read(pipe.fileno(), LINE_BYTES_MAX):
                lines, newline, pending = (pending + chunk).rpartition(b"\n")
                if newline:
                    self._hand_on(lines)
                if len(pending) >= LINE_BYTES_MAX:
                    self._hand_on(pending)
                    pending = b""
        if pending:
            self._hand_on(pending)

    def _hand_on(self, lines: bytes) -> None:
        self._output.write(lines + b"\n")
        last = lines.rstrip().rpartition(b"\n")[2]
        if last:
            self._last_line = last[:LAST_LINE_BYTES_MAX]


def die_with_parent() -> Callable[[], None] | None:
    """For the child between fork and exec: SIGKILL when the thread that started it dies. Linux only."""
    if not ON_LINUX:
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def in_the_child() -> None:
        # SIGKILL, not SIGTERM: a worker that hangs must not stay either, and one that is killed loses
        # nothing that Redis acknowledged.
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # killed between fork and prctl: no signal would ever come
            os._exit(1)

    return in_the_child
