"""Trade files replayed one after the other: the next file continues the one before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pkbrokers_redis.client.replay import Replay, Summary
from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.store.connect import connect
from pkbrokers_redis.store.symbols import load_symbols, save_instruments
from tests.aggregate.stores import INFY, Row, Store, make_store
from tests.support import run_pkb, settings_env, wait_until

__all__ = ["make_store"]  # a fixture

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)

MONDAY = ("2026-01-05T10:00:00,ABC,100,5", "2026-01-05T10:01:00,ABC,105,4", "2026-01-05T10:02:00,ABC,103,3")
TUESDAY = ("2026-01-06T10:00:00,ABC,150,5", "2026-01-06T10:01:00,ABC,155,4")
MORNING, AFTERNOON = MONDAY[:2], ("2026-01-05T14:00:00,ABC,110,50", "2026-01-05T14:01:00,ABC,111,60")


class Player:
    """Replays files into a store, and has them applied."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder

    def play(self, *lines: str, column: str = "quantity") -> Summary:
        summary = self.write(*lines, column=column)
        self.store.drain()
        return summary

    def write(self, *lines: str, column: str = "quantity", stop: threading.Event | None = None) -> Summary:
        path = self.folder / "trades.csv"
        path.write_text("\n".join((f"time,symbol,price,{column}", *lines)) + "\n")
        settings = self.store.settings
        stop = stop or threading.Event()
        return Replay(lambda: connect(settings), settings, speed=None, stop=stop).run(path)

    def rows(self, interval: str = "1m") -> list[Row]:
        [token] = load_symbols(self.store.client, self.store.keys)
        return [row[1:6] for row in self.store.rows(token, interval)]


@pytest.fixture
def player(make_store: Callable[..., Store], tmp_path: Path) -> Player:
    return Player(make_store(shards=1), tmp_path)


def test_a_file_of_the_next_day_changes_nothing_of_the_day_before(player: Player) -> None:
    player.play(*MONDAY)
    before = player.rows(), player.rows("day")
    assert before == ([[100, 100, 100, 100, 5], [105, 105, 105, 105, 4], [103, 103, 103, 103, 3]],
                      [[100, 105, 100, 103, 12]])  # fmt: skip
    assert player.play(*TUESDAY).ticks == 2
    assert player.rows() == [*before[0], [150, 150, 150, 150, 5], [155, 155, 155, 155, 4]]
    assert player.rows("day") == [*before[1], [150, 155, 150, 155, 9]]


@pytest.mark.parametrize("interval", ["1m", "day"])
def test_two_files_of_a_date_equal_one_file(player: Player, interval: str) -> None:
    player.play(*MORNING)
    player.play(*AFTERNOON)
    parts = player.rows(interval)
    player.store.client.flushdb()
    player.play(*MORNING, *AFTERNOON)
    assert parts == player.rows(interval)
    assert sum(row[4] for row in parts) == 119


def test_two_files_of_cumulative_volume_equal_one_file(player: Player) -> None:
    player.play("2026-01-05T10:00:00,ABC,100,500", "2026-01-05T10:01:00,ABC,105,900", column="volume")
    player.play("2026-01-05T14:00:00,ABC,110,950", "2026-01-05T14:01:00,ABC,111,1010", column="volume")
    assert [row[4] for row in player.rows()] == [500, 400, 50, 60]
    player.play("2026-01-06T09:15:00,ABC,120,2000", column="volume")
    assert [row[4] for row in player.rows("day")] == [1010, 2000]


def test_the_same_trades_again_change_nothing(player: Player) -> None:
    player.play(*MONDAY[:2])
    assert player.play(*MONDAY, *TUESDAY).rows_older == 0
    before = player.store.all_rows()
    assert [row[4] for row in player.rows()] == [5, 4, 3, 5, 4]
    again = player.play(*MONDAY, *TUESDAY)
    assert (again.ticks, again.rows_older) == (2, 3)
    assert player.store.all_rows() == before


def test_rows_of_an_earlier_date_are_left_out_and_counted(player: Player) -> None:
    player.play(*TUESDAY)
    before = player.store.all_rows()
    older = player.play(*MONDAY)
    assert (older.ticks, older.rows_older) == (0, 3)
    assert player.store.all_rows() == before


@pytest.mark.parametrize("other", [MORNING, ("2026-01-05T14:00:30,ABC,110,7",)])
def test_other_trades_of_a_stored_time_are_a_one_line_error(player: Player, other: tuple[str, ...]) -> None:
    player.play(*AFTERNOON)
    before = player.store.client.xlen(player.store.keys.ticks(0))
    with pytest.raises(InputFileError, match=r"NSE:ABC on 2026-01-05.*in order of time") as error:
        player.write(*other)
    assert "\n" not in str(error.value)
    assert player.store.client.xlen(player.store.keys.ticks(0)) == before


def test_corrected_prices_of_stored_trades_are_refused_by_name(player: Player) -> None:
    player.play(*MONDAY)
    before = player.store.all_rows()
    corrected = (MONDAY[0].replace(",100,", ",99.5,"), *MONDAY[1:])
    with pytest.raises(InputFileError, match="NSE:ABC has other prices than the store at 2026-01-05 10:00"):
        player.write(*corrected)
    assert player.store.all_rows() == before
    again = player.play(*MONDAY)
    assert again.rows_known == 3
    assert player.store.all_rows() == before


def test_the_command_says_how_many_rows_were_known_or_out_of_order(player: Player) -> None:
    player.play(*MONDAY)
    path = player.folder / "trades.csv"
    env = settings_env(player.store.settings)
    assert "3 rows are in the store already" in run_pkb("replay", str(path), env=env).stdout
    path.write_text("time,symbol,price,volume\n2026-01-06T09:59:01,X,1,9\n2026-01-06T09:59:02,X,1,5\n")
    assert "1 rows were out of order" in run_pkb("replay", str(path), env=env).stdout


def test_a_file_waits_until_the_one_before_is_applied(player: Player) -> None:
    player.write(*MORNING)
    stop = threading.Event()
    stop.set()
    assert player.write(*AFTERNOON, stop=stop).ticks == 0
    thread = threading.Thread(target=player.write, args=AFTERNOON)
    thread.start()
    aggregator = player.store.aggregator()
    wait_until(lambda: aggregator.step(block_ms_max=1) == 0 and not thread.is_alive(), what="the second file")
    player.store.drain(aggregator)
    assert [row[4] for row in player.rows()] == [5, 4, 50, 60]


def test_an_instrument_of_the_master_that_never_ticked_starts_at_0(player: Player) -> None:
    row = {"instrument_token": INFY, "tradingsymbol": "ABC", "exchange": "NSE"}
    save_instruments(player.store.client, player.store.keys, [row])
    player.play(*MORNING)
    assert player.rows() == [[100, 100, 100, 100, 5], [105, 105, 105, 105, 4]]


def test_the_command_reports_what_it_left_out(player: Player) -> None:
    player.play(*TUESDAY)
    (player.folder / "trades.csv").write_text("\n".join(("time,symbol,price,quantity", *MONDAY)))
    env = settings_env(player.store.settings)
    replayed = run_pkb("replay", str(player.folder / "trades.csv"), env=env)
    assert "3 rows left out: older than what the store has of their instruments" in replayed.stdout
    (player.folder / "trades.csv").write_text("time,symbol,price,quantity\n2026-01-06T09:59:00,ABC,1,1\n")
    refused = run_pkb("replay", str(player.folder / "trades.csv"), env=env)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1


def test_a_file_that_ends_before_the_open_is_continued(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    player = Player(make_store(shards=1, sessions="market"), tmp_path)
    player.play("2026-01-05T09:05:00,ABC,100,5", "2026-01-05T09:06:00,ABC,101,7")
    player.play("2026-01-05T09:20:00,ABC,102,3", "2026-01-05T09:21:00,ABC,103,4")
    assert player.rows() == [[102, 102, 102, 102, 3], [103, 103, 103, 103, 4]]
    assert player.rows("day")[0][4] == 19
