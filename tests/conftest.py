"""Fixtures: settings that ignore the user's environment, and a private server of each kind.

A test that asks for `client` or `settings` runs once on Valkey and once on Redis; one that asks for
neither starts no server. One kind only: `@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import redis
from hypothesis.database import DirectoryBasedExampleDatabase

from pkbrokers_redis.candles import compiled
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.embedded import EmbeddedServer, attach
from tests.support import redis_server_binary

REPOSITORY = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile(
    "dev",
    deadline=None,
    max_examples=60,
    database=DirectoryBasedExampleDatabase(REPOSITORY / ".hypothesis" / "examples"),
)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


WARM_UP = """
from pkbrokers_redis.candles.model import DEFAULT_INTERVALS
from pkbrokers_redis.runtime.warmup import warm_up, warm_up_writer
warm_up_writer()
warm_up(DEFAULT_INTERVALS)
"""


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels once, before three processes would each compile them."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A shell's background job ignores SIGINT, and every command that tests start would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    is_first = not hasattr(config, "workerinput")  # xdist's processes have one
    if is_first and compiled.folder and not any(Path(compiled.folder).rglob("*.nbi")):
        subprocess.run([sys.executable, "-c", WARM_UP], cwd=REPOSITORY, check=False)


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the user's PKB_ variables, .env and data folder from a test and its children."""
    for name in [name for name in os.environ if name.startswith("PKB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg-data"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["valkey", "redis"])
def server_kind(request: pytest.FixtureRequest) -> str:
    """`valkey` or `redis`, as PKB_EMBEDDED_SERVER understands them."""
    kind: str = request.param
    if kind == "redis" and redis_server_binary() is None:
        pytest.skip("no redis-server 7 or later on PATH")
    return kind


@pytest.fixture(scope="session")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], EmbeddedServer]]:
    """Return a function that starts a server of a kind once per test process; stop them with the session."""
    started: dict[str, EmbeddedServer] = {}

    def server_of(kind: str) -> EmbeddedServer:
        if kind not in started:
            folder = tmp_path_factory.mktemp(f"server-{kind}")
            started[kind] = attach(load_settings(data_dir=folder, embedded_server=kind), linger_seconds=0)
        return started[kind]

    yield server_of
    for server in started.values():
        server.close()


@pytest.fixture
def server(_servers: Callable[[str], EmbeddedServer], server_kind: str) -> EmbeddedServer:
    """The private server, emptied of data and functions before each test."""
    server = _servers(server_kind)
    with redis.Redis.from_url(server.url) as connection:
        connection.flushall()
        connection.function_flush("SYNC")
    return server


@pytest.fixture
def make_settings(tmp_path: Path, server: EmbeddedServer) -> Callable[..., Settings]:
    """`make_settings(shards=2, sessions="always")`: settings on the private server, all else default."""

    def make(**overrides: Any) -> Settings:
        return load_settings(**{"redis_url": server.url, "data_dir": tmp_path / "data", **overrides})

    return make


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    """Default settings on the private server."""
    return make_settings()


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    """A plain redis-py client (bytes, no retries) of the private, empty server."""
    with redis.Redis.from_url(server.url, socket_timeout=30) as connection:
        yield connection
