"""TickProcessor: a queue of ticks in, upstream's answers out."""

from __future__ import annotations

import pickle
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from pkbrokers_redis.compat.candle_store import InMemoryCandleStore
from pkbrokers_redis.compat.tick_processor import TickProcessor
from pkbrokers_redis.compat.upstream_types import Tick
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.rows import read_ticks
from tests.client.contract import INFY, OPEN_S, RELIANCE, write_master
from tests.client.feeding import aggregating, tick
from tests.support import running_server, wait_until

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


@pytest.fixture
def processor(client: redis.Redis, make_settings: Callable[..., Settings]) -> TickProcessor:
    write_master(client, make_settings().keys)
    settings = make_settings(clock="event")
    return TickProcessor(candle_store=InMemoryCandleStore(settings=settings, client=client))


def test_queued_ticks_become_candles(processor: TickProcessor, client: redis.Redis) -> None:
    ticks: queue.Queue[Any] = queue.Queue()
    for n in range(10):
        ticks.put(tick(n, 100 + n, 1000 + n))
    ticks.put({"type": "order"})
    ticks.put(None)
    ticks.put(Tick(RELIANCE, 7.0, day_volume=1, exchange_timestamp=OPEN_S))
    processor.set_data_queue(ticks)
    with aggregating(client, processor.candle_store.store.settings) as drain:
        processor.start()
        processor.start()
        wait_until(lambda: processor.stats["ticks_processed"] == 11, what="the ticks to be sent")
        processor.stop()
        drain()
    assert processor.stats["ticks_received"] == 13 and processor.stats["errors"] == 0
    assert processor.get_candles("INFY", interval="5m")[-1]["close"] == 109
    assert processor.get_candles(instrument_token=INFY) == processor.get_candles("INFY")
    assert processor.get_candles_df("INFY")["close"].tolist() == [109.0]
    assert processor.get_latest_price("INFY") == 109
    assert list(processor.get_all_day_ohlcv()) == ["INFY"]  # RELIANCE was seen once: that makes no candle
    every = processor.get_multi_timeframe_candles("INFY")
    assert set(every) == set(processor.candle_store.store.intervals)
    assert {name: len(found) for name, found in every.items()}["60m"] == 1
    stats = processor.get_stats()
    assert stats["processor"]["instruments_mapped"] == 8 and stats["store"]["instruments_with_ticks"] == 2


def test_stop_sends_what_the_queue_holds(processor: TickProcessor) -> None:
    ticks: queue.Queue[Any] = queue.Queue()
    processor.set_data_queue(ticks)
    processor.start()
    for n in range(5_000):
        ticks.put(tick(n / 10, 100, 1000 + n))
    processor.stop()
    assert ticks.empty() and processor.stats["ticks_processed"] == 5_000


def test_other_messages_are_ignored(processor: TickProcessor) -> None:
    assert not processor.process_tick({"type": "order", "instrument_token": INFY, "last_price": 1})
    assert not processor.process_tick(None) and not processor.process_tick("tick")
    assert processor.process_tick({"instrument_token": INFY, "last_price": 1})
    assert processor.process_ticks_batch([tick(1, 1, 1), tick(2, 2, 2), 5]) == 2


def test_unreadable_queue_items_do_not_end_the_thread(processor: TickProcessor) -> None:
    class Unreadable:
        def _asdict(self) -> dict[str, Any]:
            raise RuntimeError("unreadable")

    class Queue(queue.Queue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            found = super().get(block, timeout)
            if found == "unreadable":
                raise pickle.UnpicklingError(found)
            return found

    ticks = Queue()
    processor.set_data_queue(ticks)
    processor.start()
    for item in (Unreadable(), "unreadable"):
        ticks.put(item)
        wait_until(ticks.empty, what="the item to be read")
    ticks.put(tick(1, 100, 1000))
    wait_until(lambda: processor.stats["ticks_processed"] == 1, what="the tick behind them")
    processor.stop()
    assert processor.stats["errors"] == 2


def test_ticks_and_a_new_name_wait_while_redis_is_unavailable(
    server_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkbrokers_redis.client.producer.RETRY_SECONDS", 0.01)
    folder, ticks = tmp_path / "server", queue.Queue[Any]()
    with running_server(folder, "--appendonly", "yes") as port:
        settings = load_settings(redis_url=f"redis://127.0.0.1:{port}", data_dir=tmp_path / "data")
        processor = TickProcessor(ticks, candle_store=InMemoryCandleStore(settings=settings))
        processor.start()
        ticks.put(tick(0, 1, 1, token=2953217))
        wait_until(lambda: processor.stats["ticks_processed"] == 1, what="the first tick")
    for n in (2, 3):
        ticks.put(tick(n, n, n, token=2953217, trading_symbol="TCS"))
        wait_until(lambda n=n: processor.stats["ticks_processed"] == n, what="a tick that waits")
    with running_server(folder, "--appendonly", "yes", "--port", str(port)), redis.Redis(port=port) as client:

        def are_all_sent() -> bool:
            ticks.put(tick(4, 4, 4, token=2953217, trading_symbol="TCS"))
            return bool(client.hexists(settings.keys.symbols(), "NSE:TCS"))

        wait_until(are_all_sent, what="the name")
        processor.stop()
        prices = [each.last_price for each in read_ticks(client, settings.keys, 2953217, 1_000)]
        assert prices[:4] == [1, 2, 3, 4] and processor.stats["errors"] == 0


def test_exports_write_files_and_return_whether_they_succeeded(
    processor: TickProcessor, client: redis.Redis, tmp_path: Path
) -> None:
    with aggregating(client, processor.candle_store.store.settings) as drain:
        processor.process_ticks_batch([tick(n, 100 + n, 1000 + n) for n in range(5)])
        drain()
    assert processor.export_pickle(tmp_path / "day.pkl") and processor.export_ticks_json(tmp_path / "t.json")
    assert list(pickle.loads((tmp_path / "day.pkl").read_bytes())) == ["INFY"]
    assert processor.export_pickle()
    assert len(list(processor.candle_store.store.settings.data_dir.glob("stock_data_*.pkl"))) == 1
    (tmp_path / "file").write_text("")
    assert not processor.export_pickle(tmp_path / "file" / "x.pkl")
    assert not processor.export_ticks_json(tmp_path / "file" / "x.json")
