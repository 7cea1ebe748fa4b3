"""Clusters and Sentinel sets on loopback: real servers, started for a test and surely ended."""

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

from pkbrokers_redis.store.binary import find_binary
from tests.support import running_process, wait_until

SLOTS = 16_384
SERVICE = "pkbmaster"


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, all different."""
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
    """Until the server answers a PING (or wants a password for it)."""

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
    """Masters on loopback that share the slots evenly."""

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


@contextlib.contextmanager
def running_cluster(folder: Path, masters: int = 3, *options: str) -> Iterator[Cluster]:
    """A cluster of Valkeys without replicas, whole and agreed upon."""
    ports = free_ports(2 * masters)
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                running_node(
                    folder / f"node-{number}",
                    ports[number],
                    *("--cluster-enabled", "yes", "--cluster-port", str(ports[masters + number])),
                    *("--cluster-node-timeout", "5000", "--appendonly", "yes", *options),
                )
            )
            for number in range(masters)
        ]
        cluster = Cluster(ports[:masters], processes)
        nodes = [stack.enter_context(cluster.node(number)) for number in range(masters)]
        for number, node in enumerate(nodes):
            first, last = SLOTS * number // masters, SLOTS * (number + 1) // masters - 1
            node.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for number in range(1, masters):
            nodes[0].execute_command("CLUSTER MEET", "127.0.0.1", ports[number], ports[masters + number])

        def is_whole() -> bool:
            infos: list[Any] = [node.execute_command("CLUSTER INFO") for node in nodes]
            return all(
                info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == masters
                for info in infos
            )

        wait_until(is_whole, timeout_seconds=30, what="the cluster to agree")
        yield cluster


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

    def believed_ports(self) -> set[int]:
        """Whom the Sentinels take for the master, each for itself."""
        found = set()
        for port in self.sentinel_ports:
            with redis.Redis(port=port, socket_timeout=5) as sentinel:
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
