"""Pickles in upstream's two shapes: written for plain pandas, and read from any source."""

from __future__ import annotations

import datetime as dt
import io
import pickle
import pickletools
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.files.frames import tidy
from pkbrokers_redis.files.pickles import (
    DAILY_ROWS_MAX,
    INDEXES_SHARED_MAX,
    SYMBOLS_A_BATCH,
    PickledDict,
    daily_name,
    intraday_name,
    read_frames,
    shaped,
)
from tests.client.contract import OPEN_S
from tests.files.pandas_2 import PICKLES


def rows(count: int, step: int = 86_400) -> np.ndarray[Any, Any]:
    """float64[n, 8] as a bulk read gives: rising closes from 100.5."""
    table = np.zeros((count, 8))
    table[:, 0] = OPEN_S + step * np.arange(count)
    table[:, 1:5] = 100.5 + np.arange(count)[:, None]
    table[:, 5] = 10 + np.arange(count)
    return table


def pickled(items: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    writer = PickledDict(file)
    for key, value in items.items():
        writer.add(key, value)
    writer.finish()
    return file.getvalue()


def test_shared_index_is_written_once_and_each_frame_reads_as_if_written_alone() -> None:
    """There are more sets of days than shared indexes, and one set that most frames have."""
    tables = {f"S{i}": rows(120 if i % 2 else 20 + i) for i in range(2 * INDEXES_SHARED_MAX + 20)}
    frames = {name: shaped(table, True, "published") for name, table in tables.items()}
    data = pickled(frames)
    alone = {name: pickle.loads(pickle.dumps(frame)) for name, frame in frames.items()}
    got, read = pickle.loads(data), read_frames(data).frames
    assert list(got) == list(alone) == list(read)
    for name, frame in alone.items():
        pd.testing.assert_frame_equal(got[name], frame, check_freq=False, check_column_type=False)
        pd.testing.assert_frame_equal(read[name], tidy(frame))
    assert len(data) < sum(len(pickled({name: frames[name]})) for name in frames) - 60 * 120 * 8
    got = pickle.loads(data)
    got["S1"].loc[got["S1"].index[0], "Close"] = 0.0
    got["S1"].index = got["S1"].index + pd.Timedelta(days=1)
    pd.testing.assert_frame_equal(got["S3"], alone["S3"], check_freq=False)


def test_file_names_are_those_of_upstream() -> None:
    day = dt.date(2026, 11, 5)
    assert (daily_name(day), intraday_name(day)) == (
        "stock_data_05112026.pkl",
        "intraday_stock_data_05112026.pkl",
    )


def test_plain_pandas_reads_the_published_shape() -> None:
    got = pickle.loads(pickled({"INFY": shaped(rows(3), True, "published")}))["INFY"]
    assert got.columns.to_list() == ["Open", "High", "Low", "Close", "Volume"]
    assert str(got.index.tz) == "Asia/Kolkata" and got.index[0].isoformat() == "2026-01-05T00:00:00+05:30"
    assert got["Close"].to_list() == [100.5, 101.5, 102.5] and got["Volume"].dtype == np.int64


def test_split_shape_makes_a_frame_as_in_upstream() -> None:
    table = pickle.loads(pickled({"INFY": shaped(rows(2, 60), False, "split")}))["INFY"]
    frame = pd.DataFrame(data=table["data"], columns=table["columns"], index=table["index"])
    assert frame.columns.to_list() == ["open", "high", "low", "close", "volume"]
    assert table["index"] == ["2026-01-05T09:15:00+05:30", "2026-01-05T09:16:00+05:30"]
    assert table["data"][1] == [101.5, 101.5, 101.5, 101.5, 11] and type(table["data"][1][4]) is int


def test_published_shape_names_nothing_that_pandas_2_lacks() -> None:
    """Nothing that only pandas 3 knows: labels of Arrow strings, arrays of times without their third part."""
    data = pickled({"INFY": shaped(rows(3), True, "published")})
    names = {str(argument) for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}
    assert names and not any("Arrow" in name or "StringDtype" in name for name in names)
    assert b"ns" in data and b"pandas.arrays\nDatetimeArray" in data
    state = data[data.index(b"DatetimeArray") :]
    assert pickle.EMPTY_DICT in state and pickle.TUPLE3 in state


def test_days_are_limited_to_a_trading_year() -> None:
    assert len(shaped(rows(300), True, "published")) == DAILY_ROWS_MAX
    assert len(shaped(rows(300), False, "split")["data"]) == 300


@pytest.mark.parametrize("count", [0, 1, SYMBOLS_A_BATCH, SYMBOLS_A_BATCH + 1])
def test_dict_written_item_by_item_is_read_as_that_dict(count: int) -> None:
    items = {f"S{i}": {"data": [[1.5, i]], "columns": ["x"], "index": ["a", "a"]} for i in range(count)}
    assert pickle.loads(pickled(items)) == items


@pytest.mark.parametrize("shape", ["published", "split"])
@pytest.mark.parametrize("daily", [True, False])
def test_written_frames_are_read_back(shape: Any, daily: bool) -> None:
    found = read_frames(pickled({"INFY": shaped(rows(5), daily, shape)}))
    frame = found.frames["INFY"]
    assert found.refused == 0 and frame.columns.to_list() == ["open", "high", "low", "close", "volume"]
    assert (
        frame["close"].to_list() == [100.5, 101.5, 102.5, 103.5, 104.5] and frame["volume"].dtype == np.int64
    )
    assert frame.index[0].isoformat() == f"2026-01-05T{'00:00' if daily else '09:15'}:00+05:30"
    assert str(frame.index.tz) == "Asia/Kolkata" and frame.index.name == "datetime"


@pytest.mark.parametrize("protocol", [2, 5])
def test_files_of_pandas_2_are_read_to_the_same_frame_in_every_shape(protocol: int) -> None:
    found = read_frames(PICKLES[protocol])
    assert sorted(found.frames) == ["INFY", "SBIN", "SPLIT", "STAMPS", "TCS"] and found.refused == 0
    for frame in found.frames.values():
        pd.testing.assert_frame_equal(frame, found.frames["INFY"])


OHLC = {"open": 1, "high": 2, "low": 0.5, "close": 1.5}


@pytest.mark.parametrize(
    "table",
    [
        {"2026-11-20": {**OHLC, "volume": 3}},
        {
            "data": [[1, 2, 0.5, 1.5, 3, 1.5]],
            "columns": ["Open", "High", "Low", "Close", "Volume", "Adj Close"],
            "index": ["2026-11-20"],
        },
        {
            "data": [["1", "2", "0.5", "1.5", "3"]],
            "columns": [*OHLC, "volume"],
            "index": [dt.date(2026, 11, 20)],
        },
        {
            "data": [[1, 2, 0.5, 1.5, 3]],
            "columns": [*OHLC, "volume"],
            "index": ["2026-11-19T18:30:00Z"],
        },
        pd.DataFrame([{**OHLC, "VOLUME": 3}], index=[dt.datetime(2026, 11, 20)]),
        pd.DataFrame(
            [{**OHLC, "volume": 9}, {**OHLC, "volume": 3}], index=pd.DatetimeIndex(["2026-11-20"] * 2)
        ),
        pd.DataFrame(
            [{**OHLC, "volume": 3}, dict.fromkeys([*OHLC, "volume"])],
            index=pd.DatetimeIndex(["2026-11-20", "2026-11-21"]),
        ),
    ],
    ids=["by moment", "adjusted", "texts", "utc", "naive", "twice", "an empty row"],
)
def test_every_spelling_of_a_table_is_read_to_the_same_row(table: Any) -> None:
    frame = read_frames(pickle.dumps({"INFY": table})).frames["INFY"]
    assert frame.index.to_list() == [pd.Timestamp("2026-11-20", tz="Asia/Kolkata")]
    assert frame.iloc[0].to_list() == [1, 2, 0.5, 1.5, 3]


def test_hybrid_files_of_upstream_are_read() -> None:
    hybrid = {
        "symbol_data": {"INFY": {"2026-11-20T00:00:00+05:30": {**OHLC, "volume": 3}}},
        "metadata": {},
        "dataframe_format": {},
    }
    assert list(read_frames(pickle.dumps(hybrid)).frames) == ["INFY"]


def test_malformed_entries_are_counted_and_all_other_entries_are_read() -> None:
    items = {
        "INFY": shaped(rows(1), True, "published"),
        "NONE": None,
        "TEXT": "x",
        "COLUMNS": {"data": [[1]], "columns": ["open"], "index": ["2026-11-20"]},
        "NUMBERED": {"data": [[1, 1, 1, 1]], "columns": list(OHLC), "index": [0]},
        "RAGGED": {"data": [[1, 1, 1, 1], [1]], "columns": list(OHLC), "index": ["2026-11-20"] * 2},
        "SHORT": {"data": [[1, 1, 1, 1]], "columns": list(OHLC), "index": ["2026-11-20"] * 2},
        "bell\a": shaped(rows(1), True, "published"),
        7: shaped(rows(1), True, "published"),
    }
    found = read_frames(pickle.dumps(items))
    assert list(found.frames) == ["INFY"] and found.refused == len(items) - 1 and "NONE" in found.why


def test_pickle_without_a_dict_of_symbols_is_a_one_line_error() -> None:
    with pytest.raises(InputFileError, match="dict of symbols"):
        read_frames(pickle.dumps([1, 2]))
