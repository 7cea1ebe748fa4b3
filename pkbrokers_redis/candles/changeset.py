"""What a batch changed, as text ready for Redis: the last compiled step before a commit.

`collect` walks the dirty instruments once and writes every row and every state text into one byte
buffer; an *operation* is six integers that say what to do with a piece of it:

    (kind, instrument, interval, first byte, last byte + 1, rev)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.arrays import (
    ANNOUNCE,
    BASE,
    CLOSE,
    CLOSE_TIME,
    CLOSE_VOLUME,
    COMPLETE,
    DIRTY,
    DIRTY_SIZE,
    EVICTED_SIZE,
    FIRST_AT,
    FLAG,
    HIGH,
    LISTED,
    LOW,
    OPEN,
    OPEN_TIME,
    OPEN_VOLUME,
    R_HIGH,
    R_LOW,
    R_PRICE,
    R_TIME,
    R_VOLUME,
    REV,
    RING_MAX,
    RING_SIZE,
    S_OI,
    SLOT_WIDTH,
    START,
    TICKS,
    TOP,
    Floats,
    Tables,
)
from pkbrokers_redis.candles.codec import FLAG_BYTES_MAX, NUMBER_BYTES_MAX, Bytes, write_flag, write_number
from pkbrokers_redis.candles.compiled import compiled

Ints = npt.NDArray[np.int64]

CURRENT, DROP, PUT, CLOSED, HOT, MARKS, REVISION = range(7)
OP_WIDTH = 6

CELL_BYTES_MAX = NUMBER_BYTES_MAX + 1  # with its comma
ROW_BYTES_MAX = 8 * CELL_BYTES_MAX + FLAG_BYTES_MAX + 3
MARK_BYTES_MAX = 16 * CELL_BYTES_MAX
HOT_BYTES_MAX = (RING_SIZE + RING_MAX * 5) * CELL_BYTES_MAX + 32


class Scratch:
    """Where `collect` writes before a copy is handed out. The books of one thread share it: it grows to the
    largest commit and stays, and eight of their own would hold eight times as much."""

    def __init__(self) -> None:
        self.text = np.empty(0, np.uint8)
        self.ops = np.empty((0, OP_WIDTH), np.int64)

    def grow(self, text_size: int, ops_size: int) -> None:
        """Room for at least so many bytes and operations."""
        if len(self.ops) < ops_size:
            self.ops = np.empty((ops_size, OP_WIDTH), np.int64)
        if len(self.text) < text_size:
            self.text = np.empty(text_size, np.uint8)


def bytes_max(intervals: int, slots: int) -> int:
    """The most text one instrument can give in one collect."""
    return intervals * slots * (ROW_BYTES_MAX + MARK_BYTES_MAX) + HOT_BYTES_MAX + 64


@compiled
def _volume_of(slot: Floats) -> float:
    """Rule 1: the highest cumulative volume inside minus the highest before; 0 without volumes.

    A difference of decimals (crypto replays) is rounded to 8 places, the finest any venue quotes.
    """
    if slot[TOP] != slot[TOP]:
        return 0.0
    volume = slot[TOP] - slot[BASE]
    if volume != np.floor(volume):
        volume = np.rint(volume * 1e8) / 1e8
    return float(max(volume, 0.0))


@compiled
def _write_row(out: Bytes, pos: int, slot: Floats) -> int:
    """`[start,open,high,low,close,volume,oi,ticks]`, and the flag of a candle that is not whole."""
    out[pos] = 91  # [
    pos = write_number(out, pos + 1, slot[START])
    for column in (OPEN, HIGH, LOW, CLOSE):
        out[pos] = 44  # ,
        pos = write_number(out, pos + 1, slot[column])
    out[pos] = 44
    pos = write_number(out, pos + 1, _volume_of(slot))
    out[pos] = 44
    pos = write_number(out, pos + 1, slot[S_OI])
    out[pos] = 44
    pos = write_number(out, pos + 1, slot[TICKS])
    pos = write_flag(out, pos, int(slot[FLAG]))
    out[pos] = 93  # ]
    return pos + 1


@compiled
def _write_hot(out: Bytes, pos: int, inst: Floats, ring: Floats) -> int:
    """`[first_at,first_time,first_volume,day,seen,baseline,oi_time,oi_volume,gap_from,gap_to,answered_from,
    answered_to,outside_time,outside_volume,time,volume,price,high,low, …]`.

    Statements after the newest are differences to it, null where a field equals the newer one's.
    """
    out[pos] = 91
    pos += 1
    for column in range(FIRST_AT, RING_SIZE):
        pos = write_number(out, pos, inst[column])
        out[pos] = 44
        pos += 1
    for j in range(int(inst[RING_SIZE])):
        newer = j - 1
        for column in (R_TIME, R_VOLUME, R_PRICE, R_HIGH, R_LOW):
            value = ring[j, column]
            if j > 0:
                if column == R_TIME or column == R_VOLUME:
                    value = ring[0, column] - value
                elif value == ring[newer, column] or (
                    column == R_PRICE and ring[j, R_VOLUME] == ring[j, R_VOLUME]
                ):
                    value = np.nan
            pos = write_number(out, pos, value)
            out[pos] = 44
            pos += 1
    out[pos - 1] = 93
    return pos


@compiled
def _write_mark(out: Bytes, pos: int, slot: Floats) -> int:
    """What a row does not say of its candle; a complete one repeats its row, for it may be amended.

    `[start,base,flag,open_time-start,open_volume-base]` while it forms, else
    `[start,base,flag,…,rev,open,high,low,close,top,oi,ticks,close_time-start,close_volume-base]`.
    """
    out[pos] = 91
    pos = write_number(out, pos + 1, slot[START])
    base = 0.0 if slot[BASE] != slot[BASE] else slot[BASE]
    start_ms = slot[START] * 1000
    out[pos] = 44
    pos = write_number(out, pos + 1, slot[BASE])
    for value in (slot[FLAG], slot[OPEN_TIME] - start_ms, slot[OPEN_VOLUME] - base):
        out[pos] = 44
        pos = write_number(out, pos + 1, value)
    if slot[COMPLETE] != 0:
        for value in (
            slot[REV], slot[OPEN], slot[HIGH], slot[LOW], slot[CLOSE], slot[TOP], slot[S_OI], slot[TICKS],
            slot[CLOSE_TIME] - start_ms, slot[CLOSE_VOLUME] - base,
        ):  # fmt: skip
            out[pos] = 44
            pos = write_number(out, pos + 1, value)
    out[pos] = 93
    return pos + 1


@compiled
def _op(ops: Ints, n: int, kind: int, i: int, k: int, first: int, last: int, rev: int) -> int:
    """Append one operation."""
    ops[n, 0], ops[n, 1], ops[n, 2], ops[n, 3], ops[n, 4], ops[n, 5] = kind, i, k, first, last, rev
    return n + 1


@compiled
def _settle(
    ops: Ints, n: int, out: Bytes, pos: int, slot: Floats, i: int, k: int, leaves: bool
) -> tuple[int, int]:
    """A complete candle: into the list, and announced when it is due (rev 0) or amended after (rev + 1)."""
    amended = slot[DIRTY] != 0 and slot[REV] >= 0 and slot[ANNOUNCE] == 0
    if amended:
        slot[REV] += 1
    elif leaves and slot[REV] < 0:
        slot[REV] = 0.0
        slot[ANNOUNCE] = 1.0
    put = slot[DIRTY] != 0 or slot[LISTED] == 0
    announce = amended or slot[ANNOUNCE] != 0
    if put or announce:
        first = pos
        pos = _write_row(out, pos, slot)
        if put:
            n = _op(ops, n, PUT, i, k, first, pos, 0)
        if announce:
            n = _op(ops, n, CLOSED, i, k, first, pos, int(slot[REV]))
    if leaves and slot[REV] > 0:  # the slot goes, its revision must not: a later one has to be higher
        n = _op(ops, n, REVISION, i, k, int(slot[START]), 0, int(slot[REV]))
    slot[LISTED], slot[DIRTY], slot[ANNOUNCE] = 1.0, 0.0, 0.0
    return n, pos


@compiled
def _write_marks(out: Bytes, pos: int, slots: Floats) -> int:
    """`[k,[mark]],[k,[mark]]`: the marks of one instrument's candles, k is the interval; or nothing."""
    first = pos
    for k in range(slots.shape[0]):
        for s in range(slots.shape[1]):
            if slots[k, s, START] == 0:
                continue
            if pos > first:
                out[pos] = 44  # ,
                pos += 1
            out[pos] = 91  # [
            pos = write_number(out, pos + 1, float(k))
            out[pos] = 44
            pos = _write_mark(out, pos + 1, slots[k, s])
            out[pos] = 93  # ]
            pos += 1
    return pos


@compiled
def collect(b: Tables, out: Bytes, ops: Ints) -> tuple[int, int]:
    """Write all changes since the last collect and mark them clean. Returns (operations, bytes)."""
    n = 0
    pos = 0
    for e in range(int(b.marks[EVICTED_SIZE])):  # in order of time, ahead of what is still in the slots
        n, pos = _settle(ops, n, out, pos, b.evicted[e, 2:], int(b.evicted[e, 0]), int(b.evicted[e, 1]), True)
    b.marks[EVICTED_SIZE] = 0
    for place in range(int(b.marks[DIRTY_SIZE])):
        i = b.dirty[place]
        for k in range(b.seconds.size):
            for s in range(b.slots.shape[2] - 1, -1, -1):
                slot = b.slots[i, k, s]
                if slot[START] == 0:
                    continue
                if slot[COMPLETE] != 0:
                    n, pos = _settle(ops, n, out, pos, slot, i, k, False)
                elif slot[DIRTY] != 0:
                    first = pos
                    pos = _write_row(out, pos, slot)
                    n = _op(ops, n, CURRENT, i, k, first, pos, 0)
                    b.in_current[i, k] = 1
                    slot[DIRTY] = 0.0
            if b.in_current[i, k] != 0 and b.slots[i, k, 0, COMPLETE] != 0:
                n = _op(ops, n, DROP, i, k, 0, 0, 0)
                b.in_current[i, k] = 0
        first = pos
        pos = _write_hot(out, pos, b.inst[i], b.ring[i])
        n = _op(ops, n, HOT, i, 0, first, pos, 0)
        if b.is_dirty[i] == 2:
            first = pos
            pos = _write_marks(out, pos, b.slots[i])
            if pos > first:
                n = _op(ops, n, MARKS, i, 0, first, pos, 0)
        b.is_dirty[i] = 0
    b.marks[DIRTY_SIZE] = 0
    return n, pos


EVICTED_WIDTH = 2 + SLOT_WIDTH
