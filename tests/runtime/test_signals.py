"""Stop signals: handled in a thread, in any number, whatever the main thread does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from pkbrokers_redis.runtime.supervisor import call_on_signals, ignore_signal, stop_on_signals
from tests.support import wait_until

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
