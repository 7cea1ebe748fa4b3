"""Captures: websocket frames as received, in a file that a replay or an independent check reads.

    PKBCAP1\\n
    +--------+------+--------+-----------------+
    | at_ms  | kind | length | <length> bytes  |   repeated, big-endian
    | u64    | u8   | u32    |                 |
    +--------+------+--------+-----------------+

`kind` is the websocket opcode: 1 text, 2 binary. The file is append-only: a writer that was killed leaves at
most an incomplete last record, which readers skip with a warning and the next writer removes. A name that
ends in `.gz` is gzipped.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, cast

from pkbrokers_redis import logs
from pkbrokers_redis.errors import InputFileError

log = logs.get("capture")

MAGIC = b"PKBCAP1\n"
KIND_TEXT, KIND_BINARY = 1, 2
FRAME_BYTES_MAX = 64 * 2**20  # a longer record is a damaged file, not a frame

_RECORD = struct.Struct(">QBI")


class CaptureWriter:
    """Appends frames to a capture; a new file gets its magic line. Not thread-safe.

    Example:
        >>> with CaptureWriter("today.cap") as capture:
        ...     capture.write(1_767_584_700_000, KIND_BINARY, frame)
    """

    def __init__(self, path: Path | str) -> None:
        """Open a file. Raises InputFileError for one that is no capture, or (gzip) ends inside a record."""
        self.path = Path(path)
        try:
            fresh = not self.path.exists() or self.path.stat().st_size == 0
            if not fresh:
                self._remove_incomplete_record()
            self._file = _open(self.path, "ab")
        except OSError as error:
            raise InputFileError(
                f"{path}: {error.strerror or error}", "name a file that can be written"
            ) from error
        if fresh:
            self._file.write(MAGIC)

    def _remove_incomplete_record(self) -> None:
        """Remove an incomplete last record: those after it would be unreadable."""
        whole = len(MAGIC) + sum(_RECORD.size + len(frame) for _, _, frame in read_capture(self.path))
        if self.path.suffix != ".gz":
            with self.path.open("r+b") as file:
                file.truncate(whole)
        elif _ends_early(self.path):
            raise InputFileError(f"{self.path} ends inside a record", "start a new file")

    def write(self, at_ms: int, kind: int, frame: bytes) -> None:
        """Append one frame, received or sent at `at_ms` (epoch ms)."""
        self._file.write(_RECORD.pack(at_ms, kind, len(frame)) + frame)

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> CaptureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_capture(path: Path | str) -> Iterator[tuple[int, int, bytes]]:
    """Yield `(at_ms, kind, frame)` of every whole record; an incomplete last one ends the iteration.

    Raises:
        InputFileError: the file cannot be read, or is no capture.
    """
    try:
        with _open(Path(path), "rb") as file:
            yield from _records(file, path)
    except gzip.BadGzipFile as error:
        raise InputFileError(f"{path} is not gzipped", "give a file made by `pkb record`") from error
    except OSError as error:
        raise InputFileError(
            f"{path}: {error.strerror or error}", "name a capture that can be read"
        ) from error


def _records(file: IO[bytes], path: Path | str) -> Iterator[tuple[int, int, bytes]]:
    if _read(file, len(MAGIC)) != MAGIC:
        raise InputFileError(f"{path} is no capture", "give a file made by `pkb record`")
    while head := _read(file, _RECORD.size):
        if len(head) < _RECORD.size:
            _log_incomplete(path)
            return
        at_ms, kind, length = _RECORD.unpack(head)
        if length > FRAME_BYTES_MAX or kind not in (KIND_TEXT, KIND_BINARY):
            raise InputFileError(
                f"{path} is damaged: a record of kind {kind} and {length} bytes", "record it again"
            )
        frame = _read(file, length)
        if len(frame) < length:
            _log_incomplete(path)
            return
        yield at_ms, kind, frame


def _read(file: IO[bytes], size: int) -> bytes:
    try:
        return file.read(size)
    except (EOFError, zlib.error):  # an incomplete gzip member
        _log_incomplete(file.name)
        return b""


def _log_incomplete(path: Path | str) -> None:
    log.warning(
        "capture_incomplete", file=str(path), reason="its last record is cut off; all before it are read"
    )


def _ends_early(path: Path) -> bool:
    try:
        with gzip.open(path, "rb") as file:
            while file.read(2**20):
                pass
    except (EOFError, zlib.error):
        return True
    return False


def _open(path: Path, mode: str) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, mode))
    return path.open(mode)
