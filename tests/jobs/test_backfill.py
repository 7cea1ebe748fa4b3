"""Backfill: what is asked of Kite, what reaches the aggregator, and what becomes of the rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import pytest
import redis
from rq import Retry

from pkbrokers_redis.errors import KiteUnavailable, PkbError, UnknownInterval
from pkbrokers_redis.jobs.backfill import repair_day, repair_gap, warm_start
from pkbrokers_redis.jobs.context import HISTORY_LAG_SECONDS, JobContext
from pkbrokers_redis.jobs.progress import Progress, read_progress, run_parts
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.store.rows import read_candles
from tests.jobs.conftest import KNOWN_S, NOW, NOW_S, OPENED_S, ROWS, MovableClock

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

TOKENS = [int(row["instrument_token"]) for row in ROWS]
STOCK = next(token for token in TOKENS if token & 0xFF == 1)
INDEX = next(token for token in TOKENS if token & 0xFF == 9)
FUTURE = 35_001 << 8 | 2  # of NFO: until 15:40


def clock_s(text: str) -> int:
    """A time of the day, epoch seconds."""
    hour, minute = map(int, text.split(":"))
    return int(NOW.replace(hour=hour, minute=minute, second=0).timestamp())


def entries(context: JobContext, token: int) -> list[dict[str, Any]]:
    """The repair entries of one instrument, decoded."""
    found: Any = context.client.xrange(context.keys.repairs(context.keys.shard_of(token)))
    rows = [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in found]
    return [row for row in rows if row.get("token") == str(token)]


def kite_rows(
    kite: SimulatedKite, token: int, interval: str, from_s: int, to_s: int
) -> list[tuple[Any, ...]]:
    """Kite's own candles that begin in [from_s, to_s)."""
    return [row[:6] for row in kite.history.rows(token, interval, from_s, to_s - 1, kite.now_ms())]


def stored(context: JobContext, token: int, interval: str) -> list[tuple[Any, ...]]:
    return [tuple(row[:6]) for row in read_candles(context.client, context.keys, token, interval, 1000)]


# --- an outage


def test_gap_repair_sends_the_minutes_of_the_outage(context: JobContext, kite: SimulatedKite) -> None:
    from_s = OPENED_S + 600
    repair_gap([STOCK], (from_s + 20) * 1000, (from_s + 61) * 1000, context=context)
    [entry] = entries(context, STOCK)
    assert (entry["kind"], entry["interval"], entry["why"]) == ("rows", "1m", "gap")
    assert (int(entry["from"]), int(entry["to"])) == (from_s, from_s + 120)
    sent = [tuple(row[:6]) for row in json.loads(entry["rows"])]
    assert sent == kite_rows(kite, STOCK, "minute", from_s, from_s + 120)
    assert len(sent) == 2


def test_gap_repair_waits_until_the_last_minute_is_complete(context: JobContext, clock: MovableClock) -> None:
    again = repair_gap([STOCK], (NOW_S - 90) * 1000, (NOW_S + 1) * 1000, context=context)
    assert isinstance(again, Retry)
    assert again.intervals == [30 + HISTORY_LAG_SECONDS]
    assert entries(context, STOCK) == []
    clock.move(30 + HISTORY_LAG_SECONDS)
    assert repair_gap([STOCK], (NOW_S - 90) * 1000, (NOW_S + 1) * 1000, context=context)["rows"] >= 1
    assert int(entries(context, STOCK)[0]["to"]) == KNOWN_S + 60


def test_gap_repair_in_the_future_is_refused(context: JobContext) -> None:
    with pytest.raises(PkbError, match="ends in the future"):
        repair_gap([STOCK], 0, (NOW_S + 10 * 86_400) * 1000, context=context)


def test_minutes_older_than_the_lists_are_not_requested(context: JobContext, kite: SimulatedKite) -> None:
    week_ago = (NOW_S - 7 * 86_400) * 1000
    assert repair_gap([STOCK], week_ago, week_ago + 60_000, context=context)["too_old"] == 1
    assert len(kite.limits.seen) == 0


def test_outage_over_the_weekend_is_repaired_as_far_as_the_lists_reach(
    context: JobContext, clock: MovableClock
) -> None:
    repair_gap([STOCK], (NOW_S - 7 * 86_400) * 1000, (KNOWN_S - 60) * 1000, context=context)
    [entry] = entries(context, STOCK)
    yesterday = NOW - timedelta(days=1)  # 105 minutes of today and the whole day before are 390 rows or more
    assert int(entry["from"]) == int(yesterday.replace(hour=9, minute=15, second=0).timestamp())


def test_instrument_refused_by_kite_does_not_affect_others(context: JobContext) -> None:
    unknown = 4242 << 8 | 1
    found = repair_gap([unknown, STOCK], OPENED_S * 1000, (OPENED_S + 60) * 1000, context=context)
    assert (found["refused"], found["rows"], found["instruments"]) == (1, 1, 2)


def test_unavailable_kite_fails_the_run_and_the_next_run_resumes(
    context: JobContext, kite: SimulatedKite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkbrokers_redis.kite.history_api.HistoryApi._sleep", lambda *_: None)
    span = (OPENED_S * 1000, (OPENED_S + 60) * 1000)
    real = context.history.rows
    calls: list[int] = []

    def rows(token: int, *arguments: Any) -> Any:
        calls.append(token)
        if len(calls) == 3:
            kite.faults.add("503", count=4, on="rest", path="/instruments/historical")
        return real(token, *arguments)

    monkeypatch.setattr(context.history, "rows", rows)
    with pytest.raises(KiteUnavailable):
        repair_gap(TOKENS[:5], *span, context=context)
    found = repair_gap(TOKENS[:5], *span, context=context)
    assert len(calls) == 3 + 3  # two were done, the third is asked for again
    assert found["instruments"] == 5


def test_repaired_rows_reach_the_lists_and_all_longer_intervals(
    context: JobContext, kite: SimulatedKite, aggregator: Callable[[], None]
) -> None:
    aggregator()
    found = repair_gap([STOCK], OPENED_S * 1000, KNOWN_S * 1000, context=context)
    assert found["applied"] is True
    assert stored(context, STOCK, "1m") == kite_rows(kite, STOCK, "minute", OPENED_S, KNOWN_S)
    assert stored(context, STOCK, "15m") == kite_rows(kite, STOCK, "15minute", OPENED_S, KNOWN_S - 899)
    flags = {row.flag for row in read_candles(context.client, context.keys, STOCK, "1m", 1000)}
    assert flags == {"backfilled"}


def with_intervals(context: JobContext, text: str) -> JobContext:
    return JobContext(
        load_settings(intervals_text=text), context.client, context.history, context.sessions, context.clock
    )


@pytest.mark.parametrize(
    ("base", "at", "asked"),
    [
        ("1m", "10:20", ("10:20", "10:21")),
        ("5m", "10:20", ("10:20", "10:25")),
        ("10m", "10:20", ("10:15", "10:25")),
        ("30m", "10:20", ("10:15", "10:45")),
        ("60m", "09:50", ("09:15", "10:15")),
    ],
)
def test_gap_repair_requests_candles_of_the_session(
    context: JobContext, kite: SimulatedKite, base: str, at: str, asked: tuple[str, str]
) -> None:
    context = with_intervals(context, f"{base},day")
    outage_s, from_s, to_s = (clock_s(text) for text in (at, *asked))
    repair_gap([STOCK], (outage_s + 5) * 1000, (outage_s + 25) * 1000, context=context)
    [entry] = entries(context, STOCK)
    assert (entry["interval"], int(entry["from"]), int(entry["to"])) == (base, from_s, to_s)
    names = {"1m": "minute", "60m": "60minute"}
    sent = [tuple(row[:6]) for row in json.loads(entry["rows"])]
    assert (
        sent == kite_rows(kite, STOCK, names.get(base, f"{base[:-1]}minute"), from_s, to_s) and len(sent) == 1
    )


def test_gap_repair_waits_for_the_end_of_a_forming_hour(context: JobContext, clock: MovableClock) -> None:
    context = with_intervals(context, "60m,day")
    again = repair_gap([STOCK], (NOW_S - 60) * 1000, (NOW_S - 30) * 1000, context=context)
    assert again.intervals == [clock_s("11:15") - NOW_S + HISTORY_LAG_SECONDS]
    clock.move(clock_s("15:20") - NOW_S)
    again = repair_gap([FUTURE], (clock_s("15:16")) * 1000, clock_s("15:17") * 1000, context=context)
    closes_s = context.session_s(FUTURE, NOW.date())[1]
    assert again.intervals == [closes_s - clock_s("15:20") + HISTORY_LAG_SECONDS]
    assert closes_s < clock_s("16:15")


def test_gap_repair_uses_the_hours_of_each_instrument(context: JobContext) -> None:
    context = with_intervals(context, "30m,day")
    outage = [clock_s("10:20") * 1000, clock_s("10:21") * 1000]
    assert context.span_s(STOCK, *outage) == (clock_s("10:15"), clock_s("10:45"))
    assert context.span_s(4242 << 8 | 7, *outage) == (clock_s("10:00"), clock_s("10:30"))  # MCX, from 9:00


def test_nothing_is_repaired_after_the_close(context: JobContext, clock: MovableClock) -> None:
    clock.move(clock_s("18:00") - NOW_S)
    found = repair_gap([STOCK], clock_s("16:01") * 1000, clock_s("16:03") * 1000, context=context)
    assert "too_old" not in found and entries(context, STOCK) == []


@pytest.mark.parametrize("base", ["2m", "4m"])
def test_interval_that_kite_lacks_is_combined_from_minutes(
    context: JobContext, kite: SimulatedKite, base: str
) -> None:
    seconds = 60 * int(base[0])
    context = with_intervals(context, f"{base},60m,day")
    repair_gap([STOCK, INDEX], (OPENED_S + 1) * 1000, (OPENED_S + seconds + 1) * 1000, context=context)
    for token in (STOCK, INDEX):
        [entry] = entries(context, token)
        first, second = json.loads(entry["rows"])
        minutes = kite_rows(kite, token, "minute", OPENED_S, OPENED_S + 2 * seconds)
        part = minutes[len(minutes) // 2 :]
        assert (entry["interval"], first[0], second[0]) == (base, OPENED_S, OPENED_S + seconds)
        assert second[1:6] == [
            part[0][1], max(row[2] for row in part), min(row[3] for row in part),
            part[-1][4], sum(row[5] for row in part),
        ]  # fmt: skip


# --- a warm start


def test_warm_start_fetches_the_session_so_far_and_the_days(
    context: JobContext, kite: SimulatedKite, aggregator: Callable[[], None]
) -> None:
    aggregator()
    found = warm_start(TOKENS, context=context)
    assert found["instruments"] == len(TOKENS)
    assert found["applied"] is True
    for token in (STOCK, INDEX):
        assert stored(context, token, "1m") == kite_rows(kite, token, "minute", OPENED_S, KNOWN_S)
        days = stored(context, token, "day")
        expected = kite_rows(kite, token, "day", NOW_S - 900 * 86_400, OPENED_S - 12 * 3600)
        assert [row[1:] for row in days] == [row[1:] for row in expected[-365:]]
        assert len(days) == 365


def test_warm_start_before_the_open_fetches_the_previous_session(
    context: JobContext, clock: MovableClock
) -> None:
    clock.move(OPENED_S - 3600 - NOW_S)
    warm_start([STOCK], context=context)
    minutes, _days = entries(context, STOCK)
    assert (int(minutes["from"]), int(minutes["to"])) == (OPENED_S - 86_400, OPENED_S - 86_400 + 375 * 60)


def test_second_warm_start_changes_nothing(
    context: JobContext, aggregator: Callable[[], None], client: redis.Redis
) -> None:
    aggregator()
    warm_start([STOCK], context=context)
    before = stored(context, STOCK, "1m"), stored(context, STOCK, "day")
    announced = client.xlen(context.keys.closed(context.keys.shard_of(STOCK)))
    warm_start([STOCK], context=context)
    assert (stored(context, STOCK, "1m"), stored(context, STOCK, "day")) == before
    assert client.xlen(context.keys.closed(context.keys.shard_of(STOCK))) == announced


def test_indices_and_most_traded_instruments_come_first(context: JobContext, client: redis.Redis) -> None:
    busy, quiet = [token for token in TOKENS if token & 0xFF == 1][:2]
    client.hset(context.keys.quote(busy), mapping={"volume": 5_000_000, "average_price": 10})
    client.hset(context.keys.quote(quiet), mapping={"volume": 10, "average_price": "odd"})
    assert context.by_activity([quiet, busy, INDEX, quiet]) == [INDEX, busy, quiet]


# --- a day


def spoil(context: JobContext, token: int, number: int, change: Callable[[list[Any]], Any]) -> None:
    """Change one row of the 1m list, as no aggregator would."""
    key = context.keys.candles(token, "1m")
    row = msgspec.json.decode(bytes(context.client.lindex(key, number)))  # type: ignore[arg-type]
    change(row)
    context.client.lset(key, number, msgspec.json.encode(row).decode())


@pytest.fixture
def watched(context: JobContext, aggregator: Callable[[], None]) -> JobContext:
    """A store with the morning of one stock."""
    aggregator()
    assert repair_gap([STOCK], OPENED_S * 1000, KNOWN_S * 1000, context=context)["applied"]
    return context


def test_day_equal_to_kites_history_is_not_rewritten(watched: JobContext) -> None:
    before = len(entries(watched, STOCK))
    found = repair_day("2026-08-05", [STOCK], context=watched)
    assert (found["rows"], found["matched"]) == (105, 105)
    assert "sent" not in found and "changed" not in found
    assert len(entries(watched, STOCK)) == before


def test_different_rows_are_counted_and_replaced(watched: JobContext, kite: SimulatedKite) -> None:
    spoil(watched, STOCK, 5, lambda row: row.__setitem__(5, row[5] + 1))
    spoil(watched, STOCK, 6, lambda row: row.__setitem__(4, row[2]))
    spoil(watched, STOCK, 7, lambda row: row.__setitem__(8, "gap"))
    key = watched.keys.candles(STOCK, "1m")
    watched.client.lrem(key, 1, watched.client.lindex(key, 9))  # type: ignore[arg-type]
    dry = repair_day("2026-08-05", [STOCK], dry_run=True, context=watched)
    counts = {"rows": 105, "changed": 2, "missing": 1, "marked": 1, "matched": 102}
    assert {name: dry[name] for name in counts} == counts
    found = repair_day("2026-08-05", [STOCK], context=watched)
    assert {name: found[name] for name in counts} == counts
    assert found["sent"] == 1 and found["applied"] is True
    assert stored(watched, STOCK, "1m") == kite_rows(kite, STOCK, "minute", OPENED_S, KNOWN_S)
    assert repair_day("2026-08-05", [STOCK], context=watched)["matched"] == 105


def test_day_without_stored_rows_counts_all_as_missing(context: JobContext) -> None:
    found = repair_day("2026-08-05", [STOCK], dry_run=True, context=context)
    assert (found["rows"], found["missing"]) == (105, 105)


def test_closed_day_has_nothing_to_compare(context: JobContext, kite: SimulatedKite) -> None:
    assert "rows" not in repair_day("2026-08-02", [STOCK], dry_run=True, context=context)
    assert "rows" not in repair_day("2026-08-06", [STOCK], dry_run=True, context=context)  # tomorrow
    assert len(kite.limits.seen) == 0


def test_day_candles_match_kites_rows_stamped_midnight(
    context: JobContext, aggregator: Callable[[], None]
) -> None:
    aggregator()
    warm_start([STOCK], context=context)
    assert repair_day("2026-08-04", [STOCK], "day", context=context)["matched"] == 1
    assert "rows" not in repair_day("2026-08-05", [STOCK], "1d", context=context)  # not over


@pytest.mark.parametrize("interval", ["2m", "7m", "soon"])
def test_unknown_interval_of_a_backfill_is_one_line(context: JobContext, interval: str) -> None:
    with pytest.raises(UnknownInterval):
        repair_day("2026-08-05", [STOCK], interval, context=context)


# --- slices


def test_slice_ends_after_its_time_and_the_next_resumes(context: JobContext) -> None:
    progress = Progress(context.client, context.keys, "test")
    seconds = iter([0.0, 10.0, 40.0, 0.0, 1.0, 2.0])
    done: list[str] = []

    def work(part: str) -> dict[str, int]:
        done.append(part)
        return {"rows": len(part)}

    parts = ["a", "bb", "ccc", "dddd"]
    assert run_parts(progress, parts, work, clock=lambda: next(seconds)) is None
    assert done == ["a", "bb"]
    assert read_progress(context.client, context.keys, "test") == (2, 4)
    assert run_parts(progress, parts, work, clock=lambda: next(seconds)) == {"rows": 10}
    assert done == parts
    progress.forget()
    assert read_progress(context.client, context.keys, "test") is None


def test_progress_is_reported_and_unknown_fields_are_ignored(context: JobContext) -> None:
    received: list[tuple[int, int, str]] = []
    context.client.hset(context.keys.job("test"), mapping={"a": "no figures", "b": '{"rows":1}'})
    progress = Progress(context.client, context.keys, "test", lambda *result: received.append(result))
    assert run_parts(progress, ["a", "b"], lambda _: {"rows": 2}) == {"rows": 3}
    assert received == [(1, 2, ""), (2, 2, "a")]
    assert 0 < context.client.ttl(context.keys.job("test")) <= 86_400  # type: ignore[operator]
