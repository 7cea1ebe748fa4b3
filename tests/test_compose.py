"""Run each service of the compose files without a container engine, until its own health check passes.

Hosts and addresses are replaced by loopback ports, folders of a container by scratch ones; nothing else is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkbrokers_redis.cli.main import COMMANDS
from pkbrokers_redis.settings import Settings, env_name
from pkbrokers_redis.simulator.market import Market
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.simulator.websocket_server import SimulatorServer
from tests.bot.telegram import TOKEN, Telegram
from tests.support import PKB, redis_server_binary, running_process, wait_until
from tests.topologies import free_ports

ROOT = Path(__file__).resolve().parents[1]
FILES = ["docker-compose.yml", "docker-compose.cluster.yml"]
REDIS_PORT = "6379"

needs_redis = pytest.mark.skipif(
    redis_server_binary() is None or shutil.which("redis-cli") is None,
    reason="needs redis-server 7 and redis-cli",
)


def compose(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return content


def services(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose(name)["services"]
    return found


def is_worker(service: dict[str, Any]) -> bool:
    return bool(service["image"] == "pkbrokers-redis")


EVERY_SERVICE = [(file, name) for file in FILES for name in services(file)]


@pytest.mark.parametrize("file", FILES)
def test_compose_file_has_every_role_of_the_pipeline(file: str) -> None:
    found = services(file)
    assert {"ingest", "aggregator", "jobs", "cron"} <= found.keys()
    assert any(name.startswith("redis") for name in found)


@pytest.mark.parametrize(("file", "name"), EVERY_SERVICE)
def test_service_runs_an_existing_command_with_a_health_check(file: str, name: str) -> None:
    service = services(file)[name]
    if is_worker(service):
        assert service["command"][0] == "pkb" and service["command"][1] in COMMANDS
        assert service["restart"] == "unless-stopped"
        known = {env_name(field) for field in Settings.model_fields}
        assert service["environment"].keys() <= known
    if service.get("restart"):
        assert service["healthcheck"]["test"][0] == "CMD"
    for other, condition in service.get("depends_on", {}).items():
        needed = services(file)[other]
        assert condition["condition"] == (
            "service_healthy" if "restart" in needed else "service_completed_successfully"
        )


@pytest.mark.parametrize(("file", "name"), EVERY_SERVICE)
def test_service_uses_only_declared_volumes_and_networks(file: str, name: str) -> None:
    content = compose(file)
    service = content["services"][name]
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert source.startswith("./") or source in content["volumes"], volume
    assert set(service.get("networks", [])) <= content.get("networks", {}).keys()


@pytest.mark.parametrize("file", FILES)
def test_redis_service_is_durable_and_never_evicts(file: str) -> None:
    for name, service in services(file).items():
        if "redis-server" in service["command"]:
            words = service["command"]
            assert words[words.index("--appendonly") + 1] == "yes", name
            assert words[words.index("--save") + 1] == "", name  # its default forks every minute
            assert words[words.index("--maxmemory-policy") + 1] == "noeviction", name
            assert any(volume.endswith(":/data") for volume in service["volumes"]), name


@pytest.mark.parametrize("file", FILES)
def test_jobs_service_has_the_smallest_cpu_share(file: str) -> None:
    weights = {name: service.get("cpu_shares", 1024) for name, service in services(file).items()}
    assert weights.pop("jobs") < min(weights.values())


@pytest.mark.parametrize("file", FILES)
def test_stop_grace_period_is_longer_than_draining(file: str) -> None:
    for service in services(file).values():
        if is_worker(service):
            assert int(service["stop_grace_period"].removesuffix("s")) >= 10


def test_compose_files_contain_no_secret() -> None:
    secret = {
        env_name(name)
        for name, field in Settings.model_fields.items()
        if "SecretStr" in str(field.annotation)
    }
    for file in FILES:
        for service in services(file).values():
            assert (service.get("environment", {}).keys() & secret) <= {"PKB_REDIS_URL", "PKB_RQ_REDIS_URL"}
            for name in ("PKB_REDIS_URL", "PKB_RQ_REDIS_URL"):
                assert "@" not in service.get("environment", {}).get(name, "")
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"secrets/", ".env"} <= set(ignored)


# --- Dockerfile


def dockerfile() -> list[list[str]]:
    """Instructions, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_image_runs_as_an_unprivileged_user_with_a_health_check() -> None:
    words = dict(dockerfile())
    assert words["USER"] == "pkb"
    check = json.loads(words["HEALTHCHECK"].partition("CMD ")[2])
    assert check == services("docker-compose.yml")["ingest"]["healthcheck"]["test"][1:]
    assert words["FROM"].startswith("python:3.1")


def test_files_copied_into_the_image_exist_and_pass_dockerignore() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    copied = {
        word
        for what, words in dockerfile()
        if what == "COPY" and "--from" not in words
        for word in words.split()[:-1]
    }
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


def test_image_build_step_that_compiles_the_rules_runs() -> None:
    [program] = [words for what, words in dockerfile() if what == "RUN" and words.startswith("python -c")]
    code = re.fullmatch(r'python -c "(.*)"', program)
    assert code is not None
    subprocess.run([sys.executable, "-c", code[1]], check=True, timeout=110)


# --- running


class Stack:
    """The services of a file on this machine. `up` starts one, after those it depends on."""

    def __init__(self, file: str, folder: Path, dotenv: dict[str, str], stack: ExitStack) -> None:
        self._services = services(file)
        self._folder = folder
        self._dotenv = dotenv
        self._stack = stack
        self._up: set[str] = set()
        nodes = [name for name, each in self._services.items() if "redis-server" in each["command"]]
        free = free_ports(2 * len(nodes))
        self.ports = dict(zip(nodes, free[: len(nodes)], strict=True))
        self._bus_ports = dict(zip(nodes, free[len(nodes) :], strict=True))

    def up(self, name: str) -> None:
        """Start a service and wait until its health check passes; run a one-shot service to its end."""
        if name in self._up:
            return
        self._up.add(name)
        service = self._services[name]
        for other in service.get("depends_on", {}):
            self.up(other)
        env = self._environment(name)
        if service.get("restart") is None:
            subprocess.run(
                self._words(name, service["command"]),
                env=env,
                check=True,
                timeout=100,
                stdout=subprocess.DEVNULL,
            )
            return
        process = self._stack.enter_context(running_process(*self._words(name, service["command"]), env=env))

        def is_healthy() -> bool:
            assert process.poll() is None, process.stdout and process.stdout.read()
            check = self._words(name, service["healthcheck"]["test"][1:])
            return (
                subprocess.run(check, env=env, capture_output=True, check=False, timeout=60).returncode == 0
            )

        wait_until(is_healthy, timeout_seconds=90, what=f"{name} to become healthy", poll_seconds=0.2)

    def _environment(self, name: str) -> dict[str, str]:
        service = self._services[name]
        env = {word: value for word, value in os.environ.items() if not word.startswith("PKB_")}
        if not is_worker(service):
            return env
        # As an engine does it: .env first, then `environment`; and /data is a folder of its own.
        own = {**self._dotenv, **{word: self._local(value) for word, value in service["environment"].items()}}
        data = self._folder / "data" / name
        data.mkdir(parents=True, exist_ok=True)
        assert own["PKB_DATA_DIR"] == "/data"
        return {**env, **own, "PKB_DATA_DIR": str(data)}

    def _words(self, name: str, words: list[str]) -> list[str]:
        if words[0] == "pkb":
            return [*PKB, *words[1:]]
        if words[0] == "redis-server":
            folder = self._folder / name
            folder.mkdir(parents=True)
            own = ["--port", str(self.ports[name]), "--bind", "127.0.0.1", "--dir", str(folder)]
            if "--cluster-enabled" in words:
                own += ["--cluster-port", str(self._bus_ports[name])]
            return [*words, *own]
        if words[0] == "redis-cli":
            return ["redis-cli", "-p", str(self.ports[name]), *words[1:]]
        return [self._local(word) for word in words]

    def _local(self, text: str) -> str:
        """Hosts and addresses of the services, with their ports, as loopback ports."""
        for name, port in self.ports.items():
            networks = self._services[name].get("networks", {})
            addresses = (
                [each["ipv4_address"] for each in networks.values()] if isinstance(networks, dict) else []
            )
            for host in (name, *addresses):
                text = text.replace(f"{host}:{REDIS_PORT}", f"127.0.0.1:{port}")
                text = text.replace(f"-h {host} -p {REDIS_PORT}", f"-h 127.0.0.1 -p {port}")
        assert REDIS_PORT not in text, text
        return text


@pytest.fixture
def kite() -> Iterator[SimulatorServer]:
    server = SimulatorServer(Market(universe(5), int(time.time() * 1000)))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def telegram() -> Iterator[Telegram]:
    with Telegram() as server:
        yield server


@needs_redis
@pytest.mark.timeout(300)
@pytest.mark.parametrize("file", FILES)
def test_every_service_becomes_healthy_and_candles_form(
    file: str, tmp_path: Path, kite: SimulatorServer, telegram: Telegram
) -> None:
    tokens = ",".join(str(row["instrument_token"]) for row in universe(5))
    dotenv = {"PKB_KITE_WS_URL": kite.url, "PKB_INSTRUMENTS": tokens, "PKB_SESSIONS": "always"}
    dotenv["PKB_WEB_PORT"] = str(free_ports(1)[0])
    dotenv |= {"PKB_TELEGRAM_TOKEN": TOKEN, "PKB_TELEGRAM_API_URL": telegram.url}
    with ExitStack() as stack:
        whole = Stack(file, tmp_path, dotenv, stack)
        for name in services(file):
            whole.up(name)
        # And together they are a pipeline.
        env = whole._environment("aggregator")

        def candles() -> str:
            command = [*PKB, "candles", tokens.split(",")[1], "1m", "--current", "--json"]
            return subprocess.run(
                command, env=env, capture_output=True, text=True, check=False, timeout=60
            ).stdout

        wait_until(lambda: '"close"' in candles(), timeout_seconds=60, what="a candle", poll_seconds=0.2)
        status = [*PKB, "status"]
        wait_until(
            lambda: subprocess.run(status, env=env, check=False, stdout=subprocess.DEVNULL).returncode == 0,
            timeout_seconds=60,
        )
        doctor = subprocess.run(
            [*PKB, "doctor"], env=env, capture_output=True, text=True, check=False, timeout=60
        )
        assert doctor.returncode == 0, doctor.stdout + doctor.stderr
