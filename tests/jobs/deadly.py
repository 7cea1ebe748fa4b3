"""Jobs workers that a kill -9 meets at a chosen moment, or that a test kills. They are forked: none imports.

    python -m tests.jobs.deadly     a line of JSON in, a line out: {"start": …} → pid, {"ended": pid} → code

A moment is a module, a function in it, and how many of its calls go well: the one after them kills the
worker, and its child with it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.support import is_alive, wait_until

END_SECONDS_MAX = 90


class Moment(NamedTuple):
    """`Moment("os", "fsync", 1)`: in the second call."""

    module: str
    function: str
    calls: int = 0


class Worker:
    """A jobs worker. `log` is what it has said."""

    def __init__(self, workers: Workers, pid: int, log_path: Path) -> None:
        self.pid, self._workers, self._said = pid, workers, log_path
        self._code: int | None = None

    @property
    def log(self) -> str:
        return self._said.read_text()

    def ended(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._workers.ask({"ended": self.pid})
        return self._code

    def wait_for_its_death(self) -> None:
        """By a moment's kill."""
        wait_until(lambda: self.ended() is not None, timeout_seconds=END_SECONDS_MAX, what="its death")
        assert self.ended() == -signal.SIGKILL, self.log

    def kill(self) -> None:
        """kill -9, and the end of everything it has started: nobody else ends that."""
        started = psutil.Process(self.pid).children(recursive=True)
        os.kill(self.pid, signal.SIGKILL)
        self.wait_for_its_death()
        for each in started:
            wait_until(lambda pid=each.pid: not is_alive(pid), what=f"the end of {each}")


class Workers:
    """Starts them; all are ended with it."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder, self._count = process, folder, 0
        self._started: list[Worker] = []

    def start(self, moment: Moment | None = None, file_bytes_max: int | None = None) -> Worker:
        """One with the environment of now. `file_bytes_max`: no file can grow larger, as on a full disk."""
        self._count += 1
        log_path = self._folder / f"worker-{self._count}.log"
        env = {name: value for name, value in os.environ.items() if name.startswith(("PKB_", "TMPDIR"))}
        how = {"moment": moment, "env": env, "said": str(log_path), "file_bytes_max": file_bytes_max}
        self._started.append(Worker(self, self.ask({"start": how}), log_path))
        return self._started[-1]

    def end_all(self) -> None:
        """Those that a test has left: they would take the next one's jobs."""
        while self._started:
            worker = self._started.pop()
            if worker.ended() is None:
                worker.kill()

    def ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def deadly_workers(folder: Path) -> Iterator[Workers]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Workers(process, folder)
    finally:
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.kill()
        process.communicate()


# --- in the process that forks


def main() -> None:

    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            answer: int | None = os.fork()
            if answer == 0:
                _be_a_worker(asked["start"])
        else:
            pid, status = os.waitpid(asked["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _be_a_worker(how: dict[str, Any]) -> None:
    from pkbrokers_redis.jobs.worker import jobs
    from pkbrokers_redis.runtime.roles import run_role

    log_path = os.open(how["said"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log_path, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in [name for name in os.environ if name.startswith("PKB_")]:
        del os.environ[name]
    os.environ.update(how["env"])
    if how["file_bytes_max"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (how["file_bytes_max"], resource.RLIM_INFINITY))
    if how["moment"] is not None:
        _arm(Moment(*how["moment"]))
    code = 1
    try:
        code = run_role(jobs)
    finally:
        os._exit(code)


def _arm(moment: Moment) -> None:
    holder: Any = importlib.import_module(moment.module)
    *owners, attribute = moment.function.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    real, left = getattr(holder, attribute), moment.calls

    def deadly(*given: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
        return real(*given, **named)

    setattr(holder, attribute, deadly)


if __name__ == "__main__":
    main()
