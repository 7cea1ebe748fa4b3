"""Captures: websocket frames as they came, in a file that a replay or an independent check reads.

    PKBCAP1\\n
    +--------+------+--------+-----------------+
    | at_ms  | kind | length | <length> bytes  |   again and again, big-endian
    | u64    | u8   | u32    |                 |
    +--------+------+--------+-----------------+

`kind` is the websocket opcode: 1 text, 2 binary. Append-only: a writer that was killed leaves at most a
cut-off last record, which readers skip with a warning and the next writer removes. A name that ends in `.gz`
is gzipped.
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

    Raises InputFileError when the file cannot be opened, is no capture, or (gzip) ends inside a record.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            fresh = not self.path.exists() or self.path.stat().st_size == 0
            if not fresh:
                self._mend_tail()
            self._file = _open(self.path, "ab")
        except OSError as error:
            raise InputFileError(f"{path}: {error.strerror or error}", "name a file we may write") from error
        if fresh:
            self._file.write(MAGIC)

    def _mend_tail(self) -> None:
        """Records after a cut-off one would be unreadable: cut it away."""
        whole = len(MAGIC) + sum(_RECORD.size + len(frame) for _, _, frame in read_capture(self.path))
        if self.path.suffix != ".gz":
            with self.path.open("r+b") as file:
                file.truncate(whole)
        elif _ends_early(self.path):
            raise InputFileError(f"{self.path} ends inside a record", "start a new file")

    def write(self, at_ms: int, kind: int, frame: bytes) -> None:
        """One frame, received or sent at `at_ms` (epoch ms)."""
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
    """`(at_ms, kind, frame)` of every whole record, lazily; a cut-off tail ends the iteration.

    Raises InputFileError when the file cannot be read or is no capture.
    """
    try:
        with _open(Path(path), "rb") as file:
            yield from _records(file, path)
    except gzip.BadGzipFile as error:
        raise InputFileError(f"{path} is not gzipped", "give a file made by `pkb record`") from error
    except OSError as error:
        raise InputFileError(f"{path}: {error.strerror or error}", "name a capture we may read") from error


def _records(file: IO[bytes], path: Path | str) -> Iterator[tuple[int, int, bytes]]:
    if _read(file, len(MAGIC)) != MAGIC:
        raise InputFileError(f"{path} is no capture", "give a file made by `pkb record`")
    while head := _read(file, _RECORD.size):
        if len(head) < _RECORD.size:
            _warn_of_cut(path)
            return
        at_ms, kind, length = _RECORD.unpack(head)
        if length > FRAME_BYTES_MAX or kind not in (KIND_TEXT, KIND_BINARY):
            raise InputFileError(
                f"{path} is damaged: a record of kind {kind} and {length} bytes", "capture anew"
            )
        frame = _read(file, length)
        if len(frame) < length:
            _warn_of_cut(path)
            return
        yield at_ms, kind, frame


def _read(file: IO[bytes], size: int) -> bytes:
    try:
        return file.read(size)
    except (EOFError, zlib.error):  # a gzip member that was cut off
        _warn_of_cut(file.name)
        return b""


def _warn_of_cut(path: Path | str) -> None:
    log.warning("capture_cut", file=str(path), why="its last record is not whole: the others are read")


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
