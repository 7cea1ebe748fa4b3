"""Ten seconds of chaos in every test run; `make chaos SECONDS=600 SEED=n` is the long one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.driver import Chaos


@pytest.mark.timeout(240)
@pytest.mark.xdist_group("chaos")
def test_rows_after_seconds_of_faults_equal_the_undisturbed_run(tmp_path: Path) -> None:
    # A feed that is away, a hang beyond the lease, a stalled Redis, a killed one, a killed ingest.
    seed = int(os.environ.get("PKB_CHAOS_SEED", "17270"))
    report = Chaos(seed, 10.0, tmp_path, ingests=1, aggregators=2).run()
    assert report.rows_different == 0, f"seed {seed}: {report.examples}"
    assert report.announced_twice == report.announced_differently == 0, f"seed {seed}"
    assert report.outages_wrong == [], f"seed {seed}"
    assert report.rows >= 3_000
    assert sum(report.faults.values()) >= 3
