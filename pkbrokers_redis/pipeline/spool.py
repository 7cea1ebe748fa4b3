"""The spool: frames on disk while Redis is away, first in, first out, of one source (one life of an ingest).

    <PKB_SPOOL_DIR>/<source>/lock              held (flock) for as long as that process lives
    <PKB_SPOOL_DIR>/<source>/<seq, 20 digits>.spool    a segment, named by its first frame

    "PKBSPL1\\n" | length u16 | source                                     a segment's head
    +--------+-------+-----+-------+-----------------+
    | length | crc32 | seq | at_ms | <length> bytes  |   again and again, big-endian
    | u32    | u32   | u64 | u64   | the frame       |   crc32 is of everything behind it
    +--------+-------+-----+-------+-----------------+

What was appended survives the process, though not a power cut; one killed inside an append leaves a torn
record, which the reader cuts. A segment is deleted when Redis has it; a dead process's successor begins at
the start of the first one, and repeats carry the seq they had, so that the aggregator skips them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from pkbrokers_redis import logs

log = logs.get("spool")

MAGIC = b"PKBSPL1\n"
SEGMENT_BYTES = 16 * 2**20  # what a successor repeats at most: 90,000 ticks, a fraction of a second
READ_BYTES_MAX = 8 * 2**20  # of frames handed out at once
FRAME_BYTES_MAX = 64 * 2**20  # a longer record is damage, not a frame
SUFFIX = ".spool"

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


@dataclass(slots=True)
class _Segment:
    path: Path
    size: int  # bytes that are whole, as far as we know


class Spool:
    """A queue of frames on disk. Not thread-safe: the inbox guards it. It makes its folder when first needed.

    Nothing raises for a disk that fails or is full: `append` says so, and reading goes on behind the damage.
    """

    def __init__(self, root: Path, source: str, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.root = root
        self.source = source
        self.folder = root / quote(source, safe="")
        self.size_bytes = 0  # of all segments
        self.refusal = ""  # why the last `append` failed
        self._segment_bytes = segment_bytes
        self._segments: deque[_Segment] = deque()
        self._lock: int | None = None
        self._writing: int | None = None  # descriptor of the last segment
        self._reading: BinaryIO | None = None  # the first segment
        self._ahead: deque[Frame] = deque()  # read and not yet acknowledged, at most one `read`'s worth
        self._acknowledged = 0

    # -- writing ---------------------------------------------------------------------------------

    def append(self, frame: Frame, bytes_max: int) -> bool:
        """Add a frame behind all others; False when it would not fit `bytes_max` or the disk refuses."""
        numbers = _NUMBERS.pack(frame.seq, frame.at_ms)
        crc = zlib.crc32(frame.data, zlib.crc32(numbers))
        parts = [_HEAD.pack(len(frame.data), crc), numbers, frame.data]
        size = RECORD_BYTES + len(frame.data)
        try:
            if self._writing is None or self._segments[-1].size >= self._segment_bytes:
                self._begin_segment(frame.seq, size, bytes_max)
            elif self.size_bytes + size > bytes_max:
                raise _full()
            self._write(parts, size)
        except OSError as error:
            self.refusal = error.strerror or str(error)
            return False
        return True

    def _begin_segment(self, first_seq: int, size: int, bytes_max: int) -> None:
        source = self.source.encode()
        head = MAGIC + _SOURCE.pack(len(source)) + source
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
        """The oldest frames not acknowledged, up to `most`; the same again until they are. [] at the end."""
        while not self._ahead and self._segments:
            self._ahead.extend(self._read_first(most))
            if not self._ahead:
                self._drop_first()
        return list(self._ahead)

    def acknowledge(self, seq: int) -> None:
        """Redis has every frame up to `seq`."""
        self._acknowledged = max(self._acknowledged, seq)
        while self._ahead and self._ahead[0].seq <= seq:
            self._ahead.popleft()

    def _read_first(self, most: int) -> list[Frame]:
        segment = self._segments[0]
        frames: list[Frame] = []
        size = 0
        try:
            if self._reading is None:
                self._reading = segment.path.open("rb")
                self._read_head(self._reading)
            while len(frames) < most and size < READ_BYTES_MAX and self._reading.tell() < segment.size:
                frame = self._read_record(self._reading)
                if frame.seq > self._acknowledged:
                    frames.append(frame)
                    size += len(frame.data)
        except (OSError, ValueError) as error:
            read = self._reading.tell() if self._reading is not None else 0
            left = segment.size - read
            segment.size = read  # cut: nothing behind can be trusted
            if len(self._segments) == 1:
                self._end_segment()
            log.warning("spool_cut", file=str(segment.path), why=str(error), bytes_left_unread=left)
        return frames

    def _read_head(self, file: BinaryIO) -> None:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it is no spool file")
        length = file.read(_SOURCE.size)
        if len(length) < _SOURCE.size:
            raise ValueError("torn head")
        self.source = file.read(_SOURCE.unpack(length)[0]).decode(errors="replace")

    def _read_record(self, file: BinaryIO) -> Frame:
        """One record; ValueError where it is torn, and the file stands where it began."""
        start = file.tell()
        head = file.read(RECORD_BYTES)
        if len(head) == RECORD_BYTES:
            length, crc = _HEAD.unpack_from(head)
            numbers = head[_HEAD.size :]
            if length <= FRAME_BYTES_MAX:
                data = file.read(length)
                if len(data) == length and zlib.crc32(data, zlib.crc32(numbers)) == crc:
                    seq, at_ms = _NUMBERS.unpack(numbers)
                    return Frame(self.source, seq, at_ms, data)
        file.seek(start)
        raise ValueError("torn record")

    def _drop_first(self) -> None:
        segment = self._segments.popleft()
        if self._reading is not None:
            self._reading.close()
            self._reading = None
        if not self._segments:
            self._end_segment()
        self.size_bytes = sum(each.size for each in self._segments)
        with contextlib.suppress(OSError):
            segment.path.unlink()

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
        if self._reading is not None:
            self._reading.close()
            self._reading = None
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
        paths = sorted(folder.glob(f"*{SUFFIX}"))
        spool._segments.extend(_Segment(path, path.stat().st_size) for path in paths)
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
