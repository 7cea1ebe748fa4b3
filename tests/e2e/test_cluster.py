"""The whole pipeline on a real cluster of three masters: simulator, ingest, two aggregators, readers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.runtime.health import check_volumes
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.connect import connect
from tests.chaos import oracle
from tests.chaos.driver import all_rows
from tests.e2e.pipelines import is_drained, running_pipeline, wait_for_entries
from tests.support import run_pkb, settings_env
from tests.topologies import running_cluster

INSTRUMENTS = 400


@pytest.mark.xdist_group("heavy")
def test_every_row_on_a_cluster_equals_the_oracle(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster") as cluster:
        settings = load_settings(
            redis_url=cluster.url,
            data_dir=tmp_path / "data",
            sessions="always",
            stream_retention_seconds=3600,  # nothing trimmed: the check below reads all of it
        )
        client = connect(settings)
        keys = settings.keys
        with running_pipeline(
            settings, client, tmp_path, instruments=INSTRUMENTS, rate=4_000, aggregators=2
        ) as pipeline:
            wait_for_entries(client, keys, 500)
            followed = CandleStore(settings).follow(block_seconds=0.1)
            wait_for_entries(client, keys, 500)
            doctor = run_pkb("doctor", env=settings_env(settings))
            assert doctor.returncode == 0, doctor.stdout + doctor.stderr
            pipeline.close_market(client, keys)
            output = pipeline.stop()
        assert "Traceback" not in output
        assert is_drained(client, keys)

        # The keys of all shards, spread over the masters.
        shards_of: list[set[str]] = []
        for number in range(3):
            with cluster.node(number) as node:
                names = [name.decode() for name in node.keys("pkb:{*")]
                shards_of.append({name.split(":")[1] for name in names})
        assert all(shards_of) and sum(map(len, shards_of)) == settings.shards
        assert set.union(*shards_of) == {f"{{{shard}}}" for shard in range(settings.shards)}

        # Every row and each instrument's volume, from the streams without the pipeline's help.
        expected: oracle.Rows = {}
        volumes: dict[int, list[int]] = defaultdict(list)
        sessions = load_sessions("always", settings.timezone)
        for shard in range(settings.shards):
            entries: Any = client.xrange(keys.ticks(shard))
            ticks, repeats = oracle.acknowledged(fields for _, fields in entries)
            assert repeats == 0
            expected |= oracle.candles(ticks, settings.intervals, sessions)
            for _, tick in ticks:
                if tick[3] is not None:
                    volumes[tick[0]].append(tick[3])
        rows_read = all_rows(client, settings)
        assert sum(map(len, rows_read.values())) >= INSTRUMENTS * len(settings.intervals)
        assert rows_read == {key: rows for key, rows in expected.items() if rows}
        assert len(volumes) > INSTRUMENTS * 0.9
        traded = {token: max(seen) - seen[0] for token, seen in volumes.items()}
        result = check_volumes(client, keys)
        assert (result.checked, result.wrong) == (len(volumes), {})

        with CandleStore(settings) as store:
            minutes = store.bulk(None, "1m", count=1_000, include_current=True)
            for i, token in enumerate(minutes.tokens.tolist()):
                if token in traded:
                    rows = minutes.rows[minutes.offsets[i] : minutes.offsets[i + 1]]
                    assert rows[:, 5].sum() == traded[token]
            quote = store.get_quote(pipeline.tokens[50])
            assert quote["last_price"] > 0
        closed = list(followed)
        assert all(candle.token in volumes or candle.candle.volume == 0 for candle in closed)
