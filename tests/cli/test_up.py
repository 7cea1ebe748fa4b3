"""`pkb up` as a program: mistakes are one line, whichever process finds them, and nobody stays behind."""

from __future__ import annotations

import sys
from pathlib import Path

from pkbrokers_redis.cli.roles import role_specs
from tests.support import run_pkb


def test_roles_without_processes_are_left_out_and_the_order_is_kept() -> None:
    specs = role_specs({"ingest": 2, "cron": 0, "jobs": 1, "aggregate": 3, "web": 1, "bot": 0})
    assert [(spec.name, spec.count) for spec in specs] == [
        ("ingest", 2), ("jobs", 1), ("aggregate", 3), ("web", 1)
    ]  # fmt: skip
    assert specs[2].argv == (sys.executable, "-m", "workers.aggregate")


def test_an_unavailable_store_is_one_line_before_anything_starts() -> None:
    found = run_pkb("up", env={"PKB_REDIS_URL": "redis://:secret@127.0.0.1:1/0", "PKB_LOG_LEVEL": "info"})
    assert found.returncode == 2
    assert found.stderr.startswith("pkb: redis://127.0.0.1:1/0 cannot be reached")
    assert found.stderr.count("\n") == 1
    assert "secret" not in found.stderr


def test_zero_aggregators_are_refused() -> None:
    found = run_pkb("up", "--aggregators", "0")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr


def test_a_mistake_that_a_worker_finds_ends_everything_with_its_one_line(tmp_path: Path) -> None:
    # No Kite session: only ingest needs one, and says so.
    env = {"PKB_DATA_DIR": str(tmp_path / "data"), "PKB_INSTRUMENTS": "256265"}
    found = run_pkb("up", "--no-web", env=env)
    assert found.returncode == 2
    mistakes = [line for line in found.stderr.splitlines() if line.startswith("pkb: ")]
    assert len(mistakes) == 1
    assert "PKB_KITE" in mistakes[0]
    assert "Traceback" not in found.stderr
