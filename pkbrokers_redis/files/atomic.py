"""Write files atomically: under a temporary name, synced, then renamed.

A reader sees the old file or the new one, never a part. A killed writer leaves at most a `.….tmp`, which a
later write in that folder or the day's trim (`sweep`) deletes.
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

STALE_SECONDS = 3600  # no write takes an hour: an older temporary file has no writer
# Errors of a disk that is full, read-only, broken, or too small for the file. Other errors have a path.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp(-journal|-wal|-shm)?")  # SQLite adds the last ones


class FilesUnwritable(PkbError):
    """Raised when files cannot be written: disk full, read-only, no permission. The old files stay."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(
            f"the files in {folder} cannot be written ({error.strerror or error})",
            "make room or grant permission, or move PKB_FILES_DIR",
        )


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Raise FilesUnwritable for a disk's error in the block."""
    try:
        yield
    except OSError as error:  # the OSErrors of requests have neither number nor path
        if error.errno in DISK_ERRORS or error.filename is not None:
            raise FilesUnwritable(folder, error) from error
        raise


class HashedFile:
    """A binary file that computes the sha256 and the size of its content while it is written."""

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
        """Return the hash of everything written so far, in hex."""
        return self._sum.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[HashedFile]:
    """Yield a file that replaces `path` at the end of the block; nothing changes if the block raises.

    Missing folders are created.

    Raises:
        OSError: The disk is full, or the permission is missing.

    Example:
        >>> with replacing(Path("ticks.json")) as file:
        ...     file.write(b"{}")
    """
    with replacing_path(path) as temporary, temporary.open("wb") as file:
        hashed = HashedFile(file)
        yield hashed
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, for writers that need a path (Parquet, SQLite)."""
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
    """Make `other` a second name of `path`, atomically; copy it if the file system has no links."""
    with replacing_path(other) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


@contextmanager
def exclusively(lock: Path) -> Iterator[None]:
    """Hold a lock file, which ends with its process. Raise PkbError if another process holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PkbError(f"another run holds {lock.name}", "wait for it to end") from None
        yield


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path) -> int:
    """Delete the temporary files of killed writers anywhere in the folder; return how many.

    `replacing` deletes old ones next to its file only, and a dated file is written on one day only.
    """
    return _remove_stale(folder.rglob(".*.tmp*"))


def _remove_stale(paths: Iterable[Path]) -> int:
    removed = 0
    for path in paths:
        try:
            # After the clock was set back, an old file has a time in the future.
            if _TEMPORARY.fullmatch(path.name) and abs(time.time() - path.lstat().st_mtime) > STALE_SECONDS:
                path.unlink()
                removed += 1
        except OSError:
            pass  # another process deleted it
    return removed


def _sync_folder(folder: Path) -> None:
    """Make the rename durable, if the system can open a folder."""
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
