"""The data manager: the order of the sources, which source counts; no failure is fatal or silent."""

from __future__ import annotations

import datetime as dt
import hashlib
import http.server
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import redis

from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.compat import sources
from pkbrokers_redis.compat.data_manager import InstrumentDataManager
from pkbrokers_redis.errors import PkbError, RedisUnavailable
from pkbrokers_redis.files.frames import Frames
from pkbrokers_redis.files.manifest import Entry, update_manifest
from pkbrokers_redis.files.pickles import daily_name
from pkbrokers_redis.files.published import Context, Source, folder_of
from pkbrokers_redis.files.sqlite import LocalCandleDatabase
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.meta import ensure_meta
from tests.client.contract import INFY, OPEN_S, push, row, write_master

MONDAY = dt.date(2026, 1, 5)
IN_HOURS, AFTER_HOURS = OPEN_S + 3600, OPEN_S + 10 * 3600  # Monday 10:15 and 19:15


@pytest.fixture(params=["valkey"])
def server_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def at(make_settings: Callable[..., Settings], tmp_path: Path) -> Callable[..., Settings]:
    """Settings whose market time stands (nearly) still at a moment."""

    def made(market_s: int, **overrides: Any) -> Settings:
        shift = f"{market_s},{dt.datetime.now(dt.UTC).timestamp()},0.01"
        return make_settings(time_shift=shift, files_dir=tmp_path, **overrides)

    return made


def days(*closes: float, until: dt.date = MONDAY) -> pd.DataFrame:
    """A row a day, the last on `until`."""
    index = pd.date_range(end=until, periods=len(closes), tz="Asia/Kolkata", name="datetime")
    close = np.array(closes)
    return pd.DataFrame(
        {"Open": close, "High": close, "Low": close, "Close": close, "Volume": 10}, index=index
    )


def write_pickle(folder: Path, frames: dict[str, pd.DataFrame], day: dt.date = MONDAY) -> Path:
    path = folder / daily_name(day)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(frames))
    return path


def ticks_json(price: float, stamp: str = "2026-01-05T10:14:00+05:30", symbol: str = "INFY") -> str:
    ohlcv = {"open": price, "high": price, "low": price, "close": price, "volume": 5, "timestamp": stamp}
    return json.dumps({"1": {"trading_symbol": symbol, "ohlcv": ohlcv}})


def statuses_of(manager: InstrumentDataManager) -> dict[str, str]:
    return {answer.source: answer.status for answer in manager.answers}


def closes(manager: InstrumentDataManager, symbol: str = "INFY") -> list[float]:
    frame = manager.get_dataframe_for_symbol(symbol)
    return [] if frame is None else frame["close"].to_list()


def test_after_hours_the_local_pickle_is_enough(at: Callable[..., Settings], tmp_path: Path) -> None:
    write_pickle(tmp_path, {"INFY": days(1, 2, 3), "TCS": days(4, 5, 6)})
    with InstrumentDataManager(at(AFTER_HOURS)) as manager:
        assert manager.execute()
        assert closes(manager) == [1, 2, 3] and manager.symbols() == ["INFY", "TCS"]
        assert statuses_of(manager) == {
            "pickle": "used", "remote pickle": "not needed", "sqlite": "not needed", "store": "not needed",
            "kite": "left out", "ticks.json": "not needed", "remote ticks.json": "not needed",
        }  # fmt: skip


def test_frames_and_dicts_have_upstreams_shape(at: Callable[..., Settings], tmp_path: Path) -> None:
    write_pickle(tmp_path, {"INFY": days(1, 2)})
    with InstrumentDataManager(at(AFTER_HOURS)) as manager:
        data = manager.get_data_for_symbol("INFY")  # reads the sources
        assert data == {
            "data": [[1.0, 1.0, 1.0, 1.0, 10], [2.0, 2.0, 2.0, 2.0, 10]],
            "columns": ["open", "high", "low", "close", "volume"],
            "index": ["2026-01-04T00:00:00+05:30", "2026-01-05T00:00:00+05:30"],
        }
        assert manager.pickle_data == {"INFY": data}
        frame = manager.get_dataframe_for_symbol("NSE:INFY")
        assert (
            frame is not None and str(frame.index.tz) == "Asia/Kolkata" and frame["volume"].dtype == np.int64
        )
        assert manager.get_data_for_symbol("NOBODY") is None and manager.get_dataframe_for_symbol("X") is None
        again = pickle.loads(manager.save_pickle().read_bytes())
        assert again == manager.pickle_data and manager.local_pickle_path.name == "stock_data_05012026.pkl"


def test_in_market_hours_the_store_s_row_of_today_replaces_older_ones(
    at: Callable[..., Settings], client: redis.Redis, tmp_path: Path
) -> None:
    settings = at(IN_HOURS)
    write_master(client, settings.keys)
    ensure_meta(client, settings, "2026-01-05T09:00:00+05:30")
    with LocalCandleDatabase(settings=settings) as database:
        for day, close in (("2026-01-02", 7.0), ("2026-01-05", 8.0)):
            database.update_daily_candle("INFY", day, close, close, close, close, 1)
    client.hset(settings.keys.current(INFY), "day", row(OPEN_S, 9.5, 77))
    with InstrumentDataManager(settings, CandleStore(settings, client)) as manager:
        assert manager.execute(symbols=["INFY"])
        assert closes(manager) == [7, 9.5]
        source = manager.get_source_for_symbol("INFY")
        assert source is not None and source.source == "store"
        statuses = statuses_of(manager)
        assert (
            statuses["sqlite"] == statuses["store"] == "used"
            and statuses["remote ticks.json"] == "not needed"
        )
        store = next(answer for answer in manager.answers if answer.source == "store")
        assert store.age_seconds is not None and store.age_seconds < 5 and store.symbols == 1


def test_ticks_json_gives_today_if_the_store_is_unavailable(
    at: Callable[..., Settings], tmp_path: Path
) -> None:
    write_pickle(tmp_path, {"INFY": days(1, 2, until=dt.date(2026, 1, 2))}, dt.date(2026, 1, 2))
    (tmp_path / "ticks.json").write_text(ticks_json(3.5))
    settings = at(IN_HOURS, redis_url="redis://127.0.0.1:1")
    with InstrumentDataManager(settings) as manager:
        assert manager.execute()
        assert closes(manager) == [1, 2, 3.5]
        failed = next(answer for answer in manager.answers if answer.source == "store")
        assert (
            failed.status == "failed" and "cannot be reached" in failed.reason and "\n" not in failed.reason
        )


def test_skip_db_leaves_the_file_out_and_kite_is_read_only_on_request(
    at: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = at(IN_HOURS)
    with LocalCandleDatabase(settings=settings) as database:
        database.update_daily_candle("INFY", "2026-01-05", 1, 1, 1, 1, 1)
    with InstrumentDataManager(settings, sources=["sqlite", "kite"]) as manager:
        assert not manager.execute(skip_db=True) and statuses_of(manager) == {
            "sqlite": "left out",
            "kite": "left out",
        }
        assert manager.execute() and closes(manager) == [1]


def test_a_malicious_pickle_is_skipped_with_its_reason(at: Callable[..., Settings], tmp_path: Path) -> None:
    path = write_pickle(tmp_path, {})
    path.write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    (tmp_path / "ticks.json").write_text(ticks_json(3.5))
    with InstrumentDataManager(at(AFTER_HOURS)) as manager:
        assert manager.execute() and closes(manager) == [3.5]
        answer = manager.answers[0]
        assert (answer.source, answer.status) == ("pickle", "failed") and "os.system" in answer.reason
    assert not (tmp_path / "ran").exists()


def test_no_source_has_anything(at: Callable[..., Settings]) -> None:
    with InstrumentDataManager(at(AFTER_HOURS)) as manager:
        assert not manager.execute() and manager.pickle_data is None and manager.symbols() == []
        assert all(answer.reason for answer in manager.answers if answer.status != "used")


@pytest.mark.parametrize(("now_s", "symbols"), [(AFTER_HOURS, None), (OPEN_S + 23 * 3600, ["INFY"])])
def test_a_pickle_written_at_noon_is_not_the_day_s_final_row(
    at: Callable[..., Settings],
    client: redis.Redis,
    tmp_path: Path,
    now_s: int,
    symbols: list[str] | None,
) -> None:
    settings = at(now_s)  # that evening, or next morning before the open
    write_master(client, settings.keys)
    ensure_meta(client, settings, "2026-01-05T09:00:00+05:30")
    path = write_pickle(tmp_path, {"INFY": days(1, 2, until=MONDAY)})
    os.utime(path, (OPEN_S + 3 * 3600,) * 2)
    push(client, settings.keys, INFY, "day", [row(OPEN_S - 86_400 * 3, 7.0), row(OPEN_S, 9.5)])
    with InstrumentDataManager(settings, CandleStore(settings, client)) as manager:
        assert manager.execute(symbols=symbols)
        assert closes(manager)[-1] == 9.5 and statuses_of(manager)["ticks.json"] == "not needed"
    os.utime(path, (OPEN_S + 7 * 3600,) * 2)
    with InstrumentDataManager(settings, CandleStore(settings, client)) as manager:
        assert manager.execute(symbols=symbols)
        assert closes(manager) == [1, 2] and statuses_of(manager)["store"] == "not needed"


def test_last_fridays_pickle_is_current_until_mondays_open(
    at: Callable[..., Settings], tmp_path: Path
) -> None:
    friday = dt.date(2026, 1, 2)
    write_pickle(tmp_path, {"INFY": days(1, 2, until=friday)}, friday)
    with InstrumentDataManager(at(OPEN_S - 3600)) as manager:
        assert manager.execute() and statuses_of(manager)["sqlite"] == "not needed"
    with InstrumentDataManager(at(AFTER_HOURS)) as manager:
        assert manager.execute() and statuses_of(manager)["sqlite"] == "unavailable"


class Mine(Source):
    """A user's source: one file and one row."""

    name: ClassVar[str] = "mine"
    frames: ClassVar[Frames] = {}
    requested: ClassVar[list[Sequence[str] | None]] = []
    error: ClassVar[BaseException | None] = None

    def is_available(self) -> bool:
        return True

    def fetch_data(self, symbols: Sequence[str] | None, start_date: dt.date, end_date: dt.date) -> Frames:
        Mine.requested.append(symbols)
        if Mine.error is not None:
            raise Mine.error
        return Mine.frames


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> type[Mine]:
    monkeypatch.setitem(sources.SOURCES, "mine", Mine)
    Mine.frames, Mine.requested, Mine.error = {}, [], None
    return Mine


def lower(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.rename(columns=str.lower)


def test_a_user_s_source_is_one_class_and_one_entry(at: Callable[..., Settings], mine: type[Mine]) -> None:
    mine.frames = {"INFY": lower(days(1, 2, 3))}
    with InstrumentDataManager(at(AFTER_HOURS), sources=["mine"]) as manager:
        assert manager.execute(symbols=["INFY", "TCS"]) and closes(manager) == [1, 2, 3]
        assert mine.requested == [["INFY", "TCS"]]
        assert manager.answers[0].as_of.startswith("2026-01-04T18:30:00")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x\ny"),
        KeyError("k"),
        OSError("o"),
        RedisUnavailable("unreachable", "start it"),
        AssertionError(),
    ],
)
def test_an_error_of_one_source_does_not_stop_the_next(
    at: Callable[..., Settings], mine: type[Mine], tmp_path: Path, error: Exception
) -> None:
    mine.error = error
    write_pickle(tmp_path, {"INFY": days(1, 2, 3)})
    with InstrumentDataManager(at(AFTER_HOURS), sources=["mine", "pickle"]) as manager:
        assert manager.execute() and closes(manager) == [1, 2, 3]
        assert manager.answers[0].status == "failed" and "\n" not in manager.answers[0].reason


def test_only_missing_symbols_are_read(at: Callable[..., Settings], mine: type[Mine], tmp_path: Path) -> None:
    write_pickle(tmp_path, {"INFY": days(1, 2, 3)})
    mine.frames = {"TCS": lower(days(7, 8))}
    with InstrumentDataManager(at(AFTER_HOURS), sources=["pickle", "mine"]) as manager:
        manager.execute(symbols=["INFY", "TCS"])
        assert mine.requested == [["TCS"]] and closes(manager, "TCS") == [7, 8]


def test_for_earlier_days_the_first_source_counts(
    at: Callable[..., Settings], mine: type[Mine], tmp_path: Path
) -> None:
    write_pickle(tmp_path, {"INFY": days(1, 2, until=dt.date(2026, 1, 2))}, dt.date(2026, 1, 2))
    mine.frames = {"INFY": lower(days(50, 60, 70, 80, 90))}  # 1st to 5th
    with InstrumentDataManager(at(AFTER_HOURS), sources=["pickle", "mine"]) as manager:
        manager.execute()
        assert closes(manager) == [1, 2, 70, 80, 90]


def test_an_unknown_source_is_reported(at: Callable[..., Settings]) -> None:
    with InstrumentDataManager(at(AFTER_HOURS), sources=["nobody"]) as manager:
        assert not manager.execute() and "unknown source" in manager.answers[0].reason


# Published files


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(URL, folder) of a web server."""
    folder = tmp_path / "published"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("by", ["url", "path", "file url"])
def test_published_pickles_are_read_from_anywhere(
    at: Callable[..., Settings], published: tuple[str, Path], by: str
) -> None:
    url, folder = published
    write_pickle(folder, {"INFY": days(1, 2, 3)})
    where = {"url": url, "path": str(folder), "file url": f"file://{folder}"}[by]
    with InstrumentDataManager(at(AFTER_HOURS, files_url=where)) as manager:
        assert manager.execute() and closes(manager) == [1, 2, 3]
        assert statuses_of(manager)["remote pickle"] == "used"


def test_a_published_ticks_json_gives_today(at: Callable[..., Settings], published: tuple[str, Path]) -> None:
    url, folder = published
    write_pickle(folder, {"INFY": days(1, 2, until=dt.date(2026, 1, 2))}, dt.date(2026, 1, 2))
    (folder / "ticks.json").write_text(ticks_json(3.5))
    with InstrumentDataManager(at(IN_HOURS, files_url=url)) as manager:
        assert manager.execute() and closes(manager) == [1, 2, 3.5]


def test_a_file_that_differs_from_its_manifest_is_refused(
    at: Callable[..., Settings], published: tuple[str, Path]
) -> None:
    url, folder = published
    path = write_pickle(folder, {"INFY": days(1, 2, 3)})
    data = path.read_bytes()
    made_at = "2026-01-05T16:00:00+05:30"
    entry = Entry(hashlib.sha256(data).hexdigest(), len(data), 3, 1, "", "", made_at, "pickle")
    update_manifest(folder, {path.name: entry})
    with InstrumentDataManager(at(AFTER_HOURS, files_url=url), sources=["remote pickle"]) as manager:
        assert manager.execute()
        assert manager.answers[0].age_seconds == pytest.approx(AFTER_HOURS - (OPEN_S + 6.75 * 3600), abs=60)
        path.write_bytes(data + b" ")
        assert not manager.execute() and "manifest" in manager.answers[0].reason


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://127.0.0.1:1/%zz", "nonsense://x", "/no/such/folder"]
)
def test_an_unreachable_server_or_a_missing_url_is_a_reason(at: Callable[..., Settings], url: str) -> None:
    with InstrumentDataManager(at(AFTER_HOURS, files_url=url)) as manager:
        assert not manager.execute()
        reasons = {answer.source: answer.reason for answer in manager.answers}
        assert reasons["remote pickle"] and reasons["remote ticks.json"]


def test_the_sync_target_on_github_is_the_default_folder(at: Callable[..., Settings]) -> None:
    branch = "actions-data-download"
    expected = f"https://raw.githubusercontent.com/someone/data/{branch}/{branch}"
    assert folder_of(at(IN_HOURS, github_repo="someone/data")) == expected
    assert folder_of(at(IN_HOURS)) is None


def test_every_source_of_both_orders_exists() -> None:
    for order in (sources.MARKET_HOURS, sources.AFTER_HOURS):
        assert set(sources.SOURCES) - set(order) == set(), "has no place in the order"
        assert set(order) - set(sources.SOURCES) == set(), "is not in SOURCES"


def test_every_source_states_why_it_is_unavailable(at: Callable[..., Settings], client: redis.Redis) -> None:
    settings = at(IN_HOURS)
    context = Context(
        settings, settings.data_dir, lambda: IN_HOURS * 1000.0, lambda: CandleStore(settings, client)
    )
    for name, kind in sources.SOURCES.items():
        source = kind(context)
        try:
            assert source.is_available() or source.reason, name
        except PkbError:
            pytest.fail(f"{name} raises instead of answering")
        source.close()


def test_malformed_rows_in_redis_are_counted(at: Callable[..., Settings], client: redis.Redis) -> None:
    settings = at(IN_HOURS)
    write_master(client, settings.keys)
    ensure_meta(client, settings, "2026-01-05T09:00:00+05:30")
    push(client, settings.keys, INFY, "day", ["?", row(OPEN_S - 86_400 * 3, 7.0)])
    with InstrumentDataManager(settings, CandleStore(settings, client), sources=["store"]) as manager:
        assert manager.execute(symbols=["INFY", "NOBODY"]) and closes(manager) == [7]
        assert manager.answers[0].refused == 2
