"""Push and pull against a real repository: one rolling commit, nothing else touched, only whole files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from pkbrokers_redis.consumers.files.manifest import parse_manifest, problems, read_manifest
from pkbrokers_redis.core.errors import InputFileError, RefusedPickle, SettingsError
from pkbrokers_redis.jobs import sync
from pkbrokers_redis.jobs.github import GitFailed, RemoteAway, backoff_seconds
from pkbrokers_redis.jobs.pull import pull
from pkbrokers_redis.jobs.sync import FileTooLarge, PushConflict, push
from pkbrokers_redis.jobs.target import Target, target_of
from pkbrokers_redis.settings import Settings, load_settings
from tests.cli.conftest import Pkb, pkb
from tests.jobs.remotes import BRANCH, FOLDER, GitHost, Repository, snapshot

__all__ = ["pkb"]  # a fixture

TOKEN = "ghp_made_up"
LATER = "2026-11-21T15:36:02+05:30"
ENTRY = {
    "sha256": "0",
    "bytes": 1,
    "rows": 1,
    "instruments": 1,
    "from": "",
    "to": "",
    "made_at": LATER,
    "kind": "",
}
AT_S = 1_795_169_000.0  # 2026-11-20


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "remote" / "kite.git")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Our files."""
    snapshot(tmp_path / "data" / "files", "ticks.json", b"{}")
    snapshot(tmp_path / "data" / "files", "daily_candles.pkl", pickle.dumps({"INFY": [1.5]}))
    return tmp_path / "data" / "files"


@pytest.fixture
def settings(repository: Repository, tmp_path: Path) -> Settings:
    return sync_settings(repository, tmp_path / "data")


def sync_settings(repository: Repository, data: Path, **more: Any) -> Settings:
    options = {"github_url": f"file://{repository.path}", "github_branch": BRANCH, "github_path": FOLDER}
    return load_settings(**{**options, "data_dir": data, **more})


@pytest.fixture
def target(settings: Settings) -> Target:
    return target_of(settings)


# --- push


def test_the_first_push_makes_the_branch_with_the_files_and_their_manifest(
    repository: Repository, target: Target, folder: Path
) -> None:
    found = push(target, folder)
    assert (found["files"], found["changed"], found["attempts"]) == (2, True, 1)
    assert repository.tip() == found["commit"]
    assert repository.names() == [
        f"{FOLDER}/{name}" for name in ("daily_candles.pkl", "manifest.json", "ticks.json")
    ]
    published = parse_manifest(repository.read(f"{FOLDER}/manifest.json"))
    assert published == read_manifest(folder)


def test_the_same_files_again_make_no_commit(repository: Repository, target: Target, folder: Path) -> None:
    first = push(target, folder)
    again = push(target, folder)
    assert (again["changed"], again["commit"]) == (False, first["commit"])


def test_other_files_of_the_branch_stay_byte_for_byte(
    repository: Repository, target: Target, folder: Path
) -> None:
    theirs = {
        "README.md": b"hello\r\n", f"{FOLDER}/old.bin": os.urandom(5_000), f"{FOLDER}x/y": b"beside",
        "t\u00e4glich/\u20b9.txt": b"1",
    }  # fmt: skip
    repository.commit(theirs)
    before = repository.git("ls-tree", "-r", BRANCH).splitlines()
    push(target, folder)
    after = repository.git("ls-tree", "-r", BRANCH).splitlines()
    assert set(before) < set(after) and len(after) == len(before) + 3
    assert all(repository.read(name) == content for name, content in theirs.items())


def test_eight_pushes_leave_one_commit_and_no_more_objects_than_one(
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


def test_somebody_elses_commit_upon_ours_is_kept_and_built_upon(
    repository: Repository, target: Target, folder: Path
) -> None:
    push(target, folder)
    theirs = repository.commit({"notes.txt": b"1"}, "a note")
    for content in (b'{"1":{}}', b'{"2":{}}'):
        snapshot(folder, "ticks.json", content)
        push(target, folder)
    log = repository.log()
    assert log[1] == "a note" and len(log) == 3
    assert repository.git("rev-parse", f"{BRANCH}^") == theirs
    assert repository.read("notes.txt") == b"1"


def test_a_push_that_another_outruns_is_built_anew_on_what_they_pushed(
    repository: Repository, target: Target, folder: Path
) -> None:
    raced = []

    def another(done: int, total: int, _part: str) -> None:
        if done == 1 and len(raced) < 2:  # after our fetch, before our push
            raced.append(repository.commit({f"theirs-{len(raced)}": b"x"}))

    waits: list[float] = []
    found = push(target, folder, listener=another, sleep=waits.append)
    assert found["attempts"] == 3 and len(waits) == 2
    assert {"theirs-0", "theirs-1", f"{FOLDER}/ticks.json"} <= set(repository.names())
    assert repository.git("rev-parse", f"{BRANCH}^") == raced[-1]


def test_a_branch_that_never_rests_is_given_up_after_some_attempts(
    repository: Repository, target: Target, folder: Path
) -> None:
    raced = []

    def another(done: int, _total: int, _part: str) -> None:
        if done == 1:
            raced.append(repository.commit({"theirs": os.urandom(8)}))

    with pytest.raises(PushConflict):
        push(target, folder, listener=another, sleep=lambda _: None)
    assert len(raced) == sync.ATTEMPTS_MAX and repository.tip() == raced[-1]
    assert all(0 <= backoff_seconds(attempt, 1.0) <= 8 for attempt in range(1, 20))


def test_a_remote_that_cannot_leave_contents_out_will_do(repository: Repository, folder: Path) -> None:
    repository.git("config", "uploadpack.allowFilter", "false")
    repository.commit({"theirs": b"x"})
    target = Target(str(repository.path), BRANCH, "")  # a path, and the top of the branch
    for content in (b'{"1":{}}', b'{"2":{}}'):
        snapshot(folder, "ticks.json", content)
        push(target, folder)
    assert repository.names() == ["daily_candles.pkl", "manifest.json", "theirs", "ticks.json"]
    assert len(repository.log()) == 2


def test_two_pushes_at_once_both_arrive(repository: Repository, target: Target, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for each in folders:
        snapshot(each, f"{each.name}.pkl", pickle.dumps({}))
    threads = [threading.Thread(target=push, args=(target, each)) for each in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {f"{FOLDER}/one.pkl", f"{FOLDER}/two.pkl"} <= set(repository.names())
    assert set(parse_manifest(repository.read(f"{FOLDER}/manifest.json"))) == {"one.pkl", "two.pkl"}


def test_a_remote_that_refuses_is_no_conflict(repository: Repository, target: Target, folder: Path) -> None:
    hook = repository.path / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'protected branch' >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(GitFailed, match="git push failed"):
        push(target, folder, sleep=lambda _: pytest.fail("nothing to wait for"))


def test_a_file_that_is_too_large_stays_at_home_and_is_named_once_the_others_are_there(
    repository: Repository, target: Target, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("huge.pkl", sync.FILE_BYTES_MAX + 1), ("large.pkl", sync.FILE_BYTES_WARN + 1)):
        snapshot(folder, name, b"\0")
        os.truncate(folder / name, size)
    with pytest.raises(FileTooLarge, match=r"huge\.pkl \(100 MB\)"):
        push(target, folder, ["huge.pkl"])
    assert repository.tip() == ""  # looked at before anything else
    snapshot(folder, "large.pkl", b"\0")
    with pytest.raises(FileTooLarge) as error:
        push(target, folder)
    assert error.value.names == ["huge.pkl"] and f"{FOLDER}/huge.pkl" not in repository.names()
    assert f"{FOLDER}/ticks.json" in repository.names()
    assert "large_file" not in capfd.readouterr().err


def test_a_push_downloads_no_contents_of_the_branch(
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


def test_dated_files_of_last_month_leave_the_branch(
    repository: Repository, target: Target, folder: Path
) -> None:
    for day in ("01102026", "19112026"):
        snapshot(folder, f"stock_data_{day}.pkl", pickle.dumps({}))
    push(target, folder, at_s=AT_S - 40 * 86_400)
    repository.commit({f"{FOLDER}/stock_data_01012020.pkl": b"not ours: in no manifest"})
    push(target, folder, ["ticks.json"], at_s=AT_S)
    names = {name.rpartition("/")[2] for name in repository.names()}
    assert "stock_data_01102026.pkl" not in names
    assert {"stock_data_19112026.pkl", "stock_data_01012020.pkl", "daily_candles.pkl"} <= names
    assert "stock_data_01102026.pkl" not in parse_manifest(repository.read(f"{FOLDER}/manifest.json"))


def test_what_is_pushed_is_what_its_manifest_says_though_the_file_is_replaced_meanwhile(
    repository: Repository, target: Target, folder: Path
) -> None:
    over = threading.Event()

    def keep_writing() -> None:
        while not over.is_set():
            snapshot(folder, "ticks.json", b"{" + b" " * (os.urandom(1)[0]) + b"}")

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(3):
            push(target, folder)
            assert_whole(repository)
    finally:
        over.set()
        writer.join()


def assert_whole(repository: Repository) -> None:
    for name, entry in parse_manifest(repository.read(f"{FOLDER}/manifest.json")).items():
        assert hashlib.sha256(repository.read(f"{FOLDER}/{name}")).hexdigest() == entry.sha256


def test_nothing_to_push_and_a_damaged_file_are_one_line(
    target: Target, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputFileError, match="nothing to push"):
        push(target, tmp_path / "empty")
    monkeypatch.setattr(sync, "READ_AGAIN_SECONDS", 0.0)
    (folder / "ticks.json").write_bytes(b"[]")
    with pytest.raises(InputFileError, match="not the file its manifest names"):
        push(target, folder)
    (folder / "ticks.json").unlink()
    with pytest.raises(InputFileError, match="not in the folder"):
        push(target, folder)


# --- pull


@pytest.fixture
def published(repository: Repository, target: Target, folder: Path) -> Repository:
    push(target, folder)
    return repository


@pytest.fixture(params=["git", "https"])
def source(request: pytest.FixtureRequest, published: Repository, tmp_path: Path) -> Any:
    """Settings of another machine that pulls, both ways, and the folder it pulls into."""
    here = tmp_path / "there"
    if request.param == "git":
        yield sync_settings(published, here), here / "files"
        return
    with GitHost(published.path.parent, TOKEN) as host:
        base = f"{host.url}/raw/{BRANCH}/{FOLDER}"
        yield sync_settings(published, here, files_url=base, github_token=TOKEN), here / "files"


def test_a_pull_brings_whole_files_and_a_second_one_nothing(source: Any) -> None:
    settings, there = source
    found = pull(settings, there)
    assert found["pulled"] == 2 and problems(there) == []
    again = pull(settings, there)
    assert again["pulled"] == 0 and (again["same"] == 2 or again["unchanged"])
    (there / "ticks.json").unlink()
    assert pull(settings, there)["pulled"] == 1 and problems(there) == []


def test_newer_files_of_ours_stay_and_older_ones_go(source: Any, published: Repository) -> None:
    settings, there = source
    snapshot(there, "ticks.json", b"{  }", LATER)
    snapshot(there, "daily_candles.pkl", pickle.dumps({}), "2026-11-01T15:36:02+05:30")
    found = pull(settings, there)
    assert (found["older"], found["pulled"]) == (1, 1)
    assert (there / "ticks.json").read_bytes() == b"{  }"
    assert pull(settings, there, force=True)["pulled"] == 2
    assert (there / "ticks.json").read_bytes() == b"{}"


def test_a_file_that_is_not_its_manifests_is_refused_and_ours_stays(
    source: Any, published: Repository
) -> None:
    settings, there = source
    snapshot(there, "ticks.json", b"{ }", "2026-11-01T15:36:02+05:30")
    published.commit({f"{FOLDER}/ticks.json": b"[]"})
    with pytest.raises(InputFileError, match=r"ticks\.json"):
        pull(settings, there, ["ticks.json"])
    assert (there / "ticks.json").read_bytes() == b"{ }" and problems(there) == []
    assert not list(there.glob(".*.tmp"))


def test_a_damaged_manifest_of_ours_is_no_obstacle(source: Any) -> None:
    settings, there = source
    there.mkdir(parents=True)
    (there / "manifest.json").write_text("{")
    assert pull(settings, there)["pulled"] == 2 and problems(there) == []


class Nasty:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def test_a_pickle_that_asks_for_more_than_tables_is_refused_by_name(
    source: Any, published: Repository, target: Target, folder: Path
) -> None:
    settings, there = source
    snapshot(folder, "daily_candles.pkl", pickle.dumps({"INFY": Nasty()}), LATER)
    push(target, folder)
    with pytest.raises(RefusedPickle, match="system"):
        pull(settings, there)
    assert not (there / "daily_candles.pkl").exists() and not Path("pwned").exists()


@pytest.mark.parametrize(
    "name", ["../up.pkl", "/etc/up.pkl", ".manifest.json.lock", "a/.hidden.pkl", "manifest.json"]
)
def test_a_manifest_cannot_name_a_file_outside_or_one_of_our_own(
    source: Any, published: Repository, name: str
) -> None:
    settings, there = source
    text = json.dumps({"version": 1, "files": {name: ENTRY}}).encode()
    published.commit({f"{FOLDER}/manifest.json": text})
    try:
        assert pull(settings, there, ["*"])["pulled"] == 0
    except InputFileError as error:
        assert "manifest.json cannot be read" in str(error)
    assert not list(there.glob("**/*.pkl"))


def test_a_file_larger_than_we_take_is_refused_before_it_comes(source: Any, published: Repository) -> None:
    settings, there = source
    text = json.dumps({"version": 1, "files": {"ticks.json": {**ENTRY, "bytes": 1 << 40}}}).encode()
    published.commit({f"{FOLDER}/manifest.json": text})
    with pytest.raises(InputFileError, match="more than"):
        pull(settings, there)


def test_an_unchanged_manifest_is_not_sent_again(published: Repository, tmp_path: Path) -> None:
    with GitHost(published.path.parent, TOKEN) as host:
        base = f"{host.url}/raw/{BRANCH}/{FOLDER}"
        settings = sync_settings(published, tmp_path, files_url=base, github_token=TOKEN)
        pull(settings, tmp_path / "there")
        before = host.bytes_sent
        assert pull(settings, tmp_path / "there")["unchanged"]
        assert host.bytes_sent == before
        assert TOKEN not in " ".join(host.seen)


def test_what_is_missing_or_away_is_one_line(repository: Repository, tmp_path: Path) -> None:
    settings = sync_settings(repository, tmp_path)
    with pytest.raises(InputFileError, match="no such branch"):
        pull(settings, tmp_path / "there")
    repository.commit({"x": b"1"})
    with pytest.raises(InputFileError, match=r"no manifest\.json"):
        pull(settings, tmp_path / "there")
    away = sync_settings(repository, tmp_path, files_url="http://127.0.0.1:1/x", github_token=TOKEN)
    with pytest.raises(RemoteAway) as error:
        pull(away, tmp_path / "there")
    assert TOKEN not in str(error.value)
    with pytest.raises(SettingsError, match="PKB_FILES_URL"):
        pull(settings, tmp_path / "there", via="https")


# --- the command


def test_the_command_pushes_and_pulls(
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
    assert pkb("sync", "pull").out.startswith("2 files are new here")
    assert pkb("sync", "pull", "--via", "carrier-pigeon").code == 2
    assert problems(tmp_path / "there" / "files") == []
