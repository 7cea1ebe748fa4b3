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
from pkbrokers_redis.jobs.github import RemoteAway, Target
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


@pytest.mark.parametrize("manifest", ["none", "empty", "another"])
def test_an_emptied_folder_is_filled_again(source: Any, manifest: str) -> None:
    settings, there = source
    pull(settings, there)
    for name in ("manifest.json", "ticks.json", "daily_candles.pkl"):
        (there / name).unlink()
    if manifest == "empty":
        (there / "manifest.json").write_text('{"version": 1, "files": {}}')
    elif manifest == "another":
        snapshot(there, "stock_data.db", b"made here")
    assert pull(settings, there)["pulled"] == 2 and problems(there) == []


def test_of_parquet_what_a_restore_needs_is_pulled(source: Any, target: Target, folder: Path) -> None:
    settings, there = source
    settings = load_settings(**settings.model_dump(exclude_unset=True), intervals_text="1m:2,day")
    days = [partition(f"2026-11-{day}") for day in (17, 18, 19)]
    for name in days:
        snapshot(folder, name, name.encode())
    push(target, folder, ["*"])
    assert pull(settings, there)["pulled"] == 2 + 2
    assert not (there / days[0]).exists() and (there / days[2]).read_text() == days[2]
    assert pull(settings, there, ["parquet/*"])["pulled"] == 1 and problems(there) == []


@pytest.mark.parametrize("can_filter", ["true", "false"])
def test_git_brings_many_small_files_in_one_fetch(
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
        there = tmp_path / "there"
        assert pull(settings, there, via="git")["pulled"] == len(names) + 2
        assert len([each for each in host.seen if "POST" in each]) < 10
    assert problems(there) == []


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
