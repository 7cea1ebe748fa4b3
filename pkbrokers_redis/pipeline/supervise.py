"""Runs the roles of `pkb up` and `pkb demo`: one process each, restarted when it dies, stopped in order.

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
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pkbrokers_redis.pipeline.process import (
    EXIT_USER_ERROR,
    SUPERVISED,
    Backoff,
    Output,
    Process,
    ProcessStatus,
)

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
