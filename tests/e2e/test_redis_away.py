"""Redis goes away under a steady feed, comes back, comes back older: every tick is counted once."""

from __future__ import annotations

import contextlib
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.client.replay import lag_entries
from pkbrokers_redis.ingest.buffer import FrameBuffer
from pkbrokers_redis.ingest.writer import FrameWriter, forward_all
from pkbrokers_redis.kite.protocol import encode_full
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.embedded import find_binary
from pkbrokers_redis.store.meta import ensure_meta
from tests.support import running_process, running_python, settings_env, wait_until

pytestmark = pytest.mark.xdist_group("heavy")

TOKENS = [(1_000 + n) * 256 + 1 for n in range(40)]
FRAMES = 800
START_MS = 1_767_584_700_000
SHARDS = 4


def feed() -> list[bytes]:
    """A market of 40 instruments for some minutes: frame n is second n / 4."""
    rng = np.random.default_rng(7)
    price = np.full(len(TOKENS), 1_000.0)
    volume = np.zeros(len(TOKENS))
    frames = []
    for n in range(FRAMES):
        price += rng.integers(-3, 4, len(TOKENS)) * 0.05
        volume += rng.integers(0, 50, len(TOKENS))
        rows = np.full((len(TOKENS), 10), np.nan)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3], rows[:, 4] = TOKENS, price, 10, volume, 0
        rows[:, 5], rows[:, 6], rows[:, 7] = 1_000, 2_000, 1
        rows[:, 8] = START_MS + n // 4 * 1_000
        rows[:, 9] = START_MS + n * 250
        frames.append(encode_full(rows))
    return frames


class Server:
    """A Redis of its own, with an append-only file, that comes back at the same port after a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._life = contextlib.ExitStack()

    def start(self, *options: str) -> None:
        command: list[str | Path] = [
            find_binary("valkey"),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            self.folder,
        ]
        process = self._life.enter_context(
            running_process(
                *command, "--save", "", "--appendonly", "yes", "--repl-diskless-sync-delay", "0", *options
            )
        )
        assert process.stdout is not None
        for line in process.stdout:
            if "eady to accept connections" in line:
                threading.Thread(target=process.stdout.read, daemon=True).start()
                return
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        """SIGKILL."""
        self._life.close()

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=30)


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    servers: list[Server] = []

    def make(name: str) -> Server:
        servers.append(Server(tmp_path / name))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


def settings_of(tmp_path: Path, port: int, **overrides: Any) -> Settings:
    return load_settings(
        **{
            "redis_url": f"redis://127.0.0.1:{port}/0", "data_dir": tmp_path / "data", "shards": SHARDS,
            "sessions": "always", "clock": "event", "intervals_text": "1m,5m", **overrides,
        }
    )  # fmt: skip


class Ingesting:
    """A frame buffer and its writer at work: what a worker is without its sockets."""

    def __init__(self, settings: Settings) -> None:
        self.stop = threading.Event()
        self.writer = FrameWriter(lambda: connect(settings), settings, {})
        self.buffer = FrameBuffer.open(settings, self.writer.source)
        self._thread = threading.Thread(
            target=forward_all, args=(self.buffer, self.writer, self.stop), daemon=True
        )
        self._thread.start()
        threading.Thread(target=self.buffer.run, args=(self.stop,), daemon=True).start()

    def put(self, frames: list[bytes], first: int, pause_seconds: float = 0.001) -> None:
        """Frames `first`, … of the feed, at a steady pace."""
        for n, frame in enumerate(frames, first):
            self.buffer.put(frame, START_MS + n * 250)
            time.sleep(pause_seconds)

    def empty(self) -> None:
        """Wait until Redis has everything."""
        wait_until(
            lambda: not len(self.buffer) and not self.buffer.spool_bytes,
            timeout_seconds=60,
            what="an empty buffer",
        )

    def end(self) -> int:
        self.stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.buffer.finish()


def aggregated(settings: Settings, client: redis.Redis) -> dict[str, Any]:
    """All rows, when an aggregator has applied all that is in the streams."""
    ensure_meta(client, settings, "2026-01-01T00:00:00+00:00")
    aggregator = Aggregator(lambda: connect(settings), settings, now_ms=lambda: time.time() * 1000)
    aggregator.start()
    while aggregator.step(block_ms_max=1) or lag_entries(client, settings.keys):
        pass
    aggregator.end() if hasattr(aggregator, "end") else None
    rows: dict[str, Any] = {}
    for key in client.scan_iter(match=f"{settings.prefix}:*", count=1000):
        name = key.decode().removeprefix(settings.prefix)
        if ":candles:" in name:
            rows[name] = client.lrange(key, 0, -1)
        elif ":current:" in name:
            rows[name] = client.hgetall(key)
    return rows


def undisturbed(tmp_path: Path, client: redis.Redis, port: int) -> dict[str, Any]:
    """The rows of a run in which nothing happens."""
    settings = settings_of(tmp_path, port, prefix="calm", data_dir=tmp_path / "calm")
    writer = FrameWriter(lambda: connect(settings), settings, {})
    frames = [(frame, START_MS + n * 250) for n, frame in enumerate(feed())]
    for first in range(0, FRAMES, 50):
        assert writer.write(writer.parse_new(frames[first : first + 50]), START_MS)
    rows = aggregated(settings, client)
    assert len(rows) >= 2 * len(TOKENS)
    return rows


def seqs(client: redis.Redis, settings: Settings) -> dict[bytes, list[list[int]]]:
    """Source → the numbers in each shard's stream, in its order, each where it stands first."""
    found: dict[bytes, list[list[int]]] = {}
    for shard in range(settings.shards):
        entries: Any = client.xrange(settings.keys.ticks(shard))
        for _, fields in entries:
            own = found.setdefault(fields[b"src"], [[] for _ in range(settings.shards)])[shard]
            if (seq := int(fields[b"seq"])) not in own:
                own.append(seq)
    return found


def test_frames_are_spooled_while_redis_is_unavailable_and_arrive_once_in_order(
    tmp_path: Path, make_server: Callable[[str], Server]
) -> None:
    server = make_server("redis")
    settings = settings_of(tmp_path, server.port, buffer_max_bytes=100_000)
    frames = feed()
    ingesting = Ingesting(settings)
    ingesting.put(frames[:200], 0)
    server.kill()
    ingesting.put(frames[200:500], 200)
    assert ingesting.buffer.figures()["frames_spooled"] > 100
    assert ingesting.buffer.size_bytes <= 100_000
    server.start()
    ingesting.put(frames[500:], 500)
    ingesting.empty()
    assert ingesting.end() == 0
    assert not list((tmp_path / "data" / "spool").rglob("frames.sqlite"))

    with server.client() as client:
        source = ingesting.writer.source.encode()
        assert seqs(client, settings) == {source: [list(range(1, FRAMES + 1))] * SHARDS}
        assert aggregated(settings, client) == undisturbed(tmp_path, client, server.port)


INGEST_UNTIL_KILLED = """
import sys, time, threading
from tests.e2e.test_redis_away import Ingesting, feed
from pkbrokers_redis.settings import load_settings
ingesting = Ingesting(load_settings())
frames = feed()
ingesting.put(frames[:100], 0)
ingesting.empty()
print("kill redis", flush=True)
sys.stdin.readline()
ingesting.put(frames[100:400], 100)
while len(ingesting.buffer):
    time.sleep(0.01)
print(ingesting.writer.source, ingesting.buffer.figures()["frames_spooled"], flush=True)
time.sleep(600)
"""


def test_next_ingest_sends_the_spool_of_a_killed_one_first(
    tmp_path: Path, make_server: Callable[[str], Server]
) -> None:
    server = make_server("redis")
    settings = settings_of(tmp_path, server.port, buffer_max_bytes=100_000)
    frames = feed()
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", INGEST_UNTIL_KILLED],
        env={**settings_env(settings), "PYTHONPATH": root}, cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "kill redis\n"
            server.kill()
            process.stdin.write("\n")
            process.stdin.flush()
            dead, spooled = process.stdout.readline().split()
        finally:
            process.kill()
    assert int(spooled) >= 300, "everything Redis did not have was on disk"
    server.start()
    ingesting = Ingesting(settings)
    ingesting.put(frames[400:], 400)
    ingesting.empty()
    assert ingesting.end() == 0

    with server.client() as client:
        assert seqs(client, settings) == {
            dead.encode(): [list(range(1, 401))] * SHARDS,
            ingesting.writer.source.encode(): [list(range(1, FRAMES - 400 + 1))] * SHARDS,
        }
        for shard in range(SHARDS):
            entries: Any = client.xrange(settings.keys.ticks(shard))
            sources = [fields[b"src"].decode() for _, fields in entries]
            assert sources == sorted(sources, key=lambda each: each != dead), "the dead one's first"
        assert aggregated(settings, client) == undisturbed(tmp_path, client, server.port)


class Proxy:
    """A TCP proxy in front of Redis: a virtual address that can be moved to another server."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._links: list[socket.socket] = []
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", proxy.target)) as far,
                ):
                    proxy._links += [far, self.request]
                    back = threading.Thread(target=_carry, args=(far, self.request), daemon=True)
                    back.start()
                    _carry(self.request, far)

        class Listener(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._server = Listener(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def move(self, port: int) -> None:
        """Connections break; new ones lead to `port`."""
        self.target = port
        for link in self._links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self._links.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


def test_failover_to_a_lagging_replica_loses_no_row(
    tmp_path: Path, make_server: Callable[[str], Server]
) -> None:
    master, replica = make_server("master"), make_server("replica")
    proxy = Proxy(master.port)
    settings = settings_of(tmp_path, proxy.port)
    frames = feed()
    with master.client() as old, replica.client() as new:
        new.replicaof("127.0.0.1", str(master.port))
        wait_until(lambda: new.info("replication")["master_link_status"] == "up", what="replication")
        ingesting = Ingesting(settings)
        ingesting.put(frames[:200], 0)
        ingesting.empty()
        aggregated(settings, old)
        ingesting.put(frames[200:300], 200)
        ingesting.empty()
        old.wait(1, 10_000)
        new.replicaof("NO", "ONE")  # from here on it misses everything
        ingesting.put(frames[300:600], 300)
        ingesting.empty()
        aggregated(settings, old)  # … the commits too
        behind = [old.xlen(settings.keys.ticks(s)) - new.xlen(settings.keys.ticks(s)) for s in range(SHARDS)]
        assert min(behind) == 300
        proxy.move(replica.port)
        ingesting.put(frames[600:], 600)
        ingesting.empty()
        ingesting.end()
        proxy.close()
        assert ingesting.writer.counts["restored_entries"] == 300 * SHARDS
        source = ingesting.writer.source.encode()
        assert seqs(new, settings) == {source: [list(range(1, FRAMES + 1))] * SHARDS}
        direct = settings_of(tmp_path, replica.port)
        assert aggregated(direct, new) == undisturbed(tmp_path, new, replica.port)


def test_repeatedly_lost_replies_duplicate_nothing(
    tmp_path: Path, make_server: Callable[[str], Server]
) -> None:
    """The connection breaks at any moment: nobody knows which commands were carried out."""
    server = make_server("redis")
    proxy = Proxy(server.port)
    settings = settings_of(tmp_path, proxy.port)
    ingesting = Ingesting(settings)
    feeder = threading.Thread(target=ingesting.put, args=(feed(), 0), daemon=True)
    feeder.start()
    cuts = 0
    while feeder.is_alive():
        time.sleep(0.05)
        proxy.move(server.port)
        cuts += 1
    feeder.join()
    ingesting.empty()
    ingesting.end()
    proxy.close()
    assert cuts >= 5
    assert ingesting.writer.counts["resent_batches"] >= 3
    with server.client() as client:
        source = ingesting.writer.source.encode()
        assert seqs(client, settings) == {source: [list(range(1, FRAMES + 1))] * SHARDS}
        direct = settings_of(tmp_path, server.port)
        assert aggregated(direct, client) == undisturbed(tmp_path, client, server.port)


def test_ingest_stopped_while_redis_is_unavailable_leaves_its_frames_on_disk(
    tmp_path: Path, make_server: Callable[[str], Server]
) -> None:
    server = make_server("redis")
    rows = universe(50)
    market = Market(rows, int(time.time() * 1000), rate=500)
    kite = SimulatorServer(market)
    kite.start()
    settings = settings_of(tmp_path, server.port, clock="wall")
    tokens = ",".join(str(row["instrument_token"]) for row in rows)
    env = {**settings_env(settings), "PKB_KITE_WS_URL": kite.url, "PKB_INSTRUMENTS": tokens}
    spool = tmp_path / "data" / "spool"
    try:
        with running_python("-m", "workers.ingest", env=env) as ingest:
            with server.client() as client:
                wait_until(lambda: client.xlen(settings.keys.ticks(0)) > 3, what="ticks")
            server.kill()
            wait_until(
                lambda: ingest.poll() is not None or _told(ingest, "redis_unavailable"), what="its word on it"
            )
            time.sleep(0.5)  # of ticks
            ingest.send_signal(signal.SIGTERM)
            output, _ = ingest.communicate(timeout=30)
            assert ingest.returncode == 0, output
            assert "frames_left_on_disk" in output
        assert list(spool.rglob("frames.sqlite"))
        server.start()
        with running_python("-m", "workers.ingest", env=env) as ingest, server.client() as client:
            wait_until(lambda: not list(spool.rglob("frames.sqlite")), what="the spool to be sent")
            wait_until(lambda: len(seqs(client, settings)) == 2, what="both sources in the streams")
            ingest.send_signal(signal.SIGTERM)
            output, _ = ingest.communicate(timeout=30)
            assert ingest.returncode == 0, output
            for numbers in seqs(client, settings).values():
                first, last = numbers[0][0], max(max(each) for each in numbers if each)
                together = sorted({seq for each in numbers for seq in each})
                assert (first, together) == (1, list(range(1, last + 1)))
    finally:
        kite.stop()


def _told(process: subprocess.Popen[str], event: str) -> bool:
    assert process.stdout is not None
    return event in process.stdout.readline()
