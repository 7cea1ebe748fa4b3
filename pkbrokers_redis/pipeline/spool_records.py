"""The bytes of a spool's segment.

"PKBSPL1\\n" | length u16 | source                                     a segment's head
+--------+-------+-----+-------+-----------------+
| length | crc32 | seq | at_ms | <length> bytes  |   again and again, big-endian
| u32    | u32   | u64 | u64   | the frame       |   crc32 is of everything behind it
+--------+-------+-----+-------+-----------------+
"""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO, NamedTuple

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
