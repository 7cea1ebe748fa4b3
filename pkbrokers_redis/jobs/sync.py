"""Push: the snapshots onto a branch, in one commit that rolls.

    branch before   … ─ A ─ R        R is the last sync         … ─ A ─ B    B is another author's commit
    branch after    … ─ A ─ R'       R' replaces R              … ─ A ─ B ─ R'

So the repository holds each file once, however often a sync runs. All other files on the branch stay byte for
byte. A commit that another author pushes meanwhile is detected (`--force-with-lease`), fetched and kept.
Only the trees of the branch's last two commits are downloaded, and only contents that it lacks are uploaded.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import DEFAULT_INTERVALS, Interval
from pkbrokers_redis.errors import InputFileError, PkbError
from pkbrokers_redis.files.manifest import NAME as MANIFEST
from pkbrokers_redis.files.manifest import Entry, encode_manifest, parse_manifest, read_manifest
from pkbrokers_redis.jobs.github import (
    Git,
    GitFailed,
    RemoteUnavailable,
    Target,
    backoff_seconds,
    fetch,
    head_of,
)
from pkbrokers_redis.jobs.progress import Listener
from pkbrokers_redis.jobs.retention import deleted, outdated, select, unneeded

FILE_BYTES_MAX = 100 << 20  # GitHub refuses larger ones
FILE_BYTES_WARN = 50 << 20  # and warns from here
FILES_MAX = 2_000
ATTEMPTS_MAX = 6
READS_MAX = 20  # of a file that a snapshot replaces at the same time
READ_PAUSE_SECONDS = 0.1
PIECE_BYTES = 1 << 20
TRAILER = "Pkb-Commit: rolling"

log = logs.get("sync")


class FileTooLarge(PkbError):
    """Raised when files are larger than GitHub accepts; all other files were pushed.

    Attributes:
        names: The files that were not pushed.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        listed = ", ".join(f"{name} ({size / 2**20:.0f} MB)" for name, size in sizes.items())
        super().__init__(
            f"too large for the repository: {listed}; the limit is {FILE_BYTES_MAX >> 20} MB",
            "leave them out with --file, or publish fewer rows; the other files were pushed",
        )
        self.names = list(sizes)


class PushConflict(PkbError):
    """Raised when the branch changed during each attempt."""


def push(
    target: Target,
    folder: Path,
    patterns: Sequence[str] | None = None,
    *,
    intervals: Sequence[Interval] = DEFAULT_INTERVALS,
    at_s: float | None = None,
    listener: Listener | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Push the snapshots of a folder onto the branch. The same files again change nothing.

    Args:
        target: Repository, branch and folder.
        folder: Local folder with a manifest.
        patterns: Names of files to push, with `*` and `?`. Without patterns: the files that other programs
            read, and the Parquet that a restore needs.
        intervals: The store's intervals; they say how much Parquet a restore needs.
        at_s: Time of the commit, epoch seconds; default: now.
        listener: Called with (done, total, file) after each file.
        sleep: Waits before another attempt.

    Returns:
        `{"commit": …, "changed": bool, "files": …, "bytes": …, "attempts": …}`.

    Raises:
        FileTooLarge: Files exceed GitHub's limit; the others were pushed.
        PushConflict: The branch changed during each of six attempts.
        GitFailed, RemoteUnavailable: git did not succeed.
        InputFileError: The folder is empty or damaged, or a path on the branch is in the way.
    """
    names, too_large = _choose(folder, patterns, intervals)
    for attempt in range(1, ATTEMPTS_MAX + 1):
        try:
            with Git(target) as git:
                made_s = time.time() if at_s is None else at_s
                result = _Push(git, folder, names, intervals, made_s, listener).run()
            break
        except PushConflict:
            if attempt == ATTEMPTS_MAX:
                raise
            log.info("push_conflict", target=target.shown, attempt=attempt)
            sleep(backoff_seconds(attempt, random.random()))
    log.info("pushed", target=target.shown, attempts=attempt, **result)
    if too_large:
        raise FileTooLarge(too_large)
    return {**result, "attempts": attempt}


def _choose(
    folder: Path, patterns: Sequence[str] | None, intervals: Sequence[Interval]
) -> tuple[list[str], dict[str, int]]:
    """Return the files to push, and the sizes of those that GitHub would refuse."""
    listed = select(read_manifest(folder), patterns, intervals)
    missing = deleted(folder, listed)
    if missing:
        log.warning("files_missing", files=len(missing), first=missing[0])
    names = sorted(set(listed).difference(missing))
    if not names:
        raise InputFileError(
            f"there is nothing to push in {folder}",
            "write snapshots first: `pkb snapshot ticks`, `pkb snapshot pickle`",
        )
    if len(names) > FILES_MAX:
        raise InputFileError(f"{len(names):,} files are too many to push", "select some with --file")
    sizes = {name: _size(folder, name) for name in names}
    large = {name: size for name, size in sizes.items() if size > FILE_BYTES_MAX}
    for name, size in sizes.items():
        if FILE_BYTES_WARN < size <= FILE_BYTES_MAX:
            log.warning("large_file", file=name, bytes=size, limit_bytes=FILE_BYTES_MAX)
    if len(large) == len(names):
        raise FileTooLarge(large)
    return [name for name in names if name not in large], large


def _size(folder: Path, name: str) -> int:
    try:
        return (folder / name).stat().st_size
    except OSError as error:
        raise InputFileError(
            f"{name} is in the manifest but not in the folder", "write the snapshots again"
        ) from error


class _Push:
    """One attempt in a scratch repository."""

    def __init__(
        self,
        git: Git,
        folder: Path,
        names: Sequence[str],
        intervals: Sequence[Interval],
        made_s: float,
        listener: Listener | None,
    ) -> None:
        self._git, self._folder, self._names, self._intervals = git, folder, names, intervals
        self._made_s = made_s
        self._listener = listener or (lambda done, total, name: None)
        self._total = len(names) + 1  # the manifest too

    def run(self) -> dict[str, Any]:
        """Build the commit and push it, unless the branch holds these files already."""
        git, target = self._git, self._git.target
        tip = fetch(git, depth=2)
        branch_files: dict[str, str] = {}  # path → blob
        if tip is not None:
            git.mark_shallow(tip)
            git("read-tree", tip)
            branch_files = _index(git)
            _check_paths(target, branch_files, [*self._names, MANIFEST])
        entries = self._build_index(tip, set(branch_files.values()))
        # The contents of the branch's other files are not here, and git does not need them.
        tree = git("write-tree", "--missing-ok")
        result = {"files": len(entries), "bytes": sum(entry.bytes for entry in entries.values())}
        if tip is not None and tree == git("rev-parse", f"{tip}^{{tree}}"):
            return {"commit": tip, "changed": False, **result}
        commit = _commit(git, tree, tip, self._made_s)
        self._send(commit, tip)
        self._listener(self._total, self._total, MANIFEST)
        return {"commit": commit, "changed": True, **result}

    def _build_index(self, tip: str | None, blobs: set[str]) -> dict[str, Entry]:
        """Add the files and the manifest to git's index, remove outdated ones; return the files' entries."""
        git, target = self._git, self._git.target
        lines: list[str] = []
        listed = read_manifest(self._folder)
        entries: dict[str, Entry] = {}
        for number, name in enumerate(self._names):
            blob, entries[name] = _store(git, self._folder, name, listed.get(name), blobs)
            blobs.add(blob)
            lines.append(f"100644 {blob}\t{target.path_of(name)}\0")
            self._listener(number + 1, self._total, name)
        published = {**_manifest_at(git, tip), **entries}
        old = [*outdated(published, _kolkata_date(self._made_s)), *unneeded(published, self._intervals)]
        for name in set(old).difference(entries):
            lines.append(f"0 {'0' * len(blob)}\t{target.path_of(name)}\0")
            del published[name]
        blob = git("hash-object", "-w", "--stdin", given=encode_manifest(published))
        lines.append(f"100644 {blob}\t{target.path_of(MANIFEST)}\0")
        git("update-index", "-z", "--index-info", given="".join(lines).encode(errors="surrogateescape"))
        return entries

    def _send(self, commit: str, tip: str | None) -> None:
        """Push the commit if the branch is still at `tip`. Raises PushConflict if it is not."""
        git, ref = self._git, self._git.target.ref
        try:
            git("push", "--quiet", f"--force-with-lease={ref}:{tip or ''}", "origin", f"{commit}:{ref}")
        except RemoteUnavailable:
            raise
        except GitFailed as error:
            if head_of(git) == tip:
                raise  # the branch did not change: the remote refuses the push
            raise PushConflict(
                f"{git.target.shown} changed during the push, {ATTEMPTS_MAX} times",
                "find out which other program pushes to this branch all the time",
            ) from error


def _index(git: Git) -> dict[str, str]:
    """Return path → blob of the index."""
    listed = git("ls-files", "--stage", "-z").split("\0")
    return {path: head.split()[1] for head, _, path in (line.partition("\t") for line in listed if line)}


def _check_paths(target: Target, branch_files: Collection[str], names: Iterable[str]) -> None:
    """Raise InputFileError if the branch has a file where a folder of the sync must be, or the reverse: git
    would silently replace it."""
    folders = {str(folder) for path in branch_files for folder in PurePosixPath(path).parents}
    for path in map(target.path_of, names):
        blocking = [str(folder) for folder in PurePosixPath(path).parents if str(folder) in branch_files]
        if blocking or path in folders:
            raise InputFileError(
                f"{(blocking or [path])[0]} on the branch {target.branch} is in the way of {path}",
                "remove it from the branch, or change PKB_GITHUB_PATH",
            )


def _store(
    git: Git, folder: Path, name: str, entry: Entry | None, blobs: Collection[str]
) -> tuple[str, Entry]:
    """Write a file to git unless it is among `blobs`; return its blob and the manifest entry of these bytes.

    A snapshot may replace the file at any moment; the opened file keeps its content.
    """
    path = folder / name
    for _ in range(READS_MAX):
        try:
            file = path.open("rb")
        except OSError as error:
            raise InputFileError(f"{name} cannot be read ({error.strerror})", "write it again") from error
        with file:
            size = os.fstat(file.fileno()).st_size
            if entry is not None and entry.bytes == size:
                sha256, blob = _digests(file, size)
                if sha256 == entry.sha256:
                    if blob not in blobs:
                        file.seek(0)
                        blob = git("hash-object", "-w", "--no-filters", "--stdin", given=file)
                    return blob, entry
        time.sleep(READ_PAUSE_SECONDS)
        entry = read_manifest(folder).get(name)
    raise InputFileError(f"{name} differs from its manifest entry", "write the snapshot again")


def _digests(file: IO[bytes], size: int) -> tuple[str, str]:
    """Return the content's sha256 and git's blob id."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    while piece := file.read(PIECE_BYTES):
        sha256.update(piece)
        blob.update(piece)
    return sha256.hexdigest(), blob.hexdigest()


def _manifest_at(git: Git, tip: str | None) -> dict[str, Entry]:
    """Return the entries of the branch's manifest; {} if there is none, or it is damaged."""
    path = git.target.path_of(MANIFEST)
    if tip is None or not git("ls-tree", tip, "--", path):
        return {}
    try:
        return parse_manifest(git.run(["cat-file", "blob", f"{tip}:{path}"]))
    except InputFileError:
        log.warning("branch_manifest_replaced", target=git.target.shown)
        return {}


def _commit(git: Git, tree: str, tip: str | None, at_s: float) -> str:
    """Commit the tree: it replaces the last sync's commit if that is the tip, else it follows the tip."""
    parents = [] if tip is None else [tip]
    if tip is not None and _is_rolling(git, tip):
        parents = _parents(git, tip)
    arguments = [word for parent in parents for word in ("-p", parent)]
    moment = f"{int(at_s)} +0530"
    made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(at_s + 19_800))
    text = f"Market data of {made} India time\n\n{TRAILER}\n"
    env = {"GIT_AUTHOR_DATE": moment, "GIT_COMMITTER_DATE": moment}
    return git.run(["commit-tree", tree, *arguments], given=text.encode(), env=env).decode().strip()


def _is_rolling(git: Git, commit: str) -> bool:
    return TRAILER in git("log", "-1", "--format=%B", commit).splitlines()


def _parents(git: Git, commit: str) -> list[str]:
    header = git.run(["cat-file", "commit", commit]).decode(errors="replace").partition("\n\n")[0]
    return [line.split()[1] for line in header.splitlines() if line.startswith("parent ")]


def _kolkata_date(at_s: float) -> date:
    return datetime.fromtimestamp(at_s + 19_800, UTC).date()
