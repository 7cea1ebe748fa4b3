"""Where the sync goes: a folder on a branch of a repository, checked letter by letter before git sees it.

PKB_GITHUB_URL (or https://github.com/PKB_GITHUB_REPO.git) · PKB_GITHUB_BRANCH · PKB_GITHUB_PATH

Git for the sync, run so that it tells nobody the token.

    with Git(target) as git:
        git("fetch", …)         in a scratch repository

The token is neither in arguments, nor in the environment, nor in a URL, nor in a file with a name: git asks
`askpass`, which reads it from an open file that has none, and answers only for the target's own host.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
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


SECONDS_MAX = 240.0  # one git command
STALL_BYTES_A_SECOND, STALL_SECONDS = 1_000, 30  # a transfer slower than this for so long has stalled
REASON_LENGTH_MAX = 200
SCRATCH, LOCK = "pkb-sync-", "lock"
STALE_SECONDS = (
    3600  # no sync takes an hour: a scratch folder that old has lost its guard too (power, container)
)
USER = "x-access-token"  # GitHub's name for whoever comes with a token
PASSED_ON = frozenset({
    "PATH", "TMPDIR", "SSH_AUTH_SOCK", "SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_SSL_CAINFO", "https_proxy",
    "HTTPS_PROXY", "http_proxy", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY",
})  # fmt: skip

# Waits for our end, whatever its kind: it reads a pipe that only we hold open. git's helpers are no children
# of ours and would go on with their transfer; all of them are in its process group, which is "0" to it.
GUARD = 'trap "" TERM INT HUP; read -r _; kill -TERM 0; rm -rf "$1"; kill -KILL 0'

# Answers the target's own prompt only: a redirect to another host asks in vain.
ASKPASS = """#!/bin/sh
case "$1" in *"'$PKB_ASKED_FOR'"*) exec cat "/dev/fd/$PKB_TOKEN_FD" ;; esac
exit 1
"""

log = logs.get("sync")


class GitFailed(PkbError):
    """Raised when git did not succeed; the message has its last line, without secrets."""


class RemoteAway(GitFailed):
    """Raised when the remote cannot be reached or does not answer in time: try again later."""


class Git:
    """Git in a scratch repository that is gone at the end of the block. Raises GitFailed, RemoteAway.

    `git("rev-parse", "HEAD")` gives what it printed. Each command ends within `seconds_max`, and with us: a
    kill -9 of ours leaves neither git, nor its helpers, nor the scratch repository.
    """

    def __init__(self, target: Target, seconds_max: float = SECONDS_MAX) -> None:
        self.target = target
        self._seconds_max = seconds_max
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._token: IO[bytes] | None = None
        self._lock: IO[bytes] | None = None
        self._env: dict[str, str] = {}

    def __enter__(self) -> Git:
        _sweep()
        self._folder = tempfile.TemporaryDirectory(prefix=SCRATCH)  # mode 0700
        scratch = Path(self._folder.name)
        self._env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self._env |= {
            "HOME": str(scratch),
            "LC_ALL": "C",
            "GIT_DIR": str(scratch / "repository"),
            "GIT_INDEX_FILE": str(scratch / "index"),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,  # no helper of the user's that would keep the token
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ALLOW_PROTOCOL": "file:http:https:ssh",
            "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oConnectTimeout=20 -oServerAliveInterval=15",
        }
        config = self._config()
        self._env["GIT_CONFIG_COUNT"] = str(len(config))
        for number, (name, value) in enumerate(config.items()):
            self._env[f"GIT_CONFIG_KEY_{number}"], self._env[f"GIT_CONFIG_VALUE_{number}"] = name, value
        try:
            self._lock = (scratch / LOCK).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", GUARD, "sh", str(scratch)],
                env={name: value for name, value in self._env.items() if name == "PATH"},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
            )
            if self.target.token is not None and self.target.url.startswith("http"):
                self._lend_token(scratch, self.target.token)
            self("init", "--quiet", "--bare", str(scratch / "repository"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._guard is not None:
            self._end_all()
        if self._token is not None:
            self._token.close()
        if self._lock is not None:
            self._lock.close()
        if self._folder is not None:
            self._folder.cleanup()

    def __call__(self, *arguments: str, given: bytes | IO[bytes] | None = None) -> str:
        """Run one command; `given` is its input."""
        return self.run(arguments, given=given).decode(errors="surrogateescape").strip()

    def run(
        self,
        arguments: Sequence[str],
        *,
        given: bytes | IO[bytes] | None = None,
        into: IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> bytes:
        """The same, bytes; with `into` what it prints goes there."""
        text, stdin = (
            (given, subprocess.PIPE) if isinstance(given, bytes) else (None, given or subprocess.DEVNULL)
        )
        assert self._guard is not None  # noqa: S101  inside the block
        try:
            child = subprocess.Popen(
                ["git", *arguments],
                env={**self._env, **(env or {})},
                stdin=stdin,
                stdout=subprocess.PIPE if into is None else into,
                stderr=subprocess.PIPE,
                pass_fds=() if self._token is None else (self._token.fileno(),),
                process_group=self._guard.pid,
            )
        except FileNotFoundError:
            raise GitFailed("there is no git", "install git") from None
        try:
            out, said = child.communicate(text, timeout=self._seconds_max)
        except subprocess.TimeoutExpired:
            raise RemoteAway(
                f"git {arguments[0]} took longer than {self._seconds_max:.0f} s", "is the remote reachable?"
            ) from None
        finally:
            if child.poll() is None:  # a time limit, ours or RQ's: the block is over
                self._end_all()
                child.communicate()
        if child.returncode < 0:
            shown = f"git {arguments[0]} was ended by signal {-child.returncode}"
            raise GitFailed(shown, "try again; did the memory suffice?")
        if child.returncode:
            raise self._failure(arguments[0], said)
        return out or b""

    def end_history_at(self, commit: str) -> None:
        """From a history that has an end git pushes nothing that the commit there holds; from a whole one it
        fetches, and sends again, what a commit that takes that one's place has in common with it."""
        with (Path(self._env["GIT_DIR"]) / "shallow").open("a") as listed:
            listed.write(f"{commit}\n")

    def _end_all(self) -> None:
        """The guard and all of git that still runs."""
        assert self._guard is not None  # noqa: S101
        if self._guard.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.communicate()

    def _lend_token(self, scratch: Path, token: SecretStr) -> None:
        script = scratch / "askpass"
        script.write_text(ASKPASS)
        script.chmod(0o700)
        self._token = tempfile.TemporaryFile()  # noqa: SIM115  open as long as we are
        self._token.write(token.get_secret_value().encode())
        self._token.flush()
        self._token.seek(0)
        parts = urlsplit(self.target.url)
        self._env |= {
            "GIT_ASKPASS": str(script),
            "PKB_TOKEN_FD": str(self._token.fileno()),
            "PKB_ASKED_FOR": f"{parts.scheme}://{USER}@{parts.netloc}",
        }

    def _config(self) -> dict[str, str]:
        return {
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

    def _failure(self, command: str, said: bytes) -> GitFailed:
        lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
        text = self._clean(" ".join(dict.fromkeys(_telling(lines))))
        log.debug("git_failed", command=command, why=text)
        shown = f"git {command} failed ({text[:REASON_LENGTH_MAX]})"
        if re.search(r"non-fast-forward|hook declined|protected branch|repository rule", text, re.I):
            branch = self.target.branch
            hint = f"allow force pushes to the branch {branch}, or set PKB_GITHUB_BRANCH to one of its own"
            return GitFailed(shown, hint)
        if any("No space left" in line for line in lines if not line.startswith("remote:")):
            return GitFailed(shown, f"make room in {tempfile.gettempdir()}, or set TMPDIR")
        if self.target.url.startswith("ssh:") and re.search(
            r"denied|verification failed|Too many auth", text
        ):
            hint = f"check the ssh key and known_hosts: git ls-remote {self.target.url}"
            return GitFailed(shown, hint)
        status = re.search(r"(?:returned error: |HTTP )(\d{3})\b", text)  # a path may hold any number
        code = int(status[1]) if status else 0
        if code in (401, 403) or re.search(
            r"Authentication failed|could not read (Username|Password)|denied", text
        ):
            return GitFailed(shown, "check PKB_GITHUB_TOKEN: it needs contents:write on that repository")
        if code == 404 or re.search(r"not found|does not (appear|exist)", text):
            return GitFailed(shown, "check PKB_GITHUB_REPO or PKB_GITHUB_URL, and that the token may see it")
        if 500 <= code <= 599 or re.search(
            r"resolve host|timed out|Failed to connect|Connection|early EOF|hung up", text
        ):
            return RemoteAway(shown, "try again later")
        return GitFailed(shown, f"try it by hand: git ls-remote {self.target.url}")

    def _clean(self, text: str) -> str:
        token = self.target.token
        if token is not None and token.get_secret_value():
            text = text.replace(token.get_secret_value(), "***")
        return re.sub(r"://[^/@\s']*@", "://", text)


def _telling(lines: Sequence[str]) -> Sequence[str]:
    """The lines with the reason: git's and the remote's; ssh's last where git has none of its own."""
    for number, line in enumerate(lines):
        if number and line.startswith("fatal: Could not read from remote"):
            return lines[number - 1 : number]
    return [line for line in lines if re.match(r"(fatal|error|remote): |! \[", line)] or lines[-1:]


def _sweep() -> None:
    """Remove what killed syncs of ours left. Ages alone do not tell: clocks are set."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        try:
            facts = left.lstat()
            # A clock that was set back makes what is old look as if it came from the future.
            is_old = abs(time.time() - facts.st_mtime) > STALE_SECONDS
            if facts.st_uid == os.getuid() and is_old and not _is_held(left):
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass  # another was faster


def _is_held(scratch: Path) -> bool:
    """Whether a sync that lives works in there."""
    try:
        with (scratch / LOCK).open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass  # killed before it had one
    return False


def backoff_seconds(attempt: int, jitter: float) -> float:
    """Before attempt 2, 3, …: up to 0.5, 1, 2 … 8 s; `jitter` is between 0 and 1."""
    return float(min(8.0, 0.25 * 2**attempt)) * jitter


def head_of(git: Git) -> str | None:
    """The branch's newest commit at the remote; None where there is no such branch."""
    listed = git("ls-remote", "origin", git.target.ref)
    return listed.split()[0] if listed else None


def fetch(git: Git, depth: int) -> str | None:
    """Fetch the branch's last `depth` commits, without the files' contents where the remote can do that."""
    head = head_of(git)
    if head is None:
        return None
    # The remote may have moved on between the two: what was fetched counts.
    git(
        "fetch", "--quiet", "--no-tags", f"--depth={depth}", "--filter=blob:none", "--force",
        "origin", f"+{git.target.ref}:refs/pkb/head",
    )  # fmt: skip
    return git("rev-parse", "refs/pkb/head")
