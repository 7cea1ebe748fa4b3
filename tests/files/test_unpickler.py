"""Strangers' pickles: what real frames need is read, everything else is refused by name and never run."""

from __future__ import annotations

import datetime as dt
import io
import os
import pickle
import struct
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
from pkbrokers_redis.files import pickle_described
from pkbrokers_redis.files.unpickler import ALLOWED, load_pickle
from tests.files.pandas_2 import PICKLES

PROTOCOLS = [2, 3, 4, 5]


def frame(**columns: Any) -> pd.DataFrame:
    index = pd.date_range("2026-11-20 09:15", periods=3, freq="5min", tz="Asia/Kolkata", name="datetime")
    return pd.DataFrame(
        {"Open": [1.0, 2, 3], "Close": [1.5, 2.5, 3.5], "Volume": [1, 2, 3], **columns}, index=index
    )


FRAMES = {
    "tz-aware": frame(),
    "naive": frame().tz_localize(None),
    "utc": frame().tz_convert("UTC"),
    "fixed offset": frame().tz_convert(dt.timezone(dt.timedelta(hours=5, minutes=30))),
    "a slice": frame().iloc[1:],
    "float32": frame().astype("float32"),
    "moments in a column": frame().reset_index(),
    "text": frame(symbol="INFY"),
    "masked": frame(oi=pd.array([1, None, 3], dtype="Int64"), iv=pd.array([0.1, None, 0.3], dtype="Float64")),
    "categories": frame(flag=pd.Categorical(["", "gap", ""])),
    "dates": pd.DataFrame({"Open": [1.0]}, index=[dt.date(2026, 11, 20)]),
    "numbered": pd.DataFrame({"a": [1.0, 2.0]}),
    "empty": pd.DataFrame(),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", list(FRAMES))
def test_a_frame_comes_back_as_it_was(name: str, protocol: int) -> None:
    got = load_pickle(pickle.dumps({"INFY": FRAMES[name]}, protocol))["INFY"]
    pd.testing.assert_frame_equal(got, FRAMES[name], check_freq=False, check_column_type=False)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_values_beside_frames_come_back(protocol: int) -> None:
    values = {
        "numbers": [1, 2.5, -(10**30), None, True, b"x"],
        "numpy": [
            np.float64(1.5),
            np.int64(2),
            np.datetime64("2026-11-20"),
            np.array([1, 2]),
            np.array(["a", "é"]),
        ],
        "moments": [
            pd.Timestamp("2026-11-20 09:15", tz="Asia/Kolkata"),
            pd.Timedelta("1h"),
            dt.datetime(2026, 11, 20, tzinfo=ZoneInfo("Asia/Kolkata")),
            dt.date(2026, 11, 20),
        ],
        "series": frame()["Open"],
    }
    got = load_pickle(pickle.dumps(values, protocol))
    assert got["numbers"] == values["numbers"] and got["moments"] == values["moments"]
    assert [str(each) for each in got["numpy"]] == [str(each) for each in values["numpy"]]
    pd.testing.assert_series_equal(got["series"], frame()["Open"], check_freq=False)


def test_missing_values_come_back_as_missing() -> None:
    got = load_pickle(
        pickle.dumps({"na": pd.NA, "nat": pd.NaT, "texts": pd.Series(["a", None], dtype="string")})
    )
    assert got["na"] is pd.NA and got["nat"] is pd.NaT
    assert got["texts"][0] == "a" and pd.isna(got["texts"][1])


@pytest.mark.parametrize("protocol", [2, 5])
def test_frames_of_pandas_2_and_pytz_load_without_either(protocol: int) -> None:
    got = load_pickle(PICKLES[protocol])
    assert (
        str(got["INFY"].index.tz) == "Asia/Kolkata"
        and got["INFY"].index[0].isoformat() == "2026-11-16T00:00:00+05:30"
    )
    assert got["INFY"]["Close"].to_list() == [1.5, 2.5, 3.5, 4.5, 5.5]
    assert got["TCS"].columns.to_list()[-1] == "Adj Close" and got["SBIN"]["Open"].dtype == np.float32
    assert got["STAMPS"]["index"][0] == pd.Timestamp("2026-11-16", tz="Asia/Kolkata")


def test_what_occurs_twice_is_one_object() -> None:
    one = frame()
    got = load_pickle(pickle.dumps([one, one]))
    assert got[0] is got[1]


# The bad ones. `RAN` would be written by each of them, were it run.


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
    "copyreg's extension registry": (b"\x80\x02\x82\x01.", "EXT1"),
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
    "a persistent id": (b"\x80\x02X\x01\x00\x00\x00xQ.", "BINPERSID"),
    "out-of-band buffers": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "a codec that is a module": (stack_global("_codecs", "encode", "x", "rot13"), "_codecs.encode"),
    "an unknown dtype": (stack_global("numpy", "dtype", "V8"), "numpy.dtype"),
    "subprocess": (stack_global("subprocess", "Popen", "touch ran"), "subprocess.Popen"),
}


@pytest.mark.parametrize("name", list(MALICIOUS))
def test_a_malicious_pickle_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data, asked = MALICIOUS[name]
    path = tmp_path / "stock_data_20112026.pkl"
    path.write_bytes(data)
    with pytest.raises(RefusedPickle) as refused:
        load_pickle(path)
    assert asked in refused.value.name and "\n" not in str(refused.value)


def array(shape: tuple[int, ...], dtype: Any, content: Any) -> bytes:
    """A pickle of an array that says what it likes about itself."""
    made = Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")  # type: ignore[attr-defined]
    made.call = (*made.call, (1, shape, dtype, False, content))  # type: ignore[assignment]
    return pickle.dumps(made)


LYING = {
    "an array longer than its bytes": array((10**9,), np.dtype("f8"), b"\0" * 8),
    "an array with a negative side": array((-1,), np.dtype("f8"), b""),
    "objects from bytes": array((1,), np.dtype("O"), b"\0" * 8),
    "objects fewer than said": array((5,), np.dtype("O"), [1]),
    "an array of a shape like a bomb": array((10**9, 10**9), np.dtype("O"), []),
    "memory by number": pickle.dumps(Calls(bytearray, 10**12)),
    "a frame built by call": pickle.dumps(Calls(pd.DataFrame, 0.0)),
    "a date from nonsense": pickle.dumps(Calls(dt.datetime, b"xx")),
    "a zone that is a path": pickle.dumps(Calls(getattr(ZoneInfo, "_unpickle"), "../../etc/passwd", 1)),  # noqa: B009
}


@pytest.mark.parametrize("name", list(LYING))
def test_a_pickle_that_lies_is_refused_or_means_nothing(name: str) -> None:
    try:
        got = load_pickle(LYING[name])
    except RefusedPickle:
        return
    assert not isinstance(got, pd.DataFrame | np.ndarray | bytearray)


def test_a_frame_whose_blocks_do_not_fit_is_refused() -> None:
    good = pickle.dumps({"INFY": frame()}, 3)
    rows = struct.pack("<q", 1) + struct.pack("<q", 2) + struct.pack("<q", 3)
    assert rows in good
    with pytest.raises(RefusedPickle):
        load_pickle(good.replace(b"K\x01K\x03\x86", b"K\x03K\x01\x86"))  # the volumes' block is turned


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\x7f", b"p2147483647\n", b"p99999999999999999999\n"])
def test_a_memo_bomb_is_refused_before_it_is_lit(opcode: bytes) -> None:
    with pytest.raises(RefusedPickle, match="memo"):
        load_pickle(b"\x80\x02N" + opcode + b".")


@pytest.mark.parametrize(
    "opcode", [b"\x8e" + struct.pack("<Q", 2**40), b"T\xff\xff\xff\x7f", b"\x8a\xff", b"X\x05\0\0\0a"]
)
def test_a_length_beyond_the_file_is_refused_before_it_is_allocated(opcode: bytes) -> None:
    with pytest.raises(RefusedPickle, match="ends inside"):
        load_pickle(b"\x80\x04" + opcode + b".")


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


WIDE = pickle.dumps(tuple(range(20_000)), 2)[2:-1] + b"q\xff0"  # a large tuple, in the memo
UNROLLING: dict[str, bytes] = {
    "a key of tuples": b"}" + nested(b"\x86") + b"Ns",
    "a key of tuples, doubled on the stack": b"}K\x01" + b"2\x86" * 60 + b"Ns",
    "a key of tuples in three": b"}K\x01" + b"22\x87" * 60 + b"Ns",
    "a key of marked tuples": b"}(K\x01" + b"".join(b"q%ct(h%ch%c" % (i, i, i) for i in range(60)) + b"tNs",
    "an element of a set": b"\x8f(" + nested(b"\x86") + b"\x90",
    "a frozen set": b"(" + nested(b"\x86") + b"\x91",
    "a key of slices": b"}cbuiltins\nslice\nq\xff0K\x01"
    + b"".join(b"q%c0h\xffh%ch%c\x86R" % (i, i, i) for i in range(60)) + b"Ns",
    "one large key many times": WIDE + b"}(" + b"h\xffN" * 10_000 + b"u",
    "lists": nested(b"\x86") + b"0(" + b"".join(b"q%c(h%ch%cl" % (i, i, i) for i in range(60)) ,
    "lists filled backwards": filled_backwards(),
    "a table of lists": b"}X\x04\x00\x00\x00INFY" + filled_backwards() + b"s",
    "an unknown dtype": b"cnumpy\ndtype\n" + filled_backwards() + b"\x85R",
    "a zone": b"czoneinfo\nZoneInfo\n" + filled_backwards() + b"\x85R",
}  # fmt: skip


@pytest.mark.parametrize("name", list(UNROLLING))
def test_references_to_references_are_not_unrolled(name: str) -> None:
    with pytest.raises(RefusedPickle) as refused:
        load_pickle(b"\x80\x04" + UNROLLING[name] + b".")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_lists_in_a_cell_are_not_unrolled() -> None:
    deep: list[Any] = [1.0]
    for _ in range(45):
        deep = [deep] * 10
    cells = np.empty(1, object)
    cells[0] = deep
    with pytest.raises(RefusedPickle, match="without end"):
        load_pickle(pickle.dumps({"INFY": pd.DataFrame({"Open": cells})}))


def test_what_frames_share_is_no_unrolling() -> None:
    one = frame(symbol="INFY")
    tree = {f"S{i}": one for i in range(3_000)}
    assert len(load_pickle(pickle.dumps((tree, tree, tuple(tree.values()))))[2]) == 3_000


def test_a_file_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.pkl"
    path.write_bytes(pickle.dumps(list(range(1000))))
    with pytest.raises(InputFileError, match="more than 100"):
        load_pickle(path, bytes_max=100)


def test_what_follows_the_end_is_refused() -> None:
    with pytest.raises(RefusedPickle, match="goes on"):
        load_pickle(pickle.dumps(1) + b"more")


@pytest.mark.parametrize("data", [b"", b".", b"\x80", b"<html>404</html>", b"\x80\x04}", b"\x1f\x8b\x08gzip"])
def test_what_is_no_pickle_is_one_line(data: bytes) -> None:
    with pytest.raises(RefusedPickle) as refused:
        load_pickle(data)
    assert "\n" not in str(refused.value)


def test_no_class_can_be_written_on() -> None:
    build = b"\x80\x02cpandas\nDataFrame\nN}X\x03\x00\x00\x00evil" + b"K\x01s\x86b."
    with pytest.raises(RefusedPickle):
        load_pickle(build.replace(b"X\x03\x00\x00\x00evil", b"X\x04\x00\x00\x00evil"))
    assert not hasattr(pickle_described.Frame, "evil") and not hasattr(pd.DataFrame, "evil")


def test_nothing_allowed_is_a_plain_function_or_a_class_of_pandas() -> None:
    harmless = {slice, dt.datetime, dt.date, dt.time, dt.timedelta, dt.timezone}
    assert all(type(answer) is pickle_described.Sealed or answer in harmless for answer in ALLOWED.values())


@given(st.data())
def test_a_damaged_file_never_brings_more_than_one_line(data: st.DataObject) -> None:
    good = bytearray(PICKLES[5])
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        load_pickle(bytes(good))
    except InputFileError as error:
        assert "\n" not in str(error)


def test_pickletools_and_we_count_opcodes_alike() -> None:
    """The table of argument lengths is right: each sample is accepted up to its very last byte."""
    for protocol in range(6):
        file = io.BytesIO()
        pickle.Pickler(file, protocol).dump(
            [1, 2.5, "é" * 300, b"x" * 300, 2**70, -1, None, {"a": (1, 2, 3, 4)}, 2**3000]
        )
        if protocol >= 2:
            assert load_pickle(file.getvalue())[2] == "é" * 300
