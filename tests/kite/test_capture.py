"""Capture files: what goes in comes out, whatever the last writer's end was."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.kite.capture import KIND_BINARY, KIND_TEXT, MAGIC, CaptureWriter, read_capture

RECORDS = [
    (1_700_000_000_000, KIND_TEXT, b"{}"),
    (1_700_000_000_001, KIND_BINARY, b"\0" * 99),
    (3, KIND_BINARY, b""),
]


def write(path: Path, records: list[tuple[int, int, bytes]] = RECORDS) -> None:
    with CaptureWriter(path) as capture:
        for record in records:
            capture.write(*record)


@pytest.mark.parametrize("name", ["frames.cap", "frames.cap.gz"])
def test_what_was_written_is_read_back_and_appending_goes_on(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path)
    assert list(read_capture(path)) == RECORDS
    write(path)
    assert list(read_capture(path)) == RECORDS * 2


def test_a_gz_capture_is_gzipped(tmp_path: Path) -> None:
    write(tmp_path / "frames.gz")
    assert (tmp_path / "frames.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_a_cut_off_tail_costs_only_its_record_and_the_next_writer_mends_it(tmp_path: Path) -> None:
    path = tmp_path / "frames.cap"
    write(path, RECORDS[:2])
    whole = path.read_bytes()
    for size in range(len(whole) - len(RECORDS[1][2]) - 13 + 1, len(whole)):
        path.write_bytes(whole[:size])
        assert list(read_capture(path)) == RECORDS[:1]
        write(path, RECORDS[1:])
        assert list(read_capture(path)) == RECORDS


@pytest.mark.parametrize("name", ["frames.cap", "frames.cap.gz"])
def test_an_incomplete_last_record_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / name
    write(path)
    list(read_capture(path))
    assert "capture_incomplete" not in "".join(capsys.readouterr())
    path.write_bytes(path.read_bytes()[:-5])
    list(read_capture(path))
    assert "capture_incomplete" in "".join(capsys.readouterr())


def test_a_cut_off_gzip_gives_its_whole_records_and_takes_no_more(tmp_path: Path) -> None:
    path = tmp_path / "frames.cap.gz"
    write(path, [(n, KIND_BINARY, bytes([n]) * 999) for n in range(200)])
    path.write_bytes(path.read_bytes()[:-20])
    records = list(read_capture(path))
    assert [at_ms for at_ms, _, _ in records] == list(range(len(records)))
    with pytest.raises(InputFileError, match="new file"):
        CaptureWriter(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"not a capture at all", MAGIC + b"\0" * 8 + b"\x07\0\0\0\1x"]
)
@pytest.mark.parametrize("name", ["x.cap", "x.gz"])
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if not (content == b"" and name == "x.cap"):
        with pytest.raises(InputFileError) as caught:
            list(read_capture(path))
        assert "\n" not in str(caught.value)
        assert caught.value.hint
    if content:
        with pytest.raises(InputFileError):
            CaptureWriter(path)
        assert path.read_bytes() == content


def test_a_file_that_is_not_there_or_not_ours_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="No such file"):
        list(read_capture(tmp_path / "nowhere.cap"))
    with pytest.raises(InputFileError):
        list(read_capture(tmp_path))
    with pytest.raises(InputFileError):
        CaptureWriter(tmp_path / "nowhere" / "x.cap")


@given(st.binary(max_size=200))
def test_no_bytes_whatever_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("capture") / "x.cap"
    path.write_bytes(MAGIC + content)
    try:
        records = list(read_capture(path))
    except InputFileError as error:
        assert error.hint
    else:
        assert sum(13 + len(frame) for _, _, frame in records) <= len(content)
