"""Pull: only whole files, only newer ones, over HTTPS and with git."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from pkbrokers_redis.errors import InputFileError, RefusedPickle, SettingsError
from pkbrokers_redis.files.manifest import problems
from pkbrokers_redis.jobs.github import RemoteUnavailable, Target
from pkbrokers_redis.jobs.pull import pull
from pkbrokers_redis.jobs.sync import push
from pkbrokers_redis.settings import load_settings
from tests.jobs.remotes import BRANCH, FOLDER, GitHost, Repository, partition, snapshot, sync_settings

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


@pytest.fixture
def published(repository: Repository, target: Target, folder: Path) -> Repository:
    push(target, folder)
    return repository


@pytest.fixture(params=["git", "https"])
def source(request: pytest.FixtureRequest, published: Repository, tmp_path: Path) -> Any:
    """Settings of another machine that pulls, both ways, and the folder it pulls into."""
    here = tmp_path / "local"
    if request.param == "git":
        yield sync_settings(published, here), here / "files"
        return
    with GitHost(published.path.parent, TOKEN) as host:
        base = f"{host.url}/raw/{BRANCH}/{FOLDER}"
        yield sync_settings(published, here, files_url=base, github_token=TOKEN), here / "files"


def test_pull_copies_whole_files_and_a_second_pull_copies_none(source: Any) -> None:
    settings, local = source
    result = pull(settings, local)
    assert result["pulled"] == 2 and problems(local) == []
    again = pull(settings, local)
    assert again["pulled"] == 0 and (again["same"] == 2 or again["unchanged"])
    (local / "ticks.json").unlink()
    assert pull(settings, local)["pulled"] == 1 and problems(local) == []


@pytest.mark.parametrize("manifest", ["none", "empty", "another"])
def test_pull_fills_an_emptied_folder_again(source: Any, manifest: str) -> None:
    settings, local = source
    pull(settings, local)
    for name in ("manifest.json", "ticks.json", "daily_candles.pkl"):
        (local / name).unlink()
    if manifest == "empty":
        (local / "manifest.json").write_text('{"version": 1, "files": {}}')
    elif manifest == "another":
        snapshot(local, "stock_data.db", b"made here")
    assert pull(settings, local)["pulled"] == 2 and problems(local) == []


def test_pull_copies_the_parquet_that_a_restore_needs(source: Any, target: Target, folder: Path) -> None:
    settings, local = source
    settings = load_settings(**settings.model_dump(exclude_unset=True), intervals_text="1m:2,day")
    days = [partition(f"2026-11-{day}") for day in (17, 18, 19)]
    for name in days:
        snapshot(folder, name, name.encode())
    push(target, folder, ["*"])
    assert pull(settings, local)["pulled"] == 2 + 2
    assert not (local / days[0]).exists() and (local / days[2]).read_text() == days[2]
    assert pull(settings, local, ["parquet/*"])["pulled"] == 1 and problems(local) == []


@pytest.mark.parametrize("can_filter", ["true", "false"])
def test_git_fetches_many_small_files_together(
    repository: Repository, target: Target, folder: Path, tmp_path: Path, can_filter: str
) -> None:
    repository.git("config", "uploadpack.allowFilter", can_filter)
    names = [partition(f"2026-11-{day}", "day") for day in range(10, 30)]
    for name in names:
        snapshot(folder, name, name.encode())
    push(target, folder)
    with GitHost(repository.path.parent, TOKEN) as host:
        url = f"{host.url}/kite.git"
        settings = sync_settings(repository, tmp_path, github_url=url, github_token=TOKEN)
        local = tmp_path / "local"
        assert pull(settings, local, via="git")["pulled"] == len(names) + 2
        assert len([line for line in host.seen if "POST" in line]) < 10
    assert problems(local) == []


def test_pull_keeps_newer_local_files_and_replaces_older_ones(source: Any, published: Repository) -> None:
    settings, local = source
    snapshot(local, "ticks.json", b"{  }", LATER)
    snapshot(local, "daily_candles.pkl", pickle.dumps({}), "2026-11-01T15:36:02+05:30")
    result = pull(settings, local)
    assert (result["older"], result["pulled"]) == (1, 1)
    assert (local / "ticks.json").read_bytes() == b"{  }"
    assert pull(settings, local, force=True)["pulled"] == 2
    assert (local / "ticks.json").read_bytes() == b"{}"


def test_file_that_differs_from_its_manifest_is_refused_and_the_local_file_stays(
    source: Any, published: Repository
) -> None:
    settings, local = source
    snapshot(local, "ticks.json", b"{ }", "2026-11-01T15:36:02+05:30")
    published.commit({f"{FOLDER}/ticks.json": b"[]"})
    with pytest.raises(InputFileError, match=r"ticks\.json"):
        pull(settings, local, ["ticks.json"])
    assert (local / "ticks.json").read_bytes() == b"{ }" and problems(local) == []
    assert not list(local.glob(".*.tmp"))


def test_pull_works_with_a_damaged_local_manifest(source: Any) -> None:
    settings, local = source
    local.mkdir(parents=True)
    (local / "manifest.json").write_text("{")
    assert pull(settings, local)["pulled"] == 2 and problems(local) == []


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def test_pickle_that_names_a_function_is_refused_by_name(
    source: Any, published: Repository, target: Target, folder: Path
) -> None:
    settings, local = source
    snapshot(folder, "daily_candles.pkl", pickle.dumps({"INFY": Malicious()}), LATER)
    push(target, folder)
    with pytest.raises(RefusedPickle, match="system"):
        pull(settings, local)
    assert not (local / "daily_candles.pkl").exists() and not Path("pwned").exists()


@pytest.mark.parametrize(
    "name", ["../up.pkl", "/etc/up.pkl", ".manifest.json.lock", "a/.hidden.pkl", "manifest.json"]
)
def test_manifest_cannot_name_a_file_outside_the_folder_or_an_internal_one(
    source: Any, published: Repository, name: str
) -> None:
    settings, local = source
    text = json.dumps({"version": 1, "files": {name: ENTRY}}).encode()
    published.commit({f"{FOLDER}/manifest.json": text})
    try:
        assert pull(settings, local, ["*"])["pulled"] == 0
    except InputFileError as error:
        assert "manifest.json cannot be read" in str(error)
    assert not list(local.glob("**/*.pkl"))


def test_too_large_file_is_refused_before_its_transfer(source: Any, published: Repository) -> None:
    settings, local = source
    text = json.dumps({"version": 1, "files": {"ticks.json": {**ENTRY, "bytes": 1 << 40}}}).encode()
    published.commit({f"{FOLDER}/manifest.json": text})
    with pytest.raises(InputFileError, match="more than"):
        pull(settings, local)


def test_unchanged_manifest_is_not_sent_again(published: Repository, tmp_path: Path) -> None:
    with GitHost(published.path.parent, TOKEN) as host:
        base = f"{host.url}/raw/{BRANCH}/{FOLDER}"
        settings = sync_settings(published, tmp_path, files_url=base, github_token=TOKEN)
        pull(settings, tmp_path / "local")
        before = host.bytes_sent
        assert pull(settings, tmp_path / "local")["unchanged"]
        assert host.bytes_sent == before
        assert TOKEN not in " ".join(host.seen)


def test_missing_branch_manifest_or_server_is_one_line(repository: Repository, tmp_path: Path) -> None:
    settings = sync_settings(repository, tmp_path)
    with pytest.raises(InputFileError, match="no such branch"):
        pull(settings, tmp_path / "local")
    repository.commit({"x": b"1"})
    with pytest.raises(InputFileError, match=r"no manifest\.json"):
        pull(settings, tmp_path / "local")
    unavailable = sync_settings(repository, tmp_path, files_url="http://127.0.0.1:1/x", github_token=TOKEN)
    with pytest.raises(RemoteUnavailable) as error:
        pull(unavailable, tmp_path / "local")
    assert TOKEN not in str(error.value)
    with pytest.raises(SettingsError, match="PKB_FILES_URL"):
        pull(settings, tmp_path / "local", via="https")
