"""One supervised process over all its lives, and the thread that looks after it.

Runs the roles of `pkb up` and `pkb demo`: one process each, restarted when it dies, stopped in order.

    start   last role first: readers stand ready before writers
    death   again after 0.2 s, 0.4 s … 30 s; from the beginning once it ran for 30 s
    exit 2  a user's mistake, which another try would meet again: everything stops. Our processes know
            that they are supervised, and exit with 1 where only something is away (`roles.main`)
    stop    first role first (ingest, then aggregators): SIGTERM, up to 10 s, SIGKILL

One thread per process starts it, waits for its end and decides (`process.py`); nothing polls. On Linux the
kernel kills every process when the supervisor dies, kill -9 included.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


STOP_SECONDS_MAX = 10.0  # a worker commits its last batch and releases its shards in far less
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FAILED, _STOPPED = 254, 255  # notices beside the signals' numbers

__all__ = ["Backoff", "ProcessStatus", "RoleSpec", "Supervisor", "worker_argv"]


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """One row of the table of roles: `count` processes of `argv`."""

    name: str
    argv: tuple[str, ...]
    count: int = 1


def worker_argv(role: str) -> tuple[str, ...]:
    """The command of a role: `python -m workers.<role>` with this interpreter."""
    return (sys.executable, "-m", f"workers.{role}")


class Supervisor:
    """Keeps the processes of some roles running.

    `specs` come in the order of the data flow (ingest before aggregate). `env` is the environment of the
    processes (ours by default), `output` gets what they print (our stderr by default).
    """

    def __init__(
        self,
        specs: Sequence[RoleSpec],
        *,
        env: Mapping[str, str] | None = None,
        output: BinaryIO | None = None,
        backoff: Backoff | None = None,
        stop_seconds_max: float = STOP_SECONDS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop_seconds_max = stop_seconds_max
        self._notices_in: int | None = None  # open while `run` waits
        shared = Output(sys.stderr.buffer if output is None else output)
        env = {**(os.environ if env is None else env), SUPERVISED: "1"}
        self._roles = [
            [
                Process(
                    spec.name,
                    number,
                    spec.argv,
                    env=env,
                    output=shared,
                    backoff=backoff or Backoff(),
                    clock=clock,
                    on_failed=lambda: self._tell(_FAILED),
                )
                for number in range(spec.count)
            ]
            for spec in specs
        ]

    def start(self) -> None:
        """Start all processes, readers before writers, and return at once. Call it once."""
        for role in reversed(self._roles):
            for process in role:
                process.start()

    def stop(self) -> None:
        """Stop role by role in the order of the specs; returns when all are gone. May be called again."""
        for role in self._roles:
            for process in role:
                process.ask_to_stop()
            deadline = time.monotonic() + self._stop_seconds_max
            for process in role:
                process.join(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """Kill all processes now, for a user who will not wait; none is started again."""
        for role in self._roles:
            for process in role:
                process.kill()

    def run(self) -> int:
        """Start, wait for SIGTERM, SIGINT, SIGHUP or a failure, stop. The exit code: 0, or 2 for a failure.

        A second signal kills what has not stopped by then. Main thread only.
        """
        stopper: threading.Thread | None = None
        with self._notices() as notices:
            try:
                self.start()
                while (notice := os.read(notices, 1)[0]) != _STOPPED:
                    if stopper is None:
                        stopper = threading.Thread(target=self._stop_and_tell, name="stop")
                        stopper.start()
                    elif notice in SIGNALS:
                        self.kill()
            finally:
                self.stop()
                if stopper is not None:
                    stopper.join()
        return 0 if self.failure is None else EXIT_USER_ERROR

    def statuses(self) -> list[ProcessStatus]:
        """Every process, role by role."""
        return [process.status() for role in self._roles for process in role]

    @property
    def failure(self) -> str | None:
        """The last line of a process that ended with exit code 2; None while there is none."""
        for status in self.statuses():
            if status.state == "failed":
                return status.last_line or f"{status.role} exited with {EXIT_USER_ERROR}"
        return None

    def _stop_and_tell(self) -> None:
        self.stop()
        self._tell(_STOPPED)

    def _tell(self, notice: int) -> None:
        if self._notices_in is not None:
            os.write(self._notices_in, bytes([notice]))

    @contextlib.contextmanager
    def _notices(self) -> Iterator[int]:
        """A pipe of one-byte notices: signal numbers, _FAILED, _STOPPED.

        A handler of Python runs when the main thread gets to it, and the kernel may give the signal to
        another thread while the main one waits: only the wakeup descriptor is sure to end the wait.
        """
        notices_out, self._notices_in = os.pipe()
        os.set_blocking(self._notices_in, False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(self._notices_in)
        try:
            yield notices_out
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            notices_in, self._notices_in = self._notices_in, None
            os.close(notices_in)
            os.close(notices_out)
