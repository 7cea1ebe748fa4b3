"""Runs the roles of `pkb up` and `pkb demo`: one process each, restarted when it dies, stopped in order.

    start   last role first: whoever reads stands ready before whoever writes
    death   again after 0.2 s, 0.4 s … 30 s; from the beginning once it ran for 30 s
    exit 2  a user's mistake, which another try would meet again: everything stops
    stop    first role first (ingest, then aggregators): SIGTERM, up to 10 s, SIGKILL

One thread a process starts it, waits for its end and decides (`process.py`); nothing polls. On Linux the
kernel sends SIGTERM to every process when the supervisor dies, kill -9 included.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import BinaryIO

from pkbrokers_redis.pipeline.process import EXIT_USER_ERROR, Backoff, Output, Process, ProcessStatus

STOP_SECONDS_MAX = 10.0  # a worker commits its last batch and releases its shards in far less
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

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
        # Why to end: at most one entry a process and signal. SimpleQueue.put is safe in signal handlers.
        self._reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
        shared = Output(sys.stderr.buffer if output is None else output)
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
                    on_failed=lambda: self._reasons.put("failed"),
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
        with self._signals():
            try:
                self.start()
                self._reasons.get()
            finally:
                self.stop()
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

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        signals = itertools.count()  # one step, because a handler may be interrupted by the next signal's

        def handle(number: int, frame: FrameType | None) -> None:
            if next(signals) > 0:
                self.kill()
            self._reasons.put(signal.Signals(number).name)

        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
