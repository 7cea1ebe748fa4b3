"""Clusters and Sentinel sets on loopback: real servers, started for a test and always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from pkbrokers_redis.store.embedded import find_binary
from tests.support import running_process, wait_until

SLOTS = 16_384
SERVICE = "pkbmaster"


def free_ports(count: int) -> list[int]:
    """Return free ports, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def running_node(folder: Path, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A Valkey that listens on this port, with its log in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    with running_process(find_binary("valkey"), *words, "--logfile", "server.log", *options) as process:
        wait_for(port)
        yield process


def wait_for(port: int, password: str | None = None) -> None:
    """Wait until the server answers a PING or requests a password."""

    def answers() -> bool:
        with redis.Redis(port=port, password=password, socket_timeout=5) as client:
            try:
                return bool(client.ping())
            except redis.AuthenticationError:
                return True
            except redis.ConnectionError:
                return False

    wait_until(answers, what=f"the server on port {port}")


@dataclass
class Cluster:
    """Nodes on loopback: masters that share the slots evenly, then a replica for each if asked for."""

    ports: list[int]
    processes: list[subprocess.Popen[str]]

    @property
    def servers(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self.ports)

    @property
    def url(self) -> str:
        return f"redis+cluster://{self.servers}/"

    def node(self, number: int) -> redis.Redis:
        """A plain client of one node."""
        return redis.Redis(port=self.ports[number], socket_timeout=10)

    def masters(self) -> list[int]:
        """The nodes (by number) that every living node takes for a master with slots."""
        believed = [owners for number in self.living() if (owners := self._owners(number)) is not None]
        return sorted(set.intersection(*believed)) if believed else []

    def living(self) -> list[int]:
        """The nodes whose process runs."""
        return [number for number, process in enumerate(self.processes) if process.poll() is None]

    def _owners(self, number: int) -> set[int] | None:
        with self.node(number) as node:
            try:
                slots: Any = node.execute_command("CLUSTER SLOTS")
            except redis.RedisError:
                return None
        found: set[int] = set()
        for each in _masters_of(slots):
            found.add(self.ports.index(each))
        return found

    def is_whole(self, masters: int) -> bool:
        """Whether everybody agrees that all slots are served, and each replica follows its master."""
        for number in range(len(self.ports)):
            with self.node(number) as node:
                try:
                    info: Any = node.execute_command("CLUSTER INFO")
                    state: Any = node.info("replication")
                except redis.RedisError:
                    return False
            if info["cluster_state"] != "ok" or int(info["cluster_known_nodes"]) != len(self.ports):
                return False
            if state["role"] == "slave" and state["master_link_status"] != "up":
                return False
        return len(self.masters()) == masters


def _masters_of(slots: Any) -> list[int]:
    """The masters' ports in an answer to CLUSTER SLOTS, however redis-py shapes it."""
    if isinstance(slots, dict):
        return [int(each["primary"][1]) for each in slots.values()]
    return [int(each[2][1]) for each in slots]


def cluster_options(bus_port: int, timeout_ms: int) -> tuple[str, ...]:
    """What makes a server a node that keeps its data."""
    return (
        *("--cluster-enabled", "yes", "--cluster-port", str(bus_port), "--appendonly", "yes"),
        *("--cluster-node-timeout", str(timeout_ms), "--repl-diskless-sync-delay", "0"),
    )


@contextlib.contextmanager
def running_cluster(
    folder: Path, masters: int = 3, *options: str, replicas: bool = False, timeout_ms: int = 5_000
) -> Iterator[Cluster]:
    """A cluster of Valkeys, whole and agreed upon; with `replicas` one for each master."""
    count = 2 * masters if replicas else masters
    ports = free_ports(2 * count)
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                running_node(
                    folder / f"node-{number}",
                    ports[number],
                    *cluster_options(ports[count + number], timeout_ms),
                    *options,
                )
            )
            for number in range(count)
        ]
        cluster = Cluster(ports[:count], processes)
        nodes = [stack.enter_context(cluster.node(number)) for number in range(count)]
        for number, node in enumerate(nodes[:masters]):
            first, last = SLOTS * number // masters, SLOTS * (number + 1) // masters - 1
            node.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for number in range(1, count):
            nodes[0].execute_command("CLUSTER MEET", "127.0.0.1", ports[number], ports[count + number])
        for number in range(masters, count):
            owner = nodes[number - masters].execute_command("CLUSTER MYID").decode()
            wait_until(lambda n=nodes[number], o=owner: _follows(n, o), what="a replica to know its master")
        wait_until(lambda: cluster.is_whole(masters), timeout_seconds=30, what="the cluster to agree")
        yield cluster


def _follows(node: redis.Redis, owner: str) -> bool:
    try:
        node.execute_command("CLUSTER REPLICATE", owner)
    except redis.ResponseError:
        return False  # the gossip has not reached it yet
    return True


@dataclass
class SentinelSet:
    """A master, a replica, three Sentinels. `processes` are named by their ports."""

    master_port: int
    replica_port: int
    sentinel_ports: list[int]
    processes: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        servers = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        return f"redis+sentinel://{servers}/{SERVICE}/0"

    def current_port(self, password: str | None = None) -> int:
        """The port of what the first Sentinel takes for the master."""
        with redis.Redis(port=self.sentinel_ports[0], password=password, socket_timeout=5) as sentinel:
            address: Any = sentinel.sentinel_get_master_addr_by_name(SERVICE)
            return int(address[1])

    def believed_ports(self, password: str | None = None) -> set[int]:
        """Whom the Sentinels take for the master, each for itself."""
        found = set()
        for port in self.sentinel_ports:
            with redis.Redis(port=port, password=password, socket_timeout=5) as sentinel:
                address: Any = sentinel.sentinel_get_master_addr_by_name(SERVICE)
                found.add(int(address[1]))
        return found

    def follows(self, port: int) -> bool:
        """Whether that server is a replica with the whole of its master's data."""
        with redis.Redis(port=port, socket_timeout=5, decode_responses=True) as server:
            state: Any = server.info("replication")
            return state["role"] == "slave" and state["master_link_status"] == "up"

    def is_in_step(self) -> bool:
        """Whether every Sentinel knows the others and a replica that follows the master."""
        return all(_knows_all(port, None) for port in self.sentinel_ports)

    def kill_master(self) -> None:
        """kill -9."""
        os.kill(self.processes[self.master_port].pid, signal.SIGKILL)
        self.processes[self.master_port].wait(10)


@contextlib.contextmanager
def running_sentinels(
    folder: Path, *, sentinel_password: str | None = None, down_after_ms: int = 1_000
) -> Iterator[SentinelSet]:
    """A Sentinel set in which everybody knows everybody, and the replica is in step."""
    ports = free_ports(5)
    found = SentinelSet(ports[0], ports[1], ports[2:])
    with contextlib.ExitStack() as stack:
        for port in ports[:2]:
            options = ["--appendonly", "yes", "--repl-diskless-sync-delay", "0"]
            if port == found.replica_port:
                options += ["--replicaof", "127.0.0.1", str(found.master_port)]
            node = running_node(folder / f"server-{port}", port, *options)
            found.processes[port] = stack.enter_context(node)
        for port in found.sentinel_ports:
            own = folder / f"sentinel-{port}"
            own.mkdir(parents=True)
            lines = [
                f"port {port}",
                "bind 127.0.0.1",
                f"dir {own}",
                "logfile sentinel.log",
                f"sentinel monitor {SERVICE} 127.0.0.1 {found.master_port} 2",
                f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}",
                f"sentinel failover-timeout {SERVICE} 6000",
            ]
            if sentinel_password:
                lines += [f"requirepass {sentinel_password}", f"sentinel sentinel-pass {sentinel_password}"]
            config = own / "sentinel.conf"
            config.write_text("\n".join(lines) + "\n")
            process = running_process(find_binary("valkey"), config, "--sentinel")
            found.processes[port] = stack.enter_context(process)
        for port in found.sentinel_ports:
            wait_for(port, sentinel_password)
        wait_until(
            lambda: all(_knows_all(port, sentinel_password) for port in found.sentinel_ports),
            timeout_seconds=30,
            what="the Sentinels to know each other and the replica",
        )
        yield found


def _knows_all(port: int, password: str | None) -> bool:
    with redis.Redis(port=port, password=password, socket_timeout=5, decode_responses=True) as sentinel:
        states: Any = sentinel.sentinel_masters()
        state = states.get(SERVICE, {})
        if state.get("num-other-sentinels") != 2 or state.get("num-slaves") != 1:
            return False
        replicas: Any = sentinel.sentinel_slaves(SERVICE)
        return all(replica.get("master-link-status") == "ok" for replica in replicas)
