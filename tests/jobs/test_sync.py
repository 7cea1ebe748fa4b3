"""Push to a real repository: one rolling commit, nothing else touched."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import threading
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from pkbrokers_redis.candles.model import Interval
from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.files.manifest import Entry, parse_manifest, problems, read_manifest
from pkbrokers_redis.jobs import sync
from pkbrokers_redis.jobs.github import Git, GitFailed, Target, backoff_seconds, target_of
from pkbrokers_redis.jobs.retention import PARTITIONS_MAX, needed
from pkbrokers_redis.jobs.sync import FileTooLarge, PushConflict, push
from tests.cli.conftest import Pkb, pkb
from tests.jobs.remotes import BRANCH, FOLDER, GitHost, Repository, partition, snapshot, sync_settings

__all__ = ["pkb"]  # a fixture

TOKEN = "ghp_made_up"
AT_S = 1_795_169_000.0  # 2026-11-20


# --- push


def test_first_push_creates_the_branch_with_the_files_and_their_manifest(
    repository: Repository, target: Target, folder: Path
) -> None:
    result = push(target, folder)
    assert (result["files"], result["changed"], result["attempts"]) == (2, True, 1)
    assert repository.tip() == result["commit"]
    assert repository.names() == [
        f"{FOLDER}/{name}" for name in ("daily_candles.pkl", "manifest.json", "ticks.json")
    ]
    published = parse_manifest(repository.read(f"{FOLDER}/manifest.json"))
    assert published == read_manifest(folder)


def test_pushing_the_same_files_makes_no_commit(repository: Repository, target: Target, folder: Path) -> None:
    first = push(target, folder)
    again = push(target, folder)
    assert (again["changed"], again["commit"]) == (False, first["commit"])


def test_push_keeps_other_files_of_the_branch_byte_for_byte(
    repository: Repository, target: Target, folder: Path
) -> None:
    existing = {
        "README.md": b"hello\r\n", f"{FOLDER}/old.bin": os.urandom(5_000), f"{FOLDER}x/y": b"near",
        "t\u00e4glich/\u20b9.txt": b"1",
    }  # fmt: skip
    repository.commit(existing)
    before = repository.git("ls-tree", "-r", BRANCH).splitlines()
    push(target, folder)
    after = repository.git("ls-tree", "-r", BRANCH).splitlines()
    assert set(before) < set(after) and len(after) == len(before) + 3
    assert all(repository.read(name) == content for name, content in existing.items())


def test_eight_pushes_leave_one_commit_and_no_more_objects_than_one_push(
    repository: Repository, target: Target, folder: Path
) -> None:
    repository.commit({"README.md": b"hello"})
    sizes = []
    for number in range(8):
        snapshot(folder, "ticks.json", os.urandom(50_000))
        assert push(target, folder, at_s=AT_S + number)["changed"]
        if number in (0, 7):
            sizes.append(repository.objects_after_gc())
    assert len(repository.log()) == 2 and repository.log()[1] == "by hand"
    assert sizes[0][0] == sizes[1][0]
    assert abs(sizes[0][1] - sizes[1][1]) <= 2  # KiB


def test_push_keeps_a_commit_of_another_author_and_follows_it(
    repository: Repository, target: Target, folder: Path
) -> None:
    push(target, folder)
    note = repository.commit({"notes.txt": b"1"}, "a note")
    for content in (b'{"1":{}}', b'{"2":{}}'):
        snapshot(folder, "ticks.json", content)
        push(target, folder)
    log = repository.log()
    assert log[1] == "a note" and len(log) == 3
    assert repository.git("rev-parse", f"{BRANCH}^") == note
    assert repository.read("notes.txt") == b"1"


def test_push_that_races_with_another_is_built_again_on_the_other_commit(
    repository: Repository, target: Target, folder: Path
) -> None:
    raced = []

    def another(done: int, total: int, _part: str) -> None:
        if done == 1 and len(raced) < 2:  # between fetch and push
            raced.append(repository.commit({f"other-{len(raced)}": b"x"}))

    waits: list[float] = []
    result = push(target, folder, listener=another, sleep=waits.append)
    assert result["attempts"] == 3 and len(waits) == 2
    assert {"other-0", "other-1", f"{FOLDER}/ticks.json"} <= set(repository.names())
    assert repository.git("rev-parse", f"{BRANCH}^") == raced[-1]


def test_push_gives_up_after_the_maximum_number_of_conflicts(
    repository: Repository, target: Target, folder: Path
) -> None:
    raced = []

    def another(done: int, _total: int, _part: str) -> None:
        if done == 1:
            raced.append(repository.commit({"other": os.urandom(8)}))

    with pytest.raises(PushConflict):
        push(target, folder, listener=another, sleep=lambda _: None)
    assert len(raced) == sync.ATTEMPTS_MAX and repository.tip() == raced[-1]
    assert all(0 <= backoff_seconds(attempt, 1.0) <= 8 for attempt in range(1, 20))


def test_push_works_with_a_remote_without_partial_fetch(repository: Repository, folder: Path) -> None:
    repository.git("config", "uploadpack.allowFilter", "false")
    repository.commit({"other": b"x"})
    target = Target(str(repository.path), BRANCH, "")  # a path, and the top of the branch
    for content in (b'{"1":{}}', b'{"2":{}}'):
        snapshot(folder, "ticks.json", content)
        push(target, folder)
    assert repository.names() == ["daily_candles.pkl", "manifest.json", "other", "ticks.json"]
    assert len(repository.log()) == 2


def test_two_concurrent_pushes_both_succeed(repository: Repository, target: Target, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder_ in folders:
        snapshot(folder_, f"{folder_.name}.pkl", pickle.dumps({}))
    threads = [threading.Thread(target=push, args=(target, folder_)) for folder_ in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {f"{FOLDER}/one.pkl", f"{FOLDER}/two.pkl"} <= set(repository.names())
    assert set(parse_manifest(repository.read(f"{FOLDER}/manifest.json"))) == {"one.pkl", "two.pkl"}


def test_push_that_the_remote_refuses_is_final(repository: Repository, target: Target, folder: Path) -> None:
    hook = repository.path / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'protected branch' >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(GitFailed, match=r"git push failed .*protected branch.*allow force pushes"):
        push(target, folder, sleep=lambda _: pytest.fail("must not wait"))


def test_second_push_to_a_branch_without_force_pushes_names_the_setting(
    repository: Repository, target: Target, folder: Path
) -> None:
    repository.git("config", "receive.denyNonFastForwards", "true")
    push(target, folder)
    snapshot(folder, "ticks.json", b"{ }")
    with pytest.raises(GitFailed, match="allow force pushes to the branch data, or set PKB_GITHUB_BRANCH"):
        push(target, folder)


def test_too_large_file_is_named_after_all_other_files_were_pushed(
    repository: Repository, target: Target, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("huge.pkl", sync.FILE_BYTES_MAX + 1), ("large.pkl", sync.FILE_BYTES_WARN + 1)):
        snapshot(folder, name, b"\0")
        os.truncate(folder / name, size)
    with pytest.raises(FileTooLarge, match=r"huge\.pkl \(100 MB\)"):
        push(target, folder, ["huge.pkl"])
    assert repository.tip() == ""  # sizes are checked first
    snapshot(folder, "large.pkl", b"\0")
    with pytest.raises(FileTooLarge) as error:
        push(target, folder)
    assert error.value.names == ["huge.pkl"] and f"{FOLDER}/huge.pkl" not in repository.names()
    assert f"{FOLDER}/ticks.json" in repository.names()
    assert "event=large_file" not in capfd.readouterr().err


def test_push_downloads_no_contents_of_the_branch(
    repository: Repository, folder: Path, tmp_path: Path
) -> None:
    repository.commit({"big.bin": os.urandom(3_000_000), f"{FOLDER}/old.pkl": os.urandom(3_000_000)})
    with GitHost(repository.path.parent, TOKEN) as host:
        url = f"{host.url}/kite.git"
        settings = sync_settings(repository, tmp_path, github_url=url, github_token=TOKEN)
        assert push(target_of(settings), folder)["changed"]
        snapshot(folder, "ticks.json", b"{ }")
        assert push(target_of(settings), folder)["changed"]
        assert host.bytes_sent < 100_000
    assert len(repository.log()) == 2 and len(repository.read("big.bin")) == 3_000_000


@pytest.mark.parametrize("commits", [0, 1, 3])
def test_push_neither_stores_nor_sends_contents_that_the_branch_has(
    repository: Repository, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: int
) -> None:
    stored: list[str] = []

    class Watched(Git):
        def __call__(self, *arguments: str, given: Any = None) -> str:
            printed = super().__call__(*arguments, given=given)
            stored.extend([printed] if arguments[0] == "hash-object" else [])
            return printed

    monkeypatch.setattr(sync, "Git", Watched)
    for number in range(commits):
        repository.commit({"other": b"%d" % number})
    large = os.urandom(3_000_000)
    for name in ("stock_data_20112026.pkl", "daily_candles.pkl"):
        snapshot(folder, name, large)
    with GitHost(repository.path.parent, TOKEN) as host:
        url = f"{host.url}/kite.git"
        target = target_of(sync_settings(repository, tmp_path, github_url=url, github_token=TOKEN))
        push(target, folder, at_s=AT_S)
        assert len(stored) == 3  # ticks.json, both pickles at once, the manifest
        taken, sent = host.bytes_taken, host.bytes_sent
        for number in (1, 2):  # after the other commit, then in place of the first push
            snapshot(folder, "ticks.json", b'{"%d": 1}' % number)
            push(target, folder, at_s=AT_S + number)
        assert len(stored) == 3 + 2 * 2
        assert host.bytes_taken - taken < 100_000 and host.bytes_sent - sent < 100_000
    assert_whole(repository)
    assert len(repository.log()) == commits + 1 and "dangling blob" not in repository.git("fsck", "--full")


def test_push_removes_outdated_files_from_the_branch(
    repository: Repository, target: Target, folder: Path
) -> None:
    for day in ("01102026", "19112026"):
        snapshot(folder, f"stock_data_{day}.pkl", pickle.dumps({}))
    push(target, folder, at_s=AT_S - 40 * 86_400)
    repository.commit({f"{FOLDER}/stock_data_01012020.pkl": b"in no manifest"})
    push(target, folder, ["ticks.json"], at_s=AT_S)
    names = {name.rpartition("/")[2] for name in repository.names()}
    assert "stock_data_01102026.pkl" not in names
    assert {"stock_data_19112026.pkl", "stock_data_01012020.pkl", "daily_candles.pkl"} <= names
    assert "stock_data_01102026.pkl" not in parse_manifest(repository.read(f"{FOLDER}/manifest.json"))


def test_locally_deleted_dated_files_do_not_stop_a_push(
    repository: Repository, target: Target, folder: Path
) -> None:
    days = ("stock_data_18112026.pkl", "stock_data_19112026.pkl", partition("2026-11-19"))
    for name in days:
        snapshot(folder, name, name.encode())
    push(target, folder, at_s=AT_S)
    for name in days[1:]:
        (folder / name).unlink()
    snapshot(folder, "ticks.json", b"{ }")
    assert push(target, folder, at_s=AT_S)["files"] == 3
    assert {f"{FOLDER}/{name}" for name in days} < set(repository.names())  # until they are outdated
    assert repository.read(f"{FOLDER}/ticks.json") == b"{ }"


def test_branch_holds_only_the_parquet_that_a_restore_needs(
    repository: Repository, target: Target, folder: Path
) -> None:
    """Each of these partitions has one row an instrument."""
    intervals = (Interval("1m", 60, 2), Interval("day", 0, 3))
    days = [f"2026-11-{day}" for day in (16, 17, 18, 19)]
    names = [partition(day, interval) for interval in ("1m", "5m", "day") for day in days]
    for name in names:
        snapshot(folder, name, name.encode())

    def partitions() -> list[str]:
        return [name.removeprefix(f"{FOLDER}/") for name in repository.names() if "parquet" in name]

    push(target, folder, intervals=intervals)
    assert partitions() == [partition(day) for day in days[-2:]] + [
        partition(day, "day") for day in days[-3:]
    ]
    snapshot(folder, partition("2026-11-20"), b"20")
    push(target, folder, intervals=intervals)
    assert partitions()[:2] == [partition("2026-11-19"), partition("2026-11-20")]
    assert len(partitions()) == 2 + 3
    push(target, folder, ["parquet/*"], intervals=intervals)  # requested by name
    assert len(partitions()) == len(names) + 1
    push(target, folder, intervals=intervals)
    assert len(partitions()) == 2 + 4 + 3  # partitions of an unknown interval stay
    assert_whole(repository)


def test_more_partitions_are_needed_if_they_have_few_rows_up_to_a_limit() -> None:
    def entry(rows: int, instruments: int) -> Entry:
        return Entry("", 1, rows, instruments, "", "", "", "parquet")

    days = [str(date(2025, 1, 1) + timedelta(days=number)) for number in range(500)]
    minutes = Interval("1m", 60, 390)
    thin = {partition(day): entry(1_000, 10) for day in days}
    assert needed(thin, [minutes]) == [partition(day) for day in days[:-5:-1]]
    full = {partition(day): entry(3_750, 10) for day in days}
    assert needed(full, [minutes]) == [partition(day) for day in days[:-3:-1]]
    empty = {partition(day): entry(0, 0) for day in days}
    assert len(needed(empty, [Interval("1m", 60, 100_000)])) == PARTITIONS_MAX


@pytest.mark.parametrize(
    ("existing", "blocking"),
    [(FOLDER, FOLDER), ("results", "results"), (f"{FOLDER}/ticks.json/x", f"{FOLDER}/ticks.json")],
)
def test_push_does_not_replace_a_file_that_has_the_name_of_its_folder(
    repository: Repository, target: Target, folder: Path, existing: str, blocking: str
) -> None:
    repository.commit({existing: b"other"})
    with pytest.raises(InputFileError, match=f"^{blocking} on the branch .*PKB_GITHUB_PATH"):
        push(target, folder)
    assert repository.read(existing) == b"other" and len(repository.log()) == 1


def test_pushed_files_match_their_manifest_while_snapshots_replace_them(
    repository: Repository, target: Target, folder: Path
) -> None:
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.is_set():
            snapshot(folder, "ticks.json", b"{" + b" " * (os.urandom(1)[0]) + b"}")

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(3):
            push(target, folder)
            assert_whole(repository)
    finally:
        stop.set()
        writer.join()


def assert_whole(repository: Repository) -> None:
    for name, entry in parse_manifest(repository.read(f"{FOLDER}/manifest.json")).items():
        assert hashlib.sha256(repository.read(f"{FOLDER}/{name}")).hexdigest() == entry.sha256


def test_empty_folder_and_damaged_file_are_one_line_errors(
    target: Target, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputFileError, match="nothing to push"):
        push(target, tmp_path / "empty")
    monkeypatch.setattr(sync, "READ_PAUSE_SECONDS", 0.0)
    (folder / "ticks.json").write_bytes(b"[]")
    with pytest.raises(InputFileError, match="differs from its manifest entry"):
        push(target, folder)
    (folder / "ticks.json").unlink()
    with pytest.raises(InputFileError, match="not in the folder"):
        push(target, folder)


# --- the command


def test_commands_push_and_pull(
    pkb: Pkb, repository: Repository, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKB_DATA_DIR", str(folder.parent))
    ended = pkb("sync", "push")
    assert ended.code == 2 and "PKB_GITHUB_REPO" in ended.err
    for name, value in (("URL", f"file://{repository.path}"), ("BRANCH", BRANCH), ("PATH", FOLDER)):
        monkeypatch.setenv(f"PKB_GITHUB_{name}", value)
    ended = pkb("sync", "push")
    assert ended.code == 0 and ended.out.startswith("pushed 2 files"), ended
    assert json.loads(pkb("sync", "push", "--json").out)["changed"] is False
    monkeypatch.setenv("PKB_DATA_DIR", str(tmp_path / "there"))
    assert pkb("sync", "pull").out.startswith("pulled 2 files")
    assert pkb("sync", "pull", "--via", "carrier-pigeon").code == 2
    assert problems(tmp_path / "there" / "files") == []
