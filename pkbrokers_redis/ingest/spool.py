"""The bytes of a spool's segment.

"PKBSPL1\n" | length u16 | source                                     a segment's head
+--------+-------+-----+-------+-----------------+
| length | crc32 | seq | at_ms | <length> bytes  |   again and again, big-endian
| u32    | u32   | u64 | u64   | the frame       |   crc32 is of everything behind it
+--------+-------+-----+-------+-----------------+

The spool: frames on disk while Redis is away, first in, first out, of one source (one life of an ingest).

    <PKB_SPOOL_DIR>/<source>/lock              held (flock) for as long as that process lives
    <PKB_SPOOL_DIR>/<source>/<seq, 20 digits>.spool    a segment, named by its first frame
    <PKB_SPOOL_DIR>/<source>-<seq>.damaged     one that could not be read whole: for a person to look at

What was appended survives the process, though not a power cut; one killed inside an append leaves a torn
record, which the reader cuts. A segment is deleted when Redis has it; a dead process's successor begins at
the start of the first one, and repeats carry the seq they had, so that the aggregator skips them.

A disk that fails to give a segment (no descriptors left, EIO, a stale NFS handle) is asked again, and nothing
behind it is read meanwhile. Damage is passed over or cut, what it cost is in `losses`, and the file is kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from pkbrokers_redis import logs

MAGIC = b"PKBSPL1\n"
FRAME_BYTES_MAX = 64 * 2**20  # a longer record is damage, not a frame

_HEAD = struct.Struct(">II")
_NUMBERS = struct.Struct(">QQ")
_SOURCE = struct.Struct(">H")
RECORD_BYTES = _HEAD.size + _NUMBERS.size  # a record without its frame


class Frame(NamedTuple):
    """One websocket frame as it was received: `seq` counts a source's frames from 1, `at_ms` is epoch ms."""

    source: str
    seq: int
    at_ms: int
    data: bytes


def head_of(source: str) -> bytes:
    """A segment's head."""
    name = source.encode()
    return MAGIC + _SOURCE.pack(len(name)) + name


def record_of(frame: Frame) -> list[bytes]:
    """A record's parts, to be written in one go."""
    numbers = _NUMBERS.pack(frame.seq, frame.at_ms)
    crc = zlib.crc32(frame.data, zlib.crc32(numbers))
    return [_HEAD.pack(len(frame.data), crc), numbers, frame.data]


def read_head(file: BinaryIO) -> str:
    """The source. EOFError where the head is torn, ValueError where it is none."""
    magic, length = file.read(len(MAGIC)), file.read(_SOURCE.size)
    if not MAGIC.startswith(magic):
        raise ValueError("it is no spool file")
    if len(length) < _SOURCE.size:
        raise EOFError("torn head")
    return file.read(_SOURCE.unpack(length)[0]).decode(errors="replace")


def read_record(file: BinaryIO, source: str) -> Frame | None:
    """One record; None for a damaged one that ends where it says.

    EOFError where it is torn, ValueError where its length cannot be.
    """
    head = file.read(RECORD_BYTES)
    if len(head) < RECORD_BYTES:
        raise EOFError("torn record")
    length, crc = _HEAD.unpack_from(head)
    if length > FRAME_BYTES_MAX:
        raise ValueError("damaged record")
    numbers, data = head[_HEAD.size :], file.read(length)
    if len(data) < length:
        raise EOFError("torn record")
    if zlib.crc32(data, zlib.crc32(numbers)) == crc:
        seq, at_ms = _NUMBERS.unpack(numbers)
        return Frame(source, seq, at_ms, data)
    if not length:  # zeroes, which say nothing of where the next one begins
        raise ValueError("damaged record")
    return None


__all__ = ["RECORD_BYTES", "UNREADABLE_SECONDS_MAX", "Frame", "Loss", "Spool"]

log = logs.get("spool")

SEGMENT_BYTES = 16 * 2**20  # what a successor repeats at most: 90,000 ticks, a fraction of a second
READ_BYTES_MAX = 8 * 2**20  # of frames handed out at once
UNREADABLE_SECONDS_MAX = 60.0  # of asking a disk again; then its segments count as damaged
SUFFIX, SUFFIX_DAMAGED = ".spool", ".damaged"


class Loss(NamedTuple):
    """Frames that damage has cost, between one of `from_ms` and one of `to_ms` (0: not known)."""

    frames: int
    from_ms: int
    to_ms: int


@dataclass(slots=True)
class _Segment:
    path: Path
    size: int  # bytes that are whole, as far as we know
    is_damaged: bool = False

    @property
    def first_seq(self) -> int:
        return int(self.path.stem) if self.path.stem.isdecimal() else 1


class Spool:
    """A queue of frames on disk. Not thread-safe: the inbox guards it. It makes its folder when first needed.

    Nothing raises for a disk that fails or is full: `append` and `unreadable` say so, and reading goes on
    behind damage.
    """

    def __init__(
        self,
        root: Path,
        source: str,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = root
        self.source = source
        self.folder = root / quote(source, safe="")
        self.size_bytes = 0  # of all segments
        self.refusal = ""  # why the last `append` failed
        self.unreadable = ""  # why the last `read` gave nothing though there is something
        self.losses: deque[Loss] = deque()  # for the caller to take
        self._segment_bytes = segment_bytes
        self._segments: deque[_Segment] = deque()
        self._lock: int | None = None
        self._writing: int | None = None  # descriptor of the last segment
        self._reading: BinaryIO | None = None  # the first segment
        self._ahead: deque[Frame] = deque()  # read and not yet acknowledged, at most one `read`'s worth
        self._acknowledged = 0
        self._clock = clock
        self._unreadable_since: float | None = None
        self._appended = self._passed = (0, 0)  # seq and at_ms of the newest frame written, and of that read
        self._is_broken = False  # damage lies between `_passed` and what is read next

    # -- writing ---------------------------------------------------------------------------------

    def append(self, frame: Frame, bytes_max: int) -> bool:
        """Add a frame behind all others; False when it would not fit `bytes_max` or the disk refuses."""
        size = RECORD_BYTES + len(frame.data)
        try:
            if self._writing is None or self._segments[-1].size >= self._segment_bytes:
                self._begin_segment(frame.seq, size, bytes_max)
            elif self.size_bytes + size > bytes_max:
                raise _full()
            self._write(record_of(frame), size)
        except OSError as error:
            self.refusal = error.strerror or str(error)
            return False
        self._appended = frame.seq, frame.at_ms
        return True

    def _begin_segment(self, first_seq: int, size: int, bytes_max: int) -> None:
        head = head_of(self.source)
        if self.size_bytes + len(head) + size > bytes_max:
            raise _full()
        if self._lock is None:
            self._claim_folder()
        self._end_segment()
        path = self.folder / f"{first_seq:020d}{SUFFIX}"
        self._writing = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._segments.append(_Segment(path, 0))
        try:
            self._write([head], len(head))
        except OSError:
            self._segments.pop()
            self._end_segment()
            path.unlink()
            raise

    def _claim_folder(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self.root):  # nobody takes what is half made for a dead process's
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = _lock_file(self.folder)

    def _write(self, parts: list[bytes], size: int) -> None:
        segment = self._segments[-1]
        assert self._writing is not None  # noqa: S101  append opened it
        try:
            written = os.writev(self._writing, parts)
            if written < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._writing, segment.size)  # the reader must not meet half a record
            os.lseek(self._writing, segment.size, os.SEEK_SET)
            raise
        segment.size += size
        self.size_bytes += size

    def _end_segment(self) -> None:
        if self._writing is not None:
            os.close(self._writing)
            self._writing = None

    # -- reading ---------------------------------------------------------------------------------

    def read(self, most: int) -> list[Frame]:
        """The oldest frames not acknowledged, up to `most`; the same again until they are.

        [] at the end, and where `unreadable` says why not now.
        """
        self.unreadable = ""
        while not self._ahead and self._segments:
            self._ahead.extend(self._read_first(most))
            if self.unreadable:
                break
            if not self._ahead:
                self._drop_first()
        if not self._segments:
            self._settle(*self._appended)
        return list(self._ahead)

    def acknowledge(self, seq: int) -> None:
        """Redis has every frame up to `seq`."""
        self._acknowledged = max(self._acknowledged, seq)
        while self._ahead and self._ahead[0].seq <= seq:
            self._ahead.popleft()

    def _read_first(self, most: int) -> list[Frame]:
        segment = self._segments[0]
        frames: list[Frame] = []
        size = at = 0
        try:
            if self._reading is None:
                self._reading = segment.path.open("rb")
                if not self._is_broken and self._passed[0] < segment.first_seq - 1:
                    self._passed = segment.first_seq - 1, 0
                self.source = read_head(self._reading)
            while (
                len(frames) < most and size < READ_BYTES_MAX and (at := self._reading.tell()) < segment.size
            ):
                frame = read_record(self._reading, self.source)
                if frame is None:
                    self._damaged(segment, "one record is not what was written")
                    continue
                self._settle(frame.seq, frame.at_ms)
                self._passed = max(self._passed, (frame.seq, frame.at_ms))
                if frame.seq > self._acknowledged:
                    frames.append(frame)
                    size += len(frame.data)
            self._unreadable_since = None
        except OSError as error:
            self._stop_reading()  # begun anew by the next `read`
            if not frames:
                self._put_off(segment, error.strerror or str(error))
        except (EOFError, ValueError) as error:
            self._cut(segment, at, error)
        return frames

    def _put_off(self, segment: _Segment, why: str) -> None:
        """The disk does not give a segment."""
        now = self._clock()
        if self._unreadable_since is None:
            self._unreadable_since = now
            log.error("spool_unreadable", file=str(segment.path), why=why)
        if now - self._unreadable_since < UNREADABLE_SECONDS_MAX:
            self.unreadable = why
        else:
            self._cut(segment, 0, ValueError(f"unreadable for too long: {why}"))

    def _cut(self, segment: _Segment, read: int, error: Exception) -> None:
        """Nothing behind the first `read` bytes of the first segment can be trusted."""
        left, segment.size = segment.size - read, read
        if isinstance(error, EOFError) and len(self._segments) == 1 and self._writing is None:
            log.warning("spool_cut", file=str(segment.path), why=str(error), bytes_left_unread=left)
        else:
            self._damaged(segment, str(error), left)
        if len(self._segments) == 1:
            self._end_segment()

    def _damaged(self, segment: _Segment, why: str, left: int = 0) -> None:
        self._is_broken = True
        if left or not segment.is_damaged:
            log.error(
                "spool_damaged", file=str(segment.path), why=why, bytes_left_unread=left,
                kept_as=str(self._kept_path(segment)), hint="check the disk",
            )  # fmt: skip
        segment.is_damaged = True

    def _settle(self, seq: int, at_ms: int) -> None:
        """`seq` is the first frame behind damage, or the last there was where none is left to read."""
        if self._is_broken:
            lost = seq - self._passed[0] - (1 if self._segments else 0)
            if lost > 0 or not self._segments:
                self.losses.append(Loss(max(1, lost), self._passed[1], at_ms))
        self._is_broken = False

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _drop_first(self) -> None:
        segment = self._segments.popleft()
        self._stop_reading()
        if not self._segments:
            self._end_segment()
        self.size_bytes = sum(each.size for each in self._segments)
        with contextlib.suppress(OSError):
            if segment.is_damaged:
                segment.path.rename(self._kept_path(segment))
            else:
                segment.path.unlink()

    def _kept_path(self, segment: _Segment) -> Path:
        return self.root / f"{self.folder.name}-{segment.path.stem}{SUFFIX_DAMAGED}"

    # -- life ------------------------------------------------------------------------------------

    def discard(self) -> None:
        """Delete everything."""
        self._ahead.clear()
        while self._segments:
            self._drop_first()

    def close(self) -> None:
        """Let go of the folder: a later ingest sends what is still there. An empty one is removed."""
        if self._writing is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._writing)
        self._end_segment()
        self._stop_reading()
        if self._lock is None:
            return
        with contextlib.suppress(OSError), _locked(self.root):
            if not self._segments:
                (self.folder / "lock").unlink()
                self.folder.rmdir()
        os.close(self._lock)
        self._lock = None

    @classmethod
    def of_the_dead(cls, root: Path, most: int = 64) -> list[Spool]:
        """The spools under `root` whose processes are gone, now ours, in the order of their first frames."""
        if not root.is_dir():
            return []
        found: list[tuple[int, Spool]] = []
        try:
            with _locked(root):
                for folder in [each for each in sorted(root.iterdir()) if each.is_dir()][:most]:
                    if spool := cls._take_over(root, folder):
                        frames = spool.read(1)
                        found.append((frames[0].at_ms if frames else 0, spool))
        except OSError as error:
            log.error("spool_unreadable", folder=str(root), why=error.strerror or str(error))
        return [spool for _, spool in sorted(found, key=lambda pair: pair[0])]

    @classmethod
    def _take_over(cls, root: Path, folder: Path) -> Spool | None:
        try:
            lock = _lock_file(folder)
        except BlockingIOError:
            return None  # its process lives
        except OSError as error:
            log.error("spool_unreadable", folder=str(folder), why=error.strerror or str(error))
            return None
        spool = cls(root, folder.name)
        spool.folder, spool._lock = folder, lock
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
            spool._segments.extend(_Segment(path, path.stat().st_size) for path in paths)
        except OSError as error:
            os.close(lock)
            log.error("spool_unreadable", folder=str(folder), why=error.strerror or str(error))
            return None
        spool.size_bytes = sum(each.size for each in spool._segments)
        return spool


def _full() -> OSError:
    return OSError(errno.EDQUOT, "PKB_SPOOL_MAX_BYTES is used up")


def _lock_file(folder: Path) -> int:
    """Lock a folder by its file `lock`; the descriptor that holds it. Raises BlockingIOError."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """For the moments in which folders come and go."""
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
