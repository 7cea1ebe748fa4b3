"""The sync target's checks, git's errors, and that git reveals no token."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.jobs import github
from pkbrokers_redis.jobs.github import Git, GitFailed, RemoteUnavailable, Target, target_of
from pkbrokers_redis.jobs.sync import push
from pkbrokers_redis.settings import load_settings
from tests.jobs.remotes import BRANCH, FOLDER, GitHost, Repository, snapshot, words

TOKEN = "ghp16C7e42F292c6912E7710c838347Ae178B4a"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "no sync target"),
        ({"github_repo": "owner"}, "PKB_GITHUB_REPO"),
        ({"github_repo": "-owner/name"}, "PKB_GITHUB_REPO"),
        ({"github_repo": "a/.."}, "PKB_GITHUB_REPO"),
        ({"github_url": "ext::sh -c touch% /tmp/x"}, "PKB_GITHUB_URL"),
        ({"github_url": "--upload-pack=touch /tmp/x"}, "PKB_GITHUB_URL"),
        ({"github_url": "ssh://-oProxyCommand=x/y"}, "PKB_GITHUB_URL"),
        ({"github_url": "git://host/x"}, "PKB_GITHUB_URL"),
        ({"github_url": "http://example.org/x.git", "github_token": TOKEN}, "in the clear"),
        ({"github_url": f"https://me:{TOKEN}@github.com/a/b.git"}, "holds credentials"),
        ({"github_url": f"https://{TOKEN}@github.com/a/b.git"}, "holds credentials"),
        ({"github_url": "/x", "github_branch": "-x"}, "PKB_GITHUB_BRANCH"),
        ({"github_url": "/x", "github_branch": "a..b"}, "PKB_GITHUB_BRANCH"),
        ({"github_url": "/x", "github_branch": "a/.b"}, "PKB_GITHUB_BRANCH"),
        ({"github_url": "/x", "github_branch": "a.lock"}, "PKB_GITHUB_BRANCH"),
        ({"github_url": "/x", "github_branch": "a b;rm"}, "PKB_GITHUB_BRANCH"),
        ({"github_url": "/x", "github_path": "../up"}, "PKB_GITHUB_PATH"),
        ({"github_url": "/x", "github_path": "a/.GIT/hooks"}, "PKB_GITHUB_PATH"),
        ({"github_url": "/x", "github_path": "git~1"}, "PKB_GITHUB_PATH"),
        ({"github_url": "/x", "github_path": ".g\u200cit"}, "PKB_GITHUB_PATH"),
        ({"github_url": "/x", "github_path": "a\nb"}, "PKB_GITHUB_PATH"),
    ],
)  # fmt: skip
def test_invalid_target_is_a_one_line_error_that_names_its_setting(
    settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SettingsError) as error:
        target_of(load_settings(**settings))
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert TOKEN not in str(error.value)


def test_github_repository_has_a_url_without_the_token() -> None:
    target = target_of(load_settings(github_repo="me/data", github_token=TOKEN, github_path="/git-data/x/"))
    assert target.shown == "https://github.com/me/data.git actions-data-download:git-data/x"
    assert TOKEN not in repr(target)


# --- the token


def behind(host: GitHost, token: str = TOKEN) -> Target:
    return target_of(
        load_settings(
            github_url=f"{host.url}/kite.git", github_branch=BRANCH, github_path=FOLDER, github_token=token
        )
    )


def test_push_shows_the_token_in_no_command_line_file_or_output(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Watch command lines and files from outside while git runs."""
    snapshot(tmp_path / "files", "ticks.json", b"{}" + os.urandom(3_000_000))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(github.tempfile, "tempdir", str(scratch))
    stop, seen, leaks = threading.Event(), set[str](), list[str]()

    def look() -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = " ".join(child.cmdline())
                seen.add(child.name())
                if TOKEN in command:
                    leaks.append(command)
        for path in scratch.rglob("*"):
            if path.is_file() and TOKEN.encode() in path.read_bytes():
                leaks.append(str(path))

    def watch() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError, psutil.Error):  # processes and files end while we look
                look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with GitHost(repository.path.parent, TOKEN) as host:
            result = push(behind(host), tmp_path / "files")
    finally:
        stop.set()
        watcher.join()
    assert result["changed"] and repository.read(f"{FOLDER}/ticks.json").startswith(b"{}")
    assert any("git" in name for name in seen) and leaks == []
    assert TOKEN not in " ".join(host.seen)
    assert any(header.startswith("Basic") for header in host.authorizations)
    assert list(scratch.iterdir()) == []
    out, err = capfd.readouterr()
    assert TOKEN not in out + err


def test_refused_token_is_a_one_line_error_without_the_token(repository: Repository, tmp_path: Path) -> None:
    snapshot(tmp_path / "files", "ticks.json", b"{}")
    wrong = "wrong" + TOKEN
    with GitHost(repository.path.parent, TOKEN) as host, pytest.raises(GitFailed) as error:
        push(behind(host, wrong), tmp_path / "files")
    assert "PKB_GITHUB_TOKEN" in str(error.value)
    assert wrong not in str(error.value) and wrong not in words(repr(error.value.__cause__))


def test_redirect_to_another_host_does_not_get_the_token(repository: Repository, tmp_path: Path) -> None:
    snapshot(tmp_path / "files", "ticks.json", b"{}")
    with GitHost(repository.path.parent, TOKEN) as honest, GitHost(repository.path.parent, TOKEN) as other:
        honest.redirect_to = other.url
        with pytest.raises(GitFailed):
            push(behind(honest), tmp_path / "files")
    assert other.seen and not any(other.authorizations)


# --- git


def test_reasons_from_git_are_shown_without_credentials(tmp_path: Path) -> None:
    target = Target(str(tmp_path / "missing.git"), "data", "")
    with Git(target) as git, pytest.raises(GitFailed, match="PKB_GITHUB_REPO or PKB_GITHUB_URL"):
        git("ls-remote", "origin")
    with Git(Target("https://a.invalid/x.git", "data", "")) as git:
        assert git._clean("fatal: https://me:pw@host/x") == "fatal: https://host/x"


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("me@h: Permission denied (publickey).", "(publickey).): check the ssh key and known_hosts: git"),
        (
            "@@@@@\nHost key verification failed.",
            "(Host key verification failed.): check the ssh key",
        ),
        (
            "ERROR: Repository not found.",
            "(ERROR: Repository not found.): check PKB_GITHUB_REPO",
        ),
        ("ssh: connect to host h port 22: Connection refused", "22: Connection refused): try again later"),
    ],
)
def test_reasons_from_ssh_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, expected: str
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\necho '{printed}' >&2\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Git(Target("ssh://me@h/x.git", "data", "")) as git, pytest.raises(GitFailed) as error:
        git("ls-remote", "origin")
    assert expected in str(error.value) and "PKB_GITHUB_TOKEN" not in str(error.value)


def test_full_scratch_disk_is_named(tmp_path: Path) -> None:
    with Git(Target(str(tmp_path), "data", "")) as git, pytest.raises(GitFailed, match="or set TMPDIR"):
        git("-c", "alias.full=!echo 'fatal: write error: No space left on device' >&2; exit 128; :", "full")


@pytest.mark.parametrize("number", ["401", "403"])
def test_number_in_a_path_is_not_taken_for_a_status(tmp_path: Path, number: str) -> None:
    folder = tmp_path / f"v-{number}"
    folder.mkdir()
    (folder / "HEAD").write_text("no repository\n")
    with Git(target_of(load_settings(github_url=str(folder)))) as git, pytest.raises(GitFailed) as caught:
        git("push", "origin", "HEAD:refs/heads/x")
    assert not isinstance(caught.value, RemoteUnavailable)
    assert "contents:write" not in str(caught.value)


def test_git_that_hangs_is_ended_with_its_helpers(tmp_path: Path) -> None:
    with Git(Target(str(tmp_path), "data", ""), seconds_max=0.5) as git:
        with pytest.raises(RemoteUnavailable, match="took longer"):
            git("-c", "alias.wait=!sleep 300", "wait")
        assert not [
            child for child in psutil.Process().children(recursive=True) if "300" in " ".join(child.cmdline())
        ]


def test_git_that_is_killed_is_a_one_line_error(tmp_path: Path) -> None:
    with Git(Target(str(tmp_path), "data", "")) as git, pytest.raises(GitFailed, match="ended by signal 9"):
        git("-c", "alias.die=!kill -9 $PPID", "die")


def test_user_configuration_of_git_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "gitconfig"
    config.write_text("[credential]\n\thelper = store\n[user]\n\tname = someone\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    with Git(Target(str(tmp_path), "data", "")) as git:
        assert git("config", "user.name") == "pkb"
        assert "helper" not in git("config", "--list")


def test_missing_git_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PkbError, match="install git"), Git(Target(str(tmp_path), "data", "")):
        pass
