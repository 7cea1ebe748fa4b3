"""Push: the snapshots onto a branch, in one commit that rolls.

    branch before   … ─ A ─ R        R is our last push         … ─ A ─ B    B is somebody else's commit
    branch after    … ─ A ─ R'       R' takes R's place         … ─ A ─ B ─ R'

So the repository holds each file once, however often we push. Everything else on the branch stays as it is,
byte for byte; what another pushed in the meantime is fetched and built upon (`--force-with-lease` notices).
Nothing of the branch but its last two commits' trees is downloaded, nothing that it has is uploaded.
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

import msgspec

from pkbrokers_redis import logs
from pkbrokers_redis.candles.model import DEFAULT_INTERVALS, Interval
from pkbrokers_redis.errors import InputFileError, PkbError
from pkbrokers_redis.files.manifest import NAME as MANIFEST
from pkbrokers_redis.files.manifest import VERSION, Entry, parse_manifest, read_manifest
from pkbrokers_redis.jobs.github import Git, GitFailed, RemoteAway, Target, backoff_seconds, fetch, head_of
from pkbrokers_redis.jobs.progress import Listener
from pkbrokers_redis.jobs.retention import chosen, gone, outdated, surplus

FILE_BYTES_MAX = 100 << 20  # GitHub refuses larger ones
FILE_BYTES_WARN = 50 << 20  # and warns from here
FILES_MAX = 2_000
ATTEMPTS_MAX = 6
READS_MAX = 20  # of a file that is being replaced under our hands
READ_AGAIN_SECONDS = 0.1
PIECE_BYTES = 1 << 20
TRAILER = "Pkb-Commit: rolling"

log = logs.get("sync")


class FileTooLarge(PkbError):
    """Raised when files are larger than GitHub takes; the others were pushed. `.names` has them."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        told = ", ".join(f"{name} ({size / 2**20:.0f} MB)" for name, size in sizes.items())
        super().__init__(
            f"too large for the repository: {told}; the limit is {FILE_BYTES_MAX >> 20} MB",
            "leave them out with --file, or publish fewer rows; the other files were pushed",
        )
        self.names = list(sizes)


class PushConflict(PkbError):
    """Raised when the branch changed under each of our attempts."""


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
    """Put the files of `folder` that match (or the usual ones: `selection`) onto the branch. The same files
    again change nothing.

    Returns `commit files changed bytes attempts large`. Raises FileTooLarge once the others are pushed,
    PushConflict, GitFailed, RemoteAway, InputFileError for a damaged or empty folder.
    """
    names, too_large = _choose(folder, patterns, intervals)
    for attempt in range(1, ATTEMPTS_MAX + 1):
        try:
            with Git(target) as git:
                moment = time.time() if at_s is None else at_s
                found = _push_once(git, folder, names, intervals, moment, listener)
            break
        except PushConflict:
            if attempt == ATTEMPTS_MAX:
                raise
            log.info("push_conflict", target=target.shown, attempt=attempt)
            sleep(backoff_seconds(attempt, random.random()))
    log.info("pushed", target=target.shown, attempts=attempt, **found)
    if too_large:
        raise FileTooLarge(too_large)
    return {**found, "attempts": attempt}


def _choose(
    folder: Path, patterns: Sequence[str] | None, intervals: Sequence[Interval]
) -> tuple[list[str], dict[str, int]]:
    """The manifest's files that are wanted, and those that GitHub would refuse; sizes come first of all."""
    listed = chosen(read_manifest(folder), patterns, intervals)
    removed = gone(folder, listed)
    if removed:
        log.warning("files_gone", files=len(removed), first=removed[0])
    names = sorted(set(listed).difference(removed))
    if not names:
        raise InputFileError(
            f"there is nothing to push in {folder}", "make it: `pkb snapshot ticks`, `pkb snapshot pickle`"
        )
    if len(names) > FILES_MAX:
        raise InputFileError(f"{len(names):,} files are too many to push", "choose some with --file")
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
            f"{name} is in the manifest but not in the folder", "make the snapshots anew"
        ) from error


def _push_once(
    git: Git,
    folder: Path,
    names: Sequence[str],
    intervals: Sequence[Interval],
    at_s: float,
    listener: Listener | None,
) -> dict[str, Any]:
    target = git.target
    tip = fetch(git, depth=2)
    total = len(names) + 1
    there: dict[str, str] = {}  # path on the branch → blob
    if tip is not None:
        git.end_history_at(tip)
        git("read-tree", tip)
        there = _index(git)
        _check_room(target, there, [*names, MANIFEST])
    blobs = set(there.values())
    lines: list[str] = []
    entries = read_manifest(folder)
    for number, name in enumerate(names):
        blob, entries[name] = _store(git, folder, name, entries.get(name), blobs)
        blobs.add(blob)
        lines.append(f"100644 {blob}\t{target.path_of(name)}\0")
        if listener is not None:
            listener(number + 1, total, name)
    entries = {name: entries[name] for name in names}
    listed = {**_manifest_at(git, tip), **entries}
    old = [*outdated(listed, _kolkata_date(at_s)), *surplus(listed, intervals)]
    for name in set(old).difference(entries):
        lines.append(f"0 {'0' * len(blob)}\t{target.path_of(name)}\0")
        del listed[name]
    manifest = _manifest_text(listed)
    blob = git("hash-object", "-w", "--stdin", given=manifest)
    lines.append(f"100644 {blob}\t{target.path_of(MANIFEST)}\0")
    git("update-index", "-z", "--index-info", given="".join(lines).encode(errors="surrogateescape"))
    # The other files' contents are not here, and need not be.
    tree = git("write-tree", "--missing-ok")
    found = {"files": len(names), "bytes": sum(entry.bytes for entry in entries.values())}
    if tip is not None and tree == git("rev-parse", f"{tip}^{{tree}}"):
        return {"commit": tip, "changed": False, **found}
    commit = _commit(git, tree, tip, at_s)
    try:
        git(
            "push",
            "--quiet",
            f"--force-with-lease={target.ref}:{tip or ''}",
            "origin",
            f"{commit}:{target.ref}",
        )
    except RemoteAway:
        raise
    except GitFailed as error:
        if head_of(git) == tip:
            raise  # nobody was faster: the remote does not want it
        raise PushConflict(
            f"{target.shown} changed while we pushed, {ATTEMPTS_MAX} times",
            "who else pushes there all the time?",
        ) from error
    if listener is not None:
        listener(total, total, MANIFEST)
    return {"commit": commit, "changed": True, **found}


def _index(git: Git) -> dict[str, str]:
    """Path → object of what the index holds."""
    listed = git("ls-files", "--stage", "-z").split("\0")
    return {path: head.split()[1] for head, _, path in (line.partition("\t") for line in listed if line)}


def _check_room(target: Target, there: Collection[str], names: Iterable[str]) -> None:
    """Raises InputFileError where a file of the branch has the name of a folder of ours, or the reverse: git
    would put ours in its place."""
    folders = {str(folder) for path in there for folder in PurePosixPath(path).parents}
    for path in map(target.path_of, names):
        in_the_way = [str(folder) for folder in PurePosixPath(path).parents if str(folder) in there]
        if in_the_way or path in folders:
            raise InputFileError(
                f"{(in_the_way or [path])[0]} on the branch {target.branch} is in the way of our {path}",
                "remove it there, or change PKB_GITHUB_PATH",
            )


def _store(
    git: Git, folder: Path, name: str, entry: Entry | None, blobs: Collection[str]
) -> tuple[str, Entry]:
    """One file into git unless it is among `blobs`, and the manifest's entry of exactly these bytes.

    A snapshot may take the file's place at any moment; the one we opened stays as it is.
    """
    path = folder / name
    for _ in range(READS_MAX):
        try:
            file = path.open("rb")
        except OSError as error:
            raise InputFileError(f"{name} cannot be read ({error.strerror})", "make it anew") from error
        with file:
            size = os.fstat(file.fileno()).st_size
            if entry is not None and entry.bytes == size:
                sha256, blob = _digests(file, size)
                if sha256 == entry.sha256:
                    if blob not in blobs:
                        file.seek(0)
                        blob = git("hash-object", "-w", "--no-filters", "--stdin", given=file)
                    return blob, entry
        time.sleep(READ_AGAIN_SECONDS)
        entry = read_manifest(folder).get(name)
    raise InputFileError(f"{name} is not the file its manifest names", "make the snapshot anew")


def _digests(file: IO[bytes], size: int) -> tuple[str, str]:
    """The sha256, and git's name for the contents."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    while piece := file.read(PIECE_BYTES):
        sha256.update(piece)
        blob.update(piece)
    return sha256.hexdigest(), blob.hexdigest()


def _manifest_at(git: Git, tip: str | None) -> dict[str, Entry]:
    """What the branch's own manifest lists; {} where there is none, or none that can be read."""
    path = git.target.path_of(MANIFEST)
    if tip is None or not git("ls-tree", tip, "--", path):
        return {}
    try:
        return parse_manifest(git.run(["cat-file", "blob", f"{tip}:{path}"]))
    except InputFileError:
        log.warning("manifest_begun_anew", target=git.target.shown)
        return {}


def _manifest_text(entries: Mapping[str, Entry]) -> bytes:
    files = {name: _told(entry) for name, entry in sorted(entries.items())}
    return msgspec.json.format(msgspec.json.encode({"version": VERSION, "files": files}), indent=1)


def _told(entry: Entry) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(entry)
    return {"from" if name == "from_" else name: value for name, value in told.items()}


def _commit(git: Git, tree: str, tip: str | None, at_s: float) -> str:
    """In place of our last commit where that is the tip, else upon the tip."""
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
