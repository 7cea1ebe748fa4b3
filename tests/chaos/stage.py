"""What the chaos driver plays with: servers and workers that can be hurt, and a recorder of what arrived."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import redis

from pkbrokers_redis.errors import RedisUnavailable
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.embedded import find_binary
from pkbrokers_redis.store.streams import StreamReader
from tests.chaos import oracle
from tests.support import wait_until
from tests.topologies import running_cluster, running_node, running_sentinels

READ_COUNT = 2_000


class RedisServer:
    """An append-only server on a fixed port that can be killed, stalled and started again."""

    can_go_back = False  # it keeps what it acknowledged, whatever fault is injected

    def __init__(self, folder: Path, kind: str = "valkey") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._command = [
            str(find_binary(kind)), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder),
            "--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--loglevel", "warning",
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port)

        def answers() -> bool:
            with contextlib.suppress(redis.RedisError):
                return bool(client.ping())
            return False

        wait_until(answers, timeout_seconds=60, what="Redis to answer")
        client.close()

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def faults(self, rng: random.Random) -> dict[str, Callable[[], None]]:
        """What can happen to one server."""
        return {
            "redis_killed": lambda: self._away(rng.uniform(0.0, 2.0)),
            "redis_away": lambda: self._away(rng.uniform(4.0, 8.0)),  # through memory and the spool's quota
            "redis_stalled": lambda: self._stall(rng.uniform(0.2, 1.5)),
        }

    def _away(self, seconds: float) -> None:
        self.kill()
        time.sleep(seconds)
        self.start()

    def _stall(self, seconds: float) -> None:
        assert self.process
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)


class SentinelServers:
    """A master, a replica and three Sentinels; the master of the moment can be killed."""

    can_go_back = True  # a replica that takes over may lack what the master acknowledged

    def __init__(self, folder: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._folder = folder
        self.set = self._stack.enter_context(running_sentinels(folder))

    @property
    def url(self) -> str:
        return self.set.url

    def start(self) -> None:
        """They run already."""

    def kill(self) -> None:
        self._stack.close()

    def faults(self, rng: random.Random) -> dict[str, Callable[[], None]]:
        """What can happen to the set."""
        return {"master_killed": lambda: self._fail_over(rng.uniform(0.0, 2.0))}

    def _fail_over(self, seconds: float) -> None:
        """Kill the master; when every Sentinel names another, let the dead one come back as its replica.

        One that comes back sooner may meet a Sentinel that still calls it master, and a writer that believes
        it (docs/operations.md).
        """
        dead = self.set.current_port()
        process = self.set.processes[dead]
        process.kill()
        process.wait()
        wait_until(lambda: dead not in self.set.believed_ports(), timeout_seconds=60, what="a failover")
        time.sleep(seconds)
        node = running_node(self._folder / f"server-{dead}", dead, "--appendonly", "yes")
        self.set.processes[dead] = self._stack.enter_context(node)
        wait_until(lambda: self.set.follows(dead), timeout_seconds=60, what="the old master to follow")
        wait_until(self.set.is_in_step, timeout_seconds=60, what="the Sentinels to see it")


class ClusterServers:
    """Three masters and a replica of each; any node can be killed, and comes back."""

    can_go_back = True  # a replica that takes over may lack what the master acknowledged

    MASTERS = 3
    TIMEOUT_MS = 1_500  # silence after which a master is given up

    def __init__(self, folder: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._folder = folder
        cluster = running_cluster(folder, self.MASTERS, replicas=True, timeout_ms=self.TIMEOUT_MS)
        self.cluster = self._stack.enter_context(cluster)

    @property
    def url(self) -> str:
        return self.cluster.url

    def start(self) -> None:
        """They run already."""

    def kill(self) -> None:
        self._stack.close()

    def faults(self, rng: random.Random) -> dict[str, Callable[[], None]]:
        """What can happen to a cluster."""
        return {
            "master_failed_over": lambda: self._fail_over(rng, rng.uniform(0.0, 1.0)),
            "master_restarted": lambda: self._restart(rng),
            "replica_killed": lambda: self._kill_replica(rng),
        }

    def _fail_over(self, rng: random.Random, seconds: float) -> None:
        """Kill a master; when all others have its replica in its place, let it come back as a replica."""
        dead = rng.choice(self.cluster.masters())
        self._kill(dead)
        wait_until(self._is_replaced(dead), timeout_seconds=60, what="a replica to take over")
        time.sleep(seconds)
        self._revive(dead)

    def _restart(self, rng: random.Random) -> None:
        """Kill a master that is back, with its data, before anybody gives it up."""
        dead = rng.choice(self.cluster.masters())
        self._kill(dead)
        self._revive(dead)

    def _kill_replica(self, rng: random.Random) -> None:
        dead = rng.choice(sorted(set(self.cluster.living()) - set(self.cluster.masters())))
        self._kill(dead)
        time.sleep(rng.uniform(0.0, 2.0))
        self._revive(dead)

    def _is_replaced(self, dead: int) -> Callable[[], bool]:
        def is_replaced() -> bool:
            masters = self.cluster.masters()
            return len(masters) == self.MASTERS and dead not in masters

        return is_replaced

    def _kill(self, number: int) -> None:
        self.cluster.processes[number].kill()
        self.cluster.processes[number].wait()

    def _revive(self, number: int) -> None:
        """The node's own file remembers who it is and whom it knows."""
        port = self.cluster.ports[number]
        command = self.cluster.processes[number].args
        words = [str(word) for word in command[1:]]  # type: ignore[index]
        options = words[words.index("--logfile") + 2 :]
        node = running_node(self._folder / f"node-{number}", port, *options)
        self.cluster.processes[number] = self._stack.enter_context(node)
        wait_until(
            lambda: self.cluster.is_whole(self.MASTERS), timeout_seconds=60, what="the cluster to be whole"
        )


class Worker:
    """One `python -m workers.<role>`; its output goes to a file for the post-mortem."""

    def __init__(self, role: str, number: int, env: dict[str, str], folder: Path) -> None:
        self.role = role
        self._env = {**os.environ, **env, "PYTHONUNBUFFERED": "1"}
        self._log = (folder / f"{role}-{number}.log").open("ab")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"workers.{self.role}"], env=self._env, stdout=self._log, stderr=self._log
        )

    def ensure(self) -> None:
        """Start it again when it ended: what a supervisor does."""
        if self.process is None or self.process.poll() is not None:
            self.start()

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            if number == signal.SIGKILL:
                self.process.wait()  # else `ensure` may still find it alive

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        if self.process is not None:
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()


class Recorder(threading.Thread):
    """Keeps every entry of the tick streams, in order; registered as a reader, so trimming waits for it.

    And those of the repair streams. They are trimmed as soon as they are applied, so one that came while we
    had no connection may be missing: `unseen` counts those.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self._settings = settings
        self.entries: dict[int, list[oracle.Entry]] = {shard: [] for shard in range(settings.shards)}
        self.repairs: dict[int, list[oracle.Entry]] = {shard: [] for shard in range(settings.shards)}
        self._kept = {settings.keys.ticks(s).encode(): found for s, found in self.entries.items()}
        self._kept |= {settings.keys.repairs(s).encode(): found for s, found in self.repairs.items()}
        self._ticks = {settings.keys.ticks(shard).encode() for shard in self.entries}
        self._last = {key.decode(): "0-0" for key in self._kept}
        self.stop_event = threading.Event()
        self.caught_up = threading.Event()

    def run(self) -> None:
        while not self.stop_event.is_set():
            try:
                client = connect(self._settings, socket_timeout_seconds=5)
                for key in map(self._settings.keys.ticks, self.entries):
                    with contextlib.suppress(redis.ResponseError):
                        client.xgroup_create(key, "recorder", id="0-0", mkstream=True)
                reader = StreamReader(client)
                while not self.stop_event.is_set():
                    self._read(client, reader)
            except (redis.RedisError, RedisUnavailable):
                time.sleep(0.1)

    def _read(self, client: redis.Redis, reader: StreamReader) -> None:
        reply = reader.read(self._last, READ_COUNT, 200)
        for key, found in reply:
            self._kept[key] += [fields for _, fields in found]
            self._last[key.decode()] = found[-1][0].decode()
            if key in self._ticks:
                client.xgroup_setid(key, "recorder", found[-1][0])
        if not reply:
            self.caught_up.set()

    def unseen(self, client: redis.Redis) -> int:
        """Repairs that were written, and not seen here."""
        count = 0
        for shard, seen in self.repairs.items():
            key = self._settings.keys.repairs(shard)
            with contextlib.suppress(redis.ResponseError):  # no repair, no stream
                count += client.xinfo_stream(key)["entries-added"] - len(seen)  # type: ignore[index]
        return count
