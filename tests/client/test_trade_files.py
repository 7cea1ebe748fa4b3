"""Trade files become tick batches: however a time is written, and whatever invalid rows hold."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.candles.model import AT_MS, DEFAULT_INTERVALS, TIME_MS
from pkbrokers_redis.candles.rules import apply_ticks
from pkbrokers_redis.candles.state import ShardState
from pkbrokers_redis.client.trade_files import TICKS_PER_FRAME, TradeFile, frames_of, read_trades
from pkbrokers_redis.errors import InputFileError

SESSIONS = load_sessions("always")
DAY_MS = 86_400_000
MOMENT_MS = 1_767_584_700_000  # 2026-01-05T09:15:00+05:30
MIDNIGHT_MS = MOMENT_MS - (9 * 60 + 15) * 60_000
INFY = 408065


def read(path: Path, known: dict[str, int] | None = None) -> TradeFile:
    return read_trades(path, {"NSE:INFY": INFY} if known is None else known, SESSIONS)


def csv(folder: Path, *lines: str, header: str = "time,symbol,price,quantity") -> Path:
    path = folder / "trades.csv"
    path.write_text("\n".join((header, *lines)) + "\n")
    return path


def trades(file: TradeFile) -> list[list[float]]:
    """[token, price, quantity, volume, time_ms] of each tick behind the baselines."""
    return file.ticks[len(file.tokens) :][:, [0, 1, 2, 3, TIME_MS]].tolist()  # type: ignore[no-any-return]


def test_a_file_starts_with_a_baseline_of_0_and_counts_up(tmp_path: Path) -> None:
    file = read(
        csv(tmp_path, "2026-01-05T09:15:00+05:30,INFY,1500.05,10", "2026-01-05T09:15:01+05:30,INFY,1500,5")
    )
    assert (file.symbols, file.tokens, file.rows_refused) == (["NSE:INFY"], [INFY], 0)
    assert file.ticks[0, [0, 1, 2, 3, TIME_MS]].tolist() == [INFY, 1500.05, 0, 0, MIDNIGHT_MS - 1]
    assert trades(file) == [[INFY, 1500.05, 10, 10, MOMENT_MS], [INFY, 1500, 5, 15, MOMENT_MS + 1000]]
    assert np.isnan(file.ticks[:, 4:TIME_MS]).all() and np.isnan(file.ticks[:, AT_MS]).all()


@pytest.mark.parametrize(
    "written",
    [
        "2026-01-05T09:15:00+05:30",
        "2026-01-05T03:45:00Z",
        "2026-01-05 09:15:00",
        "2026-01-05T09:15:00.000",
        "2026-01-04T22:45:00-05:00",
        "2026-01-05T03:45:00+00",
        "1767584700",
        "1767584700.0",
        "1767584700000",
        "1767584700000000",
        "1767584700000000000",
    ],
)
def test_a_time_may_be_written_in_many_ways(tmp_path: Path, written: str) -> None:
    assert trades(read(csv(tmp_path, f"{written},INFY,1,1")))[0][4] == MOMENT_MS


def test_times_with_and_without_zones_may_be_mixed(tmp_path: Path) -> None:
    file = read(
        csv(
            tmp_path,
            "2026-01-05T09:15:03,INFY,4,1",
            "2026-01-05T03:45:00Z,INFY,1,1",
            "2026-01-05T09:15:01+05:30,INFY,2,1",
            "yesterday,INFY,9,1",
            "2026-01-04T22:45:02-05:00,INFY,3,1",
        )
    )
    assert [(price, time - MOMENT_MS) for _, price, _, _, time in trades(file)] == [
        (1, 0), (2, 1000), (3, 2000), (4, 3000),
    ]  # fmt: skip
    assert file.rows_refused == 1


def test_columns_are_found_by_name_in_any_case_and_order(tmp_path: Path) -> None:
    path = csv(tmp_path, "5, infy ,1500,x,1767584700", header="Quantity,SYMBOL,Price,venue, Time ")
    assert trades(read(path)) == [[INFY, 1500, 5, 5, MOMENT_MS]]


def test_a_cumulative_volume_gives_the_same_as_quantities(tmp_path: Path) -> None:
    path = csv(
        tmp_path, "1767584700,INFY,1,10", "1767584701,INFY,2,25", "1767584702,INFY,3,25",
        header="time,symbol,price,volume",
    )  # fmt: skip
    assert [(quantity, volume) for _, _, quantity, volume, _ in trades(read(path))] == [
        (10, 10),
        (15, 25),
        (0, 25),
    ]


def test_a_new_day_counts_from_0_again(tmp_path: Path) -> None:
    day = DAY_MS // 1000
    quantities = csv(
        tmp_path, "1767584700,INFY,1,10", f"{1767584700 + day},INFY,1,7", f"{1767584701 + day},INFY,1,1"
    )
    assert [volume for _, _, _, volume, _ in trades(read(quantities))] == [10, 7, 8]
    for first in (7, 25):
        cumulative = csv(
            tmp_path, "1767584700,INFY,1,10", f"{1767584700 + day},INFY,1,{first}",
            f"{1767584701 + day},INFY,1,{first + 2}", header="time,symbol,price,volume",
        )  # fmt: skip
        assert [volume for _, _, _, volume, _ in trades(read(cumulative))] == [10, first, first + 2]


def test_each_instrument_has_its_baseline_and_its_own_volume(tmp_path: Path) -> None:
    file = read(csv(tmp_path, "1767584700,INFY,1,10", "1767584701,BSE:ABC,2,3", "1767584702,INFY,3,5"))
    assert file.symbols == ["BSE:ABC", "NSE:INFY"]
    assert file.ticks[:2, 0].tolist() == [INFY, file.tokens[0]]
    assert [(token == INFY, volume) for token, _, _, volume, _ in trades(file)] == [
        (True, 10),
        (False, 3),
        (True, 15),
    ]


def test_an_unknown_symbol_gets_the_same_unused_token_every_time(tmp_path: Path) -> None:
    path = csv(tmp_path, *(f"1767584700,S{n},1,1" for n in range(500)))
    first, again = read(path), read(path)
    assert first.tokens == again.tokens
    assert len({*first.tokens, INFY}) == 501
    assert all(0 < token < 2**32 and token & 0xFF == 1 for token in first.tokens)
    taken = {"NSE:TAKEN": first.tokens[0]}
    assert first.tokens[0] not in read(path, taken).tokens


@pytest.mark.parametrize(
    "row",
    [
        "yesterday,INFY,1,1",
        ",INFY,1,1",
        "-5,INFY,1,1",
        "99999999999999999999999,INFY,1,1",
        "1767584700,,1,1",
        "1767584700,  ,1,1",
        '1767584700,"IN\nFY",1,1',
        "1767584700,INFY,0,1",
        "1767584700,INFY,-3,1",
        "1767584700,INFY,inf,1",
        "1767584700,INFY,1e300,1",
        "1767584700,INFY,dear,1",
        "1767584700,INFY,nan,1",
        "1767584700,INFY,1,-1",
        "1767584700,INFY,1,inf",
        "1767584700,INFY,1,1e200",
        "1767584700,INFY,1,",
        "1767584700,INFY",
    ],
)
def test_an_invalid_row_loses_only_itself(tmp_path: Path, row: str) -> None:
    good = ["1767584699,INFY,1,1", "1767584700,INFY,2,1", "1767584701,INFY,3,1", "1767584702,INFY,4,1"]
    file = read(csv(tmp_path, *good[:2], row, *good[2:]))
    assert [price for _, price, *_ in trades(file)] == [1, 2, 3, 4]
    assert file.rows_refused == 1


def test_rows_out_of_order_are_sorted_and_equal_times_keep_theirs(tmp_path: Path) -> None:
    file = read(
        csv(
            tmp_path,
            "1767584702,INFY,4,1",
            "1767584700,INFY,1,1",
            "1767584701,INFY,2,1",
            "1767584701,INFY,3,1",
        )
    )
    assert [price for _, price, *_ in trades(file)] == [1, 2, 3, 4]


def test_a_volume_that_falls_within_a_date_is_a_late_row_and_no_new_start(tmp_path: Path) -> None:
    header = "time,symbol,price,volume"
    lines = ("1767584702.000,INFY,1,1500", "1767584702.000,INFY,2,1400", "1767584703,INFY,3,1600")
    file = read(csv(tmp_path, *lines, header=header))
    assert [(price, volume) for _, price, _, volume, _ in trades(file)] == [(2, 1400), (1, 1500), (3, 1600)]
    assert file.rows_unordered == 1
    # Another recorder's rows, seconds late: their volume was there before, their prices count.
    late = (*lines, "1767584704,INFY,4,1450", "1767584705,INFY,5,1700")
    file = read(csv(tmp_path, *late, header=header))
    assert [volume for *_, volume, _ in trades(file)] == [1400, 1500, 1600, 1600, 1700]
    assert file.rows_unordered == 2


@pytest.mark.parametrize("seconds", [1_767_584_700.0, 1_767_584_700.999])
def test_trades_of_one_millisecond_without_quantity_are_two_trades(tmp_path: Path, seconds: float) -> None:
    lines = (f"{seconds},INFY,7,10", *(f"{seconds},INFY,{price},0" for price in (100, 90, 95, 95)))
    file = read(csv(tmp_path, *lines))
    times = [time for *_, time in trades(file)]
    assert len(set(times)) == 4  # the last two say the same
    assert times == sorted(times)
    assert {time // 1000 for time in times} == {int(seconds)}
    state = ShardState(DEFAULT_INTERVALS, SESSIONS, event_clock=True)
    apply_ticks(state, file.ticks, 0, np.array([len(file.ticks)]), 100)
    minute = state.arrays.candles[0, 0, 0]
    assert minute[[col.OPEN, col.HIGH, col.LOW, col.CLOSE]].tolist() == [7, 100, 7, 95]


def test_rows_that_two_recorders_wrote_twice_are_one_trade(tmp_path: Path) -> None:
    lines = ("1767584702,INFY,1,1500",) * 3
    file = read(csv(tmp_path, *lines, header="time,symbol,price,volume"))
    assert len({time for *_, time in trades(file)}) == 1
    assert file.rows_unordered == 0


def test_decimal_quantities_stay_decimals(tmp_path: Path) -> None:
    file = read(csv(tmp_path, *("1767584700,INFY,1,0.1",) * 3))
    assert [volume for _, _, _, volume, _ in trades(file)] == [0.1, 0.2, 0.3]


def test_gzip_zip_and_parquet_read_the_same(tmp_path: Path) -> None:
    plain = csv(tmp_path, "1767584700,INFY,1500.05,10", "1767584701,INFY,1500,5")
    expected = read(plain).ticks
    with gzip.open(tmp_path / "t.csv.gz", "wb") as zipped:
        zipped.write(plain.read_bytes())
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.write(plain, "t.csv")
    names = ["t.csv.gz", "t.zip"]
    try:
        pd.read_csv(plain).to_parquet(tmp_path / "t.parquet")
        names.append("t.parquet")
    except ImportError:
        pass  # pyarrow is the user's choice
    for name in names:
        np.testing.assert_array_equal(read(tmp_path / name).ticks, expected)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe\x00\x01\x02" * 50, "t.csv"),
        (b"a,b\n1,2\n", "has no column time, symbol, price"),
        (b"time,symbol,price\n1,INFY,2\n", "has no column quantity"),
        (b"time,symbol,price,quantity\n", "holds no trade|no time can be read"),
        (b"time,symbol,price,quantity\nx,INFY,1,1\n", "no time can be read"),
        (b"time,symbol,price,quantity\n1767584700,INFY,0,1\n", "holds no trade"),
    ],
)
def test_a_file_without_trades_is_a_one_line_error(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=says) as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.zip", "t.parquet"])
def test_a_damaged_archive_is_a_one_line_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"time,symbol,price,quantity\n" * 1000)[:40])
    with pytest.raises(InputFileError):
        read(path)


def test_a_missing_file_or_a_folder_is_a_one_line_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(InputFileError):
            read(path)


def test_a_duplicate_column_counts_once(tmp_path: Path) -> None:
    path = csv(tmp_path, "1767584700,INFY,1,1,2", header="time,symbol,price,quantity,Price")
    assert [price for _, price, *_ in trades(read(path))] == [1]


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, with_header: bool) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"time,symbol,price,quantity\n" * with_header + content)
    try:
        read(path)
    except InputFileError as error:
        assert "\n" not in str(error)


# -- frames ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2_000), max_size=60), st.one_of(st.none(), st.floats(1, 500)))
def test_frames_are_all_ticks_in_order_and_none_spans_more_than_its_window(
    times: list[int], window_ms: float | None
) -> None:
    ticks = np.zeros((len(times), 10))
    ticks[:, TIME_MS] = sorted(times)
    frames = list(frames_of(ticks, window_ms))
    if times:
        np.testing.assert_array_equal(np.concatenate(frames), ticks)
    for frame in frames:
        assert 1 <= len(frame) <= TICKS_PER_FRAME
        if window_ms is not None:
            assert frame[-1, TIME_MS] - frame[0, TIME_MS] < window_ms or len(frame) == 1


def test_a_long_file_is_split_into_frames(tmp_path: Path) -> None:
    assert [len(frame) for frame in frames_of(np.zeros((4_500, 10)), None)] == [2_000, 2_000, 500]
