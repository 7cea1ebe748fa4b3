"""The supervisor with real child processes: what dies comes back, what stops stops in order, nobody stays."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pkbrokers_redis.clock import Backoff
from pkbrokers_redis.runtime.supervisor import (
    ProcessStatus,
    RoleSpec,
    Supervisor,
    call_on_signals,
    ignore_signal,
    stop_on_signals,
    worker_argv,
)
from tests.support import is_alive, running_python, wait_until

QUICK = (0.01, 0.05)

# Appends "<name> ready", then on SIGTERM "<name> stopped", to the file in argv.
WORKER = """
import signal, sys
name, path = sys.argv[1:]
def say(word):
    with open(path, "a") as file:
        file.write(f"{name} {word}\\n")
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
say("ready")
signal.sigwait([signal.SIGTERM])
say("stopped")
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""
HELLO = "import time; print('hello', flush=True); time.sleep(600)"


def python(program: str, *arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", program, *map(str, arguments))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@contextmanager
def supervising(specs: Sequence[RoleSpec], **options: object) -> Iterator[Supervisor]:
    supervisor = Supervisor(specs, **{"output": io.BytesIO(), "restart_seconds": QUICK, **options})  # type: ignore[arg-type]
    supervisor.start()
    try:
        yield supervisor
    finally:
        supervisor.kill()
        supervisor.stop()


def only(supervisor: Supervisor) -> ProcessStatus:
    [status] = supervisor.statuses()
    return status


def test_each_role_gets_its_number_of_processes(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    specs = [RoleSpec(name, python(WORKER, name, journal), count) for name, count in (("a", 1), ("b", 3))]
    with supervising(specs) as supervisor:
        wait_until(lambda: sorted(lines(journal)) == ["a ready", "b ready", "b ready", "b ready"])
        statuses = supervisor.statuses()
        assert [(each.role, each.number, each.state) for each in statuses] == [
            ("a", 0, "running"),
            ("b", 0, "running"),
            ("b", 1, "running"),
            ("b", 2, "running"),
        ]
        assert len({each.pid for each in statuses}) == 4


def test_a_killed_process_is_restarted(tmp_path: Path) -> None:
    with supervising([RoleSpec("a", python(WORKER, "a", tmp_path / "journal"))]) as supervisor:
        for restarts in range(3):
            status = wait_until(lambda: (found := only(supervisor)).state == "running" and found)
            assert status.pid is not None
            assert status.restarts == restarts
            os.kill(status.pid, signal.SIGKILL)
            wait_until(lambda: only(supervisor).restarts == restarts + 1)  # noqa: B023
        assert only(supervisor).exit_code == -signal.SIGKILL
        assert supervisor.failure is None


def test_a_process_that_ends_by_itself_is_restarted_for_any_exit_code_but_2() -> None:
    for code in (0, 1, 3):
        with supervising([RoleSpec("a", python(f"raise SystemExit({code})"))]) as supervisor:
            wait_until(lambda: only(supervisor).restarts >= 2)
            assert only(supervisor).exit_code == code


def test_the_wait_doubles_up_to_its_maximum() -> None:
    backoff = Backoff(0.2, 30.0)
    assert [backoff.next() for _ in range(10)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30]


def test_the_clock_decides_what_a_healthy_run_is() -> None:
    times = iter(range(0, 1_000_000, 40))  # each run seems to last 40 s
    with supervising(
        [RoleSpec("a", python("raise SystemExit(1)"))],
        restart_seconds=(0.01, 1e9),
        clock=lambda: float(next(times)),
    ) as supervisor:
        # Doubling from 0.01 s, eleven unhealthy runs would take 20 s of waiting.
        wait_until(lambda: only(supervisor).restarts >= 11)


def test_roles_stop_in_the_order_of_the_flow(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    specs = [
        RoleSpec("ingest", python(WORKER, "ingest", journal)),
        RoleSpec("aggregate", python(WORKER, "aggregate", journal), count=2),
    ]
    with supervising(specs) as supervisor:
        wait_until(lambda: len(lines(journal)) == 3)
        supervisor.stop()
        assert lines(journal)[3:] == ["ingest stopped", "aggregate stopped", "aggregate stopped"]
        assert {(each.state, each.pid, each.exit_code) for each in supervisor.statuses()} == {
            ("stopped", None, 0)
        }
        supervisor.stop()  # again is harmless


def test_a_process_that_will_not_stop_is_killed() -> None:
    with supervising([RoleSpec("deaf", python(DEAF))], stop_seconds_max=0.2) as supervisor:
        wait_until(lambda: only(supervisor).last_line == "deaf")
        supervisor.stop()
        assert only(supervisor).state == "stopped"
        assert only(supervisor).exit_code == -signal.SIGKILL


def test_the_children_of_a_dead_worker_are_killed(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "time.sleep(600)"
    )
    with supervising([RoleSpec("a", python(program))]) as supervisor:
        status = wait_until(lambda: (found := only(supervisor)).last_line and found)
        grandchild = int(status.last_line)
        assert is_alive(grandchild)
        assert status.pid is not None
        os.kill(status.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(grandchild))


def test_a_stop_ends_the_wait_for_the_next_try() -> None:
    slow = (600.0, 600.0)
    with supervising([RoleSpec("a", python("raise SystemExit(1)"))], restart_seconds=slow) as supervisor:
        wait_until(lambda: only(supervisor).state == "waiting")
        supervisor.stop()
        assert only(supervisor).state == "stopped"


def test_a_stop_before_the_start_is_harmless() -> None:
    supervisor = Supervisor([RoleSpec("a", python("pass"))], output=io.BytesIO())
    supervisor.stop()
    supervisor.start()
    wait_until(lambda: only(supervisor).state == "stopped")
    assert only(supervisor).exit_code is None


def test_output_arrives_in_whole_lines() -> None:
    output = io.BytesIO()
    program = "import sys, time\nfor n in range(200): print(sys.argv[1] * 50, flush=True)\ntime.sleep(600)"
    specs = [RoleSpec(name, python(program, name)) for name in "abc"]
    with supervising(specs, output=output):
        wait_until(lambda: output.getvalue().count(b"\n") == 600)
    assert set(output.getvalue().split()) == {b"a" * 50, b"b" * 50, b"c" * 50}


def test_a_line_without_end_is_passed_on_in_pieces_and_remembered_in_part() -> None:
    output = io.BytesIO()
    program = "import time; print('x' * 1_000_000, end='', flush=True); time.sleep(600)"
    with supervising([RoleSpec("a", python(program))], output=output) as supervisor:
        wait_until(lambda: len(output.getvalue()) > 900_000)
        assert len(only(supervisor).last_line) == 1000


def test_a_closed_output_stops_no_process() -> None:
    output = io.BytesIO()
    output.close()
    with supervising([RoleSpec("a", python(HELLO))], output=output) as supervisor:
        wait_until(lambda: only(supervisor).last_line == "hello")
        assert only(supervisor).state == "running"


def test_exit_code_2_is_final_and_its_line_is_kept(tmp_path: Path) -> None:
    program = "import sys; print('pkb: no api key: set PKB_KITE_API_KEY', file=sys.stderr); sys.exit(2)"
    with supervising([RoleSpec("ingest", python(program))]) as supervisor:
        failure = wait_until(lambda: supervisor.failure)
        assert failure == "pkb: no api key: set PKB_KITE_API_KEY"
        assert only(supervisor)[2:6] == ("failed", None, 0, 2)


def test_a_missing_program_is_final_too() -> None:
    with supervising([RoleSpec("a", ("/nonexistent/worker",))]) as supervisor:
        failure = wait_until(lambda: supervisor.failure)
        assert failure == "cannot start /nonexistent/worker (No such file or directory)"


def test_a_role_is_a_module_of_workers() -> None:
    assert worker_argv("ingest") == (sys.executable, "-m", "workers.ingest")


# --- as a process of its own, as `pkb up` runs it

UP = """
import json, sys
from pkbrokers_redis.runtime.supervisor import RoleSpec, Supervisor
specs = [RoleSpec(name, tuple(argv)) for name, argv in json.loads(sys.argv[1])]
supervisor = Supervisor(specs, stop_seconds_max=float(sys.argv[2]))
code = supervisor.run()
print("failure:", supervisor.failure, flush=True)
sys.exit(code)
"""


Specs = list[tuple[str, tuple[str, ...]]]


@contextmanager
def up(specs: Specs, stop_seconds_max: float = 10) -> Iterator[subprocess.Popen[str]]:
    with running_python("-c", UP, json.dumps(specs), str(stop_seconds_max)) as process:
        yield process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_everything_in_order_and_exits_with_0(tmp_path: Path, number: signal.Signals) -> None:
    journal = tmp_path / "journal"
    with up([(name, python(WORKER, name, journal)) for name in ("ingest", "aggregate")]) as process:
        wait_until(lambda: len(lines(journal)) == 2)
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        assert lines(journal)[2:] == ["ingest stopped", "aggregate stopped"]


def test_a_second_signal_kills_all_processes() -> None:
    with up([("deaf", python(DEAF))], stop_seconds_max=600) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "deaf\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_a_users_mistake_in_one_role_stops_all_and_exits_with_2(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    # The mistake shows only once the other role runs.
    mistaken = (
        "import pathlib, sys, time\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)\n"
        "print('pkb: invalid setting: correct it', file=sys.stderr); sys.exit(2)"
    )
    with up(
        [("ingest", python(mistaken, journal)), ("aggregate", python(WORKER, "aggregate", journal))]
    ) as process:
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 2
        assert lines(journal) == ["aggregate ready", "aggregate stopped"]
        assert out.count("pkb: invalid setting: correct it\n") == 2  # as it came, and as `failure`
        assert "Traceback" not in out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_no_worker_survives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    program = "import os; print(os.getpid(), flush=True)\n" + DEAF  # not even one that hangs
    with up([("a", python(program)), ("b", python(program))]) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(4)]
        pids = [int(line) for line in said if line != "deaf\n"]
        assert all(is_alive(pid) for pid in pids)
        process.kill()
        wait_until(lambda: not any(is_alive(pid) for pid in pids))


# --- signals: handled in a thread, in any number, whatever the main thread does

FLOOD = """
import signal, sys, threading, time
from pkbrokers_redis.runtime.supervisor import stop_on_signals

stop = threading.Event()
with stop_on_signals(stop):
    print("ready", flush=True)
    while sys.stdin.readline():
        # The main thread takes and leaves the event's lock all the time, as a role's loop does.
        while not stop.wait(0.000001):
            pass
        stop.clear()
        print("stopped", flush=True)
"""


def test_a_flood_of_signals_never_deadlocks_an_event_that_the_main_thread_waits_on() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FLOOD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    killer = threading.Timer(60, process.kill)  # a deadlock ends the test as a failure
    killer.start()
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(300):
            process.stdin.write("go\n")
            process.stdin.flush()
            for number in (signal.SIGTERM, signal.SIGINT) * 5:
                process.send_signal(number)
            assert process.stdout.readline() == "stopped\n"
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        killer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_action_gets_each_signal_in_another_thread() -> None:
    received: list[tuple[signal.Signals, bool]] = []

    def note(number: signal.Signals) -> None:
        received.append((number, threading.current_thread() is threading.main_thread()))

    with call_on_signals(note, [signal.SIGUSR1, signal.SIGUSR2]):
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: len(received) == 1)
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_until(lambda: len(received) == 2)
    assert received == [(signal.SIGUSR1, False), (signal.SIGUSR2, False)]


def test_handlers_and_wakeup_descriptor_are_restored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with call_on_signals(lambda _: None, [signal.SIGUSR1]):
            assert signal.getsignal(signal.SIGUSR1) is ignore_signal
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        wakeup = signal.set_wakeup_fd(-1)
        assert wakeup == -1
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_signal_to_a_forked_child_does_not_reach_the_parent() -> None:
    stop = threading.Event()
    ready_out, ready_in = os.pipe()
    with stop_on_signals(stop):
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
            os.write(ready_in, b"1")
            while True:
                signal.pause()
        os.read(ready_out, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert not stop.wait(0.2)
    os.close(ready_out)
    os.close(ready_in)
