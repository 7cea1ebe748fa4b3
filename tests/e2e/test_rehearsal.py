"""A short virtual session with outages; `python -m tests.e2e.rehearsal` plays a whole day."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from pkbrokers_redis.settings import Settings
from tests.e2e.judgement import doctor, judge
from tests.e2e.rehearsal import Act, at, cast, cut, expire, play, restart, staged


@pytest.mark.xdist_group("heavy")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_rows_after_a_day_with_outages_equal_kites_history(
    settings: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    rows = cast(per_segment=1, segments=(1, 2, 3, 7, 9))
    assert len(rows) == 5  # NSE, NFO, CDS, MCX and an index: each with its own hours
    acts = (
        Act(at("10:02"), "an outage", cut(minutes=1)),
        Act(at("10:05:20"), "a restart", restart("ingest", "aggregate")),
        Act(at("10:08:30"), "an expiry", expire),
    )
    with staged(settings, client, tmp_path, rows, begin="10:00", speed=60, lead_seconds=4) as stage:
        end_s = play(stage, acts, end="10:10")
        verdict = judge(stage, rows, at("10:00"), end_s)
        code, complaints = doctor(stage)
        stage.stop()
    assert verdict.differences == []
    assert verdict.rows > 5 * 70 * 2  # the morning before we came is there too
    assert verdict.backfilled > 5 * 45
    assert (code, complaints) == (0, [])
    assert "event=outage" in stage.log("ingest")  # how many they are depends on which run into each other
    assert "event=logged_in" in stage.log("ingest") + stage.log("jobs")
    assert "Traceback" not in stage.log("ingest") + stage.log("aggregate") + stage.log("jobs")
