"""What Kite sends against what the pipeline believes: hours, clock, previous closes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import redis

from pkbrokers_redis.aggregate.worker import Aggregator
from pkbrokers_redis.candles.calendar import Sessions, load_sessions
from pkbrokers_redis.clock import ExchangeClock
from pkbrokers_redis.ingest import market_watch
from pkbrokers_redis.ingest.connections import Outage
from pkbrokers_redis.ingest.market_watch import LOOK_SECONDS, MarketWatch
from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.protocol import encode_packet
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.tick_writer import Packet

INFY, TCS, NIFTY, OPTION = 408065, 2953217, 256265, 35_000 << 8 | 2
SATURDAY = "2026-01-10"
SESSION = {"calendars": {"equity": {"special": {SATURDAY: {"windows": "regular", "why": "drill"}}}}}


def ms(text: str, day: str = "2026-01-07") -> float:
    return datetime.fromisoformat(f"{day} {text}+05:30").timestamp() * 1000


class Watched:
    """A watch whose packets, clock and calendar are the test's."""

    def __init__(self, client: redis.Redis | None, calendar: Sessions, keys: Keys) -> None:
        self.host_ms = ms("10:00:00")
        self.monotonic_s = 0.0
        self.ahead_ms = 0.0  # of the host's clock
        self.packets: dict[int, Packet] = {}
        self.outages: list[tuple[str, tuple[int, ...], Outage]] = []
        self.reloads = 0
        self.client, self.keys = client, keys
        clock = ExchangeClock(lambda: self.host_ms + self.ahead_ms, lambda: self.monotonic_s)
        self.clock = clock
        part: Any = self
        self.watch = MarketWatch(
            calendar, lambda: self.packets, part, clock, self.connect, keys,
            on_calendar=self.reloaded,
        )  # fmt: skip
        self.watch.symbols = {INFY: "NSE:INFY", TCS: "NSE:TCS"}

    def connect(self) -> redis.Redis:
        assert self.client is not None
        return self.client

    def reloaded(self) -> None:
        self.reloads += 1

    def add(self, reason: str, tokens: tuple[int, ...], outage: Outage) -> None:
        self.outages.append((reason, tokens, outage))

    def at(self, text: str, day: str = "2026-01-07") -> Watched:
        self.monotonic_s += (ms(text, day) - self.host_ms) / 1000
        self.host_ms = ms(text, day)
        return self

    def see(self, token: int = INFY, mode: str = "full", **fields: Any) -> Watched:
        """A packet arrives now, stamped by the exchange now."""
        if mode == "full":
            fields = {"exchange_timestamp": int(self.host_ms // 1000)} | fields
        packet = encode_packet(mode, token, last_price=100.0, **fields)
        self.packets[token] = (b"??" + packet, 2, len(packet), int(self.clock()))
        return self

    def look(self, seconds: float = LOOK_SECONDS) -> dict[str, object]:
        self.host_ms += seconds * 1000
        self.monotonic_s += seconds
        self.watch.look()
        return self.watch.figures()

    def trade(self, looks: int, *tokens: int, first: int = 1_000) -> dict[str, object]:
        """Volume rises from look to look."""
        figures: dict[str, object] = {}
        for n in range(looks):
            for token in tokens or (INFY,):
                self.see(token, volume_traded=first + n)
            figures = self.look()
        return figures


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "calendar.json"
    path.write_text("{}")
    return path


@pytest.fixture
def watched(file: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(market_watch, "EQUITY_SEGMENTS", ())  # no store here
    return Watched(None, load_sessions("market", path=file), Keys("pkb", 8))


# -- hours


@pytest.mark.parametrize(
    ("text", "day", "is_alarm"),
    [
        ("11:00:00", SATURDAY, True),
        ("11:00:00", "2026-01-26", True),  # a holiday
        ("08:30:00", "2026-01-07", True),
        ("09:07:00", "2026-01-07", False),  # pre-open
        ("11:00:00", "2026-01-07", False),
        ("15:30:10", "2026-01-07", False),  # the last trades arrive
        ("15:33:00", "2026-01-07", True),  # longer hours
        ("15:50:00", "2026-01-07", False),  # closing session
        ("16:30:00", "2026-01-07", True),
    ],
)
def test_trading_outside_the_calendar_is_noticed(
    watched: Watched, text: str, day: str, is_alarm: bool
) -> None:
    figures = watched.at(text, day).trade(3, INFY, TCS)
    assert figures["closed_trading"] == (2 if is_alarm else 0)
    assert figures["closed_trading_names"] == ("NSE:INFY,NSE:TCS" if is_alarm else "")


def test_packets_without_trades_and_a_single_late_one_are_no_session(watched: Watched) -> None:
    watched.at("11:00:00", SATURDAY)
    for volume in (5_000, 5_000, 5_001, 5_001, 5_001):
        watched.see(volume_traded=volume).see(NIFTY)
        assert watched.look()["closed_trading"] == 0


def test_it_is_logged_once_a_day(watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    watched.at("11:00:00", SATURDAY).trade(6)
    line = capsys.readouterr().err
    assert line.count("event=trading_while_closed") == 1
    assert "instruments=1 symbols=NSE:INFY" in line


def test_a_session_that_is_added_to_the_calendar_is_backfilled_from_its_opening(
    watched: Watched, file: Path
) -> None:
    watched.at("11:00:00", SATURDAY).trade(3)
    file.write_text(json.dumps(SESSION))
    assert watched.trade(1, first=2_000)["closed_trading"] == 1  # the aggregators load it first
    assert watched.reloads == 1
    watched.trade(3, first=3_000)
    assert watched.watch.figures()["closed_trading"] == 0
    (reason, tokens, outage), *more = watched.outages
    assert (reason, tokens, more) == ("unlisted session", (INFY,), [])
    assert outage.from_ms == ms("09:15:00", SATURDAY)
    assert ms("11:00:00", SATURDAY) < outage.to_ms <= watched.host_ms


def test_a_malformed_calendar_keeps_the_hours_and_is_named_once(
    watched: Watched, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("{")
    assert watched.at("11:00:00").trade(4)["closed_trading"] == 0
    assert capsys.readouterr().err.count("event=calendar_refused") == 1
    assert watched.reloads == 0


def test_the_next_day_begins_without_yesterdays_alarm(watched: Watched) -> None:
    watched.at("15:35:00").trade(3)
    assert watched.at("10:00:00", "2026-01-08").look()["closed_trading"] == 0
    assert watched.outages == []


# -- clock


def test_the_offset_to_the_exchange_is_measured(watched: Watched) -> None:
    for n in range(6):
        watched.see(INFY).see(TCS)
        figures = watched.look()
        assert figures["clock_offset_ms"] == ("" if n < 3 else -500)
    assert watched.clock.offset_ms == 0


@pytest.mark.parametrize("ahead_ms", [180_000, -180_000, 6_000])
def test_a_wrong_clock_is_corrected_by_the_exchanges_time(
    watched: Watched, ahead_ms: float, capsys: pytest.CaptureFixture[str]
) -> None:
    watched.ahead_ms = ahead_ms
    watched.clock = watched.watch._clock = ExchangeClock(
        lambda: watched.host_ms + watched.ahead_ms, lambda: watched.monotonic_s
    )
    for _ in range(12):
        watched.see(INFY).see(TCS)
        figures = watched.look()
    assert figures["clock_offset_ms"] == ahead_ms - 500
    assert abs(watched.clock() - watched.host_ms) <= 500
    assert capsys.readouterr().err.count("event=clock_differs") == 1
    watched.ahead_ms = 0.0  # somebody sets it right
    assert abs(watched.clock() - watched.host_ms) <= 500
    for _ in range(24):
        watched.see(INFY).see(TCS)
        watched.look()
    assert watched.clock.offset_ms == 0


def test_data_of_another_day_is_no_wrong_clock(watched: Watched) -> None:
    for n in range(6):
        watched.see(INFY, exchange_timestamp=1_600_000_000 + n)
        watched.see(TCS, exchange_timestamp=1_600_000_000 + n)
        watched.look()
    assert watched.clock.offset_ms == 0


def test_quotes_without_an_exchange_time_measure_nothing(watched: Watched) -> None:
    for n in range(6):
        watched.see(INFY, mode="quote", volume_traded=n)
        assert watched.look()["clock_offset_ms"] == ""


# -- previous closes


@pytest.fixture
def stored(client: redis.Redis, make_settings: Callable[..., Settings]) -> Watched:
    """INFY's and TCS's last day rows are Tuesday's; the option's as well."""
    keys = make_settings(shards=1).keys
    for token in (INFY, TCS, OPTION):
        for day, close in (("2026-01-05", 900), ("2026-01-06", 1000)):
            row = [int(ms("09:15:00", day) / 1000), 990, 1010, 980, close, 5_000, None, 9]
            client.rpush(keys.candles(token, "day"), json.dumps(row))
    return Watched(client, load_sessions("market"), keys)


def closes(stored: Watched, **by_name: float) -> dict[str, object]:
    for name, token in (("infy", INFY), ("tcs", TCS), ("option", OPTION)):
        if name in by_name:
            stored.see(token, close=by_name[name])
    return stored.look()


def test_a_previous_close_on_another_scale_names_the_instrument(
    stored: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = closes(stored, infy=200, tcs=1_012, option=10)
    assert (figures["closes_differ"], figures["closes_differ_names"]) == (1, "NSE:INFY 1000 → 200")
    closes(stored, infy=200)
    assert capsys.readouterr().err.count("event=previous_close_differs symbol=NSE:INFY") == 1


def test_a_day_row_that_was_corrected_ends_it(stored: Watched, client: redis.Redis) -> None:
    assert closes(stored, infy=200)["closes_differ"] == 1
    row = [int(ms("09:15:00", "2026-01-06") / 1000), 198, 202, 196, 201, 25_000, None, 9]
    client.lset(stored.keys.candles(INFY, "day"), -1, json.dumps(row))
    stored.watch._closes_read_at.clear()  # a minute later
    assert closes(stored, infy=200)["closes_differ"] == 0


@pytest.mark.parametrize("text", ["08:50:00", "16:00:00"])
def test_closes_are_compared_while_the_market_is_open_only(stored: Watched, text: str) -> None:
    assert closes(stored.at(text), infy=200)["closes_differ"] == 0


def test_a_day_row_of_an_earlier_session_and_keys_of_another_type_compare_nothing(
    stored: Watched, client: redis.Redis
) -> None:
    client.rpop(stored.keys.candles(INFY, "day"))
    client.set(stored.keys.candles(TCS, "day"), "x")
    assert closes(stored, infy=200, tcs=200)["closes_differ"] == 0


# -- the aggregator


@pytest.fixture
def aggregator(
    client: redis.Redis, make_settings: Callable[..., Settings], file: Path
) -> Iterator[Aggregator]:
    settings = make_settings(shards=1, sessions="market", calendar=file)
    new = Aggregator(lambda: connect(settings), settings, now_ms=lambda: ms("11:00:00", SATURDAY))
    new.start()
    yield new
    new.close()


def test_an_aggregator_follows_the_calendar(aggregator: Aggregator, file: Path) -> None:
    aggregator.step(block_ms_max=1)
    before = aggregator.workers[0]
    file.write_text(json.dumps(SESSION))
    aggregator._calendar_due_at = 0.0  # a second later
    aggregator.step(block_ms_max=1)
    aggregator.step(block_ms_max=1)
    state = aggregator.workers[0].state
    assert aggregator.workers[0] is not before
    assert state.sessions.is_open(state.sessions.schedule_of(INFY), int(ms("11:00:00", SATURDAY)))


def test_an_aggregator_on_a_host_with_a_wrong_clock_closes_by_the_exchanges_time(
    aggregator: Aggregator, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkbrokers_redis.aggregate.repairs.READ_EVERY_SECONDS", 0.0)
    key = aggregator._keys.feed_progress()
    client.hset(key, mapping={"clock:elsewhere": "5000", os.uname().nodename.encode(): "1"})
    aggregator.step(block_ms_max=1)
    assert aggregator._now_ms() == ms("11:00:00", SATURDAY)
    client.hset(key, f"clock:{os.uname().nodename}", "-180000")
    aggregator.step(block_ms_max=1)
    assert aggregator._now_ms() == ms("11:03:00", SATURDAY)
    client.hset(key, f"clock:{os.uname().nodename}", "soon")
    aggregator.step(block_ms_max=1)
    assert aggregator._now_ms() == ms("11:00:00", SATURDAY)
