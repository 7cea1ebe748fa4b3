"""Kite's history: the right candles, in few requests, through faults, and no request twice."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import islice
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from pkbrokers_redis.candles.calendar import IST, load_sessions
from pkbrokers_redis.clock import Clock
from pkbrokers_redis.errors import KiteError, KiteThrottled, KiteUnavailable, PkbError, SessionExpired
from pkbrokers_redis.kite.history import HistoryCache, KiteTickerHistory
from pkbrokers_redis.kite.history_api import KITE_INTERVALS, BadRequest
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import universe
from pkbrokers_redis.store.auth import Session, load_session, save_session
from pkbrokers_redis.store.rate_limit import Limiter

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

NOW = datetime(2026, 8, 5, 11, 0, 30, tzinfo=IST)  # a Wednesday, 105 minutes into the session
OPENED_S = int(NOW.replace(hour=9, minute=15, second=0).timestamp())
NOW_S = int(NOW.timestamp())
ROWS = universe(40)
FREE_REQUESTS = 10_000.0  # a second: no test waits for its turn

MakeHistory = Callable[..., KiteTickerHistory]


@pytest.fixture
def kite() -> Iterator[SimulatedKite]:
    """A Kite whose time stands (almost) still at NOW."""
    real_s = datetime.now().timestamp()
    clock = Clock(NOW_S, real_s, 0.01)
    with SimulatedKite(ROWS, clock=clock, sessions=load_sessions("market")) as kite:
        yield kite


@pytest.fixture
def kite_settings(settings: Settings, kite: SimulatedKite, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in kite.environment().items():
        monkeypatch.setenv(name, value)
    return load_settings(redis_url=settings.redis_url, data_dir=settings.data_dir)


class Patient(threading.Event):
    """A stop event on which nobody really waits: it notes for how long they would have."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        super().__init__()
        self.waits: list[float] = []
        self._release = lambda: client.hdel(settings.keys.limit("history"), "blocked")

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        if timeout and timeout > 1:  # the wait of a 429, and not one before another try
            self._release()
        return self.is_set()


@pytest.fixture
def patient(client: redis.Redis, kite_settings: Settings) -> Patient:
    return Patient(client, kite_settings)


@pytest.fixture
def make_history(kite_settings: Settings, client: redis.Redis, patient: Patient) -> MakeHistory:
    """Histories that never wait."""

    def make(**arguments: Any) -> KiteTickerHistory:
        limiter = Limiter(client, kite_settings.keys, per_second=FREE_REQUESTS)
        common = {"settings": kite_settings, "client": client, "limiter": limiter, "stop": patient}
        return KiteTickerHistory(**{**common, **arguments})

    return make


INFY = int(
    next(row["instrument_token"] for row in ROWS if row["exchange"] == "NSE" and row["segment"] == "NSE")
)
INDEX = int(next(row["instrument_token"] for row in ROWS if row["segment"] == "INDICES"))


def history_requests(kite: SimulatedKite) -> int:
    return sum(seen.kind == "historical" for seen in kite.limits.seen)


# --- rows


@pytest.mark.parametrize("interval", KITE_INTERVALS)
def test_every_interval_equals_kites_candles(
    interval: str, make_history: MakeHistory, kite: SimulatedKite
) -> None:
    found = make_history().rows(INFY, interval, OPENED_S - 3 * 86_400, NOW_S)
    name = KITE_INTERVALS[interval].name
    expected = kite.history.rows(INFY, name, OPENED_S - 3 * 86_400, NOW_S - 1, kite.now_ms())
    assert [row[:6] for row in found] == [row[:6] for row in expected if row[0] >= OPENED_S - 3 * 86_400]
    assert found


def test_the_span_is_half_open_and_includes_the_current_candle(make_history: MakeHistory) -> None:
    rows = make_history().rows(INFY, "1m", OPENED_S + 60, OPENED_S + 180)
    assert [row.start for row in rows] == [OPENED_S + 60, OPENED_S + 120]
    assert make_history().rows(INFY, "1m", OPENED_S, NOW_S + 60)[-1].start <= NOW_S


def test_open_interest_is_for_derivatives_only(make_history: MakeHistory) -> None:
    future = next(int(row["instrument_token"]) for row in ROWS if row["instrument_type"] == "FUT")
    assert make_history().rows(INFY, "1m", OPENED_S, NOW_S)[0].oi is None
    assert make_history().rows(future, "1m", OPENED_S, NOW_S)[0].oi is not None


def test_a_long_span_is_split_into_spans_that_kite_allows(
    make_history: MakeHistory, kite: SimulatedKite
) -> None:
    history = make_history()
    rows = history.rows(INFY, "60m", NOW_S - 900 * 86_400, NOW_S)
    assert history_requests(kite) == 3  # 400 days each
    starts = [row.start for row in rows]
    assert starts == sorted(set(starts))
    assert starts[0] < NOW_S - 890 * 86_400


# --- faults


@pytest.mark.parametrize("kind", ["503", "500", "drop", "html", "garbage_json"])
def test_transient_errors_are_retried(kind: str, make_history: MakeHistory, kite: SimulatedKite) -> None:
    history = make_history()
    history.rows(INFY, "1m", OPENED_S, NOW_S)
    kite.faults.add(kind, count=2, on="rest", path="/instruments/historical")
    assert history.rows(INFY, "1m", OPENED_S, NOW_S)
    assert kite.faults.struck[kind] == 2


def test_a_lasting_error_is_one_line(make_history: MakeHistory, kite: SimulatedKite) -> None:
    kite.faults.add("503", on="rest", path="/instruments/historical")
    with pytest.raises(KiteUnavailable) as error:
        make_history().rows(INFY, "1m", OPENED_S, NOW_S)
    assert kite.faults.struck["503"] == 4
    assert "\n" not in str(error.value)


def test_a_429_pauses_all_processes_and_is_retried(
    make_history: MakeHistory, kite: SimulatedKite, patient: Patient
) -> None:
    kite.faults.add("429", count=2, on="rest", path="/instruments/historical")
    assert make_history().rows(INFY, "1m", OPENED_S, NOW_S)
    waits = sorted(wait for wait in patient.waits if wait > 1)
    assert [math.ceil(wait) for wait in waits[-2:]] == [2, 4]  # doubled


def test_a_lasting_429_is_one_line(make_history: MakeHistory, kite: SimulatedKite) -> None:
    kite.faults.add("429", on="rest", path="/instruments/historical")
    with pytest.raises(KiteThrottled):
        make_history(attempts=2).rows(INFY, "1m", OPENED_S, NOW_S)


def test_an_expired_session_is_renewed_during_a_download(
    make_history: MakeHistory, client: redis.Redis, kite_settings: Settings, kite: SimulatedKite
) -> None:
    stale = Session(
        str(kite_settings.kite_api_key),
        "AB1234",
        access_token=SecretStr("yesterdays-token"),
        login_at=time.time(),
    )
    save_session(client, kite_settings.keys, stale)
    assert make_history().rows(INFY, "1m", OPENED_S, OPENED_S + 600)
    assert kite.limits.seen[0].status == 403
    renewed = load_session(client, kite_settings.keys)
    assert renewed is not None and not renewed.is_same(stale)


def test_a_given_session_is_not_renewed(make_history: MakeHistory) -> None:
    with pytest.raises(SessionExpired, match="log in again"):
        make_history(enctoken="stale-token", user_id="AB1234").rows(INFY, "1m", OPENED_S, NOW_S)


def test_an_unknown_instrument_is_one_line(make_history: MakeHistory) -> None:
    with pytest.raises(KiteError) as error:
        make_history().rows(4242 << 8 | 1, "1m", OPENED_S, NOW_S)
    assert "\n" not in str(error.value)


def test_a_stop_ends_a_long_download(make_history: MakeHistory, kite: SimulatedKite) -> None:
    stop = threading.Event()
    history = make_history(stop=stop)
    history.rows(INFY, "1m", OPENED_S, NOW_S)
    stop.set()
    with pytest.raises(PkbError, match="stopped"):
        history.rows(INFY, "1m", OPENED_S, NOW_S)
    assert history_requests(kite) == 1


def test_two_processes_that_share_the_limit_get_no_429(
    kite: SimulatedKite, kite_settings: Settings, client: redis.Redis
) -> None:
    kite.limits.enforced = True

    def ask(_number: int) -> int:
        with KiteTickerHistory(settings=kite_settings, attempts=1) as history:
            return sum(len(history.rows(token, "1m", OPENED_S, NOW_S)) > 0 for token in [INFY] * 4)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == [4, 4]


# --- the file


def test_days_before_today_are_requested_once(make_history: MakeHistory, kite: SimulatedKite) -> None:
    first = make_history().cached_rows(INFY, "5m", OPENED_S - 10 * 86_400, NOW_S)
    before = history_requests(kite)
    assert make_history().cached_rows(INFY, "5m", OPENED_S - 10 * 86_400, NOW_S) == first
    assert history_requests(kite) == before + 1  # today's, which Kite may still change
    assert make_history().cached_rows(INFY, "5m", OPENED_S - 10 * 86_400, NOW_S, fresh=True) == first
    assert history_requests(kite) == before + 3


def test_an_interrupted_download_resumes(make_history: MakeHistory, kite: SimulatedKite) -> None:
    span = (NOW_S - 1500 * 86_400, OPENED_S - 86_400)
    done = list(islice(make_history().download(INFY, "60m", *span), 2))  # and then it was killed
    assert history_requests(kite) == 2
    rest = list(make_history().download(INFY, "60m", *span))
    assert history_requests(kite) == 4
    assert [piece[0] for piece in done + rest] == [span[0] + n * 400 * 86_400 for n in range(4)]
    assert list(make_history().download(INFY, "60m", *span)) == []


def test_the_cache_returns_its_missing_spans(make_history: MakeHistory, kite_settings: Settings) -> None:
    cache = HistoryCache(kite_settings.data_dir / "own" / "history.db")
    row = make_history().rows(INFY, "1m", OPENED_S, OPENED_S + 60)[0]
    at = row.start
    cache.replace(INFY, "minute", at, at + 60, [row])
    cache.replace(INFY, "minute", at + 180, at + 240, [])
    assert cache.missing(INFY, "minute", at - 60, at + 300) == [
        (at - 60, at),
        (at + 60, at + 180),
        (at + 240, at + 300),
    ]
    cache.replace(INFY, "minute", at + 60, at + 180, [row])  # a row outside of its span is not taken
    assert cache.missing(INFY, "minute", at, at + 240) == []
    assert cache.get(INFY, "minute", at, at + 240) == [row]
    assert cache.missing(INFY, "5minute", at, at + 60) == [(at, at + 60)]


def test_a_damaged_cache_file_is_a_one_line_error(make_history: MakeHistory, kite_settings: Settings) -> None:
    path = kite_settings.data_dir / "history.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("this is no database, it is a letter to my aunt" * 100)
    with pytest.raises(PkbError, match="delete the file"):
        make_history().frame(INFY, "day")


# --- for people and upstream's users


def test_a_frame_has_an_index_in_indian_time(make_history: MakeHistory) -> None:
    frame = make_history().frame(INFY, "15m", "2026-08-03", "2026-08-04")
    assert list(frame.columns) == ["open", "high", "low", "close", "volume", "oi"]
    assert str(frame.index.tz) == "Asia/Kolkata"
    assert frame.index[0].isoformat() == "2026-08-03T09:15:00+05:30"
    assert {stamp.date().isoformat() for stamp in frame.index} == {"2026-08-03", "2026-08-04"}
    assert frame.index.is_monotonic_increasing


def test_historical_data_has_upstreams_shape(make_history: MakeHistory, kite: SimulatedKite) -> None:
    history = make_history()
    answer = history.get_historical_data(INFY, "2026-08-03", "2026-08-04", interval="5minute")
    assert answer["status"] == "success"
    assert answer["data"]["source"] == "api"
    candles = answer["data"]["candles"]
    assert candles[0][0] == "2026-08-03T09:15:00+0530"
    assert len(candles[0]) == 7
    again = history.get_historical_data(INFY, "2026-08-03", "2026-08-04", interval="5minute", oi=False)
    assert again["data"]["source"] == "database"
    assert again["data"]["candles"] == [candle[:6] for candle in candles]
    forced = history.get_historical_data(INFY, "2026-08-03", "2026-08-04", "5minute", forceFetch=True)
    assert forced["data"]["source"] == "api"
    filled = history.get_historical_data(INDEX, "2026-08-03", "2026-08-04", "5minute", insertOnly=True)
    assert filled["data"]["candles"] == []


def test_without_dates_the_last_365_candles_are_returned(make_history: MakeHistory) -> None:
    candles = make_history().get_historical_data(INFY)["data"]["candles"]
    assert 230 < len(candles) < 260
    assert candles[-1][0].startswith("2026-08-05")


def test_one_failed_instrument_does_not_affect_the_rest(make_history: MakeHistory) -> None:
    history = make_history()
    unknown = 4242 << 8 | 1
    found = history.get_multiple_instruments_history([INFY, unknown, INDEX], "2026-08-03", "2026-08-04")
    assert [found[token]["status"] for token in (INFY, unknown, INDEX)] == ["success", "failed", "success"]
    assert history.failed_tokens == [unknown]
    assert "\n" not in found[unknown]["error"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda history: history.get_historical_data(None),
        lambda history: history.get_historical_data("INFY"),
        lambda history: history.get_historical_data(INFY, "2026-08-04", "2026-08-03"),
        lambda history: history.get_historical_data(INFY, "the day before"),
        lambda history: history.get_multiple_instruments_history([]),
    ],
)
def test_an_invalid_request_is_a_one_line_value_error(
    make_history: MakeHistory, ask: Callable[[KiteTickerHistory], Any]
) -> None:
    with pytest.raises(BadRequest) as error:
        ask(make_history())
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)


def test_no_secret_is_in_an_error(make_history: MakeHistory, kite: SimulatedKite) -> None:
    kite.faults.add("drop", on="rest", path="/instruments/historical")
    history = make_history(attempts=1)
    with pytest.raises(KiteUnavailable) as error:
        history.rows(INFY, "1m", OPENED_S, NOW_S)
    session = history._api._kite.session  # type: ignore[union-attr]
    assert session is not None and session.token
    assert session.token not in repr(error.getrepr(style="long"))
