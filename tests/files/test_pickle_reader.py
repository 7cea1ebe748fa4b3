"""Pickles of unknown origin: real tables are read, everything else is refused by name and never run.

Names and tables are tested on the child's own functions; bombs and limits through a real child.
"""

from __future__ import annotations

import datetime as dt
import io
import os
import pickle
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.errors import InputFileError, RefusedPickle
from pkbrokers_redis.files import pickle_reader
from pkbrokers_redis.files.pickle_reader import ALLOWED, load_tree, read_frames, rows_of
from tests.files.pandas_2 import PICKLES

PROTOCOLS = [2, 3, 4, 5]


def frame(**columns: Any) -> pd.DataFrame:
    index = pd.date_range("2026-11-20 09:15", periods=3, freq="5min", tz="Asia/Kolkata", name="datetime")
    return pd.DataFrame(
        {
            "Open": [1.0, 2, 3],
            "High": [9.0, 9, 9],
            "Low": [0.5, 0.5, 0.5],
            "Close": [1.5, 2.5, 3.5],
            "Volume": [1, 2, 3],
            **columns,
        },
        index=index,
    )


TABLES = {
    "tz-aware": frame(),
    "naive": frame().tz_localize(None),
    "utc": frame().tz_convert("UTC"),
    "fixed offset": frame().tz_convert(dt.timezone(dt.timedelta(hours=5, minutes=30))),
    "a slice": frame().iloc[1:],
    "float32": frame().astype("float32"),
    "moments in a column": frame(at=frame().index),
    "text": frame(symbol="INFY"),
    "masked": frame(oi=pd.array([1, None, 3], dtype="Int64"), iv=pd.array([0.1, None, 0.3], dtype="Float64")),
    "categories": frame(flag=pd.Categorical(["", "gap", ""])),
    "dates": frame().set_axis([dt.date(2026, 11, day) for day in (18, 19, 20)]),
    "masked volume": frame().astype({"Volume": "Int64"}),
    "seconds": frame().set_axis(frame().index.as_unit("s")),
}


def load(data: bytes) -> Any:
    return load_tree(io.BytesIO(data))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", list(TABLES))
def test_every_kind_of_frame_has_its_candles_read(name: str, protocol: int) -> None:
    rows = rows_of(load(pickle.dumps({"INFY": TABLES[name]}, protocol)))
    assert rows.symbols == ["INFY"] and rows.why == ""
    assert rows.numbers[:, 3].tolist() == TABLES[name]["Close"].to_list()
    index = pd.DatetimeIndex(TABLES[name].index)
    index = index.tz_localize("Asia/Kolkata") if index.tz is None else index
    assert rows.moments.tolist() == index.as_unit("ns").asi8.tolist()


@pytest.mark.parametrize("name", ["numbered", "empty", "series", "no close", "categorical prices"])
def test_table_without_candles_costs_only_its_entry(name: str) -> None:
    table: Any = {
        "numbered": frame().reset_index(drop=True),
        "empty": pd.DataFrame(),
        "series": frame()["Open"],
        "no close": frame().drop(columns="Close"),
        "categorical prices": frame().astype({"Open": "category"}),
    }[name]
    rows = rows_of(load(pickle.dumps({"BAD": table, "INFY": frame()})))
    assert rows.symbols == ["INFY"] and rows.refused == 1 and "BAD" in rows.why


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_values_in_split_tables_are_read(protocol: int) -> None:
    moments = [
        pd.Timestamp("2026-11-20 09:15", tz="Asia/Kolkata"),
        dt.datetime(2026, 11, 20, 9, 16, tzinfo=ZoneInfo("Asia/Kolkata")),
        pd.NaT,
    ]
    data = [[np.float64(1), 2, 0.5, np.int64(1), 10], [2, 2, 2, 2, None], [3, 3, 3, 3, 3]]
    table = {"data": data, "columns": ["open", "high", "low", "close", "volume"], "index": moments}
    rows = rows_of(load(pickle.dumps({"INFY": table, "NA": pd.NA, "SPAN": pd.Timedelta("1h")}, protocol)))
    assert rows.symbols == ["INFY"] and rows.refused == 2
    assert rows.numbers.tolist() == [[1, 2, 0.5, 1, 10], [2, 2, 2, 2, 0]]


@pytest.mark.parametrize("protocol", [2, 5])
def test_frames_of_pandas_2_and_pytz_are_read_without_either(protocol: int) -> None:
    found = read_frames(PICKLES[protocol])
    assert sorted(found.frames) == ["INFY", "SBIN", "SPLIT", "STAMPS", "TCS"] and found.refused == 0
    infy = found.frames["INFY"]
    assert str(infy.index.tz) == "Asia/Kolkata" and infy.index[0].isoformat() == "2026-11-16T00:00:00+05:30"
    assert infy["close"].to_list() == [1.5, 2.5, 3.5, 4.5, 5.5]


# Malicious files. Each of them would append to `RAN` or make a file, were it run.


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


RAN: list[str] = []


def ran(*_: Any) -> None:
    RAN.append("ran")


@pytest.fixture(autouse=True)
def _nothing_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    RAN.clear()
    monkeypatch.setattr(os, "system", ran)
    yield
    assert RAN == [] and list(tmp_path.glob("ran*")) == []


def text_protocol(module: str, name: str, opcode: bytes) -> bytes:
    return {
        b"c": f"c{module}\n{name}\n(S'touch ran'\ntR.".encode(),
        b"i": f"(S'touch ran'\ni{module}\n{name}\n.".encode(),
        b"o": f"(c{module}\n{name}\nS'touch ran'\no.".encode(),
    }[opcode]


def stack_global(module: str, name: str, *arguments: str) -> bytes:
    def text(words: str) -> bytes:
        return b"\x8c" + bytes([len(words)]) + words.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + b"".join(map(text, arguments)) + b"tR."


OBJECTS_WITH_CODE = np.empty(1, object)
OBJECTS_WITH_CODE[0] = Calls(eval, "__import__('os').system('touch ran')")

MALICIOUS: dict[str, tuple[bytes, str]] = {
    "os.system": (text_protocol("os", "system", b"c"), "os.system"),
    "posix.system by its real name": (stack_global("posix", "system", "touch ran"), "posix.system"),
    "builtins.eval": (pickle.dumps(Calls(eval, "1")), "builtins.eval"),
    "builtins.exec in protocol 2": (pickle.dumps(Calls(exec, "1"), 2), "__builtin__.exec"),
    "a call inside a call": (pickle.dumps({"INFY": [Calls(print, Calls(eval, "1"))]}), "builtins.print"),
    "code in an array of objects": (pickle.dumps({"INFY": OBJECTS_WITH_CODE}), "builtins.eval"),
    "code in a frame's cell": (pickle.dumps({"INFY": frame(x=[Calls(eval, "1"), 0, 0])}), "builtins.eval"),
    "code as a frame's name": (pickle.dumps({Calls(eval, "'INFY'"): frame()}), "builtins.eval"),
    "copyreg's reconstructor": (text_protocol("copyreg", "_reconstructor", b"c"), "copyreg._reconstructor"),
    "copyreg's extension registry": (b"\x80\x02\x82\x01.", "extension code"),
    "pandas' own eval": (stack_global("pandas", "eval", "1"), "pandas.eval"),
    "pandas' own read_pickle": (stack_global("pandas", "read_pickle", "x.pkl"), "pandas.read_pickle"),
    "pandas' io below an allowed module": (
        stack_global("pandas.core.frame", "DataFrame.eval"),
        "DataFrame.eval",
    ),
    "numpy.load": (stack_global("numpy", "load", "x.npy"), "numpy.load"),
    "numpy's runstring": (stack_global("numpy.testing._private.utils", "runstring", "1"), "runstring"),
    "getattr on a class": (pickle.dumps(Calls(getattr, pd.DataFrame, "eval")), "builtins.getattr"),
    "getattr for __globals__": (pickle.dumps(Calls(getattr, ZoneInfo, "__init__")), "builtins.getattr"),
    "a dotted name": (stack_global("datetime", "datetime.__subclasses__"), "datetime.__subclasses__"),
    "operator.attrgetter": (stack_global("operator", "attrgetter", "x"), "operator.attrgetter"),
    "functools.partial": (stack_global("functools", "partial"), "functools.partial"),
    "a module's import": (stack_global("builtins", "__import__", "os"), "builtins.__import__"),
    "another unpickler": (stack_global("pickle", "loads", "x"), "pickle.loads"),
    "opcode INST": (text_protocol("os", "system", b"i"), "os.system"),
    "opcode OBJ": (text_protocol("os", "system", b"o"), "os.system"),
    "a persistent id": (b"\x80\x02X\x01\x00\x00\x00xQ.", "persistent id"),
    "out-of-band buffers": (b"\x80\x05\x97.", "out-of-band"),
    "a codec that is a module": (stack_global("_codecs", "encode", "x", "rot13"), "_codecs.encode"),
    "an unknown dtype": (stack_global("numpy", "dtype", "V8"), "numpy.dtype"),
    "subprocess": (stack_global("subprocess", "Popen", "touch ran"), "subprocess.Popen"),
}


@pytest.mark.parametrize("name", list(MALICIOUS))
def test_malicious_pickle_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data, expected_name = MALICIOUS[name]
    with pytest.raises(RefusedPickle) as refused:
        load(data)
    assert expected_name in f"{refused.value.name} {refused.value}" and "\n" not in str(refused.value)


def test_refusal_in_the_child_arrives_by_name(tmp_path: Path) -> None:
    path = tmp_path / "stock_data_20112026.pkl"
    path.write_bytes(MALICIOUS["os.system"][0])
    with pytest.raises(RefusedPickle, match=r"asks for 'os\.system'") as refused:
        read_frames(path)
    assert refused.value.name == "os.system"


def array(shape: tuple[int, ...], dtype: Any, content: Any) -> bytes:
    """A pickle of an array that says what it likes about itself."""
    made = Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")  # type: ignore[attr-defined]
    made.call = (*made.call, (1, shape, dtype, False, content))  # type: ignore[assignment]
    return pickle.dumps(made)


LYING = {
    "an array longer than its bytes": array((10**9,), np.dtype("f8"), b"\0" * 8),
    "an array with a negative side": array((-1,), np.dtype("f8"), b""),
    "objects from bytes": array((1,), np.dtype("O"), b"\0" * 8),
    "fewer objects than stated": array((5,), np.dtype("O"), [1]),
    "an array of a shape like a bomb": array((10**9, 10**9), np.dtype("O"), []),
    "memory by number": pickle.dumps(Calls(bytearray, 10**12)),
    "a frame built by call": pickle.dumps(Calls(pd.DataFrame, 0.0)),
    "a date from nonsense": pickle.dumps(Calls(dt.datetime, b"xx")),
    "a zone that is a path": pickle.dumps(Calls(getattr(ZoneInfo, "_unpickle"), "../../etc/passwd", 1)),  # noqa: B009
}


@pytest.mark.parametrize("name", list(LYING))
def test_description_that_cannot_be_true_is_refused_or_carries_no_candles(name: str) -> None:
    try:
        rows = rows_of(load(b"\x80\x04}(X\x04\x00\x00\x00INFY" + body_of(LYING[name]) + b"u."))
    except RefusedPickle:
        return
    assert rows.symbols == [] and rows.refused == 1


def body_of(data: bytes) -> bytes:
    """The opcodes of a pickle without its header and its end."""
    return data[11:-1] if data[2:3] == b"\x95" else data[2:-1]


def test_frame_whose_blocks_do_not_fit_its_axes_costs_only_its_entry() -> None:
    turned = pickle.dumps({"INFY": frame()}, 3).replace(b"K\x01K\x03\x86", b"K\x03K\x01\x86")
    rows = rows_of(load(turned))
    assert rows.symbols == [] and rows.refused == 1


# Bombs, in a child


@pytest.fixture
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_reader, "CPU_SECONDS_MIN", 1.0)


@pytest.mark.parametrize(
    "opcode",
    [b"r\xff\xff\xff\x7f", b"p2147483647\n", b"\x8e" + struct.pack("<Q", 2**40), b"T\xff\xff\xff\x7f"],
    ids=["memo", "memo in text", "length of bytes", "length of text"],
)
def test_number_that_asks_for_memory_is_refused(opcode: bytes) -> None:
    with pytest.raises(RefusedPickle, match=r"memory|truncated|ran out"):
        read_frames(b"\x80\x04N" + opcode + b".")


def test_text_that_is_longer_than_its_file_is_refused() -> None:
    for opcode in (b"\x8a\xff", b"X\x05\0\0\0a", b"p99999999999999999999\n"):
        with pytest.raises(RefusedPickle):
            load(b"\x80\x04N" + opcode + b".")


def nested(make: bytes, levels: int = 60) -> bytes:
    """A value that holds the one before it twice, and so on: 2^60 leaves."""
    return b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + make for i in range(levels))


def filled_backwards(levels: int = 45) -> bytes:
    """A list that refers twice to a list that is empty yet, and so on; then they are filled."""
    made = b"".join(b"]q" + bytes([i]) + b"0" for i in range(levels))
    filled = b"".join(
        b"h" + bytes([i]) + b"(" + 2 * (b"h" + bytes([i + 1])) + b"e0" for i in range(levels - 1)
    )
    return made + filled + b"h" + bytes([levels - 1]) + b"K\x01a0h\x00"


def cells_without_end() -> bytes:
    deep: list[Any] = [1.0]
    for _ in range(45):
        deep = [deep] * 10
    cells = np.empty(1, object)
    cells[0] = deep
    table = pd.DataFrame(
        {"Open": cells, "High": cells, "Low": cells, "Close": cells}, index=frame().index[:1]
    )
    return pickle.dumps({"INFY": table}, 3)[2:-1]


def colliding() -> bytes:
    class Many(dict[int, None]):
        """Written without being built here: building it takes as long as reading it."""

        def items(self) -> Any:
            return ((2 + i * (2**61 - 1), None) for i in range(1, 200_000))

    file = io.BytesIO()
    pickler = pickle._Pickler(file, 3)  # type: ignore[attr-defined]
    pickler.write(b"}")
    pickler._batch_setitems(Many().items())
    return file.getvalue()


BOMBS: dict[str, bytes] = {
    "a key of tuples": b"}" + nested(b"\x86") + b"Ns",
    "an element of a set": b"\x8f(" + nested(b"\x86") + b"\x90",
    "a key of slices": b"}cbuiltins\nslice\nq\xff0K\x01"
    + b"".join(b"q%c0h\xffh%ch%c\x86R" % (i, i, i) for i in range(60)) + b"Ns",
    "lists in a table": b"}X\x04\x00\x00\x00INFY}(X\x04\x00\x00\x00data" + filled_backwards()
    + b"X\x07\x00\x00\x00columns]X\x04\x00\x00\x00opena"
    + b"X\x05\x00\x00\x00index]us",
    "keys with one hash": colliding(),
}  # fmt: skip
HARMLESS: dict[str, bytes] = {
    "lists": nested(b"\x86") + b"0(" + b"".join(b"q%c(h%ch%cl" % (i, i, i) for i in range(60)),
    "lists filled backwards": filled_backwards(),
    "a table of lists": b"}X\x04\x00\x00\x00INFY" + filled_backwards() + b"s",
    "an unknown dtype": b"cnumpy\ndtype\n" + filled_backwards() + b"\x85R",
    "a zone": b"czoneinfo\nZoneInfo\n" + filled_backwards() + b"\x85R",
    "cells": cells_without_end(),
}


@pytest.mark.usefixtures("_short_limits")
@pytest.mark.parametrize("name", list(BOMBS))
def test_file_that_computes_without_end_is_ended_by_its_limits(name: str) -> None:
    with pytest.raises(RefusedPickle) as refused:
        read_frames(b"\x80\x04" + BOMBS[name] + b".")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@pytest.mark.parametrize("name", list(HARMLESS))
def test_references_to_references_are_not_unrolled(name: str) -> None:
    try:
        rows = rows_of(load(b"\x80\x04" + HARMLESS[name] + b"."))
    except InputFileError as error:
        assert "\n" not in str(error) and len(str(error)) < 200
    else:
        assert len(rows.numbers) == 0 and len(rows.why) < 200


def test_child_that_runs_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_reader, "WALL_FACTOR", 0.001)
    with pytest.raises(RefusedPickle, match="took longer"):
        read_frames(pickle.dumps({}))


def test_result_beyond_its_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_reader, "RESULT_BYTES_MAX", 100)
    with pytest.raises(RefusedPickle):
        read_frames(pickle.dumps({"INFY": frame()}))


def test_child_gets_no_setting_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    run = subprocess.run

    def note(*arguments: Any, env: dict[str, str], **options: Any) -> Any:
        seen.append(env)
        return run(*arguments, env=env, **options)

    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.setenv("PKB_KITE_API_SECRET", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    assert read_frames(pickle.dumps({"INFY": frame()})).frames["INFY"]["volume"].to_list() == [1, 2, 3]
    assert "hunter2" not in seen[0].values()


def test_frames_that_share_one_object_are_all_read() -> None:
    one = frame(symbol="INFY")
    assert len(rows_of(load(pickle.dumps({f"S{i}": one for i in range(3_000)}))).symbols) == 3_000


def test_file_above_the_size_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.pkl"
    path.write_bytes(pickle.dumps(list(range(1000))))
    with pytest.raises(InputFileError, match="more than 100"):
        read_frames(path, bytes_max=100)


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(RefusedPickle, match="goes on"):
        load(pickle.dumps(1) + b"more")


@pytest.mark.parametrize("data", [b"", b".", b"\x80", b"<html>404</html>", b"\x80\x04}", b"\x1f\x8b\x08gzip"])
def test_file_that_is_no_pickle_is_one_line(data: bytes) -> None:
    with pytest.raises(RefusedPickle) as refused:
        load(data)
    assert "\n" not in str(refused.value)


def test_no_allowed_name_is_a_class_or_function_of_a_library() -> None:
    harmless = {slice, dict, dt.datetime, dt.date, dt.time, dt.timedelta, dt.timezone, None}
    own = {answer for answer in ALLOWED.values() if answer not in harmless}
    assert {answer.__module__ for answer in own} == {"pkbrokers_redis.files.pickle_reader"}


@given(st.data())
def test_damaged_file_never_raises_more_than_one_line(data: st.DataObject) -> None:
    damaged = bytearray(PICKLES[5])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        rows_of(load(bytes(damaged)))
    except InputFileError as error:
        assert "\n" not in error.message
    except MemoryError:
        pass  # a length of many gigabytes; the child's limit makes it one line
