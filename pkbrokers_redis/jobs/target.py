"""Where the sync goes: a folder on a branch of a repository, checked letter by letter before git sees it.

PKB_GITHUB_URL (or https://github.com/PKB_GITHUB_REPO.git) · PKB_GITHUB_BRANCH · PKB_GITHUB_PATH
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from pydantic import SecretStr

from pkbrokers_redis.core.errors import SettingsError
from pkbrokers_redis.settings import Settings

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
GITHUB = "https://github.com"


@dataclass(frozen=True, slots=True)
class Target:
    """A folder on a branch of a repository. `folder` is "" for the top."""

    url: str
    branch: str
    folder: str
    token: SecretStr | None = None

    @property
    def ref(self) -> str:
        """The branch's full name."""
        return f"refs/heads/{self.branch}"

    def path_of(self, name: str) -> str:
        """A file of the folder as git names it."""
        return f"{self.folder}/{name}" if self.folder else name

    @property
    def shown(self) -> str:
        """For people: `https://github.com/me/data.git actions-data-download:results`."""
        return f"{self.url} {self.branch}:{self.folder or '/'}"


def target_of(settings: Settings) -> Target:
    """The sync target of the settings. Raises SettingsError: one line that names the setting."""
    url = settings.github_url
    if not url:
        repo = settings.github_repo or ""
        if not repo:
            raise SettingsError(
                "there is no sync target", "set PKB_GITHUB_REPO (owner/name) or PKB_GITHUB_URL"
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_.-]+", repo) or repo.endswith(
            ("/.", "/..")
        ):
            raise SettingsError(f"PKB_GITHUB_REPO {repo[:60]!r} is no repository", "write it as owner/name")
        url = f"{GITHUB}/{repo.removesuffix('.git')}.git"
    token = settings.github_token
    _check_url(url, token is not None)
    return Target(url, _checked_branch(settings.github_branch), _checked_folder(settings.github_path), token)


def _check_url(url: str, has_token: bool) -> None:
    if "://" not in url:
        if not url.startswith("/") or any(ord(letter) < 32 for letter in url):
            raise SettingsError(
                "PKB_GITHUB_URL is neither a URL nor an absolute path",
                "use https://…, ssh://… or /path/to/repo",
            )
        return
    try:
        parts = urlsplit(url)
        host, secret = (
            parts.hostname or "",
            parts.password or (parts.username if parts.scheme != "ssh" else ""),
        )
    except ValueError:
        raise SettingsError("PKB_GITHUB_URL is no URL", "use https://host/owner/name.git") from None
    if secret:  # the URL itself must not be shown
        raise SettingsError("PKB_GITHUB_URL holds credentials", "put the token into PKB_GITHUB_TOKEN")
    if parts.scheme not in ("https", "http", "ssh", "file") or host.startswith("-") or not url.isprintable():
        raise SettingsError("PKB_GITHUB_URL cannot be used", "use https://…, ssh://… or a path")
    if has_token and parts.scheme == "http" and host not in LOOPBACK:
        raise SettingsError("PKB_GITHUB_URL would send the token in the clear", "use https://")


def _checked_branch(branch: str) -> str:
    """What `git check-ref-format` allows, in letters that need no quoting anywhere."""
    is_fine = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,199}", branch)
    parts = branch.split("/")
    if (
        not is_fine
        or ".." in branch
        or any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in parts)
    ):
        raise SettingsError(
            f"PKB_GITHUB_BRANCH {branch[:60]!r} is no branch", "use a name such as data/ticks"
        )
    return branch


def _checked_folder(folder: str) -> str:
    """A relative path that stays in the repository and out of `.git`, whatever the file system thinks."""
    folder = folder.strip("/")
    if not folder or folder == ".":
        return ""
    # NTFS takes these for `.git` too; git refuses such trees on the other side.
    bad = any(
        part in ("", ".", "..") or re.fullmatch(r"\.git[\s.]*|git~\d+", part, re.I)
        for part in folder.split("/")
    )
    if bad or len(folder) > 400 or not folder.isprintable() or "\\" in folder or ":" in folder:
        raise SettingsError(f"PKB_GITHUB_PATH {folder[:60]!r} is no folder", "use one such as results/data")
    return str(PurePosixPath(folder))
