"""History's rows and outages, rule by rule and as a property. A book is driven directly, without Redis."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.amend import (
    HistoryRows,
    Outage,
    RepairResult,
    apply_history,
    flag_lists,
    flag_outage,
    lists_in_reach,
)
from pkbrokers_redis.candles.rows import CandleList, row_text
from pkbrokers_redis.candles.state import ShardState
from tests.candles.test_rules import OPEN, TOKEN, Market, row, tick

NAN = math.nan
Row = list[Any]


class Repaired(Market):
    """A market whose shard gets repairs too, and that can change hands."""

    def backfill(
        self, first: int, last: int, *rows: Row, now: float | None = None, interval: str = "1m"
    ) -> RepairResult:
        """History answers for the seconds [first, last) after 09:15 as soon as they are over, or at `now`."""
        k = [each.name for each in self.book.intervals].index(interval)
        lists = {n: self._list(n) for n in range(len(self.book.intervals))}
        now_ms = (OPEN + (last + 2 if now is None else now)) * 1000
        self.book.event_clock = False
        result = apply_history(
            self.book, HistoryRows(TOKEN, k, OPEN + first, OPEN + last, list(rows)), lists, now_ms
        )
        self.book.event_clock = True
        for n, rows_of in lists.items():
            self._keep(n, rows_of)
        self.commit(close=False)
        return result

    def outage(self, first: float, last: float) -> int:
        """The feed was down in [first, last), seconds after 09:15."""
        outage = Outage([TOKEN], (OPEN + first) * 1000, (OPEN + last) * 1000)
        places = list(lists_in_reach(self.book, outage))
        marked = flag_outage(self.book, outage)
        lists = {place: self._list(place.k) for place in places}
        marked += flag_lists(self.book, outage, lists)
        for place, rows_of in lists.items():
            self._keep(place.k, rows_of)
        self.commit(close=False)
        return marked

    def change_hands(self) -> None:
        """The next aggregator knows what was committed, and nothing else."""
        old = self.book
        self.book = ShardState(
            old.intervals, old.sessions, grace_seconds=old.grace_ms / 1000, event_clock=True
        )
        if str(TOKEN) in self.state:
            current = {name: row_text(each) for name, each in self.current.get(TOKEN, {}).items()}
            marks = self.state.get(f"{TOKEN}:candles")
            self.book.restore(TOKEN, self.state[str(TOKEN)], marks, current)
        self.book.arrays.scalars[col.WATERMARK] = old.watermark_ms

    def _list(self, k: int) -> CandleList:
        interval = self.book.intervals[k]
        stored = self.lists.get((TOKEN, interval.name), {})
        return CandleList(
            [row_text(stored[start]) for start in sorted(stored)[-interval.keep :]], interval.keep
        )

    def _keep(self, k: int, rows: CandleList) -> None:
        if rows.changed:
            texts = [msgspec.json.decode(text) for text in rows.texts()]
            self.lists[TOKEN, self.book.intervals[k].name] = {each[0]: each for each in texts}

    @property
    def inst(self) -> Any:
        return self.book.arrays.inst[self.book.index(TOKEN)]

    def adds_up(self) -> bool:
        """Rule 2, as `pkb doctor` shows it."""
        total = sum(each[5] for each in self.rows("1m"))
        return bool(abs(total - (self.inst[col.CUM_VOLUME] - self.inst[col.BASELINE])) < 1e-6)

    def flags(self, interval: str) -> list[str]:
        return [each[8] if len(each) > 8 else "" for each in self.rows(interval)]


def minute(n: int, *prices: float, volume: float, oi: float | None = None) -> Row:
    """What history says of minute `n` after 09:15: open, high, low, close."""
    return [OPEN + 60 * n, *prices, volume, oi]


def three_minutes() -> Repaired:
    """09:15 whole; 09:16 lost but for its first seconds; 09:17 has the volume of what was lost."""
    return Repaired().take(
        tick(-10, 100, 1_000), tick(5, 101, 1_010), tick(50, 102, 1_020),
        tick(65, 103, 1_030), tick(130, 105, 1_100), tick(185, 104, 1_110),
    )  # fmt: skip


LOST = (minute(1, 103, 109, 99, 106, volume=60), minute(2, 106, 106, 105, 105, volume=20))


# -- outages -----------------------------------------------------------------------------------------


def test_an_outage_marks_every_candle_it_touched_and_none_beside_it() -> None:
    market = three_minutes()
    assert market.outage(70, 125) == 5  # 09:16, 09:17, five minutes, the hour; and the day, by hand here
    assert market.flags("1m") == ["", "gap", "gap", ""]
    assert market.flags("5m") == market.flags("60m") == ["gap"]


def test_an_announced_candle_that_gets_the_mark_is_announced_again() -> None:
    market = three_minutes().take(tick(190, 104, 1_111))
    assert ("1m", OPEN + 120, 0) in market.closed
    market.outage(70, 125)
    assert ("1m", OPEN + 120, 1) in market.closed
    assert ("1m", OPEN + 180, 1) not in market.closed


def test_a_candle_that_only_begins_later_gets_the_mark_too_and_so_does_a_successor() -> None:
    market = Repaired().take(tick(-10, 100, 1_000), tick(5, 101, 1_010))
    market.outage(70, 125)
    market.change_hands()
    market.take(tick(130, 105, 1_100), tick(181, 105, 1_110))
    assert market.flags("1m") == ["", "gap", ""]
    assert market.flags("60m") == ["gap"]


def test_rows_that_left_memory_get_the_gap_flag_in_their_lists() -> None:
    market = Repaired().take(*(tick(60 * n, 100, 1_000 + n) for n in range(-1, 10)))
    market.outage(130, 250)
    assert market.flags("1m") == ["", "", "gap", "gap", "gap", *[""] * 5]


def test_outages_that_touch_are_one() -> None:
    market = Repaired().take(tick(5, 100, 1_000), tick(6, 100, 1_001))
    market.outage(70, 100)
    market.outage(100, 125)
    assert [market.inst[col.GAP_FROM], market.inst[col.GAP_TO]] == [(OPEN + 70) * 1000, (OPEN + 125) * 1000]


def test_partial_says_more_than_gap() -> None:
    market = Repaired().take(tick(5, 100, 1_000), tick(50, 101, 1_010))
    market.outage(20, 40)
    assert market.flags("1m") == ["partial"]


def test_the_day_candle_has_its_packets_own_fields_and_no_gap() -> None:
    day = (100.0, 120.0, 90.0)
    market = Repaired().take(tick(-10, 100, 1_000, day=day), tick(5, 101, 1_010, day=day))
    market.outage(1, 3)
    assert market.flags("1m") == ["gap"] and market.flags("day") == [""]
    market = Repaired().take(tick(-10, 100, None), tick(5, 101, None))
    market.outage(1, 3)
    assert market.flags("day") == ["gap"]


# -- rows of the base interval -----------------------------------------------------------------------


def test_history_replaces_the_rows_of_an_outage_and_recomposes_longer_candles() -> None:
    market = three_minutes()
    market.outage(70, 125)
    result = market.backfill(60, 180, *LOST)
    assert market.rows("1m") == [
        row(0, 101, 102, 101, 102, 20, None, 2),
        row(60, 103, 109, 99, 106, 60, None, 1, "backfilled"),
        row(120, 106, 106, 105, 105, 20, None, 1, "backfilled"),
        row(180, 104, 104, 104, 104, 10, None, 1),
    ]
    assert market.rows("5m") == [row(0, 101, 109, 99, 104, 110, None, 5, "backfilled")]
    assert market.rows("60m") == market.rows("5m")
    assert market.adds_up() and (result.rows, result.malformed, result.forming) == (5, 0, 0)


def test_the_candle_that_forms_goes_on_as_if_nothing_had_been_missing() -> None:
    market = three_minutes()
    market.outage(70, 125)
    market.backfill(60, 180, *LOST)
    market.take(tick(200, 107, 1_130))
    assert market.rows("5m") == [row(0, 101, 109, 99, 107, 130, None, 6, "backfilled")]
    assert market.adds_up()


def test_a_copy_counted_at_its_receive_time_leaves_no_extreme_in_a_longer_candle() -> None:
    # What Kite resends after a reconnect has no trade time: traded in 09:19, taken for a trade of 09:20.
    market = Repaired().take(
        tick(-10, 110, 1_000), tick(5, 110, 1_010), tick(302.5, 98, 1_050, at=302.5),
        tick(320, 105, 1_060), tick(365, 106, 1_070),
    )  # fmt: skip
    market.outage(250, 302)
    market.backfill(
        240, 360, minute(4, 104, 104, 98, 98, volume=40), minute(5, 105, 105, 105, 105, volume=10)
    )
    assert market.rows("5m")[1] == row(300, 105, 106, 105, 106, 20, None, 3, "backfilled")
    assert market.rows("5m")[0][1:6] == [110, 110, 98, 98, 50]
    assert market.adds_up()


def test_an_extreme_between_two_minutes_stays_in_the_longer_candle() -> None:
    market = Repaired().take(
        tick(-10, 110, 1_000, day=(110, 110, 110)), tick(5, 110, 1_010, day=(110, 110, 110)),
        tick(59, 109, 1_020, day=(110, 110, 109)), tick(61, 109, 1_030, day=(110, 112, 109)),
        tick(185, 111, 1_100, day=(110, 112, 109)), tick(245, 110, 1_110, day=(110, 112, 109)),
    )  # fmt: skip
    assert market.rows("5m")[0][2] == 112 and all(each[2] < 112 for each in market.rows("1m"))
    market.outage(70, 180)
    market.backfill(
        120, 240, minute(2, 110, 111, 109, 110, volume=30), minute(3, 111, 111, 110, 110, volume=40)
    )
    assert market.rows("5m")[0][2] == 112


def test_what_history_finds_and_we_never_saw_becomes_a_row_and_lowers_the_baseline() -> None:
    market = Repaired().take(tick(-10, 100, 1_000), tick(5, 101, 1_010), tick(130, 105, 1_100))
    market.backfill(60, 120, minute(1, 103, 109, 99, 106, volume=60))
    assert market.rows("1m")[1] == row(60, 103, 109, 99, 106, 60, None, 0, "backfilled")
    assert market.inst[col.BASELINE] == 940 and market.adds_up()


def test_what_is_equal_already_is_left_alone_and_what_is_equal_and_marked_is_result() -> None:
    whole = minute(0, 101, 102, 101, 102, volume=20)
    market = three_minutes()
    announced = list(market.closed)
    assert market.backfill(0, 60, whole).rows == 0
    assert market.closed == announced
    market = three_minutes()
    market.outage(10, 20)
    assert market.flags("1m") == ["gap", "", "", ""] and market.flags("5m") == ["gap"]
    assert market.backfill(0, 60, whole).rows == 4
    assert market.flags("1m") == ["backfilled", "", "", ""] and market.flags("5m") == ["backfilled"]
    assert market.backfill(0, 60, whole).rows == 0


def test_rows_that_history_does_not_have_stay() -> None:
    market = three_minutes()
    rows = market.rows("1m")
    market.backfill(0, 180)
    assert market.rows("1m") == rows


def test_open_interest_is_historys_where_it_has_any() -> None:
    market = Repaired().take(
        tick(-10, 100, 0, oi=1), tick(5, 101, 10, oi=7), tick(65, 101, 20, oi=8), tick(125, 1, 30)
    )
    market.backfill(
        0, 120, minute(0, 101, 102, 101, 101, volume=10), minute(1, 101, 101, 101, 101, volume=10, oi=9)
    )
    assert [each[6] for each in market.rows("1m")] == [7, 9, None]


def test_a_candle_that_is_not_over_is_passed_over() -> None:
    market = three_minutes()
    forming = minute(3, 1, 999, 1, 5, volume=900)
    assert market.backfill(180, 240, forming, now=190).forming == 1
    assert market.backfill(180, 240, forming, now=241).forming == 1  # late ticks may still come
    assert market.rows("1m")[-1] == row(180, 104, 104, 104, 104, 10, None, 1)
    assert market.backfill(180, 240, forming, now=242).forming == 0
    assert market.rows("1m")[-1][1:6] == [1, 999, 1, 5, 900]


@pytest.mark.parametrize(
    "odd",
    [
        [OPEN + 61, 1, 1, 1, 1, 1, None],  # no minute's start
        [OPEN + 3_600, 1, 1, 1, 1, 1, None],  # outside the span
        [OPEN, 1, 1, 2, 1, 1, None],  # low above high
        [OPEN, 3, 2, 1, 1, 1, None],  # open beyond high
        [OPEN, 1, 1, 1, 1, -1, None],
        [OPEN, 1, 1, 1, 1, 1, -1],
        [OPEN, 0, 0, 0, 0, 0, None],
        [OPEN, 1, 1, 1, 1, 1e13, None],
        [OPEN, 1, math.inf, 1, 1, 1, None],
        [OPEN, 1, NAN, 1, 1, 1, None],
        [OPEN, 1, None, 1, 1, 1, None],
        [OPEN, "1", 1, 1, 1, 1, None],
        [OPEN, 1, 1, 1, 1, 1, "1"],
        [OPEN, 1, 1, 1],
        [],
        [None, 1, 1, 1, 1, 1, None],
        [OPEN + 0.5, 1, 1, 1, 1, 1, None],
    ],
)
def test_an_invalid_row_of_history_is_counted_and_the_valid_ones_are_applied(odd: Row) -> None:
    market = three_minutes()
    result = market.backfill(0, 180, odd, LOST[0])
    assert result.malformed == 1
    assert market.rows("1m")[1][1:6] == [103, 109, 99, 106, 60]
    assert market.adds_up()


def test_rows_outside_the_session_are_none() -> None:
    market = three_minutes()
    before_the_open = [OPEN - 60, 1, 1, 1, 1, 500, None]
    assert market.backfill(-600, 60, before_the_open).malformed == 1
    assert market.rows("1m")[0][0] == OPEN


def test_a_row_older_than_a_full_list_is_not_kept_and_moves_no_sum() -> None:
    market = Repaired(intervals="1m:3,5m:3,day").take(*(tick(60 * n, 100, 1_000 + n) for n in range(-1, 10)))
    baseline = market.inst[col.BASELINE]
    assert market.backfill(60, 120, minute(1, 103, 109, 99, 106, volume=60)).rows == 0
    assert market.inst[col.BASELINE] == baseline


def test_where_base_rows_are_gone_a_longer_candle_is_extended() -> None:
    market = Repaired(intervals="1m:3,15m:3,day").take(*(tick(60 * n, 100, 1_000 + n) for n in range(-1, 10)))
    assert market.rows("15m") == [row(0, 100, 100, 100, 100, 10, None, 10)]
    market.lists[TOKEN, "1m"] = {
        start: each for start, each in market.lists[TOKEN, "1m"].items() if start > OPEN + 300
    }
    market.backfill(480, 540, minute(8, 100, 109, 99, 106, volume=51))
    assert market.rows("15m") == [row(0, 100, 109, 99, 100, 60, None, 10, "backfilled")]


# -- warm start --------------------------------------------------------------------------------------

MORNING = [minute(n, 100, 101, 99, 100, volume=10) for n in range(165)]  # 09:15 to 12:00
NOON = 165 * 60


@pytest.mark.parametrize("rows_first", [True, False])
def test_who_begins_at_noon_has_the_morning_from_history_and_its_own_volume_in_its_minute(
    rows_first: bool,
) -> None:
    market = Repaired()
    first = tick(NOON + 20, 100, 5_000)
    if rows_first:
        market.backfill(0, NOON, *MORNING, now=NOON + 10)
        market.change_hands()
        market.take(first)
    else:
        market.take(first)
        market.backfill(0, NOON, *MORNING, now=NOON + 30)
    market.take(tick(NOON + 40, 102, 5_030))
    rows = market.rows("1m")
    assert len(rows) == 166 and market.adds_up()
    assert rows[-1] == row(NOON, 102, 102, 102, 102, 30, None, 1, "partial")
    assert market.rows("60m")[-1] == row(9900 - 2700, 100, 102, 99, 102, 450 + 30, None, 1, "partial")
    assert [each[5] for each in market.rows("60m")] == [600, 600, 480]
    assert sum(each[5] for each in rows) == 1_680

    market.take(tick(NOON + 65, 103, 5_040))
    market.backfill(NOON, NOON + 60, minute(165, 101, 102, 98, 102, volume=130), now=NOON + 70)
    assert market.flags("1m")[-2] == "backfilled" and market.flags("60m")[-1] == "backfilled"
    assert market.rows("60m")[-1][1:6] == [100, 103, 98, 103, 450 + 130 + 10]
    assert market.adds_up()


def test_the_first_tick_of_today_does_not_count_the_backfilled_morning_again() -> None:
    market = Repaired().take(tick(-86_400, 90, 8_000), tick(-86_399, 91, 8_001))
    market.backfill(0, NOON, *MORNING, now=NOON + 10)
    assert market.inst[col.CUM_VOLUME] == 1_650
    market.take(
        tick(NOON - 5, 100, 1_700)
    )  # Kite's copy of the last trade; 50 had been traded before the open
    assert sum(each[5] for each in market.rows("1m") if each[0] >= OPEN) == 1_650
    market.take(tick(NOON + 20, 102, 1_730))
    assert market.rows("1m")[-1] == row(NOON, 102, 102, 102, 102, 30, None, 1)
    assert market.rows("60m")[-1][5] == 450 + 30
    assert market.rows("day")[-1][5] == 1_730


def test_ticks_that_come_after_history_spoke_of_their_minute_change_no_row_and_no_sum() -> None:
    market = three_minutes()
    market.backfill(0, 180, *LOST)
    rows = {name: market.rows(name) for name in ("1m", "5m", "60m")}
    market.take(tick(70, 150, 1_040), tick(100, 50, 1_095))
    assert {name: market.rows(name) for name in rows} == rows
    assert market.book.counts()["already_backfilled"] == 2 and market.adds_up()


def test_an_instrument_without_volume_is_result_too() -> None:
    market = Repaired().take(tick(-10, 100, None), tick(5, 101, None), tick(130, 105, None))
    market.outage(60, 120)
    market.backfill(60, 120, minute(1, 103, 109, 99, 106, volume=0))
    assert market.rows("1m")[1] == row(60, 103, 109, 99, 106, 0, None, 0, "backfilled")
    assert market.rows("60m")[0][1:6] == [101, 109, 99, 105, 0]
    market.take(tick(131, 105, 700), tick(132, 106, 710))
    assert market.rows("1m")[2][5] == 10


# -- other intervals ---------------------------------------------------------------------------------


def test_days_of_history_are_rows_by_themselves() -> None:
    market = three_minutes()
    yesterday = OPEN - 86_400
    midnight = yesterday - 9 * 3600 - 15 * 60
    result = market.backfill(-90_000 * 2, -80_000, [midnight, 90, 95, 85, 91, 5_000, None], interval="day")
    assert (result.rows, result.malformed) == (1, 0)
    assert market.rows("day")[0] == [yesterday, 90, 95, 85, 91, 5_000, None, 0, "backfilled"]
    assert market.adds_up()


def test_rows_of_a_longer_interval_are_replaced_and_nothing_else() -> None:
    market = three_minutes()
    minutes = market.rows("1m")
    market.backfill(0, 300, [OPEN, 101, 120, 90, 104, 999, None], interval="5m", now=400)
    assert market.rows("5m") == [row(0, 101, 120, 90, 104, 999, None, 5, "backfilled")]
    assert market.rows("1m") == minutes and market.adds_up()


DAY_OVER = 6.5 * 3600 + 60  # seconds after 09:15


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_day_of_kites_day_history_is_never_made_of_its_minutes(in_memory: bool) -> None:
    market = three_minutes()
    midnight = OPEN - 9 * 3600 - 15 * 60
    settled = [midnight, 100, 103, 97, 102.75, 5_000, None]
    market.backfill(-40_000, 60_000, settled, interval="day", now=DAY_OVER)
    wanted = [OPEN, *settled[1:6], None, 5, "backfilled"]
    assert market.rows("day") == [wanted]
    if not in_memory:  # the next days push it out
        for n in range(1, 5):
            market.take(tick(86_400 * n, 110, 10), tick(86_400 * n + 60, 111, 20))
    market.backfill(60, 120, minute(1, 103, 101, 99, 100.5, volume=70), now=4 * 86_400 + DAY_OVER)
    market.backfill(60, 180, *LOST, now=4 * 86_400 + DAY_OVER)
    assert market.rows("day")[0] == wanted
    market.outage(60, 180)
    market.backfill(60, 180, *LOST, now=4 * 86_400 + DAY_OVER)
    assert market.rows("day")[0] == wanted


def test_a_candle_that_history_answered_whole_is_not_partial_whenever_it_is_asked() -> None:
    market = Repaired(intervals="1m,5m,day").take(tick(130, 100, 1_000), tick(140, 101, 1_010))
    market.take(tick(190, 102, 1_030), tick(400, 103, 1_040))
    assert market.flags("5m")[0] == market.flags("day")[0] == "partial"
    tomorrow = 86_400
    market.take(tick(tomorrow - 60, 104, 5), tick(tomorrow + 5, 104, 10), tick(tomorrow + 70, 104, 20))
    market.backfill(tomorrow, tomorrow + 60, minute(24 * 60, 104, 104, 104, 104, volume=10))
    minutes = [minute(n, 100, 104, 99, 101, volume=10) for n in range(375)]
    market.backfill(0, 375 * 60, *minutes, now=tomorrow + 200)
    assert market.flags("5m")[0] == "backfilled"
    assert market.flags("day")[0] == "backfilled"


# -- the property ------------------------------------------------------------------------------------


def history_of(trades: list[tuple[int, float, int]], first: int, last: int) -> list[Row]:
    """The minutes of all trades, naively."""
    minutes: dict[int, Row] = {}
    for second, price, quantity in trades:
        if first <= second < last:
            cells = minutes.setdefault(
                second // 60, [OPEN + second // 60 * 60, price, price, price, price, 0, None]
            )
            cells[2], cells[3], cells[4] = max(cells[2], price), min(cells[3], price), price
            cells[5] += quantity
    return [minutes[n] for n in sorted(minutes)]


@st.composite
def a_day(draw: st.DrawFn) -> Any:
    """Trades of ninety minutes, one or two outages of the feed, and when history comes."""
    seconds = draw(st.lists(st.integers(0, 5_399), min_size=3, max_size=60))
    prices = st.integers(90, 110)
    trades = [(second, float(draw(prices)), draw(st.integers(1, 50))) for second in sorted(seconds)]
    edges = sorted(draw(st.lists(st.integers(1, 5_390), min_size=2, max_size=4, unique=True)))
    outages = list(zip(edges[::2], edges[1::2], strict=False))
    return trades, outages, draw(st.integers(0, 2_000)), draw(st.booleans()), draw(st.booleans())


@given(a_day())
def test_after_gap_and_history_every_row_is_as_if_the_feed_had_never_been_down(day: Any) -> None:
    trades, outages, delay, day_fields, hands = day
    whole, repaired = Repaired(), Repaired()
    ticks = []
    volume, high, low = 500, 100.0, 100.0
    for second, price, quantity in [(-10, 100.0, 0), *trades]:
        volume, high, low = volume + quantity, max(high, price), min(low, price)
        fields = (100.0, high, low) if day_fields else None
        ticks.append((second, tick(second, price, volume, day=fields, at=second + 0.3)))
    for _, each in ticks:
        whole.take(each)

    events: list[tuple[float, int, Any]] = []
    for second, each in ticks:
        if not any(first <= second < last for first, last in outages):
            events.append((second, 1, each))
    for first, last in outages:
        known = [each for second, each in ticks if second < last]
        copy = [*known[-1][:9], (OPEN + last) * 1000.0]  # Kite sends the last trade again after a subscribe
        events.append((last, 0, copy))
        events.append((last, 2, (first, last)))
        minutes = (first // 60 * 60, last // 60 * 60 + 60)
        events.append((minutes[1] + 2 + delay, 3, minutes))
    for at, kind, what in sorted(events, key=lambda event: (event[0], event[1])):
        if kind <= 1:
            repaired.take(what)
        elif kind == 2:
            repaired.outage(*what)
        else:
            repaired.backfill(*what, *history_of(trades, *what), now=at)
        if hands:
            repaired.change_hands()
        assert repaired.adds_up()

    hit = [(OPEN + first, OPEN + last) for first, last in outages]
    for interval in repaired.book.intervals[:-1]:
        rows = repaired.rows(interval.name)
        assert [each[:6] for each in rows] == [each[:6] for each in whole.rows(interval.name)]
        for each in rows:
            touched = any(first < each[0] + interval.seconds and each[0] < last for first, last in hit)
            flag = each[8] if len(each) > 8 else ""
            if not touched or (interval.seconds == 60 and len(outages) == 1):
                assert flag == ("backfilled" if touched else "")
            else:  # history may have answered before the outage, or the candle, was known
                assert flag in ("backfilled", "")
    assert [each[:6] for each in repaired.rows("day")] == [each[:6] for each in whole.rows("day")]
