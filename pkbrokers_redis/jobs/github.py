"""The sync target (a folder on a branch of a repository) and git, run so that it reveals no token.

    PKB_GITHUB_URL (or https://github.com/PKB_GITHUB_REPO.git) · PKB_GITHUB_BRANCH · PKB_GITHUB_PATH

    with Git(target_of(settings)) as git:
        git("fetch", …)         in a scratch repository that ends with the block

The token is in no argument, URL, message or file. git asks the script of GIT_ASKPASS, which reads the token
from git's environment and answers only for the target's own host.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from pydantic import SecretStr

from pkbrokers_redis import logs
from pkbrokers_redis.errors import PkbError, SettingsError
from pkbrokers_redis.settings import Settings

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
GITHUB = "https://github.com"


@dataclass(frozen=True, slots=True)
class Target:
    """A folder on a branch of a repository.

    Attributes:
        url: What git is given, without credentials.
        branch: Name of the branch, without `refs/heads/`.
        folder: Path in the repository; "" is its top.
        token: Sent as the password over HTTP(S) only.
    """

    url: str
    branch: str
    folder: str
    token: SecretStr | None = None

    @property
    def ref(self) -> str:
        """Return the branch's full name."""
        return f"refs/heads/{self.branch}"

    def path_of(self, name: str) -> str:
        """Return the path of a file of the folder in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    @property
    def shown(self) -> str:
        """Return the target for people: `https://github.com/me/data.git actions-data-download:results`."""
        return f"{self.url} {self.branch}:{self.folder or '/'}"


def target_of(settings: Settings) -> Target:
    """Return the sync target of the settings.

    Raises:
        SettingsError: A setting is missing or could harm; the message names it.
    """
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
    """Accept what `git check-ref-format` does, in letters that need no quoting anywhere."""
    is_valid = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,199}", branch)
    parts = branch.split("/")
    if (
        not is_valid
        or ".." in branch
        or any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in parts)
    ):
        raise SettingsError(
            f"PKB_GITHUB_BRANCH {branch[:60]!r} is no branch", "use a name such as data/ticks"
        )
    return branch


def _checked_folder(folder: str) -> str:
    """Accept a relative path that stays in the repository and out of `.git` on every file system."""
    folder = folder.strip("/")
    if not folder or folder == ".":
        return ""
    # NTFS reads these as `.git` too, and git's remotes refuse such trees.
    is_git_folder = any(
        part in ("", ".", "..") or re.fullmatch(r"\.git[\s.]*|git~\d+", part, re.I)
        for part in folder.split("/")
    )
    if is_git_folder or len(folder) > 400 or not folder.isprintable() or "\\" in folder or ":" in folder:
        raise SettingsError(f"PKB_GITHUB_PATH {folder[:60]!r} is no folder", "use one such as results/data")
    return str(PurePosixPath(folder))


SECONDS_MAX = 240.0  # one git command
STALL_BYTES_A_SECOND, STALL_SECONDS = 1_000, 30  # git ends a transfer that is slower for so long
REASON_LENGTH_MAX = 200
SCRATCH = "pkb-sync-"
USER = "x-access-token"  # GitHub's user name for a token
PASSED_ON = (
    "PATH", "TMPDIR", "SSH_AUTH_SOCK", "SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_SSL_CAINFO", "https_proxy",
    "HTTPS_PROXY", "http_proxy", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY",
)  # fmt: skip

# git starts helpers (git-remote-https, ssh), which PR_SET_PDEATHSIG does not reach. So git and its helpers
# share a process group with this shell. It waits for the end of a pipe that only our process holds open; a
# kill -9 of our process closes the pipe, and the shell ends the group and removes the scratch repository.
GUARD = 'trap "" TERM INT HUP; read -r _; kill -TERM 0; rm -rf "$1"; kill -KILL 0'

# Answers only the prompt for the target's own host, so a redirect to another host gets no token.
ASKPASS = """#!/bin/sh
case "$1" in *"'$PKB_GIT_HOST'"*) printf %s "$PKB_GIT_TOKEN"; exit 0 ;; esac
exit 1
"""

# (what git or the remote printed, the hint, whether a later try can succeed); the first match counts.
# `{token}`, `{branch}`, `{url}` and `{tmp}` are filled in.
REASONS: tuple[tuple[str, str, bool], ...] = (
    (
        r"non-fast-forward|hook declined|protected branch|repository rule",
        "allow force pushes to the branch {branch}, or set PKB_GITHUB_BRANCH to one of its own",
        False,
    ),
    (r"(?<!remote: )(fatal|error): .*No space left", "make room in {tmp}, or set TMPDIR", False),
    (
        r"Permission denied \(|verification failed|Too many auth",
        "check the ssh key and known_hosts: git ls-remote {url}",
        False,
    ),
    (
        r"(returned error: |HTTP )40[13]\b|Authentication failed|could not read (Username|Password)|denied",
        "check PKB_GITHUB_TOKEN: it needs contents:write on that repository",
        False,
    ),
    (
        r"(returned error: |HTTP )404\b|not found|does not (appear|exist)",
        "check PKB_GITHUB_REPO or PKB_GITHUB_URL, and that the token may see it",
        False,
    ),
    (
        r"(returned error: |HTTP )5\d\d\b|resolve host|timed out|Failed to connect|Connection"
        r"|early EOF|hung up",
        "try again later",
        True,
    ),
    (r"", "try it by hand: git ls-remote {url}", False),
)

log = logs.get("sync")


class GitFailed(PkbError):
    """Raised when git did not succeed; the message has its reason, without secrets."""


class RemoteUnavailable(GitFailed):
    """Raised when the remote cannot be reached or does not answer in time: try again later."""


class Git:
    """Git in a scratch repository that is deleted at the end of the block.

    Each command ends within `seconds_max`, and at the latest with this process: its kill -9 leaves neither
    git, nor its helpers, nor the scratch repository.

    Example:
        >>> with Git(target_of(settings)) as git:
        ...     head = git("ls-remote", "origin", git.target.ref)

    Raises:
        GitFailed: git is missing, or a command failed.
        RemoteUnavailable: The remote cannot be reached now, or the time is over.
    """

    def __init__(self, target: Target, seconds_max: float = SECONDS_MAX) -> None:
        self.target = target
        self._seconds_max = seconds_max
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._env: dict[str, str] = {}

    def __enter__(self) -> Git:
        self._folder = tempfile.TemporaryDirectory(prefix=SCRATCH)  # mode 0700
        scratch = Path(self._folder.name)
        self._env = self._environment(scratch)
        try:
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", GUARD, "sh", str(scratch)],
                env={"PATH": self._env.get("PATH", os.defpath)},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
            )
            self("init", "--quiet", "--bare", str(scratch / "repository"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._guard is not None:
            self._end_all()
        if self._folder is not None:
            self._folder.cleanup()

    def __call__(self, *arguments: str, given: bytes | IO[bytes] | None = None) -> str:
        """Run one command and return what it printed. `given` is its input."""
        return self.run(arguments, given=given).decode(errors="surrogateescape").strip()

    def run(
        self,
        arguments: Sequence[str],
        *,
        given: bytes | IO[bytes] | None = None,
        into: IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> bytes:
        """Run one command and return the bytes that it printed.

        Args:
            arguments: The command and its options, without `git`.
            given: Its standard input.
            into: A file that gets its output instead.
            env: Further environment variables.
        """
        assert self._guard is not None  # noqa: S101  inside the block
        content, stdin = (given, subprocess.PIPE) if isinstance(given, bytes) else (None, given)
        try:
            child = subprocess.Popen(
                ["git", *arguments],
                env={**self._env, **(env or {})},
                stdin=stdin or subprocess.DEVNULL,
                stdout=into or subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=self._guard.pid,
            )
        except FileNotFoundError:
            raise GitFailed("there is no git", "install git") from None
        try:
            out, printed = child.communicate(content, timeout=self._seconds_max)
        except subprocess.TimeoutExpired:
            raise RemoteUnavailable(
                f"git {arguments[0]} took longer than {self._seconds_max:.0f} s", "is the remote reachable?"
            ) from None
        finally:
            if child.poll() is None:  # this time limit or RQ's: the block is over
                self._end_all()
                child.communicate()
        if child.returncode < 0:
            reason = f"git {arguments[0]} was ended by signal {-child.returncode}"
            raise GitFailed(reason, "try again; did the memory suffice?")
        if child.returncode:
            raise self._failure(arguments[0], printed.decode(errors="replace"))
        return out or b""

    def mark_shallow(self, commit: str) -> None:
        """Mark the commit as the end of history, so that git neither fetches its ancestors nor sends objects
        that the remote already has."""
        with (Path(self._env["GIT_DIR"]) / "shallow").open("a") as shallow:
            shallow.write(f"{commit}\n")

    def _end_all(self) -> None:
        """End the guard and every git that still runs."""
        assert self._guard is not None  # noqa: S101
        if self._guard.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.communicate()

    def _environment(self, scratch: Path) -> dict[str, str]:
        env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        env |= {
            "HOME": str(scratch),
            "LC_ALL": "C",
            "GIT_DIR": str(scratch / "repository"),
            "GIT_INDEX_FILE": str(scratch / "index"),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,  # a credential helper of the user's would store the token
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ALLOW_PROTOCOL": "file:http:https:ssh",
            "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oConnectTimeout=20 -oServerAliveInterval=15",
        }
        if self.target.token is not None and self.target.url.startswith("http"):
            script = scratch / "askpass"
            script.write_text(ASKPASS)
            script.chmod(0o700)
            parts = urlsplit(self.target.url)
            env["GIT_ASKPASS"] = str(script)
            env["PKB_GIT_TOKEN"] = self.target.token.get_secret_value()
            env["PKB_GIT_HOST"] = f"{parts.scheme}://{USER}@{parts.netloc}"
        config = {
            "remote.origin.url": self.target.url,
            "credential.username": USER,
            "http.lowSpeedLimit": str(STALL_BYTES_A_SECOND),
            "http.lowSpeedTime": str(STALL_SECONDS),
            "http.postBuffer": str(1 << 20),
            # Pickles of two days have little in common: no search for deltas, no whole file in memory.
            "core.bigFileThreshold": "1m",
            "core.compression": "1",
            "gc.auto": "0",
            "user.name": "pkb",
            "user.email": "pkb@localhost",
        }
        env["GIT_CONFIG_COUNT"] = str(len(config))
        for number, (name, value) in enumerate(config.items()):
            env[f"GIT_CONFIG_KEY_{number}"], env[f"GIT_CONFIG_VALUE_{number}"] = name, value
        return env

    def _failure(self, command: str, printed: str) -> GitFailed:
        """Return the error for what a command printed."""
        text = self._clean(_reason_in(printed))
        log.debug("git_failed", command=command, reason=text)
        hint, is_temporary = next(row[1:] for row in REASONS if re.search(row[0], text, re.I))
        hint = hint.format(branch=self.target.branch, url=self.target.url, tmp=tempfile.gettempdir())
        kind = RemoteUnavailable if is_temporary else GitFailed
        return kind(f"git {command} failed ({text[:REASON_LENGTH_MAX]})", hint)

    def _clean(self, text: str) -> str:
        token = self.target.token
        if token is not None and token.get_secret_value():
            text = text.replace(token.get_secret_value(), "***")
        return re.sub(r"://[^/@\s']*@", "://", text)


def _reason_in(printed: str) -> str:
    """Return the lines with the reason: git's and the remote's; ssh's last one where git has none."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if number and line.startswith("fatal: Could not read from remote"):
            return lines[number - 1]
    reasons = [line for line in lines if re.match(r"(fatal|error|remote): |! \[", line)] or lines[-1:]
    return " ".join(dict.fromkeys(reasons))


def backoff_seconds(attempt: int, jitter: float) -> float:
    """Return the pause before attempt 2, 3, …: up to 0.5, 1, 2 … 8 s; `jitter` is between 0 and 1."""
    return float(min(8.0, 0.25 * 2**attempt)) * jitter


def head_of(git: Git) -> str | None:
    """Return the branch's newest commit at the remote, or None if there is no such branch."""
    listed = git("ls-remote", "origin", git.target.ref)
    return listed.split()[0] if listed else None


def fetch(git: Git, depth: int) -> str | None:
    """Fetch the branch's last `depth` commits and return the newest, or None if there is no such branch.

    Files' contents are left out where the remote supports that.
    """
    head = head_of(git)
    if head is None:
        return None
    # The branch may have moved since `head_of`: the commit that was fetched counts.
    git(
        "fetch", "--quiet", "--no-tags", f"--depth={depth}", "--filter=blob:none", "--force",
        "origin", f"+{git.target.ref}:refs/pkb/head",
    )  # fmt: skip
    return git("rev-parse", "refs/pkb/head")
