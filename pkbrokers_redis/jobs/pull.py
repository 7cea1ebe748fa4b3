"""Pull: published snapshots into a folder, if they are newer than what is there, and only whole ones.

    manifest.json ─► which are newer? ─► each under a temporary name ─► sha256, then what is inside
                     (nothing changed: 304)                             (allow-list unpickler) ─► renamed

Over HTTPS from the folder's raw URL where there is one (GitHub, PKB_FILES_URL), else with git.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, Protocol
from urllib.parse import quote, urlsplit

import requests
import requests.auth

from pkbrokers_redis import logs
from pkbrokers_redis.errors import InputFileError, SettingsError
from pkbrokers_redis.files.atomic import replacing_path
from pkbrokers_redis.files.manifest import NAME as MANIFEST
from pkbrokers_redis.files.manifest import Entry, parse_manifest, read_manifest, update_manifest
from pkbrokers_redis.files.pickle_reader import read_frames
from pkbrokers_redis.files.published import MANIFEST_BYTES_MAX, folder_of
from pkbrokers_redis.files.ticks_json import read_ticks_json
from pkbrokers_redis.jobs.github import LOOPBACK, Git, GitFailed, RemoteAway, fetch, target_of
from pkbrokers_redis.jobs.progress import Listener
from pkbrokers_redis.jobs.retention import chosen
from pkbrokers_redis.settings import Settings

Via = Literal["auto", "https", "git"]

PULLED_BYTES_MAX = 512 << 20  # one file
TIMEOUT_SECONDS = (10.0, 60.0)  # to connect, between two pieces
PIECE_BYTES = 1 << 20
SMALL_BYTES_MAX = 1 << 20  # files up to here come together where that is faster
ETAG_FILE = ".pulled-etag"
FETCH_BLOBS = (
    "-c", "fetch.negotiationAlgorithm=noop", "fetch", "origin", "--quiet", "--no-tags",
    "--no-write-fetch-head", "--filter=blob:none", "--stdin",
)  # fmt: skip

log = logs.get("sync")


class Remote(Protocol):
    """Where files come from. `manifest` is None when it has not changed since the last pull."""

    shown: str

    def manifest(self) -> bytes | None: ...
    def expect(self, names: Sequence[str]) -> None: ...
    def copy(self, name: str, into: IO[bytes], bytes_max: int) -> None: ...
    def done(self, names: Sequence[str]) -> None: ...


def pull(
    settings: Settings,
    folder: Path,
    patterns: Sequence[str] | None = None,
    *,
    via: Via = "auto",
    force: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Bring the published files that match (or the usual ones: `selection`), and are newer, into `folder`.
    `force` takes older ones too.

    Returns counts: `pulled same older bytes`. Raises InputFileError for a file that is not what the manifest
    names, RefusedPickle for one that asks for more than tables, RemoteAway, GitFailed, SettingsError. What
    was there before stays whole in any case.
    """
    with _open(settings, folder, patterns, via, force) as remote:
        text = remote.manifest()
        if text is None:
            return {"pulled": 0, "same": 0, "older": 0, "bytes": 0, "unchanged": True}
        theirs = parse_manifest(text)
        usable = {name: entry for name, entry in theirs.items() if _is_usable(name)}
        names = chosen(usable, patterns, settings.intervals)
        ours = _ours(folder)
        verdicts = {
            name: "pulled" if force else _compare(folder / name, ours.get(name), theirs[name])
            for name in names
        }
        small = (name for name in names if theirs[name].bytes <= SMALL_BYTES_MAX)
        remote.expect([name for name in small if verdicts[name] == "pulled"])
        found = {"pulled": 0, "same": 0, "older": 0, "bytes": 0}
        for number, (name, verdict) in enumerate(verdicts.items()):
            entry = theirs[name]
            if verdict == "pulled":
                _take(remote, folder / name, name, entry)
                update_manifest(folder, {name: entry})
                found["bytes"] += entry.bytes
            found[verdict] += 1
            if listener is not None:
                listener(number + 1, len(names), name)
        remote.done(names)
    log.info("pulled_files", source=remote.shown, **found)
    return found


def _ours(folder: Path) -> dict[str, Entry]:
    try:
        return read_manifest(folder)
    except InputFileError:
        return {}  # damaged: then everything is news


def _compare(path: Path, ours: Entry | None, theirs: Entry) -> str:
    if ours is None or not path.exists() or path.stat().st_size != ours.bytes:
        return "pulled"
    if ours.sha256 == theirs.sha256:
        return "same"
    return "pulled" if (theirs.made_at_ms or 0) > (ours.made_at_ms or 0) else "older"


def _is_usable(name: str) -> bool:
    """No file that we keep for ourselves, whatever a manifest lists."""
    return name != MANIFEST and not any(part.startswith(".") for part in Path(name).parts)


def _take(remote: Remote, path: Path, name: str, entry: Entry) -> None:
    if not 0 <= entry.bytes <= PULLED_BYTES_MAX:
        raise InputFileError(
            f"{name} has {entry.bytes:,} bytes, more than {PULLED_BYTES_MAX:,}", "publish it in parts"
        )
    with replacing_path(path) as temporary:
        with temporary.open("w+b") as file:
            remote.copy(name, file, entry.bytes)
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise InputFileError(
                    f"{name} is not the file its manifest names", "it may be half-way published; try again"
                )
        if path.suffix in (".pkl", ".pickle"):
            read_frames(temporary)
        elif path.name == "ticks.json":
            read_ticks_json(temporary)


# --- where from


@contextmanager
def _open(
    settings: Settings, folder: Path, patterns: Sequence[str] | None, via: Via, force: bool
) -> Iterator[Remote]:
    base = folder_of(settings)
    if via == "https" and (base is None or "://" not in base):
        raise SettingsError("there is no URL to pull from", "set PKB_FILES_URL or PKB_GITHUB_REPO")
    if via != "git" and base is not None and base.startswith(("http://", "https://")):
        with requests.Session() as session:
            yield _OverHttps(session, settings, base, folder, patterns, force)
        return
    with Git(target_of(settings)) as git:
        yield _OverGit(git)


class _OverGit:
    """The branch's tree, then each file's contents when it is asked for."""

    def __init__(self, git: Git) -> None:
        self._git = git
        self.shown = git.target.shown
        self._tip = fetch(git, depth=1)
        if self._tip is None:
            raise InputFileError(
                f"{self.shown} has no such branch", "push to it first, or check PKB_GITHUB_BRANCH"
            )

    def manifest(self) -> bytes | None:
        path = self._git.target.path_of(MANIFEST)
        if not self._git("ls-tree", self._tip or "", "--", path):
            raise _no_manifest(self.shown)
        return self._git.run(["cat-file", "blob", f"{self._tip}:{path}"])

    def expect(self, names: Sequence[str]) -> None:
        """Fetch the contents of these at once; of others each when it is asked for."""
        paths = {self._git.target.path_of(name) for name in names}
        listed = (
            line.partition("\t") for line in self._git("ls-tree", "-r", "-z", self._tip or "").split("\0")
        )
        blobs = {head.split()[2] for head, _, path in listed if path in paths}
        if len(blobs) < 2:
            return
        try:
            self._git(*FETCH_BLOBS, given="\n".join(blobs).encode())
        except RemoteAway:
            raise
        except GitFailed:
            log.debug("fetched_one_by_one", source=self.shown)  # git before 2.29, or the remote's protocol 0

    def copy(self, name: str, into: IO[bytes], bytes_max: int) -> None:
        blob = f"{self._tip}:{self._git.target.path_of(name)}"
        size = int(self._git("cat-file", "-s", blob))
        if size != bytes_max:
            raise InputFileError(
                f"{name} has {size:,} bytes, its manifest says {bytes_max:,}", "push it again"
            )
        self._git.run(["cat-file", "blob", blob], into=into)

    def done(self, names: Sequence[str]) -> None:
        pass


class _OverHttps:
    """Raw URLs. The token goes to GitHub's raw host (or a loopback one) only, as a header."""

    def __init__(
        self,
        session: requests.Session,
        settings: Settings,
        base: str,
        folder: Path,
        patterns: Sequence[str] | None,
        force: bool,
    ) -> None:
        self.shown = base
        parts = urlsplit(base)
        self._session = session
        self._session.trust_env = True
        token, host = settings.github_token, parts.hostname or ""
        is_github = host == "raw.githubusercontent.com" and parts.scheme == "https"
        if token is not None and (is_github or host in LOOPBACK):
            self._session.auth = _Token(token.get_secret_value())
        self._folder, self._force, self._etag = folder, force, ""
        self._scope = f"{base} {' '.join(patterns or ['the usual'])}"

    def manifest(self) -> bytes | None:
        headers = {}
        if not self._force and (known := self._known_etag()):
            headers["If-None-Match"] = known
        answer = self._get(MANIFEST, headers)
        with answer:
            if answer.status_code == 304:
                return None
            self._etag = answer.headers.get("ETag", "")
            content = bytearray()
            for piece in self._pieces(answer, MANIFEST):
                content += piece
                if len(content) > MANIFEST_BYTES_MAX:
                    raise InputFileError(
                        f"{MANIFEST} is larger than {MANIFEST_BYTES_MAX >> 20} MB", "is it one?"
                    )
            return bytes(content)

    def expect(self, names: Sequence[str]) -> None:
        pass

    def copy(self, name: str, into: IO[bytes], bytes_max: int) -> None:
        written = 0
        with self._get(name, {}) as answer:
            for piece in self._pieces(answer, name):
                written += len(piece)
                if written > bytes_max:
                    raise InputFileError(f"{name} is longer than its manifest says", "try again")
                into.write(piece)

    def done(self, names: Sequence[str]) -> None:
        """Everything of this manifest is here: until it changes there is nothing to do."""
        if self._etag:
            with replacing_path(self._folder / ETAG_FILE) as temporary:
                temporary.write_text("\n".join([self._scope, self._etag, *names]))

    def _known_etag(self) -> str:
        """What the last pull of the same files saw, if they are still there, in their size."""
        try:
            scope, etag, *names = (self._folder / ETAG_FILE).read_text().split("\n")
            ours = read_manifest(self._folder)
            is_whole = all((self._folder / name).stat().st_size == ours[name].bytes for name in names)
        except (OSError, ValueError, KeyError, InputFileError):
            return ""
        return etag if scope == self._scope and is_whole else ""

    def _get(self, name: str, headers: dict[str, str]) -> requests.Response:
        try:
            answer = self._session.get(
                f"{self.shown}/{quote(name)}", headers=headers, timeout=TIMEOUT_SECONDS, stream=True
            )
        except requests.RequestException as error:
            raise _away(name, self.shown, type(error).__name__) from None  # its text may hold headers
        if answer.status_code in (200, 304):
            return answer
        answer.close()
        if answer.status_code == 404 and name == MANIFEST:
            raise _no_manifest(self.shown)
        if answer.status_code in (401, 403, 404):
            raise InputFileError(
                f"cannot fetch {name} from {self.shown} (HTTP {answer.status_code})",
                "check PKB_GITHUB_REPO, PKB_GITHUB_TOKEN or PKB_FILES_URL",
            )
        raise _away(name, self.shown, f"HTTP {answer.status_code}")

    def _pieces(self, answer: requests.Response, name: str) -> Iterator[bytes]:
        try:
            yield from answer.iter_content(PIECE_BYTES)
        except requests.RequestException as error:
            raise _away(name, self.shown, type(error).__name__) from None


class _Token(requests.auth.AuthBase):
    """The token as a header, which a `.netrc` does not replace and a redirect does not carry elsewhere."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"token {self._token}"
        return request


def _away(name: str, source: str, why: str) -> RemoteAway:
    return RemoteAway(f"cannot fetch {name} from {source} ({why})", "try again later")


def _no_manifest(source: str) -> InputFileError:
    return InputFileError(f"there is no {MANIFEST} at {source}", "`pkb sync push` writes one")
