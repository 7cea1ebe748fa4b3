"""The manifest lists the files of a folder, and `problems` finds the differences."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.files.atomic import replacing
from pkbrokers_redis.files.manifest import (
    NAME,
    Entry,
    announce,
    parse_manifest,
    problems,
    read_manifest,
    update_manifest,
)


def written(folder: Path, name: str, text: bytes = b"rows") -> Entry:
    with replacing(folder / name) as file:
        file.write(text)
    made_at = "2026-11-20T15:36:02+05:30"
    position = {"0": "1795152605000-0"}
    entry = Entry(
        file.sha256, file.bytes_written, 2, 1, "2026-11-19", "2026-11-20", made_at, "pickle", position
    )
    update_manifest(folder, {name: entry})
    return entry


def test_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    one, two = written(tmp_path, "a.pkl"), written(tmp_path, "interval=1m/date=2026-11-20/part.parquet")
    assert read_manifest(tmp_path) == {"a.pkl": one, "interval=1m/date=2026-11-20/part.parquet": two}
    assert problems(tmp_path) == [] and one.made_at_ms == 1795169162000
    listed = json.loads((tmp_path / NAME).read_text())["files"]["a.pkl"]
    assert listed["from"] == "2026-11-19" and listed["position"] == {"0": "1795152605000-0"}


def test_entry_can_be_removed(tmp_path: Path) -> None:
    written(tmp_path, "a.pkl")
    update_manifest(tmp_path, {}, removed=["a.pkl"])
    assert read_manifest(tmp_path) == {}


def test_announced_entry_is_valid_once_its_file_is_in_place(tmp_path: Path) -> None:
    old = written(tmp_path, "a.pkl")
    new = replace(old, sha256=hashlib.sha256(b"ROWS").hexdigest(), rows=7)
    announce(tmp_path, {"a.pkl": new, "never.pkl": new})
    other = written(tmp_path, "b.pkl")  # by another process, meanwhile
    assert read_manifest(tmp_path) == {"a.pkl": old, "b.pkl": other} and problems(tmp_path) == []
    (tmp_path / "a.pkl").write_bytes(b"ROWS")
    assert read_manifest(tmp_path)["a.pkl"] == new and problems(tmp_path) == []
    assert parse_manifest((tmp_path / NAME).read_bytes())["a.pkl"] == old
    update_manifest(tmp_path, {}, removed=["never.pkl"])
    assert parse_manifest((tmp_path / NAME).read_bytes())["a.pkl"] == new
    assert "coming" not in json.loads((tmp_path / NAME).read_text())


def test_problems_names_changed_shorter_and_missing_files(tmp_path: Path) -> None:
    for name in ("changed", "shorter", "deleted"):
        written(tmp_path, name)
    (tmp_path / "changed").write_bytes(b"ROWS")
    (tmp_path / "shorter").write_bytes(b"r")
    (tmp_path / "deleted").unlink()
    assert problems(tmp_path) == [
        "changed has another sha256",
        "deleted is missing",
        "shorter has 1 bytes, not 4",
    ]
    assert problems(tmp_path, ["never"]) == ["never is not in the manifest"]


def test_folder_without_a_manifest_has_no_files(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 1}',
        '{"version": 9, "files": {}}',
        '{"version": 1, "files": {"a": {}}}',
        '{"version":1,"files":{"a":1}}',
    ],
)
def test_damaged_manifest_is_a_one_line_error_and_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(InputFileError):
        read_manifest(tmp_path)
    entry = written(tmp_path, "a.pkl")
    assert read_manifest(tmp_path) == {"a.pkl": entry}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ""])
def test_path_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path, "a.pkl")
    listed = json.loads((tmp_path / NAME).read_text())
    listed["files"][name] = listed["files"]["a.pkl"]
    (tmp_path / NAME).write_text(json.dumps(listed))
    with pytest.raises(InputFileError):
        read_manifest(tmp_path)


def test_concurrent_writers_lose_no_entry(tmp_path: Path) -> None:
    threads = [threading.Thread(target=written, args=(tmp_path, f"{i}.pkl")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_manifest(tmp_path)) == 8 and problems(tmp_path) == []
