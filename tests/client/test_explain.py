"""Explaining a candle: its row, ticks, announcements and session; and what is not there, in words."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import redis

from pkbrokers_redis.cli.common import parse_moment
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.compat.candle_store import InMemoryCandleStore
from pkbrokers_redis.errors import PkbError, UnknownInterval
from pkbrokers_redis.settings import Settings
from tests.client.contract import INFY, OPEN_S, RELIANCE, announce, push, row, tick_frame, write_master
from tests.client.feeding import aggregating, tick
from tests.support import run_pkb, settings_env

VALKEY = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(clock="event")


@pytest.fixture
def store(client: redis.Redis, settings: Settings) -> CandleStore:
    write_master(client, settings.keys)
    return CandleStore(settings, client)


@pytest.fixture
def fed(client: redis.Redis, store: CandleStore) -> InMemoryCandleStore:
    """INFY from 1,000 on: ticks in three minutes; the first minute was amended after it had closed."""
    candles = InMemoryCandleStore(settings=store.settings, client=client)
    with aggregating(client, store.settings) as drain:
        candles.process_ticks_batch([tick(0, 100, 1000), tick(5, 101, 1010), tick(40, 99, 1030)])
        candles.process_ticks_batch([tick(61, 102, 1040), tick(130, 103, 1050)])
        drain()
        candles.process_tick(tick(50, 98.5, 1035))
        drain()
    return candles


@VALKEY
def test_an_amended_candle_shows_its_ticks_and_revisions(
    fed: InMemoryCandleStore, store: CandleStore
) -> None:
    found = store.explain("INFY", "1m", OPEN_S + 30)
    assert (found.symbol, found.start, found.end, found.place) == ("NSE:INFY", OPEN_S, OPEN_S + 60, "list")
    assert found.row == store.get_candles("INFY", "1m")[0] and found.row is not None
    assert [each.last_price for each in found.ticks] == [100, 101, 99, 98.5]
    assert [(each.rev, each.candle.close) for each in found.announcements] == [(0, 99), (1, 98.5)]
    assert (
        found.announcements[-1].rev == 1
        and len(found.sources) == 1
        and found.baseline == 1000
        and found.day_volume == 1050
    )
    text = "\n".join(found.lines())
    assert "complete, 3 ticks changed it" in text and "amended, revision 1" in text
    assert "first 09:15:00 at 100, last 09:15:50 at 98.5" in text
    assert "09:15–15:30" in text
    assert "day's volume 1,050, of which 1,000 is in no candle" in text


@VALKEY
def test_a_forming_candle_says_so(fed: InMemoryCandleStore, store: CandleStore) -> None:
    found = store.explain(INFY, "1h", OPEN_S + 3000)
    assert found.place == "current" and found.start == OPEN_S and found.announcements == []
    assert found.lines()[0].startswith("still forming")
    assert json.loads(json.dumps(found.as_dict()))["ticks_in_stream"] == 6


@VALKEY
def test_a_flag_is_explained_in_words(client: redis.Redis, store: CandleStore) -> None:
    rows = [row(OPEN_S + 300 * n, flag=flag) for n, flag in enumerate(("partial", "gap", "backfilled"))]
    push(client, store.keys, INFY, "5m", rows)
    announce(client, store.keys, INFY, "5m", rows[1], symbol="NSE:INFY")
    for n, words in enumerate(("watching began inside", "the feed was down", "repaired from Kite's history")):
        assert words in store.explain("INFY", "5m", OPEN_S + 300 * n + 1).lines()[1]
    assert "its ticks are no longer in the stream" in store.explain("INFY", "5m", OPEN_S).lines()
    assert "its announcement is due, or trimmed" in store.explain("INFY", "5m", OPEN_S).lines()[0]


@VALKEY
def test_a_missing_row_has_a_reason(client: redis.Redis, store: CandleStore) -> None:
    def why(seconds: int) -> str:
        return store.explain("INFY", "5m", OPEN_S + seconds).lines()[0]

    assert why(0).startswith("no row: nothing of this instrument")
    push(client, store.keys, INFY, "5m", [row(OPEN_S + 600), row(OPEN_S + 1200)])
    assert why(0).startswith("no row: it is older than all rows that are kept")
    assert why(900).startswith("no row: no trade in it was received")
    assert why(-3600).startswith("no row: it lies outside the trading hours")


@VALKEY
def test_rows_of_a_store_without_sessions_are_found_on_their_own_grid(
    client: redis.Redis, store: CandleStore
) -> None:
    night = OPEN_S - 6 * 3600 + 15 * 60  # 03:30
    push(client, store.keys, INFY, "60m", [row(night - 30 * 60)])
    found = store.explain("INFY", "60m", night)
    assert found.row is not None and found.is_in_session and found.end - found.start == 3600


@VALKEY
def test_malformed_ticks_and_state_are_ignored(client: redis.Redis, store: CandleStore) -> None:
    shard = store.keys.shard_of(INFY)
    client.xadd(store.keys.ticks(shard), {"what": "ever"})
    client.hset(store.keys.state(shard), str(INFY), "?")
    time_ms = (OPEN_S + 1) * 1000
    tick_frame(client, store.keys, shard, [[INFY, 5, 1, 1, None, None, None, None, time_ms], [INFY, "x"]])
    found = store.explain("INFY", "1m", OPEN_S)
    assert len(found.ticks) == 1 and found.baseline is None and found.row is None


@VALKEY
def test_unknown_names_are_the_usual_errors(store: CandleStore) -> None:
    with pytest.raises(UnknownInterval):
        store.explain("INFY", "7m", OPEN_S)


@VALKEY
@pytest.mark.parametrize("moment", [OPEN_S * 1000, -1, 10**15, 2**63])
def test_an_invalid_moment_is_a_one_line_error(store: CandleStore, moment: int) -> None:
    with pytest.raises(PkbError, match="no time of a candle: give epoch seconds, not milliseconds"):
        store.explain("INFY", "1m", moment)


@VALKEY
def test_the_command_prints_it(fed: InMemoryCandleStore, settings: Settings) -> None:
    env = settings_env(settings)
    done = run_pkb("explain", "INFY", "1m", "2026-01-05T09:15:30", env=env)
    assert done.returncode == 0, done.stderr
    assert "NSE:INFY 1m  2026-01-05T09:15:00+05:30" in done.stdout and "amended, revision 1" in done.stdout
    as_json = json.loads(run_pkb("explain", "INFY", "1m", str(OPEN_S), "--json", env=env).stdout)
    assert as_json["row"]["close"] == 98.5 and as_json["announcements"][1]["rev"] == 1
    wrong = run_pkb("explain", "INFY", "1m", "soon", env=env)
    assert wrong.returncode == 2 and wrong.stderr.startswith("pkb: 'soon' is not a time: write 10:05")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("09:15", OPEN_S),
        ("9:15", OPEN_S),
        ("09:15:30", OPEN_S + 30),
        ("2026-01-05T09:15", OPEN_S),
        ("2026-01-05 09:15:01", OPEN_S + 1),
        ("2026-01-05T03:45:00+00:00", OPEN_S),
        (str(OPEN_S), OPEN_S),
        ("2026-01-05", OPEN_S - 9 * 3600 - 900),
    ],
)
def test_a_moment_is_read_as_people_write_it(text: str, expected: int) -> None:
    assert parse_moment(text, OPEN_S + 1) == expected


@pytest.mark.parametrize("text", ["", "now", "25:00", "12", "0001-01-01", "9" * 12, "١٢٣٤٥٦٧٨٩"])
def test_an_unreadable_moment_is_a_one_line_error(text: str) -> None:
    with pytest.raises(PkbError, match="is not a time"):
        parse_moment(text, OPEN_S)


@VALKEY
def test_ticks_of_another_instrument_are_not_shown(fed: InMemoryCandleStore, store: CandleStore) -> None:
    assert store.explain(RELIANCE, "1m", OPEN_S).ticks == []


@VALKEY
def test_a_future_minute_and_an_always_open_store_have_the_right_words(
    client: redis.Redis, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings()
    write_master(client, settings.keys)
    store = CandleStore(settings, client)
    assert store.explain("INFY", "1m", 4_000_000_000).lines()[0] == "no row: it has not begun yet"
    night = OPEN_S - 6 * 3600
    push(client, settings.keys, INFY, "1m", [row(night)])
    text = "\n".join(store.explain("INFY", "1m", night - 600).lines())
    assert "all day" in text and "09:15" not in text
