"""Ticks older than every candle in memory amend their rows in the list; other texts there stay."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pkbrokers_redis.candles.amend import amend_rows
from pkbrokers_redis.candles.state import LateTick

MINUTE = 1_767_584_700  # 09:15
Row = list[Any]


def texts(*rows: Row) -> list[bytes]:
    return [msgspec.json.encode(row) for row in rows]


def minute(n: int, *prices: float, volume: float = 10, oi: float | None = None, ticks: int = 3) -> Row:
    """The row of minute `n`: open, high, low, close."""
    return [MINUTE + 60 * n, *prices, volume, oi, ticks]


def late(
    n: int, price: float, volume: float, *, quantity: float = 1, after: float = 1_030, oldest: int = 3
) -> LateTick:
    """A tick of minute `n`. The slots begin at minute `oldest`, before which `after` had been traded."""
    start, oldest_start = MINUTE + 60 * n, MINUTE + 60 * oldest
    return LateTick(408065, 0, start, price, quantity, volume, math.nan, after, oldest_start)


def amended(
    rows: list[Row], tick: LateTick, is_day: bool = False, *, keep: int = 3, flag: str = ""
) -> list[Row]:
    changed = amend_rows(texts(*rows), tick, is_day, keep=keep, flag=flag)
    for start, text, _ in changed:
        assert msgspec.json.decode(text)[0] == start
    return [msgspec.json.decode(each.text) for each in changed]


# Three minutes of 10 each, from 1,000 on: they end at 1,010, 1,020 and 1,030.
THREE = [minute(0, 100, 101, 99, 100), minute(1, 100, 101, 99, 100), minute(2, 100, 101, 99, 100)]


def test_a_price_beyond_the_row_becomes_its_high_and_is_counted() -> None:
    assert amended(THREE, late(1, 105, 1_015)) == [minute(1, 100, 105, 99, 100, ticks=4)]


def test_what_lies_inside_the_row_changes_nothing() -> None:
    assert amended(THREE, late(1, 100.5, 1_015)) == []


def test_the_highest_volume_of_its_minute_gives_the_close() -> None:
    rows = [
        minute(0, 100, 101, 99, 100),
        minute(1, 100, 101, 99, 100, volume=6),
        minute(2, 100, 101, 99, 100, volume=14),
    ]
    # 1,016 stood at the end of minute 1, then this: four more had traded in it, and not in minute 2.
    assert amended(rows, late(1, 99.5, 1_020)) == [
        minute(1, 100, 101, 99, 99.5, volume=10, ticks=4),
        minute(2, 100, 101, 99, 100, volume=10),
    ]


def test_the_first_trade_of_its_minute_gives_the_open() -> None:
    assert amended(THREE, late(1, 100.5, 1_015, quantity=5)) == [minute(1, 100.5, 101, 99, 100, ticks=4)]


def test_a_minute_that_had_no_row_gets_one_and_its_volume_comes_out_of_the_next() -> None:
    rows = [minute(0, 100, 101, 99, 100), minute(2, 100, 101, 99, 100, volume=20)]
    assert amended(rows, late(1, 98, 1_014)) == [
        minute(1, 98, 98, 98, 98, volume=4, ticks=1),
        minute(2, 100, 101, 99, 100, volume=16),
    ]


def test_the_sum_of_volumes_never_changes() -> None:
    rows = [minute(0, 100, 101, 99, 100), minute(2, 100, 101, 99, 100, volume=20)]
    for volume in (900, 1_010, 1_011, 1_025, 1_030, 5_000):
        after = {row[0]: row for row in [*rows, *amended(rows, late(1, 98, volume))]}
        from_slots = max(0, volume - 1_030)  # what the book takes out of the candles it holds
        assert sum(row[5] for row in after.values()) == 30 + from_slots, volume
        assert all(row[5] >= 0 for row in after.values())


def test_a_late_tick_gains_the_volume_that_the_next_candle_in_memory_lost() -> None:
    assert amended(THREE, late(2, 103, 1_031)) == [minute(2, 100, 103, 99, 103, volume=11, ticks=4)]


def test_a_volume_above_all_later_rows_takes_from_each_of_them() -> None:
    assert [row[5] for row in amended(THREE, late(0, 103, 1_035))] == [35, 0, 0]


def test_older_than_a_full_list_is_older_than_what_we_tell() -> None:
    assert amended(THREE, late(-1, 200, 1)) == []
    assert amended([], late(1, 200, 1)) == []


def test_a_list_with_room_takes_in_a_row_older_than_all_and_its_flag() -> None:
    changed = amended(THREE, late(-1, 99, 1_004), keep=4, flag="partial")
    assert changed == [
        [*minute(-1, 99, 99, 99, 99, volume=4, ticks=1), "partial"],
        minute(0, 100, 101, 99, 100, volume=6),
    ]


def test_only_the_row_that_was_not_there_is_new() -> None:
    changed = amend_rows(texts(THREE[0], THREE[2]), late(1, 100, 1_025), False, keep=3)
    assert [(each.start - MINUTE, each.is_new) for each in changed] == [(60, True), (120, False)]
    assert not any(each.is_new for each in amend_rows(texts(*THREE), late(1, 105, 1_015), False, keep=3))


def test_without_volumes_only_high_and_low_can_tell() -> None:
    rows = [minute(0, 100, 101, 99, 100, volume=0), minute(1, 100, 101, 99, 100, volume=0)]
    tick = late(0, 102, math.nan, after=math.nan, oldest=2)
    assert amended(rows, tick) == [minute(0, 100, 102, 99, 100, volume=0, ticks=4)]


def test_a_day_gains_nothing_from_the_next_day() -> None:
    days = [[MINUTE, 100, 101, 99, 100, 1_000, None, 9], [MINUTE + 86_400, 100, 101, 99, 100, 500, None, 9]]
    tick = LateTick(408065, 0, MINUTE, 90, 1, 2_000, math.nan, math.nan, MINUTE + 2 * 86_400)
    assert amended(days, tick, is_day=True) == [[MINUTE, 100, 101, 90, 100, 1_000, None, 10]]


def test_a_flag_stays_on_its_row() -> None:
    rows = [THREE[0], [*THREE[1], "gap"], THREE[2]]
    assert amended(rows, late(1, 105, 1_015))[0][8] == "gap"


def test_decimals_of_crypto_stay_decimals() -> None:
    rows = [minute(0, 1, 1, 1, 1, volume=0.3), minute(2, 1, 1, 1, 1, volume=0.3)]
    changed = amended(rows, late(1, 1, 10.4, after=10.6))
    assert [row[5] for row in changed] == [0.1, 0.2]


@pytest.mark.parametrize(
    "foreign",
    [
        b"junk",
        b"\xff\xfe",
        b"[]",
        b"[1,2]",
        b'{"start":1}',
        b'["x",1,1,1,1,1,null,1]',
        b"[%d,null,1,1,1,1,null,1]" % (MINUTE + 60),
        b'[%d,"\xff",1,1,1,1,null,1]' % (MINUTE + 60),
        b"[%d,1,1,1,1,1e999,null,1]" % (MINUTE + 60),
        b"[" * 5000,
    ],
)
def test_texts_that_are_no_rows_are_skipped(foreign: bytes) -> None:
    first, _, last = texts(*THREE)
    changed = amend_rows([first, foreign, last], late(2, 105, 1_025), False, keep=10)
    assert [msgspec.json.decode(each.text) for each in changed] == [minute(2, 100, 105, 99, 100, ticks=4)]


@given(st.lists(st.binary(max_size=60), max_size=5), st.integers(-2, 4), st.floats(0, 2_000))
@example([b"[1,1,1,1,1,1e308,null,1]"], 0, 1.0)
def test_no_bytes_break_it(rows: list[bytes], n: int, volume: float) -> None:
    for start, text, _ in amend_rows([*rows, *texts(*THREE)], late(n, 105, volume), False, keep=10):
        assert msgspec.json.decode(text)[0] == start
