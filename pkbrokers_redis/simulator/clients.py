"""The server's clients: who is connected, what they are told first, and the counters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

import msgspec
import numpy as np
import numpy.typing as npt
from websockets.asyncio.server import ServerConnection

from pkbrokers_redis.candles.calendar import IST

QUEUE_FRAMES_MAX = 512  # of one client, ~30 MB at worst; then it is disconnected
STEPS_MAX = 600  # of one round, when market time runs fast or we were held up; the next round goes on


@dataclass(slots=True)
class ServerStats:
    """Counters since the start; read them from any thread."""

    connections: int = 0
    refused: int = 0
    frames: int = 0  # binary ones handed to clients, heartbeats not counted
    packets: int = 0  # made by the market, whether or not anyone subscribed
    bad_requests: int = 0
    slow_disconnects: int = 0


@dataclass(eq=False, slots=True)
class Client:
    """One connection: what it subscribed, and what waits to be sent."""

    link: ServerConnection
    modes: npt.NDArray[np.int8]  # by row of the market
    count: int = 0  # tokens subscribed
    queue: asyncio.Queue[bytes | str] = field(default_factory=lambda: asyncio.Queue(QUEUE_FRAMES_MAX))
    held: list[bytes] = field(default_factory=list)  # by a fault that changes the order; a frame or two


def greetings(count: int, now_s: float) -> list[str]:
    """The text frames that Kite sends first. `count` instruments, market time in epoch seconds."""
    stamp = datetime.fromtimestamp(int(now_s), IST).isoformat()
    meta = {"type": "instruments_meta", "data": {"count": count, "etag": f'W/"sim-{count}"'}}
    return [text_frame(meta), text_frame({"type": "app_code", "timestamp": stamp})]


def text_frame(content: object) -> str:
    """JSON for a text frame."""
    return msgspec.json.encode(content).decode()


def steps_between(before_ms: int, now_ms: int, stride_ms: int) -> Iterator[int]:
    """The times to step through until now: one, or (`stride_ms`) so that no interval is conflated away."""
    if stride_ms > 0:
        now_ms = min(now_ms, before_ms + STEPS_MAX * stride_ms)
        yield from range(before_ms + stride_ms, now_ms, stride_ms)
    yield now_ms
