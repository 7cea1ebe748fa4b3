"""The market's hours are data; the answers are pure functions of epoch milliseconds."""

import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from datetime import date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.candles.calendar import TIME_MS_MAX, load_sessions
from pkbrokers_redis.candles.model import DEFAULT_INTERVALS
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.errors import SettingsError
from tests.support import SHARED_DATA

KOLKATA = ZoneInfo("Asia/Kolkata")
MARKET = load_sessions("market")
TIMES = st.integers(0, 4_102_444_800_000)  # 1970 to 2100


def at(text: str, zone: ZoneInfo = KOLKATA) -> int:
    """`2026-08-03 15:20` in India → epoch ms."""
    return int(datetime.fromisoformat(text).replace(tzinfo=zone).timestamp() * 1000)


def schedule(name: str) -> int:
    return MARKET.schedules.index(name)


def hours(name: str, day: str) -> list[str]:
    """The windows of a day as people write them."""
    windows = MARKET.day(schedule(name), at(f"{day} 12:00")).windows
    return [
        "-".join(f"{datetime.fromtimestamp(ms / 1000, KOLKATA):%H:%M}" for ms in each) for each in windows
    ]


@pytest.mark.parametrize(
    ("name", "day", "expected"),
    [
        ("NSE_CASH", "2026-07-31", ["09:15-15:30"]),
        ("NSE_CASH", "2026-08-03", ["09:15-15:30"]),
        ("NSE_CASH_DERIVATIVES", "2026-07-31", ["09:15-15:30"]),
        ("NSE_CASH_DERIVATIVES", "2026-08-03", ["09:15-15:15", "15:15-15:35"]),
        ("BSE_CASH_DERIVATIVES", "2026-08-03", ["09:15-15:15", "15:15-15:35"]),
        ("NFO", "2026-07-31", ["09:15-15:30"]),
        ("NFO", "2026-08-03", ["09:15-15:40"]),
        ("BFO", "2026-08-03", ["09:15-15:40"]),
        ("CDS", "2026-08-03", ["09:00-17:00"]),
        ("BCD", "2026-08-03", ["09:00-17:00"]),
        ("MCX", "2026-01-14", ["09:00-23:55"]),
        ("NSE_CASH", "2026-02-01", ["09:15-15:30"]),  # Union Budget, a Sunday
        ("NSE_CASH", "2026-02-08", []),  # any other Sunday
        ("NSE_CASH", "2024-03-02", ["09:15-10:00", "11:30-12:30"]),
        ("NSE_CASH", "2025-10-21", ["13:45-14:45"]),  # Muhurat
        ("NSE_CASH", "2024-11-01", ["18:00-19:00"]),
        ("MCX", "2026-01-26", []),
        ("MCX", "2026-01-15", ["17:00-23:55"]),  # closed until the evening
        ("MCX", "2026-09-14", ["17:00-23:30"]),
        ("INDICES", "2026-01-14", ["09:15-15:30"]),
    ],
)
def test_a_schedule_has_its_hours_on_a_day(name: str, day: str, expected: list[str]) -> None:
    assert hours(name, day) == expected


@pytest.mark.parametrize(
    ("day", "close"),
    [
        ("2026-03-06", "23:55"),  # US summer time begins on the second Sunday of March …
        ("2026-03-09", "23:30"),
        ("2026-10-30", "23:30"),  # … and ends on the first of November
        ("2026-11-02", "23:55"),
        ("2031-07-01", "23:30"),
    ],
)
def test_mcx_closes_by_us_summer_time(day: str, close: str) -> None:
    assert hours("MCX", day) == [f"09:00-{close}"]


def test_2026_has_exactly_the_sixteen_weekday_holidays_of_the_exchanges_circular() -> None:
    source = SHARED_DATA / "calendar_nse_2026.json"
    if not source.exists():
        pytest.skip("no shared calendar data next to this checkout")
    facts = json.loads(source.read_text())
    days = [date(2026, 1, 1) + timedelta(days=number) for number in range(365)]
    closed = {day.isoformat() for day in days if day.isoweekday() < 6 and not hours("NSE_CASH", str(day))}
    assert closed == set(facts["holidays_2026"])
    weekend_sessions = {
        day.isoformat() for day in days if day.isoweekday() >= 6 and hours("NSE_CASH", str(day))
    }
    assert weekend_sessions == set(facts["special_sessions"])
    assert {str(day) for day in days if day.isoweekday() < 6 and not hours("MCX", str(day))} == set(
        facts["mcx_full_holidays_2026"]
    )


@pytest.mark.parametrize(
    ("token", "has_derivatives", "expected"),
    [
        (408065, False, "NSE_CASH"),
        (408065, True, "NSE_CASH_DERIVATIVES"),
        (128083204, False, "BSE_CASH"),
        (256265, False, "INDICES"),
        (256265, True, "INDICES"),
        (2, True, "NFO"),
        (3, False, "CDS"),
        (5, False, "BFO"),
        (6, False, "BCD"),
        (7, False, "MCX"),
        (0, False, "UNKNOWN"),
        (2**32 - 1, False, "UNKNOWN"),
        (12, True, "UNKNOWN"),
    ],
)
def test_a_tokens_segment_gives_its_schedule_and_an_unknown_one_never_closes(
    token: int, has_derivatives: bool, expected: str
) -> None:
    assert MARKET.schedules[MARKET.schedule_of(token, has_derivatives)] == expected


def test_windows_are_half_open() -> None:
    cash = schedule("NSE_CASH")
    opened, closed = at("2026-01-14 09:15"), at("2026-01-14 15:30")
    assert [MARKET.is_open(cash, ms) for ms in (opened - 1, opened, closed - 1, closed)] == [
        False,
        True,
        True,
        False,
    ]


def test_a_closed_day_is_anchored_at_its_midnight() -> None:
    day = MARKET.day(schedule("NSE_CASH"), at("2026-01-26 11:00"))
    midnight = at("2026-01-26 00:00")
    assert day == (midnight, at("2026-01-27 00:00"), midnight, (), ())


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2026-01-14 08:00", "2026-01-14 09:15"),
        ("2026-01-14 12:00", "2026-01-16 09:15"),  # the 15th is a holiday
        ("2026-01-14 09:15", "2026-01-16 09:15"),  # strictly after
        ("2026-01-30 16:00", "2026-02-01 09:15"),  # the Budget's Sunday
        ("2026-04-02 23:59", "2026-04-06 09:15"),  # Good Friday, then a weekend
    ],
)
def test_the_next_open_skips_nights_weekends_and_holidays(now: str, expected: str) -> None:
    assert MARKET.next_open(schedule("NSE_CASH"), at(now)) == at(expected)


def test_the_closing_auction_is_no_new_opening() -> None:
    assert MARKET.next_open(schedule("NSE_CASH_DERIVATIVES"), at("2026-08-03 12:00")) == at(
        "2026-08-04 09:15"
    )


def test_a_market_that_never_closes_never_opens() -> None:
    always = load_sessions("always")
    assert always.is_open(0, at("2026-01-26 03:00"))
    assert always.next_open(0, at("2026-01-26 03:00")) is None


def test_the_next_open_is_sought_for_thirty_days_only(tmp_path: Path) -> None:
    file = tmp_path / "calendar.json"
    file.write_text('{"calendars": {"equity": {"weekend": [1, 2, 3, 4, 5, 6, 7], "special": null}}}')
    assert load_sessions("market", path=file).next_open(0, at("2026-01-14 08:00")) is None


@pytest.mark.parametrize(
    ("zone", "day", "hours_long"),
    [
        ("Asia/Kolkata", "2026-03-08", 24),
        ("America/New_York", "2026-03-08", 23),
        ("America/New_York", "2026-11-01", 25),
        ("Australia/Lord_Howe", "2026-04-05", 24.5),
        ("America/Sao_Paulo", "2018-11-04", 23),  # the clocks change at midnight itself
    ],
)
def test_always_makes_the_whole_local_day_one_window(zone: str, day: str, hours_long: float) -> None:
    always = load_sessions("always", zone)
    found = always.day(0, at(f"{day} 12:00", ZoneInfo(zone)))
    assert found.day_end_ms - found.day_start_ms == hours_long * 3_600_000
    assert found.windows == ((found.day_start_ms, found.day_end_ms),)
    assert found.anchor_ms == found.day_start_ms
    assert all(always.day(each, found.anchor_ms) == found for each in range(len(always.schedules)))


@given(
    TIMES,
    st.sampled_from(["Asia/Kolkata", "America/New_York", "Asia/Beirut", "Pacific/Apia", "Africa/Cairo"]),
)
def test_local_days_follow_each_other_without_gap_or_overlap(time_ms: int, zone: str) -> None:
    always = load_sessions("always", zone)
    day = always.day(0, time_ms)
    assert day.day_start_ms <= time_ms < day.day_end_ms
    assert always.day(0, day.day_end_ms).day_start_ms == day.day_end_ms


@given(TIMES, st.integers(0, len(MARKET.schedules) - 1))
def test_the_windows_of_a_day_lie_in_it_in_time_order(time_ms: int, each: int) -> None:
    day = MARKET.day(each, time_ms)
    edges = [day.day_start_ms, *(edge for window in day.windows for edge in window), day.day_end_ms]
    assert edges == sorted(edges)
    assert all(opened < closed for opened, closed in day.windows)
    assert MARKET.is_open(each, time_ms) == any(opened <= time_ms < closed for opened, closed in day.windows)


@pytest.mark.parametrize("time_ms", [-1, TIME_MS_MAX, 10**20, -(10**20)])
def test_a_time_no_trade_can_have_is_refused(time_ms: int) -> None:
    with pytest.raises(ValueError, match="between 1970 and 2200"):
        MARKET.day(0, time_ms)


def test_the_day_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkbrokers_redis.candles.calendar.DAYS_CACHED_MAX", 10)
    sessions = load_sessions("market")
    start = at("2026-01-01 12:00")
    days = [sessions.day(0, start + number * 86_400_000) for number in range(50)]
    assert len(sessions._loaded.days) <= 10
    assert [sessions.day(0, day.day_start_ms) for day in days] == days


def test_nothing_depends_on_the_hosts_time_zone() -> None:
    program = (
        "from pkbrokers_redis.candles.calendar import load_sessions\n"
        "for mode in ('market', 'always'):\n"
        "    sessions = load_sessions(mode)\n"
        "    print([sessions.day(each, t) for each in range(len(sessions.schedules))\n"
        "           for t in range(1_772_000_000_000, 1_776_000_000_000, 17_000_000)])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "TZ": zone},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for zone in ("UTC", "America/New_York", "Pacific/Kiritimati")
    }
    assert len(outputs) == 1


# --- the user's own calendar


def test_a_users_file_is_laid_over_the_shipped_one(tmp_path: Path) -> None:
    crypto = {"calendar": "open", "hours": [{"from": "2009-01-03", "windows": {"all": ["00:00", "24:00"]}}]}
    equity = {
        "holidays": {"2027-01-26": "Republic Day", "2026-01-15": None},
        "special": {"2026-02-01": {"windows": {"budget": ["10:00", "11:00"]}}},
    }
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps(
            {
                "calendars": {"equity": equity, "open": {}},
                "schedules": {"CRYPTO": crypto},
                "segments": {"77": {"schedule": "CRYPTO"}},
            }
        )
    )
    sessions = load_sessions("market", path=file)
    assert not sessions.day(0, at("2027-01-26 12:00")).windows  # a new holiday
    assert sessions.day(0, at("2026-01-15 12:00")).windows  # null cancels one
    assert not sessions.day(0, at("2026-01-26 12:00")).windows  # the shipped ones stay
    assert sessions.day(0, at("2026-02-01 12:00")).windows == (
        (at("2026-02-01 10:00"), at("2026-02-01 11:00")),
    )
    assert sessions.schedules[: len(MARKET.schedules)] == MARKET.schedules  # ids stay
    assert sessions.schedules[sessions.schedule_of(77)] == "CRYPTO"
    assert sessions.is_open(sessions.schedule_of(77), at("2026-01-25 23:59"))


def of_nfo(**windows: object) -> dict[str, object]:
    return {"schedules": {"NFO": {"hours": [{"from": "2026-01-01", "windows": windows}]}}}


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("not json", "is no JSON"),
        ("[" * 100_000, "nested too deeply|is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        ([], "the file: Expected `object`, got `array`"),
        ({"schedules": None}, "schedules"),
        ({"schedules": {"NFO": 7}}, r"schedules\[...\]: Expected `object`, got `int`"),
        ({"schedules": {"NFO": {"hours": [{"from": "soon", "windows": {}}]}}}, r"NFO\.hours\[0\]\.from"),
        ({"schedules": {"NFO": {"hours": [{"form": "2026-01-01"}]}}}, r"NFO\.hours\[0\]: .*`form`|`from`"),
        (
            of_nfo(morning=["9:15", "15:30"]),
            r"NFO\.hours\[0\]\.windows\.morning: '9:15' is no time HH:MM",
        ),
        (of_nfo(morning=["09:15", "24:01"]), r"morning: '24:01' is later than 24:00"),
        (of_nfo(morning=["09:15"]), r"schedules\.NFO\.hours\[0\]\.windows"),
        (of_nfo(morning=["15:30", "09:15"]), "opens before it closes"),
        (
            of_nfo(morning=["09:15", "12:00"], noon=["11:00", "13:00"]),
            "noon: windows come in time order",
        ),
        ({"schedules": {"NFO": {"calendar": "nyse"}}}, r"schedules\.NFO\.calendar: 'nyse'"),
        ({"calendars": {"equity": {"holidays": {"2026-13-01": "?"}}}}, r"calendars\.equity\.holidays"),
        ({"calendars": {"equity": {"weekend": [0]}}}, r"calendars\.equity\.weekend"),
        (
            {"calendars": {"mcx": {"special": {"2027-01-01": {"windows": "noon"}}}}},
            r"2027-01-01\.windows: 'noon'",
        ),
        ({"calendars": {"currency": {"holidays_of": "x"}}}, r"calendars\.currency\.holidays_of"),
        ({"segments": {"NSE": {"schedule": "NFO"}}}, r"segments\.NSE: a segment is a number"),
        ({"segments": {"1": {"schedule": "LSE"}}}, r"segments\.1\.schedule: 'LSE'"),
        ({"segments": {"1": {"with_derivatives": "LSE"}}}, r"segments\.1\.with_derivatives: 'LSE'"),
        ({"default_schedule": "LSE"}, "default_schedule: 'LSE'"),
        ({"summer_time_zone": "Mars/Olympus"}, "summer_time_zone: 'Mars/Olympus' is no time zone"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_malformed_calendar_is_one_line_that_names_the_field(
    tmp_path: Path, content: object, names: str
) -> None:
    file = tmp_path / "mine.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SettingsError, match=names) as error:
        load_sessions("market", path=file)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("PKB_CALENDAR: ")
    assert str(file) in error.value.message


def test_a_calendar_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read .*No such file"):
        load_sessions("market", path=tmp_path / "absent.json")
    with pytest.raises(SettingsError, match=r"cannot read .*directory"):
        load_sessions("market", path=tmp_path)


# --- real bars


def test_rows_outside_the_session_are_recognised_in_real_minute_bars() -> None:
    folder = SHARED_DATA / "market" / "lean-india-minute"
    if not folder.exists():
        pytest.skip("no shared market data next to this checkout")
    inside = outside = 0
    for archive in sorted(folder.glob("*_trade.zip")):
        midnight = at(datetime.strptime(archive.stem.split("_")[1], "%Y%m%d").strftime("%Y-%m-%d 00:00"))
        with zipfile.ZipFile(archive) as bars:
            text = bars.read(bars.namelist()[0]).decode()
        for row in csv.reader(io.StringIO(text)):
            elapsed_ms = int(row[0])
            is_open = MARKET.is_open(schedule("NSE_CASH"), midnight + elapsed_ms)
            assert is_open == (33_300_000 <= elapsed_ms < 55_800_000), f"{archive.name} {row}"
            inside, outside = inside + is_open, outside + (not is_open)
    assert inside > 1000
    assert outside > 5


def test_sessions_follow_their_file(tmp_path: Path) -> None:
    file = tmp_path / "calendar.json"
    file.write_text("{}")
    sessions = load_sessions("market", path=file)
    noon = at("2026-01-14 12:00")
    assert sessions.is_open(0, noon)
    assert not sessions.refresh()
    file.write_text('{"calendars": {"equity": {"holidays": {"2026-01-14": "declared at noon"}}}}')
    assert sessions.refresh()
    assert not sessions.is_open(0, noon)
    assert not sessions.refresh()
    for broken in ("{", None):
        file.write_text(broken) if broken else file.unlink()
        with pytest.raises(SettingsError):
            sessions.refresh()
        assert not sessions.refresh()  # it is said once
        assert not sessions.is_open(0, noon)
    file.write_text("{ }")
    assert sessions.refresh()
    assert sessions.is_open(0, noon)
    assert not load_sessions("always", path=file).refresh()


@pytest.mark.parametrize(
    ("exchange", "expected"),
    [("MCX", "MCX"), ("NSE", "NSE_CASH"), ("NCO", "UNKNOWN"), ("GLOBAL", "UNKNOWN")],
)
def test_the_masters_exchange_gives_the_hours_where_the_token_says_another_one(
    exchange: str, expected: str
) -> None:
    sessions = load_sessions("market")
    mcx_index = 273417  # its low byte is that of NSE's indices
    assert sessions.schedules[sessions.schedule_of(mcx_index)] == "INDICES"
    sessions.exchanges = {mcx_index: exchange}
    assert sessions.schedules[sessions.schedule_of(mcx_index)] == expected
    evening = sessions.is_open(sessions.schedule_of(mcx_index), at("2026-01-14 20:00"))
    assert evening == (expected in ("MCX", "UNKNOWN"))


def test_a_users_file_gives_an_exchange_its_hours(tmp_path: Path) -> None:
    file = tmp_path / "calendar.json"
    file.write_text('{"exchanges": {"NCO": "MCX"}}')
    sessions = load_sessions("market", path=file)
    sessions.exchanges = {12: "NCO"}
    assert sessions.schedules[sessions.schedule_of(12)] == "MCX"
    assert sessions.schedules_of([12, 13]) == {sessions.schedule_of(12)}
    assert sessions.schedules_of([13]) == {sessions.unknown_schedule}
    file.write_text('{"exchanges": {"NCO": "NOWHERE"}}')
    with pytest.raises(SettingsError, match=r"exchanges\.NCO"):
        load_sessions("market", path=file)


def test_the_shards_arrays_and_the_calendar_agree_on_hours() -> None:
    sessions = load_sessions("market")
    sessions.derivatives = frozenset({408065})
    sessions.exchanges = {273417: "MCX", 12: "NCO"}
    state = ShardState(DEFAULT_INTERVALS, sessions)
    for token in (408065, 738561, 273417, 256265, 12, 13, 7):
        assert state.arrays.schedule[state.index(token)] == sessions.schedule_of(token)
