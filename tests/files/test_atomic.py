"""Atomic files: a reader sees the old file or the new one, and a crash leaves only temporary files."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkbrokers_redis.files import atomic
from pkbrokers_redis.files.atomic import replacing, replacing_path, sha256_of


def test_new_file_replaces_the_old_one_and_has_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ticks.json"
    for text in (b"old", b"new"):
        with replacing(path) as file:
            file.write(text)
            assert not path.exists() or path.read_bytes() == b"old"
        assert path.read_bytes() == text
    assert file.sha256 == sha256_of(path) == hashlib.sha256(b"new").hexdigest() and file.bytes_written == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["ticks.json"]


def test_error_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "ticks.json"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "ticks.json"
    path.write_bytes(b"old")
    program = (
        "import os, pathlib, signal; from pkbrokers_redis.files.atomic import replacing\n"
        f"with replacing(pathlib.Path({str(path)!r})) as file:\n"
        "    file.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    temporary = list(tmp_path.glob(".ticks.json.*.tmp"))
    assert len(temporary) == 1
    os.utime(temporary[0], (0, 0))  # long ago
    with replacing(path) as file:
        file.write(b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ticks.json"] and path.read_bytes() == b"new"


@pytest.mark.parametrize("at_s", [0, 4e9], ids=["long ago", "in the future, after the clock was set back"])
def test_temporary_files_of_killed_writers_are_deleted_by_the_next_write_or_a_sweep(
    tmp_path: Path, at_s: float
) -> None:
    """A dated name is written on one day only, so no later write would delete its temporary file."""
    folders = [tmp_path, tmp_path / "interval=1m" / "date=2026-11-20"]
    folders[1].mkdir(parents=True)
    unrelated = tmp_path / ".other.tmp"
    temporary = [folder / ".stock_data_20112026.pkl.77-0123abcd.tmp" for folder in folders]
    for entry in (*temporary, unrelated):
        entry.write_bytes(b"half")
        os.utime(entry, (at_s, at_s))
    with replacing(tmp_path / "stock_data_21112026.pkl") as file:
        file.write(b"new")
    assert not temporary[0].exists() and temporary[1].exists()
    assert atomic.sweep(tmp_path) == 1 and not temporary[1].exists() and unrelated.exists()


def test_running_writer_keeps_its_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "day.parquet"
    with replacing_path(path) as first:
        first.write_bytes(b"first")
        assert atomic.sweep(tmp_path) == 0
        with replacing_path(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second" and first.exists()
    assert path.read_bytes() == b"first"


def test_folder_that_cannot_be_synced_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(atomic.os, "open", refuse)
    with replacing(tmp_path / "x") as file:
        file.write(b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
