"""Signals that stop a process, handled in a thread of their own.

A Python signal handler runs in the main thread, between two bytecodes. `threading.Event.set()` is not safe
there: the main thread may hold the event's own lock inside `wait()`, and then waits for itself. The handler
also runs late, because the kernel may deliver the signal to another thread, which does not end the main
thread's wait. Therefore the interpreter writes the number of each signal into a pipe
(`signal.set_wakeup_fd`), and a thread reads the pipe and acts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
END = b"\0"  # no signal has this number: it ends the thread


def ignore_signal(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: a handler for signals that `call_on_signals` handles through its pipe."""


@contextlib.contextmanager
def call_on_signals(
    action: Callable[[signal.Signals], None], signals: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Call `action` in a thread for each signal that arrives inside the `with` block.

    The signals replace whatever they did before, and do that again after the block. Use it in the main thread
    only, because Python allows signal handlers nowhere else.

    Args:
        action: Receives the signal. It may block and take locks.
        signals: Which signals to handle.
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
    """Set `stop` on SIGTERM and SIGINT inside the `with` block. Use it in the main thread only.

    Example:
        >>> stop = threading.Event()
        >>> with stop_on_signals(stop):
        ...     stop.wait(0.01)
        False
    """
    return call_on_signals(lambda _: stop.set())


@functools.cache
def _reset_after_fork() -> None:
    """A forked child shares the pipe: its own signals must not reach the parent's thread."""

    def reset() -> None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)

    os.register_at_fork(after_in_child=reset)
