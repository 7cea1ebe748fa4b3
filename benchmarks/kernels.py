"""Measure each part alone, next to what people use today: candle rules, frame parsing, stream writing.

python -m benchmarks.kernels
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from kiteconnect import KiteTicker

from benchmarks.harness import INSTRUMENTS, Row, machine, private_store, tick_stream
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.codec import tick_texts
from pkbrokers_redis.candles.model import DEFAULT_INTERVALS, TickArray
from pkbrokers_redis.candles.rules import apply_ticks
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.ingest.writer import FrameWriter
from pkbrokers_redis.kite.protocol import encode_full, parse_frame
from pkbrokers_redis.store.connect import connect

FRAME_PACKETS = 400
START_MS = 1_784_691_900_000


def best(work: Callable[[], Any], runs: int = 3) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def dict_aggregator(ticks: list[list[float]], seconds: list[int]) -> dict[tuple[int, int], dict[str, float]]:
    """What most Python programs do: a dict a candle, touched tick by tick. It applies fewer rules."""
    candles: dict[tuple[int, int], dict[str, float]] = {}
    seen: dict[int, float] = {}
    for token, price, _, volume, _, _, _, _, time_ms, _ in ticks:
        key = int(token)
        traded = volume - seen.get(key, volume)
        seen[key] = volume
        for length in seconds:
            start = time_ms // 1000 // length * length
            candle = candles.get((key, length))
            if candle is None or candle["start"] != start:
                candles[key, length] = {
                    "start": start, "open": price, "high": price, "low": price, "close": price,
                    "volume": traded,
                }  # fmt: skip
                continue
            candle["high"] = max(candle["high"], price)
            candle["low"] = min(candle["low"], price)
            candle["close"] = price
            candle["volume"] += traded
    return candles


def dicts_per_second(ticks: TickArray) -> float:
    """Ticks a second of `dict_aggregator`, in memory, into ten intervals."""
    few = ticks.tolist()
    seconds = [interval.seconds or 86_400 for interval in DEFAULT_INTERVALS]
    return len(few) / best(lambda: dict_aggregator(few, seconds), 1)


def rules(n: int = 1_000_000) -> Row:
    """Ticks into ten intervals of 2,000 instruments, in memory."""
    ticks = tick_stream(n, INSTRUMENTS, START_MS, 100_000)
    sessions = load_sessions("always")
    ends = np.array([n])

    def run() -> None:
        book = ShardState(DEFAULT_INTERVALS, sessions, event_clock=True, instruments=INSTRUMENTS)
        assert apply_ticks(book, ticks, 0, ends, n) == n

    measured = n / best(run)
    reference = dicts_per_second(ticks[: n // 10])
    return Row(
        "candle rules alone, 2,000 × 10 intervals",
        f"{measured:,.0f} ticks/s",
        f"plain-Python dicts {reference:,.0f} ticks/s",
        f"{measured / reference:.0f} ×",
    )


def commit_text(n: int = 200_000) -> Row:
    """Rules and the text of all changed rows and states, as a commit needs it."""
    ticks = tick_stream(n, INSTRUMENTS, START_MS, 100_000)
    book = ShardState(DEFAULT_INTERVALS, load_sessions("always"), event_clock=True, instruments=INSTRUMENTS)
    batch = 10 * INSTRUMENTS

    def run() -> None:
        for first in range(0, n, batch):
            part = ticks[first : first + batch]
            apply_ticks(book, part, 0, np.array([len(part)]), n)
            book.collect()

    return Row(
        "rules and commit text, batches of ten ticks an instrument", f"{n / best(run, 1):,.0f} ticks/s"
    )


def parser(n: int = 200_000) -> Row:
    """Full-mode frames → tick batches and their JSON rows, against the official SDK's parser."""
    stream = tick_stream(n, INSTRUMENTS, START_MS, 100_000)
    frames = [encode_full(stream[first : first + FRAME_PACKETS]) for first in range(0, n, FRAME_PACKETS)]
    ticker = KiteTicker("key", "token")

    def run() -> None:
        for frame in frames:
            tick_texts(parse_frame(frame, START_MS).ticks, 8)

    few = frames[: max(1, len(frames) // 20)]
    measured = n / best(run)
    reference = len(few) * FRAME_PACKETS / best(lambda: [ticker._parse_binary(frame) for frame in few], 1)
    return Row(
        f"parser alone: frames of {FRAME_PACKETS} full packets → stream text",
        f"{measured:,.0f} ticks/s",
        f"kiteconnect's parser {reference:,.0f} ticks/s",
        f"{measured / reference:.0f} ×",
    )


def writing(n: int = 200_000) -> Row:
    """Frames → tick streams and quotes in Redis, against one XADD a tick with named fields."""
    stream = tick_stream(n, INSTRUMENTS, START_MS, 100_000)
    frames = [(encode_full(stream[a : a + FRAME_PACKETS]), START_MS) for a in range(0, n, FRAME_PACKETS)]
    with private_store() as (settings, client):
        writer = FrameWriter(lambda: connect(settings), settings, {})

        def run() -> None:
            for first in range(0, len(frames), 8):
                writer.write(writer.parse_new(frames[first : first + 8]), int(time.time() * 1000))

        measured = n / best(run, 2)
        few: TickArray = stream[: n // 20]

        def raw() -> None:
            names = ("token", "last_price", "last_quantity", "volume", "oi", "open", "high", "low", "time_ms")
            for first in range(0, len(few), FRAME_PACKETS):
                pipeline = client.pipeline(transaction=False)
                for row in few[first : first + FRAME_PACKETS].tolist():
                    pipeline.xadd("raw", dict(zip(names, row, strict=False)))
                pipeline.execute()

        reference = len(few) / best(raw, 1)
    return Row(
        "ingest's writer alone: frames → streams and quotes in Redis",
        f"{measured:,.0f} ticks/s",
        f"one XADD a tick, redis-py pipeline {reference:,.0f} ticks/s",
        f"{measured / reference:.0f} ×",
    )


def run() -> list[Row]:
    """All of them."""
    return [rules(), commit_text(), parser(), writing()]


if __name__ == "__main__":
    print(machine())
    for row in run():
        print(row.name, f"{row.figure}  {row.reference}  {row.ratio}", sep="\n  ")
