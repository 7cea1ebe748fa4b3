"""What a batch changed, as text ready for Redis: the last compiled step before a commit.

`collect` visits the changed instruments once and writes every row and every stored state into one byte
buffer. An *operation* is six integers that say what to do with a piece of that text:

    (kind, instrument index, interval index, first byte, last byte + 1, rev)

    CURRENT        row of an open candle, for the hash `current`
    DROP           remove the interval from `current`
    PUT            row of a complete candle, for its list (appended, or replaced by start)
    CLOSED         row to announce on the stream `closed`, with its rev
    INST_STATE     what is known of the instrument, for `state`
    CANDLES_STATE  what its rows do not say about its recent candles, for `state`
    REVISION       a candle leaves memory; first byte is its start: remember its rev
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.arrays import Floats, Ints, ShardArrays
from pkbrokers_redis.candles.codec import FLAG_BYTES_MAX, NUMBER_BYTES_MAX, Bytes, write_cell, write_flag
from pkbrokers_redis.candles.compiled import compiled

CURRENT, DROP, PUT, CLOSED, INST_STATE, CANDLES_STATE, REVISION = range(7)
OP_WIDTH = 6

CELL_BYTES_MAX = NUMBER_BYTES_MAX + 1  # with its comma
ROW_BYTES_MAX = 8 * CELL_BYTES_MAX + FLAG_BYTES_MAX + 3
CANDLE_STATE_BYTES_MAX = 16 * CELL_BYTES_MAX
INST_STATE_BYTES_MAX = (col.WINDOW_SIZE + col.WINDOW_MAX * col.TICK_STATE_WIDTH) * CELL_BYTES_MAX + 96


class Changes(NamedTuple):
    """The changes of one commit: operations in order, and the text they refer to.

    `lists` are whole candle lists (instrument index, interval index, rows) that replace the stored ones
    before the operations apply.
    """

    ops: list[list[int]]
    text: bytes
    lists: Sequence[tuple[int, int, list[bytes]]] = ()


NO_CHANGES = Changes([], b"")


class Scratch:
    """The buffers `collect` writes into. The shards of one thread share it.

    It grows to the largest commit and stays: eight shards with buffers of their own would hold eight times
    as much.
    """

    def __init__(self) -> None:
        self._text = np.empty(0, np.uint8)
        self._ops = np.empty((0, OP_WIDTH), np.int64)

    def collect(self, shard: ShardArrays, dirty: int, evicted: int) -> Changes:
        """Return all changes of the shard since the last collect; the arrays count them as written."""
        intervals, depth = shard.candles.shape[1:3]
        ops_max = dirty * (intervals * (2 * depth + 1) + 2) + 3 * evicted
        candle_max = ROW_BYTES_MAX + CANDLE_STATE_BYTES_MAX
        text_max = dirty * (intervals * depth * candle_max + INST_STATE_BYTES_MAX) + evicted * ROW_BYTES_MAX
        if len(self._ops) < ops_max:
            self._ops = np.empty((ops_max, OP_WIDTH), np.int64)
        if len(self._text) < text_max + CELL_BYTES_MAX:
            self._text = np.empty(text_max + CELL_BYTES_MAX, np.uint8)
        n, size = collect(shard, self._text, self._ops)
        return Changes(self._ops[:n].tolist(), self._text[:size].tobytes())


@compiled
def _volume_of(candle: Floats) -> float:
    """Rule 1: the highest cumulative volume inside minus the highest before; 0 without volumes.

    A difference of decimals (crypto replays) is rounded to 8 places, the finest any venue quotes.
    """
    if candle[col.VOL_END] != candle[col.VOL_END]:
        return 0.0
    volume = candle[col.VOL_END] - candle[col.VOL_START]
    if volume != np.floor(volume):
        volume = np.rint(volume * 1e8) / 1e8
    return float(max(volume, 0.0))


@compiled
def _write_row(out: Bytes, pos: int, candle: Floats) -> int:
    """Write `[start,open,high,low,close,volume,oi,ticks]`, with the flag of a candle that is not whole."""
    out[pos] = 91  # [
    pos = write_cell(out, pos + 1, candle[col.START])
    for column in (col.OPEN, col.HIGH, col.LOW, col.CLOSE):
        pos = write_cell(out, pos, candle[column])
    pos = write_cell(out, pos, _volume_of(candle))
    pos = write_cell(out, pos, candle[col.OPEN_INTEREST])
    pos = write_cell(out, pos, candle[col.TICKS])
    pos = write_flag(out, pos - 1, int(candle[col.FLAG]))
    out[pos] = 93  # ]
    return pos + 1


@compiled
def _write_inst(out: Bytes, pos: int, inst: Floats, window: Floats) -> int:
    """Write `[first_at, …, off_session_volume, time,volume,price,day_high,day_low, …]`.

    The columns of `inst` before WINDOW_SIZE, then the recent ticks. Time and volume of the ticks after the
    newest are differences to it; another cell is null where it equals the newer tick's. A price that the
    volume makes unnecessary (see `rules._find_place`) is null, too.
    """
    out[pos] = 91
    pos += 1
    for column in range(col.FIRST_AT, col.WINDOW_SIZE):
        pos = write_cell(out, pos, inst[column])
    for j in range(int(inst[col.WINDOW_SIZE])):
        newer = max(j - 1, 0)
        has_volume = window[j, col.TICK_VOLUME] == window[j, col.TICK_VOLUME]
        for column in range(col.TICK_STATE_WIDTH):
            value = window[j, column]
            if j > 0:
                if column == col.TICK_TIME or column == col.TICK_VOLUME:
                    value = window[0, column] - value
                elif value == window[newer, column] or (column == col.TICK_PRICE and has_volume):
                    value = np.nan
            pos = write_cell(out, pos, value)
    out[pos - 1] = 93
    return pos


@compiled
def _write_candle_state(out: Bytes, pos: int, candle: Floats) -> int:
    """Write what a row does not say of its candle. A complete one repeats its row: it may be amended.

    `[start,vol_start,flag,open_time-start,open_volume-vol_start]` while it is open, followed by
    `rev,open,high,low,close,vol_end,oi,ticks,close_time-start,close_volume-vol_start` once it is complete.
    """
    start_ms = candle[col.START] * 1000
    zero = 0.0 if candle[col.VOL_START] != candle[col.VOL_START] else candle[col.VOL_START]
    out[pos] = 91
    pos = write_cell(out, pos + 1, candle[col.START])
    pos = write_cell(out, pos, candle[col.VOL_START])
    pos = write_cell(out, pos, candle[col.FLAG])
    pos = write_cell(out, pos, candle[col.OPEN_TIME] - start_ms)
    pos = write_cell(out, pos, candle[col.OPEN_VOLUME] - zero)
    if candle[col.COMPLETE] != 0:
        for column in (
            col.REV, col.OPEN, col.HIGH, col.LOW, col.CLOSE, col.VOL_END, col.OPEN_INTEREST, col.TICKS,
        ):  # fmt: skip
            pos = write_cell(out, pos, candle[column])
        pos = write_cell(out, pos, candle[col.CLOSE_TIME] - start_ms)
        pos = write_cell(out, pos, candle[col.CLOSE_VOLUME] - zero)
    out[pos - 1] = 93
    return pos


@compiled
def _write_candles(out: Bytes, pos: int, candles: Floats) -> int:
    """Write `[k,[state]],[k,[state]]`, the state of one instrument's recent candles; k is the interval."""
    first = pos
    for k in range(candles.shape[0]):
        for s in range(candles.shape[1]):
            if candles[k, s, col.START] == 0:
                continue
            if pos > first:
                out[pos] = 44
                pos += 1
            out[pos] = 91
            pos = write_cell(out, pos + 1, float(k))
            pos = _write_candle_state(out, pos, candles[k, s])
            out[pos] = 93
            pos += 1
    return pos


@compiled
def _op(ops: Ints, n: int, kind: int, i: int, k: int, first: int, last: int, rev: int) -> int:
    """Append one operation."""
    ops[n, 0], ops[n, 1], ops[n, 2], ops[n, 3], ops[n, 4], ops[n, 5] = kind, i, k, first, last, rev
    return n + 1


@compiled
def _collect_complete(
    ops: Ints, n: int, out: Bytes, pos: int, candle: Floats, i: int, k: int, leaves: bool
) -> tuple[int, int]:
    """Rules 4 to 6: list a complete candle; announce it when it is due (rev 0) or was amended (rev + 1)."""
    amended = candle[col.DIRTY] != 0 and candle[col.REV] >= 0 and candle[col.ANNOUNCE] == 0
    if amended:
        candle[col.REV] += 1
    elif leaves and candle[col.REV] < 0:
        candle[col.REV] = 0.0
        candle[col.ANNOUNCE] = 1.0
    put = candle[col.DIRTY] != 0 or candle[col.LISTED] == 0
    announce = amended or candle[col.ANNOUNCE] != 0
    if put or announce:
        first = pos
        pos = _write_row(out, pos, candle)
        if put:
            n = _op(ops, n, PUT, i, k, first, pos, 0)
        if announce:
            n = _op(ops, n, CLOSED, i, k, first, pos, int(candle[col.REV]))
    if leaves and candle[col.REV] > 0:  # a later revision of the evicted candle has to be higher
        n = _op(ops, n, REVISION, i, k, int(candle[col.START]), 0, int(candle[col.REV]))
    candle[col.LISTED], candle[col.DIRTY], candle[col.ANNOUNCE] = 1.0, 0.0, 0.0
    return n, pos


@compiled
def _collect_interval(
    ops: Ints, n: int, out: Bytes, pos: int, candles: Floats, in_current: Ints, i: int, k: int
) -> tuple[int, int]:
    """Write the changed candles of one instrument and interval, oldest first."""
    for s in range(candles.shape[2] - 1, -1, -1):
        candle = candles[i, k, s]
        if candle[col.START] == 0:
            continue
        if candle[col.COMPLETE] != 0:
            n, pos = _collect_complete(ops, n, out, pos, candle, i, k, False)
        elif candle[col.DIRTY] != 0:
            first = pos
            pos = _write_row(out, pos, candle)
            n = _op(ops, n, CURRENT, i, k, first, pos, 0)
            in_current[i, k] = 1
            candle[col.DIRTY] = 0.0
    if in_current[i, k] != 0 and candles[i, k, 0, col.COMPLETE] != 0:
        n = _op(ops, n, DROP, i, k, 0, 0, 0)
        in_current[i, k] = 0
    return n, pos


@compiled
def collect(shard: ShardArrays, out: Bytes, ops: Ints) -> tuple[int, int]:
    """Write all changes since the last collect and mark them clean. Return (operations, bytes)."""
    n = 0
    pos = 0
    candles, in_current, evicted = shard.candles, shard.in_current, shard.evicted
    for e in range(int(shard.scalars[col.EVICTED_SIZE])):  # they are older than what is in `candles`
        i, k = int(evicted[e, 0]), int(evicted[e, 1])
        n, pos = _collect_complete(ops, n, out, pos, evicted[e, 2:], i, k, True)
    shard.scalars[col.EVICTED_SIZE] = 0
    for place in range(int(shard.scalars[col.DIRTY_SIZE])):
        i = shard.dirty[place]
        for k in range(shard.seconds.size):
            n, pos = _collect_interval(ops, n, out, pos, candles, in_current, i, k)
        first = pos
        pos = _write_inst(out, pos, shard.inst[i], shard.window[i])
        n = _op(ops, n, INST_STATE, i, 0, first, pos, 0)
        if shard.is_dirty[i] == 2:
            first = pos
            pos = _write_candles(out, pos, candles[i])
            if pos > first:
                n = _op(ops, n, CANDLES_STATE, i, 0, first, pos, 0)
        shard.is_dirty[i] = 0
    shard.scalars[col.DIRTY_SIZE] = 0
    return n, pos
