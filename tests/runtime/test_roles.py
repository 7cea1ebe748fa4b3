"""A role's exit code: 2 and one line for a person; for our supervisor 1 where another try may do better."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import pytest
import redis

from pkbrokers_redis.runtime import roles
from pkbrokers_redis.runtime.supervisor import SUPERVISED, Backoff, RoleSpec, Supervisor, worker_argv
from pkbrokers_redis.settings import Settings
from tests.support import running_python, wait_until
from tests.topologies import free_ports, running_node

AWAY = {"PKB_REDIS_URL": "redis://:geheim@127.0.0.1:1/0"}
MISTAKEN = {"PKB_SHARDS": "none"}


@pytest.mark.parametrize("role", ["ingest", "aggregate"])
@pytest.mark.parametrize(
    ("env", "supervised", "code"),
    [(AWAY, False, 2), (AWAY, True, 1), (MISTAKEN, False, 2), (MISTAKEN, True, 2)],
    ids=["away", "away, supervised", "mistaken", "mistaken, supervised"],
)
def test_exit_codes(role: str, env: dict[str, str], supervised: bool, code: int) -> None:
    env = {**env, "PKB_KITE_WS_URL": "ws://127.0.0.1:1", **({SUPERVISED: "1"} if supervised else {})}
    with running_python("-m", f"workers.{role}", env=env) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert out.startswith("pkb: ") and out.count("\n") == 1
    assert "geheim" not in out


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--shards=4", 2)])
def test_a_worker_takes_no_arguments_and_says_so(
    capsys: pytest.CaptureFixture[str], argument: str, code: int
) -> None:
    def role(settings: Settings, stop: threading.Event) -> None:
        raise AssertionError("it runs")

    assert roles.main(role, [argument]) == code
    told = capsys.readouterr().err
    assert "takes no arguments" in told and told.count("\n") == 1


def test_a_supervised_worker_comes_back_until_redis_does(tmp_path: Path) -> None:
    [port] = free_ports(1)
    env = {**os.environ, "PKB_REDIS_URL": f"redis://127.0.0.1:{port}/0", "PKB_DATA_DIR": str(tmp_path)}
    supervisor = Supervisor(
        [RoleSpec("aggregate", worker_argv("aggregate"))],
        env=env,
        output=io.BytesIO(),
        backoff=Backoff(first_seconds=0.01, most_seconds=0.1),
    )
    supervisor.start()
    try:
        wait_until(lambda: supervisor.statuses()[0].restarts >= 2, timeout_seconds=60)
        assert supervisor.failure is None
        with running_node(tmp_path / "redis", port), redis.Redis(port=port) as client:
            # Functions are loaded by an aggregator that has begun to work.
            wait_until(lambda: client.function_list("pkbrokers"), timeout_seconds=60)
            supervisor.stop()
    finally:
        supervisor.kill()
        supervisor.stop()
