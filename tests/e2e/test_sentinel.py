"""The pipeline on a Sentinel set whose master is killed under load."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.runtime.health import check_volumes
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.connect import connect
from tests.e2e.pipelines import is_drained, running_pipeline, wait_for_entries
from tests.support import wait_until
from tests.topologies import running_sentinels

INSTRUMENTS = 200


@pytest.mark.xdist_group("heavy")
def test_killed_master_loses_no_volume(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with running_sentinels(tmp_path / "set") as found:
        settings = load_settings(redis_url=found.url, data_dir=tmp_path / "data", sessions="always")
        client = connect(settings)
        keys = settings.keys
        with running_pipeline(settings, client, tmp_path, instruments=INSTRUMENTS, rate=2_000) as pipeline:
            wait_for_entries(client, keys, 400)
            found.kill_master()
            killed_at = time.monotonic()
            wait_until(
                lambda: found.current_port() == found.replica_port, timeout_seconds=30, what="a failover"
            )
            wait_for_entries(client, keys, 1)
            record_property("gap_seconds", round(time.monotonic() - killed_at, 1))
            wait_for_entries(client, keys, 400)
            pipeline.close_market(client, keys)
            output = pipeline.stop()
        assert "Traceback" not in output
        assert is_drained(client, keys)
        result = check_volumes(client, keys)
        assert result.checked > INSTRUMENTS * 0.9
        assert result.wrong == {}
        with CandleStore(settings) as store:
            assert len(store.bulk(None, "1m", count=10, include_current=True).with_rows_only()) > 0
