"""The Kite source of the data manager, against a whole Kite on loopback."""

from __future__ import annotations

import time
from datetime import date, datetime

import pytest
import redis

from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.clock import Clock
from pkbrokers_redis.compat.sources import KiteSource
from pkbrokers_redis.files.published import Context
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.store.meta import ensure_meta
from pkbrokers_redis.store.symbols import save_instruments

ROWS = universe(10)
NOW_S = datetime(2026, 8, 5, 16, 30, tzinfo=IST).timestamp()  # a Wednesday, after the close


@pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
def test_day_candles_come_from_kite_and_an_unknown_symbol_is_counted(
    settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(NOW_S, time.time(), 0.01)
    with SimulatedKite(ROWS, clock=clock, sessions=load_sessions("market")) as kite:
        for name, value in kite.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PKB_KITE_ACCESS_TOKEN", kite.accounts.open_session())
        own = load_settings(redis_url=settings.redis_url, data_dir=settings.data_dir)
        ensure_meta(client, own, "2026-08-05T09:00:00+05:30")
        save_instruments(client, own.keys, ROWS)
        with CandleStore(own, client) as store:
            source = KiteSource(Context(own, own.files_folder, clock, lambda: store))
            found = source.fetch_data(["INFY", "NOSUCH", "RELIANCE"], date(2026, 7, 27), date(2026, 7, 31))
            infy, _ = store.resolve("INFY")
            first, last = (int(datetime(2026, 7, day, tzinfo=IST).timestamp()) for day in (27, 31))
            kites = kite.history.rows(infy, "day", first, last + 86_399, int(NOW_S * 1000))
            source.close()
    assert source.refused == 1
    assert set(found) == {"INFY", "RELIANCE"}
    assert [stamp.day for stamp in found["INFY"].index] == [27, 28, 29, 30, 31]
    assert found["INFY"].iloc[:, :5].to_numpy().tolist() == [list(map(float, row[1:6])) for row in kites]
