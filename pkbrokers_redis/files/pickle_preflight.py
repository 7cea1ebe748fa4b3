"""A look at a pickle's opcodes before anything is built from them.

Python's unpickler trusts two numbers of the file: an index of its memo (a 12-byte pickle can make it fill
32 GB with empty slots) and the length of a string (allocated before it is read). One compiled pass over the
opcodes checks both, at some 100 MB/s, and that the file ends with STOP and holds no opcode that reaches out
of it (persistent ids, the extension registry, out-of-band buffers).

References make a small file large: a tuple of three references to a tuple of three references … has 3^40
leaves in 300 bytes, and the hash of a dict's key visits each of them. So the pass keeps the stack as the
unpickler would, with how much each value holds, references counted in full, and bounds the sum. A list that
is filled after it was referred to escapes this (it has no hash); `rebuilt` counts those.
"""

from __future__ import annotations

import pickletools

import numpy as np
import numpy.typing as npt
from numba import njit

from pkbrokers_redis.errors import RefusedPickle

Bytes = npt.NDArray[np.uint8]
Kinds = npt.NDArray[np.int64]

NODES_A_BYTE_MAX = 100  # frames have less than 7, references counted in full
NODES_MIN = 100_000

# How an opcode's argument is read: 0 … 9 are that many bytes; the rest is named here.
(
    _LINE,
    _TWO_LINES,
    _LENGTH_1,
    _LENGTH_4,
    _LENGTH_8,
    _MEMO_LINE,
    _MEMO_1,
    _MEMO_4,
    _STOP,
    _FOREIGN,
    _UNKNOWN,
) = range(10, 21)
_OK, _CUT, _BAD_MEMO, _BAD_OPCODE, _LOOSE_END, _EMPTY_STACK, _TOO_MANY = range(7)
# What it does to the stack: _MAKE takes values and leaves one (or none), _FILL puts them into the one below.
_MAKE, _FILL, _MARK, _POP, _DUP, _PUT, _GET, _MEMOIZE = range(8)

FOREIGN = {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
_SPECIAL = {
    **dict.fromkeys(("PUT", "GET"), _MEMO_LINE),
    **dict.fromkeys(("BINPUT", "BINGET"), _MEMO_1),
    **dict.fromkeys(("LONG_BINPUT", "LONG_BINGET"), _MEMO_4),
    "STOP": _STOP,
}
_ACTIONS = {
    **dict.fromkeys(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"), _FILL),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _PUT),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _GET),
    "MARK": _MARK,
    "POP": _POP,
    "DUP": _DUP,
    "MEMOIZE": _MEMOIZE,
}
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
_EFFECTS = np.zeros(
    (256, 4), np.int64
)  # what it does, values taken (below the mark), to the mark?, values left
for _opcode in pickletools.opcodes:
    _KINDS[ord(_opcode.code)] = _kind_of(_opcode)
    _before = [each.name for each in _opcode.stack_before]
    _taken = _before.index("mark") if "mark" in _before else len(_before)
    _action = _ACTIONS.get(_opcode.name, _MAKE)
    _EFFECTS[ord(_opcode.code)] = (
        _action,
        _taken - (_action == _FILL),
        "mark" in _before,
        len(_opcode.stack_after),
    )


def nodes_max(size: int) -> int:
    """How many values a pickle of `size` bytes may hold, references counted in full."""
    return NODES_MIN + NODES_A_BYTE_MAX * size


def check_opcodes(data: bytes) -> None:
    """Raises RefusedPickle unless `data` is one pickle whose numbers stay within its own size."""
    problem, position = _scan(np.frombuffer(data, np.uint8), _KINDS, _EFFECTS, nodes_max(len(data)))
    if problem == _OK:
        return
    if problem == _CUT:
        raise RefusedPickle(f"the pickle ends inside an object (byte {position:,} of {len(data):,})")
    if problem == _BAD_MEMO:
        raise RefusedPickle(f"the pickle asks for a memo far larger than itself (byte {position:,})", "memo")
    if problem == _LOOSE_END:
        raise RefusedPickle(f"the pickle ends at byte {position:,}, the file goes on to {len(data):,}")
    if problem == _EMPTY_STACK:
        raise RefusedPickle(f"the pickle takes what it has not made (byte {position:,})")
    if problem == _TOO_MANY:
        raise RefusedPickle(
            f"the pickle's references unroll to far more than itself (byte {position:,})", "memo"
        )
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
def _room(array: Kinds, wanted: int) -> Kinds:
    """The array, or a longer one with the same content where `wanted` does not fit."""
    if wanted < len(array):
        return array
    longer = np.zeros(2 * wanted, np.int64)
    longer[: len(array)] = array
    return longer


@_compiled
def _scan(data: Bytes, kinds: Kinds, effects: Kinds, nodes_max: int) -> tuple[int, int]:
    """(what is wrong, where): one step an opcode, arguments skipped by their kind."""
    size = len(data)
    pos = puts = nodes = depth = marked = noted = 0
    stack, marks, memo = np.zeros(1024, np.int64), np.zeros(64, np.int64), np.zeros(1024, np.int64)
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
        elif kind in (_MEMO_1, _MEMO_4):
            width = 1 if kind == _MEMO_1 else 4
            if pos + width > size:
                return _CUT, at
            index = _little_endian(data, pos, width)
            pos += width
        elif kind in (_LINE, _TWO_LINES, _MEMO_LINE):
            start = pos
            pos = _line_end(data, pos)
            if pos > 0 and kind == _TWO_LINES:
                pos = _line_end(data, pos)
            if pos < 0:
                return _CUT, at
            if kind == _MEMO_LINE:
                index = 0
                for i in range(start, pos - 1):
                    if data[i] < 48 or data[i] > 57 or i - start > 9:
                        return _BAD_MEMO, at
                    index = index * 10 + data[i] - 48
        else:
            return _BAD_OPCODE, at

        action, taken, to_mark, left = effects[data[at]]
        fence = marks[marked - 1] if marked else 0
        if action == _MARK:
            marks = _room(marks, marked)
            marks[marked] = depth
            marked += 1
            continue
        if action == _POP and marked and fence == depth:
            marked -= 1
            continue
        if action == _GET:
            heavy = memo[index] if index < len(memo) else 0
        elif action in (_PUT, _MEMOIZE, _DUP):
            if depth <= fence:
                return _EMPTY_STACK, at
            heavy = stack[depth - 1]
            if action == _PUT:
                puts += 1
                if index > puts + 255:  # writers count up; the little room is for pieces that begin anew
                    return _BAD_MEMO, at
            if action != _DUP:
                index = noted if action == _MEMOIZE else index
                memo = _room(memo, index)
                noted += memo[index] == 0
                memo[index] = heavy
                continue
        else:
            heavy = 0
            if to_mark:
                if not marked:
                    return _EMPTY_STACK, at
                while depth > fence:
                    depth -= 1
                    heavy += stack[depth]
                marked -= 1
                fence = marks[marked - 1] if marked else 0
            for _ in range(taken):
                if depth <= fence:
                    return _EMPTY_STACK, at
                depth -= 1
                heavy += stack[depth]
            nodes += heavy
            if nodes > nodes_max:
                return _TOO_MANY, at
            if action == _FILL:
                if depth <= fence:
                    return _EMPTY_STACK, at
                stack[depth - 1] += heavy
                continue
            heavy += 1
        if left:
            stack = _room(stack, depth)
            stack[depth] = heavy
            depth += 1
    return _CUT, size
