"""What snapshots cost the ticks: socket to readable candle, alone and while a jobs worker makes files.

    python -m benchmarks.snapshots --latency [SECONDS]

9,000 instruments tick once a second over three connections; each phase is as long as the others and has as
many ends of minutes. In the second phase ticks.json is made as on a trading day, once a minute; in those
after it the jobs worker makes one snapshot after the other without a pause.

A probe's price says when it was handed to the socket. One that the aggregator overtook with a newer one
before the reader looked counts until that newer one is seen: a stall does not hide what it swallowed.
`others` is what strange processes took of the cores: where it is not near 0 the line says little.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import redis
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from benchmarks.harness import committed, running, tick_stream, tokens, wait_for, worker_env
from pkbrokers_redis.kite.protocol import encode_full
from pkbrokers_redis.runtime.warmup import freeze_heap
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.queue import OVER, enqueue, open_queue

INSTRUMENTS = 9_000
CONNECTIONS = 3
PROBES_A_CONNECTION = 3
FRAME_PACKETS = 100
LOOK_EVERY_SECONDS = 0.001
PHASE_SECONDS = 60.0
SETTLE_SECONDS = 10.0
MINUTE_SECONDS = 60.0
# What the table calls it, the kind of snapshot, how often one begins (0: when the last one is done).
PHASES = (
    ("alone", "", 0.0),
    ("ticks, one a minute", "ticks", MINUTE_SECONDS),
    ("ticks", "ticks", 0.0),
    ("pickle", "pickle", 0.0),
    ("parquet", "parquet", 0.0),
    ("alone, again", "", 0.0),
)
UNITS = 10**9  # a stamp is tenths of a millisecond, this many at most: what a price of int32 paise holds

Sent = dict[int, list[tuple[int, float]]]  # token → (stamp, when), in order
Seen = list[tuple[int, int, float]]  # token, stamp, when


@dataclass(frozen=True)
class Phase:
    """A stretch of the run."""

    name: str
    began: float
    ended: float
    took: list[float]  # seconds of each snapshot
    others: float  # cores


class Cpu:
    """Return how many cores other programs keep busy."""

    def __init__(self, server_pid: int) -> None:
        self._server = psutil.Process(server_pid)
        self._at, self._foreign = time.monotonic(), self._now()

    def _now(self) -> float:
        times = psutil.cpu_times()
        mine = psutil.Process()
        own = sum(sum(each.cpu_times()[:4]) for each in (mine, self._server, *mine.children(recursive=True)))
        return float(times.user + times.nice + times.system - own)

    def others(self) -> float:
        """Since the last look."""
        at, foreign = time.monotonic(), self._now()
        cores = (foreign - self._foreign) / (at - self._at)
        self._at, self._foreign = at, foreign
        return cores


def stamp_of(moment: float) -> int:
    """A moment of the monotonic clock as what a price can carry."""
    return int(moment * 10_000) % UNITS


def feed(link: Connection) -> None:
    """Run in a child process: report the port and the probes, feed until stopped, report send times."""
    sent: Sent = {}

    async def client(socket: ServerConnection) -> None:
        wanted: list[int] = []
        while True:
            message = json.loads(await socket.recv())
            if message["a"] == "subscribe":
                wanted += message["v"]
            if message["a"] == "mode" and len(wanted) >= INSTRUMENTS // CONNECTIONS:
                break
        step = len(wanted) // PROBES_A_CONNECTION
        probes = [wanted[n * step + n] for n in range(PROBES_A_CONNECTION)]
        sent.update({token: [] for token in probes})
        link.send(probes)
        others = [token for token in wanted if token not in probes]
        stream = tick_stream(len(others), len(others), 0, 1e9)
        stream[:, 0] = others
        probe = stream[:1].copy()
        frames = range(0, len(others), FRAME_PACKETS)
        began, second, volume = time.monotonic(), 0, 0
        with suppress(ConnectionClosed):
            while True:
                for n, first in enumerate(frames):
                    part = stream[first : first + FRAME_PACKETS]
                    part[:, 3] += 10
                    part[:, 1] += (second % 3 - 1) * 0.05
                    part[:, 8] = int(time.time()) * 1000
                    volume += 1
                    token = probes[volume % len(probes)]
                    wait = began + second + n / len(frames) - time.monotonic()
                    if wait > 0:
                        await asyncio.sleep(wait)
                    now = time.monotonic()
                    probe[0, [0, 1, 3, 8]] = token, stamp_of(now) / 100, volume, int(time.time()) * 1000
                    sent[token].append((stamp_of(now), now))
                    await socket.send(encode_full(np.concatenate([part, probe])))
                second += 1

    async def serve_all() -> None:
        async with serve(client, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
            link.send(next(iter(server.sockets)).getsockname()[1])
            await asyncio.get_running_loop().run_in_executor(None, link.recv)
            link.send(sent)

    asyncio.run(serve_all())


class Reader:
    """Looks at the probes' `1m` candles every millisecond."""

    def __init__(self, client: redis.Redis, settings: Settings, probes: list[int]) -> None:
        self.seen: Seen = []
        self._client, self._probes = client, probes
        self._keys = [settings.keys.current(token) for token in probes]
        self._last = dict.fromkeys(probes, -1)

    def watch(
        self, seconds: float, queue: Any = None, kind: str = "", every_seconds: float = 0.0
    ) -> list[float]:
        """For so long, while snapshots of `kind` are made, one begun after the other or every so often.

        Returns the seconds each took.
        """
        took: list[float] = []
        job: Any = None
        ends_at = time.monotonic() + seconds
        next_at, looks = 0.0, 0
        while time.monotonic() < ends_at or job is not None:
            self._look()
            looks += 1
            if kind and looks % 100 == 0 and (job is None or job.get_status() in OVER):
                if job is not None:
                    took.append(_seconds_of(job))
                    job = None
                if next_at <= time.monotonic() < ends_at:
                    next_at = time.monotonic() + every_seconds
                    job = queue.fetch_job(enqueue(queue, "snapshot", {"kind": kind}, again=True))
            time.sleep(LOOK_EVERY_SECONDS)
        return took

    def _look(self) -> None:
        pipe = Pipe(self._client)
        for key in self._keys:
            pipe.add("HGET", key, "1m")
        rows = pipe.execute()
        now = time.monotonic()
        for token, row in zip(self._probes, rows, strict=True):
            if row is not None and (stamp := round(float(row.split(b",")[4]) * 100)) != self._last[token]:
                self._last[token] = stamp
                self.seen.append((token, stamp, now))


def _seconds_of(job: Any) -> float:
    """How long a finished job took. Raises AssertionError for one that failed."""
    result = job.return_value(refresh=True)
    if not isinstance(result, dict):
        raise AssertionError(f"a snapshot failed: {job.latest_result()}")
    return float(result["seconds"])


def delays_ms(sent: Sent, seen: Seen, from_at: float, until_at: float) -> list[float]:
    """Of each probe sent in that time: how long until it, or a newer one of its instrument, was readable."""
    found: list[float] = []
    for token, probes in sent.items():
        place = {stamp: n for n, (stamp, _) in enumerate(probes)}
        looks = [(place[stamp], at) for each, stamp, at in seen if each == token and stamp in place]
        order = [n for n, _ in looks]
        for n, (_, at) in enumerate(probes):
            if from_at <= at < until_at and (k := bisect_left(order, n)) < len(looks):
                found.append((looks[k][1] - at) * 1000)
    return found


def run(settings: Settings, client: redis.Redis, seconds: float = PHASE_SECONDS) -> None:
    """Print the table; the store is filled."""
    freeze_heap()  # neither feeder nor reader may pause for a collection of its own
    parent, child = multiprocessing.Pipe()
    feeder = multiprocessing.Process(target=feed, args=(child,), daemon=True)
    feeder.start()
    wanted = ",".join(map(str, tokens(INSTRUMENTS).tolist()))
    env = worker_env(settings, PKB_KITE_WS_URL=f"ws://127.0.0.1:{parent.recv()}", PKB_INSTRUMENTS=wanted)
    queue = open_queue(settings, client)
    phases: list[Phase] = []
    cpu = Cpu(int(client.info("server")["process_id"]))
    with running("jobs", env), running("aggregate", env):
        wait_for("the aggregator", lambda: client.exists(settings.keys.cursor(0)))
        with running("ingest", env):
            probes = [token for _ in range(CONNECTIONS) for token in parent.recv()]
            wait_for("the first ticks", lambda: committed(client, settings)[0] > 100)
            reader = Reader(client, settings, probes)
            reader.watch(SETTLE_SECONDS)
            for name, kind, every_seconds in PHASES:
                cpu.others()
                began = time.monotonic()
                took = reader.watch(seconds, queue, kind, every_seconds)
                phases.append(Phase(name, began, time.monotonic(), took, cpu.others()))
                reader.watch(2.0)
            parent.send("enough")
            sent: Sent = parent.recv()
    feeder.join(10)
    _print(phases, sent, reader.seen)


def _print(phases: list[Phase], sent: Sent, seen: Seen) -> None:
    print(
        "\n| while | snapshots | seconds each | probes | p50 ms | p99 ms | max ms | p50 × | p99 × | others |"
    )
    print(f"|---{'|--:' * 9}|")
    alone: list[float] = []
    for phase in phases:
        delays = delays_ms(sent, seen, phase.began, phase.ended)
        p50, p99 = (float(each) for each in np.percentile(delays, [50, 99]))
        alone = alone or [p50, p99]
        each = f"{np.mean(phase.took):.1f}" if phase.took else ""
        figures = f"{len(delays):,} | {p50:.1f} | {p99:.1f} | {max(delays):.0f}"
        ratios = f"{p50 / alone[0]:.2f} | {p99 / alone[1]:.2f} | {phase.others:.2f}"
        print(f"| {phase.name} | {len(phase.took) or ''} | {each} | {figures} | {ratios} |")
