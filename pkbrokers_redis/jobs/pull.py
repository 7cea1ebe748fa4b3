"""Pull published snapshots into a folder, if they are newer than the local files.

    manifest.json ─► which are newer? ─► each under a temporary name ─► sha256, then the content ─► renamed
                     (unchanged: 304)                                   (pickles: files/pickle_reader.py)

Over HTTPS where the folder has a raw URL (GitHub, PKB_FILES_URL), else with git.
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
from pkbrokers_redis.jobs.github import LOOPBACK, Git, GitFailed, RemoteUnavailable, fetch, target_of
from pkbrokers_redis.jobs.progress import Listener
from pkbrokers_redis.jobs.retention import select
from pkbrokers_redis.settings import Settings

Via = Literal["auto", "https", "git"]

PULLED_BYTES_MAX = 512 << 20  # one file
TIMEOUT_SECONDS = (10.0, 60.0)  # to connect, between two chunks
CHUNK_BYTES = 1 << 20
SMALL_BYTES_MAX = 1 << 20  # git fetches the contents of files up to this size together
ETAG_FILE = ".pulled-etag"
FETCH_BLOBS = (
    "-c", "fetch.negotiationAlgorithm=noop", "fetch", "origin", "--quiet", "--no-tags",
    "--no-write-fetch-head", "--filter=blob:none", "--stdin",
)  # fmt: skip

log = logs.get("sync")


class Remote(Protocol):
    """A place that files come from.

    `manifest` returns None if it has not changed since the last pull. `prepare` names files that `copy` will
    be called for, `finish` all files of a pull that succeeded.
    """

    shown: str

    def manifest(self) -> bytes | None: ...
    def prepare(self, names: Sequence[str]) -> None: ...
    def copy(self, name: str, into: IO[bytes], bytes_max: int) -> None: ...
    def finish(self, names: Sequence[str]) -> None: ...


def pull(
    settings: Settings,
    folder: Path,
    patterns: Sequence[str] | None = None,
    *,
    via: Via = "auto",
    force: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Copy the published files that are newer than the local ones into `folder`.

    The local files stay whole in any case: each new file is checked before it replaces the old one.

    Args:
        settings: Name the source: PKB_FILES_URL or the sync target.
        folder: Local folder; its manifest is updated.
        patterns: Names of files, with `*` and `?`. Without patterns: those that `sync.push` publishes.
        via: "https", "git", or "auto": HTTPS if the source has a URL for it.
        force: Copy older files too.
        listener: Called with (done, total, file) after each file.

    Returns:
        Counts: `pulled same older bytes`; `unchanged` if the manifest has not changed since the last pull.

    Raises:
        InputFileError: A file differs from its manifest entry, is too large, or cannot be fetched.
        RefusedPickle: A pickle holds more than tables.
        RemoteUnavailable: The source does not respond; try again later.
        GitFailed, SettingsError: git did not succeed; there is no source.
    """
    with _open(settings, folder, patterns, via, force) as remote:
        text = remote.manifest()
        if text is None:
            return {"pulled": 0, "same": 0, "older": 0, "bytes": 0, "unchanged": True}
        published = parse_manifest(text)
        usable = {name: entry for name, entry in published.items() if _is_usable(name)}
        names = select(usable, patterns, settings.intervals)
        local = _local_entries(folder)
        verdicts = {
            name: "pulled" if force else _compare(folder / name, local.get(name), published[name])
            for name in names
        }
        small = (name for name in names if published[name].bytes <= SMALL_BYTES_MAX)
        remote.prepare([name for name in small if verdicts[name] == "pulled"])
        counts = {"pulled": 0, "same": 0, "older": 0, "bytes": 0}
        for number, (name, verdict) in enumerate(verdicts.items()):
            entry = published[name]
            if verdict == "pulled":
                _replace(remote, folder / name, name, entry)
                update_manifest(folder, {name: entry})
                counts["bytes"] += entry.bytes
            counts[verdict] += 1
            if listener is not None:
                listener(number + 1, len(names), name)
        remote.finish(names)
    log.info("files_pulled", source=remote.shown, **counts)
    return counts


def _local_entries(folder: Path) -> dict[str, Entry]:
    try:
        return read_manifest(folder)
    except InputFileError:
        return {}  # a damaged manifest: every published file is newer


def _compare(path: Path, local: Entry | None, published: Entry) -> str:
    if local is None or not path.exists() or path.stat().st_size != local.bytes:
        return "pulled"
    if local.sha256 == published.sha256:
        return "same"
    return "pulled" if (published.made_at_ms or 0) > (local.made_at_ms or 0) else "older"


def _is_usable(name: str) -> bool:
    """Return whether a published file may have this name: hidden files and the manifest are local."""
    return name != MANIFEST and not any(part.startswith(".") for part in Path(name).parts)


def _replace(remote: Remote, path: Path, name: str, entry: Entry) -> None:
    """Copy a file, check its hash and its content, then rename it."""
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
                    f"{name} differs from its manifest entry", "it may be half published; try again"
                )
        if path.suffix in (".pkl", ".pickle"):
            read_frames(temporary)
        elif path.name == "ticks.json":
            read_ticks_json(temporary)


# --- sources


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
    """Read the branch's tree, then the contents of each file on demand."""

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

    def prepare(self, names: Sequence[str]) -> None:
        """Fetch the contents of these files together; git fetches those of other files one by one."""
        paths = {self._git.target.path_of(name) for name in names}
        listed = (
            line.partition("\t") for line in self._git("ls-tree", "-r", "-z", self._tip or "").split("\0")
        )
        blobs = {head.split()[2] for head, _, path in listed if path in paths}
        if len(blobs) < 2:
            return
        try:
            self._git(*FETCH_BLOBS, given="\n".join(blobs).encode())
        except RemoteUnavailable:
            raise
        except GitFailed:
            log.debug("batch_fetch_failed", source=self.shown)  # git before 2.29, or protocol 0: one by one

    def copy(self, name: str, into: IO[bytes], bytes_max: int) -> None:
        blob = f"{self._tip}:{self._git.target.path_of(name)}"
        size = int(self._git("cat-file", "-s", blob))
        if size != bytes_max:
            raise InputFileError(
                f"{name} has {size:,} bytes, its manifest entry {bytes_max:,}", "push it again"
            )
        self._git.run(["cat-file", "blob", blob], into=into)

    def finish(self, names: Sequence[str]) -> None:
        pass


class _OverHttps:
    """Read raw URLs. The token is sent as a header, to GitHub's raw host or a loopback one only."""

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
        self._scope = f"{base} {' '.join(patterns or ['default'])}"

    def manifest(self) -> bytes | None:
        headers = {}
        if not self._force and (etag := self._stored_etag()):
            headers["If-None-Match"] = etag
        response = self._get(MANIFEST, headers)
        with response:
            if response.status_code == 304:
                return None
            self._etag = response.headers.get("ETag", "")
            content = bytearray()
            for chunk in self._chunks(response, MANIFEST):
                content += chunk
                if len(content) > MANIFEST_BYTES_MAX:
                    raise InputFileError(
                        f"{MANIFEST} is larger than {MANIFEST_BYTES_MAX >> 20} MB", "check PKB_FILES_URL"
                    )
            return bytes(content)

    def prepare(self, names: Sequence[str]) -> None:
        pass

    def copy(self, name: str, into: IO[bytes], bytes_max: int) -> None:
        written = 0
        with self._get(name, {}) as response:
            for chunk in self._chunks(response, name):
                written += len(chunk)
                if written > bytes_max:
                    raise InputFileError(f"{name} is longer than its manifest entry", "try again")
                into.write(chunk)

    def finish(self, names: Sequence[str]) -> None:
        """Store the ETag: until the manifest changes, the next pull of the same files has nothing to do."""
        if self._etag:
            with replacing_path(self._folder / ETAG_FILE) as temporary:
                temporary.write_text("\n".join([self._scope, self._etag, *names]))

    def _stored_etag(self) -> str:
        """Return the ETag of the last pull, if it was of the same files and all of them are still whole."""
        try:
            scope, etag, *names = (self._folder / ETAG_FILE).read_text().split("\n")
            local = read_manifest(self._folder)
            is_whole = all((self._folder / name).stat().st_size == local[name].bytes for name in names)
        except (OSError, ValueError, KeyError, InputFileError):
            return ""
        return etag if scope == self._scope and is_whole else ""

    def _get(self, name: str, headers: dict[str, str]) -> requests.Response:
        try:
            response = self._session.get(
                f"{self.shown}/{quote(name)}", headers=headers, timeout=TIMEOUT_SECONDS, stream=True
            )
        except requests.RequestException as error:
            # The error's text can contain headers.
            raise _unavailable(name, self.shown, type(error).__name__) from None
        if response.status_code in (200, 304):
            return response
        response.close()
        if response.status_code == 404 and name == MANIFEST:
            raise _no_manifest(self.shown)
        if response.status_code in (401, 403, 404):
            raise InputFileError(
                f"cannot fetch {name} from {self.shown} (HTTP {response.status_code})",
                "check PKB_GITHUB_REPO, PKB_GITHUB_TOKEN or PKB_FILES_URL",
            )
        raise _unavailable(name, self.shown, f"HTTP {response.status_code}")

    def _chunks(self, response: requests.Response, name: str) -> Iterator[bytes]:
        try:
            yield from response.iter_content(CHUNK_BYTES)
        except requests.RequestException as error:
            raise _unavailable(name, self.shown, type(error).__name__) from None


class _Token(requests.auth.AuthBase):
    """Send the token as a header that `.netrc` does not replace and a redirect to another host drops."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"token {self._token}"
        return request


def _unavailable(name: str, source: str, reason: str) -> RemoteUnavailable:
    return RemoteUnavailable(f"cannot fetch {name} from {source} ({reason})", "try again later")


def _no_manifest(source: str) -> InputFileError:
    return InputFileError(f"there is no {MANIFEST} at {source}", "`pkb sync push` writes one")
