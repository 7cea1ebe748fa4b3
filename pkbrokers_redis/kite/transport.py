"""One websocket connection on websocket-client, with bounds on size and time.

What the library lacks:

* it accepts a frame of any size: `_BoundedFrames` refuses one beyond its bound before reading it;
* a server that sends single bytes blocks its reader: `receive` returns, and the next call resumes;
* its connect blocks in DNS, TCP and TLS: `open_websocket` also waits for a stop event;
* its exceptions may contain the URL, and so the session: `describe` returns a text without it.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any

import websocket

POLL_SECONDS = 0.25  # how long a read or a wait may ignore a stop


class FrameTooLarge(websocket.WebSocketException):
    """Raised when the server announces a frame, or a fragmented message, beyond the bound."""


class _BoundedFrames(websocket.frame_buffer):
    """The library's frame reader with a size bound, and a deadline beyond which a read is postponed.

    A frame that arrived in part stays in the reader: the next read resumes it. (Reading more than the
    library's 16 KB at once was measured and gains nothing: ~25 µs a 90 KB frame.)
    """

    def __init__(self, link: websocket.WebSocket, frame_bytes_max: int) -> None:
        super().__init__(self._recv_in_time, skip_utf8_validation=True)
        self._link = link
        self._bytes_max = frame_bytes_max
        self.deadline = 0.0  # monotonic

    def _recv_in_time(self, size: int) -> bytes:
        if time.monotonic() > self.deadline:
            raise websocket.WebSocketTimeoutException("postponed")
        data: bytes = self._link._recv(size)  # type: ignore[no-untyped-call]
        return data

    def recv_length(self) -> None:
        super().recv_length()
        if (self.length or 0) > self._bytes_max:
            raise FrameTooLarge


class _BoundedMessage(websocket.continuous_frame):
    """The library's joiner of fragments, with the same bound for the whole."""

    def __init__(self, message_bytes_max: int) -> None:
        super().__init__(fire_cont_frame=False, skip_utf8_validation=True)
        self._bytes_max = message_bytes_max

    def add(self, frame: Any) -> None:
        if self.cont_data and len(self.cont_data[1]) + len(frame.data) > self._bytes_max:
            raise FrameTooLarge
        super().add(frame)


def open_websocket(
    url: str,
    stop: threading.Event,
    *,
    headers: Mapping[str, str],
    origin: str | None = None,
    frame_bytes_max: int,
    timeout_seconds: float,
) -> websocket.WebSocket | None:
    """Return a connected websocket whose reads time out after POLL_SECONDS; None when `stop` is set first.

    Raises:
        Exception: what websocket-client, ssl or the socket raise. Show `describe(error)`, never its own text.
        TimeoutError: after `timeout_seconds`.
    """
    # No SO_RCVBUF: a fixed size is capped low on most systems and switches the kernel's own tuning off.
    link = websocket.WebSocket(skip_utf8_validation=True)
    link.frame_buffer = _BoundedFrames(link, frame_bytes_max)
    link.cont_frame = _BoundedMessage(frame_bytes_max)
    link.settimeout(timeout_seconds)
    failures: list[BaseException] = []
    done, abandoned = threading.Event(), threading.Event()

    def connect() -> None:
        try:
            # No redirects: the URL carries the session, and Kite sends none.
            link.connect(  # type: ignore[no-untyped-call]
                url, header=dict(headers), origin=origin, redirect_limit=0
            )
        except BaseException as error:
            answer = link.handshake_response
            if answer is None or answer.status == 101:
                failures.append(error)
            else:  # a redirect, which the library reports without its status
                failures.append(websocket.WebSocketBadStatusException("", answer.status))
        if abandoned.is_set():
            _wake(link)
        done.set()

    # In a thread of its own, as nothing interrupts a name look-up.
    threading.Thread(target=connect, name="kite-connect", daemon=True).start()
    deadline = time.monotonic() + timeout_seconds
    while not done.wait(0.02):
        if stop.is_set() or time.monotonic() > deadline:
            abandoned.set()
            _wake(link)
            if stop.is_set():
                return None
            raise TimeoutError
    if failures:
        raise failures[0]
    link.settimeout(POLL_SECONDS)
    return link


def receive(link: websocket.WebSocket) -> tuple[int, bytes]:
    """Return the next message as `(opcode, data)`; wait for at most about 2 × POLL_SECONDS.

    Raises:
        WebSocketTimeoutException: no message is whole by then. Its first part is kept for the next call.
    """
    if isinstance(link.frame_buffer, _BoundedFrames):
        link.frame_buffer.deadline = time.monotonic() + POLL_SECONDS
    opcode, data = link.recv_data(control_frame=True)
    return opcode, data


def _wake(link: websocket.WebSocket) -> None:
    """End a connect that is in its handshake; one still in DNS or TCP ends by itself."""
    held = link.sock
    if held is None:
        return
    try:
        held.shutdown(socket.SHUT_RDWR)  # close() alone does not end another thread's read
        held.close()
    except OSError:
        pass  # it was closed already


def describe(error: BaseException) -> str:
    """Return an error as text without the URL: its kind, and the system's or HTTP's own code."""
    if isinstance(error, websocket.WebSocketBadStatusException):
        return f"HTTP {error.status_code}"
    if isinstance(error, FrameTooLarge):
        return "a frame beyond the size bound"
    if isinstance(error, websocket.WebSocketConnectionClosedException):
        return "connection lost"
    if isinstance(error, TimeoutError | websocket.WebSocketTimeoutException):
        return "timed out"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate refused ({error.verify_message})"
    if isinstance(error, socket.gaierror | websocket.WebSocketAddressException):
        return "host name not found"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return type(error).__name__
