"""Files that are whole or not there: written under another name, synced, renamed.

A reader sees the old file or the new one, never a part, and a kill leaves at most a `.….tmp`, which a later
write in that folder removes, or the day's trim (`sweep`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from pkbrokers_redis.errors import PkbError

READ_BYTES = 1 << 20
STALE_SECONDS = 3600  # no write of ours takes an hour: a temporary file that old has no writer left
# What a disk answers that is full, read-only, broken, or too small for the file. Others name a path.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp(-journal|-wal|-shm)?")  # SQLite's, beside its own


class FilesUnwritable(PkbError):
    """Raised when files cannot be written: disk full, read-only, no right. The old files stand."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(
            f"the files in {folder} cannot be written ({error.strerror or error})",
            "make room or give the right, or move PKB_FILES_DIR",
        )


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """A disk's error in the block becomes one line: FilesUnwritable."""
    try:
        yield
    except OSError as error:  # not redis-py's; those of requests carry neither number nor path
        if error.errno in DISK_ERRORS or error.filename is not None:
            raise FilesUnwritable(folder, error) from error
        raise


class HashedFile:
    """A binary file that knows the sha256 and the size of what was written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sum = hashlib.sha256()
        self.bytes_written = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self._file.write(data)
        self._sum.update(data)
        self.bytes_written += len(data)
        return len(data)

    @property
    def sha256(self) -> str:
        """Of all that was written so far, in hex."""
        return self._sum.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[HashedFile]:
    """`with replacing(path) as file:` write it; at the end of the block it takes the place of `path`.

    Nothing changes when the block raises. Missing folders are made. Raises OSError (disk full, no right).
    """
    with replacing_path(path) as temporary, temporary.open("wb") as file:
        hashed = HashedFile(file)
        yield hashed
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """The same for writers that want a path of their own (Parquet, SQLite): a name in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent.glob(".*.tmp*"))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def linked(path: Path, other: Path) -> None:
    """`other` becomes a second name of `path`, atomically; a copy where the disk knows no links."""
    with replacing_path(other) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


@contextmanager
def exclusively(lock: Path) -> Iterator[None]:
    """Hold a lock file; it ends with its process. Raises PkbError when another process has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PkbError(f"another run holds {lock.name}", "wait for it to end") from None
        yield


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path) -> int:
    """Remove what killed writers left anywhere in the folder; how many files. Writers at work keep theirs.

    A name with a date in it is written on one day only: no later write would find what is left of that.
    """
    return _remove_stale(folder.rglob(".*.tmp*"))


def _remove_stale(paths: Iterable[Path]) -> int:
    removed = 0
    for left in paths:
        try:
            # A clock that was set back makes what is old look as if it came from the future.
            if _TEMPORARY.fullmatch(left.name) and abs(time.time() - left.lstat().st_mtime) > STALE_SECONDS:
                left.unlink()
                removed += 1
        except OSError:
            pass  # somebody else was faster
    return removed


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. Not every system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
