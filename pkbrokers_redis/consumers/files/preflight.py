"""A look at a pickle's opcodes before anything is built from them.

Python's unpickler trusts two numbers of the file: an index of its memo (a 12-byte pickle can make it fill
32 GB with empty slots) and the length of a string (allocated before it is read). One compiled pass over the
opcodes checks both, at some 100 MB/s, and that the file ends with STOP and holds no opcode that reaches out
of it (persistent ids, the extension registry, out-of-band buffers).
"""

from __future__ import annotations

import pickletools

import numpy as np
import numpy.typing as npt
from numba import njit

from pkbrokers_redis.core.errors import RefusedPickle

Bytes = npt.NDArray[np.uint8]
Kinds = npt.NDArray[np.int64]

# How an opcode's argument is read: 0 … 9 are that many bytes; the rest is named here.
_LINE, _TWO_LINES, _LENGTH_1, _LENGTH_4, _LENGTH_8, _PUT_LINE, _PUT_1, _PUT_4, _STOP, _FOREIGN, _UNKNOWN = (
    range(10, 21)
)
_OK, _CUT, _BAD_MEMO, _BAD_OPCODE, _LOOSE_END = range(5)

FOREIGN = {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
_SPECIAL = {"PUT": _PUT_LINE, "BINPUT": _PUT_1, "LONG_BINPUT": _PUT_4, "STOP": _STOP}
_BY_ARGUMENT = {"stringnl_noescape_pair": _TWO_LINES}
_BY_LENGTH = {
    pickletools.UP_TO_NEWLINE: _LINE,
    pickletools.TAKEN_FROM_ARGUMENT1: _LENGTH_1,
    pickletools.TAKEN_FROM_ARGUMENT4: _LENGTH_4,
    pickletools.TAKEN_FROM_ARGUMENT4U: _LENGTH_4,
    pickletools.TAKEN_FROM_ARGUMENT8U: _LENGTH_8,
}
_compiled = njit(cache=True)
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


def _kind_of(opcode: pickletools.OpcodeInfo) -> int:
    if opcode.name in FOREIGN:
        return _FOREIGN
    if opcode.name in _SPECIAL:
        return _SPECIAL[opcode.name]
    if opcode.arg is None:
        return 0
    return _BY_ARGUMENT.get(opcode.arg.name) or _BY_LENGTH.get(opcode.arg.n, opcode.arg.n)


_KINDS: Kinds = np.full(256, _UNKNOWN, np.int64)
for _opcode in pickletools.opcodes:
    _KINDS[ord(_opcode.code)] = _kind_of(_opcode)


def check_opcodes(data: bytes) -> None:
    """Raises RefusedPickle unless `data` is one pickle whose numbers stay within its own size."""
    problem, position = _scan(np.frombuffer(data, np.uint8), _KINDS)
    if problem == _OK:
        return
    if problem == _CUT:
        raise RefusedPickle(f"the pickle ends inside an object (byte {position:,} of {len(data):,})")
    if problem == _BAD_MEMO:
        raise RefusedPickle(f"the pickle asks for a memo far larger than itself (byte {position:,})", "memo")
    if problem == _LOOSE_END:
        raise RefusedPickle(f"the pickle ends at byte {position:,}, the file goes on to {len(data):,}")
    name = _NAMES.get(data[position], f"0x{data[position]:02x}")
    raise RefusedPickle(f"the pickle holds an opcode {name} (byte {position:,})", name)


@_compiled
def _little_endian(data: Bytes, start: int, count: int) -> int:
    value = 0
    for i in range(count):
        value |= int(data[start + i]) << (8 * i)
    return value


@_compiled
def _line_end(data: Bytes, start: int) -> int:
    """Position behind the newline at or after `start`; -1 when there is none."""
    for i in range(start, len(data)):
        if data[i] == 10:
            return i + 1
    return -1


@_compiled
def _scan(data: Bytes, kinds: Kinds) -> tuple[int, int]:
    """(what is wrong, where): one step an opcode, arguments skipped by their kind."""
    size = len(data)
    pos = 0
    puts = 0
    while pos < size:
        at = pos
        kind = kinds[data[pos]]
        pos += 1
        index = -1
        if kind < 10:
            pos += kind
        elif kind == _STOP:
            return (_OK if pos == size else _LOOSE_END), pos
        elif kind in (_LENGTH_1, _LENGTH_4, _LENGTH_8):
            width = 1 if kind == _LENGTH_1 else 4 if kind == _LENGTH_4 else 8
            if pos + width > size:
                return _CUT, at
            length = _little_endian(data, pos, width)
            if length < 0 or length > size - pos - width:
                return _CUT, at
            pos += width + length
        elif kind in (_PUT_1, _PUT_4):
            width = 1 if kind == _PUT_1 else 4
            if pos + width > size:
                return _CUT, at
            index = _little_endian(data, pos, width)
            pos += width
        elif kind in (_LINE, _TWO_LINES, _PUT_LINE):
            start = pos
            pos = _line_end(data, pos)
            if pos > 0 and kind == _TWO_LINES:
                pos = _line_end(data, pos)
            if pos < 0:
                return _CUT, at
            if kind == _PUT_LINE:
                index = 0
                for i in range(start, pos - 1):
                    if data[i] < 48 or data[i] > 57 or i - start > 9:
                        return _BAD_MEMO, at
                    index = index * 10 + data[i] - 48
        else:
            return _BAD_OPCODE, at
        if index >= 0:
            puts += 1
            if index > puts + 255:  # writers count up; the little room is for pieces that begin anew
                return _BAD_MEMO, at
    return _CUT, size
