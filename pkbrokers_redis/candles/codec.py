"""State ⇄ text, compiled: tick rows and candle rows as JSON, and the changes of a commit.

**Rows.** The streams, lists and hashes hold plain JSON (`[738561,1412.95,…]`), so redis-cli and any language
read them. This module writes and reads exactly that grammar, arrays of numbers and null, some thirty times
faster than a general JSON library can build Python objects. Text outside it (17-digit mantissas, strings,
nested objects) is reported, and the caller asks msgspec. Kernels take and return byte positions, so that
they compose: `pos = write_number(out, pos, x)`.

**Changes.** `collect` visits the changed instruments once and writes every row and every stored state into
one byte buffer. An *operation* is six integers that say what to do with a piece of that text:

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
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles import columns as col
from pkbrokers_redis.candles.compiled import compiled
from pkbrokers_redis.candles.model import BATCH_WIDTH, FLAG_NAMES, FLAG_PARTIAL, TICK_WIDTH

if TYPE_CHECKING:
    from pkbrokers_redis.candles.state import ShardArrays

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


NUMBER_BYTES_MAX = 22  # "-9007199254740991.5" and room
TICK_BYTES_MAX = TICK_WIDTH * (NUMBER_BYTES_MAX + 1) + 3
TICK_BYTES_MIN = 2 * TICK_WIDTH + 2  # "[1,1,1,1,1,1,1,1,1]" and its comma
DECIMALS_MAX = 12
EXACT_MAX = 2.0**53
WHOLE_MAX = 9e18  # what an int64 holds

_POW10 = np.array([10.0**k for k in range(23)])  # exact in float64 up to 10²²

# A candle row's ninth element with its comma, by flag code: `,"partial"`; nothing for a whole candle.
_FLAG_ELEMENTS = [f',"{name}"'.encode() if name else b"" for name in FLAG_NAMES]
_FLAG_SIZES = np.array([len(element) for element in _FLAG_ELEMENTS])
FLAG_BYTES_MAX = int(_FLAG_SIZES.max())
_FLAG_BYTES = np.array([list(element.ljust(FLAG_BYTES_MAX)) for element in _FLAG_ELEMENTS], np.uint8)


@compiled
def write_int(out: Bytes, pos: int, value: int) -> int:
    """Write a whole number in decimal."""
    if value < 0:
        out[pos] = 45  # -
        pos += 1
        value = -value
    first = pos
    while True:
        out[pos] = 48 + value % 10
        pos += 1
        value //= 10
        if value == 0:
            break
    last = pos - 1
    while first < last:
        out[first], out[last] = out[last], out[first]
        first += 1
        last -= 1
    return pos


@compiled
def write_number(out: Bytes, pos: int, value: float) -> int:
    """Write the shortest decimal of at most 12 places that reads back as `value`.

    NaN, and what is too large for any field, writes null.
    """
    if not (-WHOLE_MAX < value < WHOLE_MAX):
        out[pos], out[pos + 1], out[pos + 2], out[pos + 3] = 110, 117, 108, 108
        return pos + 4
    whole = int(value)
    if whole == value:
        return int(write_int(out, pos, whole))
    if value < 0:
        out[pos] = 45
        pos += 1
        value = -value
    decimals = 1
    scaled = np.rint(value * 10.0)
    while scaled / _POW10[decimals] != value and decimals < DECIMALS_MAX and scaled < WHOLE_MAX / 10.0:
        decimals += 1
        scaled = np.rint(value * _POW10[decimals])
    digits = int(scaled)
    unit = int(_POW10[decimals])
    pos = write_int(out, pos, digits // unit)
    fraction = digits % unit
    while decimals > 1 and fraction % 10 == 0:  # only after giving up at 12 places
        fraction //= 10
        decimals -= 1
    out[pos] = 46  # .
    pos += 1
    for place in range(decimals - 1, -1, -1):
        out[pos + place] = 48 + fraction % 10
        fraction //= 10
    return pos + decimals


@compiled
def write_cell(out: Bytes, pos: int, value: float) -> int:
    """Write a number and a comma."""
    pos = write_number(out, pos, value)
    out[pos] = 44  # ,
    return pos + 1


@compiled
def write_flag(out: Bytes, pos: int, flag: int) -> int:
    """Write the ninth element of a candle row, `,"partial"` and its like; nothing for a whole candle."""
    if not 0 <= flag < _FLAG_SIZES.size:  # an unknown code, so not a whole candle
        flag = FLAG_PARTIAL
    size = int(_FLAG_SIZES[flag])
    for k in range(size):
        out[pos + k] = _FLAG_BYTES[flag, k]
    return pos + size


@compiled
def _write_ticks(ticks: Floats, shards: int, out: Bytes, bounds: Ints, counts: Ints) -> None:
    """Each shard's rows as `[[…],[…]]` one after the other; shard s lies in bounds[s]:bounds[s+1]."""
    n = ticks.shape[0]
    shard_of = np.empty(n, np.int64)
    counts[:] = 0
    for i in range(n):
        shard_of[i] = (np.int64(ticks[i, 0]) >> 8) % shards
        counts[shard_of[i]] += 1
    order = np.empty(n, np.int64)
    place = np.zeros(shards, np.int64)
    for shard in range(1, shards):
        place[shard] = place[shard - 1] + counts[shard - 1]
    for i in range(n):
        order[place[shard_of[i]]] = i
        place[shard_of[i]] += 1
    pos = 0
    k = 0
    for shard in range(shards):
        bounds[shard] = pos
        if counts[shard] == 0:
            continue
        out[pos] = 91  # [
        pos += 1
        for _ in range(counts[shard]):
            i = order[k]
            k += 1
            out[pos] = 91
            pos += 1
            for column in range(TICK_WIDTH):
                pos = write_cell(out, pos, ticks[i, column])
            out[pos - 1] = 93  # ]
            out[pos] = 44
            pos += 1
        out[pos - 1] = 93
    bounds[shards] = pos


def tick_texts(ticks: Floats, shards: int) -> list[tuple[int, int, bytes]]:
    """A batch float64[n, ≥9] → `(shard, n, JSON array of tick rows)` for each shard that has any.

    Rows keep their order. Tokens must be whole numbers.
    """
    out = np.empty(len(ticks) * TICK_BYTES_MAX + 2 * shards, np.uint8)
    bounds = np.empty(shards + 1, np.int64)
    counts = np.empty(shards, np.int64)
    _write_ticks(ticks, shards, out, bounds, counts)
    edges = bounds.tolist()
    text = out[: edges[-1]].tobytes()
    return [(s, n, text[edges[s] : edges[s + 1]]) for s, n in enumerate(counts.tolist()) if n]


@compiled
def _read_number(text: Bytes, pos: int, end: int) -> tuple[float, int]:
    """Read a JSON number or null at `pos`; return (value, next position), -1 for no number."""
    if text[pos] == 110:  # n
        if pos + 4 <= end and text[pos + 1] == 117 and text[pos + 2] == 108 and text[pos + 3] == 108:
            return np.nan, pos + 4
        return 0.0, -1
    negative = text[pos] == 45
    if negative:
        pos += 1
    first = pos
    mantissa = np.int64(0)
    exponent = 0
    digits = 0
    while pos < end and 48 <= text[pos] <= 57:
        mantissa = mantissa * 10 + (text[pos] - 48)
        pos += 1
        digits += 1
    if digits == 0 or (digits > 1 and text[first] == 48):
        return 0.0, -1
    if pos < end and text[pos] == 46:
        pos += 1
        first = pos
        while pos < end and 48 <= text[pos] <= 57:
            mantissa = mantissa * 10 + (text[pos] - 48)
            pos += 1
            digits += 1
        exponent = first - pos
        if exponent == 0:
            return 0.0, -1
    if digits > 18 or mantissa > EXACT_MAX or exponent < -22:
        return 0.0, -1  # more digits than a float64 holds for sure: msgspec rounds them right
    if pos < end and (text[pos] == 101 or text[pos] == 69):
        return 0.0, -1  # 1e5: no producer of this package writes it
    value = np.float64(mantissa) / _POW10[-exponent]
    return (-value if negative else value), pos


@compiled
def _read_row(text: Bytes, pos: int, end: int, row: Floats) -> int:
    """Read the nine cells of one row, `pos` after its `[`; return the position after its `]`, or -1."""
    for column in range(TICK_WIDTH):
        pos = _skip_space(text, pos, end)
        if pos >= end:
            return -1
        row[column], pos = _read_number(text, pos, end)
        if pos < 0:
            return -1
        pos = _skip_space(text, pos, end)
        if pos >= end or text[pos] != (93 if column == TICK_WIDTH - 1 else 44):  # ] ,
            return -1
        pos += 1
    return pos


@compiled
def _skip_space(text: Bytes, pos: int, end: int) -> int:
    while pos < end and text[pos] <= 32:
        pos += 1
    return pos


@compiled
def _read_entry(text: Bytes, pos: int, end: int, out: Floats, first: int) -> int:
    """Read `[[row],[row]]` into out[first:]; return the row after the last one, or -1."""
    n = first
    pos = _skip_space(text, pos, end)
    if pos >= end or text[pos] != 91:  # [
        return -1
    pos = _skip_space(text, pos + 1, end)
    if pos < end and text[pos] == 93:  # an empty array
        return n if _skip_space(text, pos + 1, end) == end else -1
    while True:
        if pos >= end or text[pos] != 91 or n >= out.shape[0]:
            return -1
        pos = _read_row(text, pos + 1, end, out[n])
        if pos < 0:
            return -1
        n += 1
        pos = _skip_space(text, pos, end)
        if pos >= end:
            return -1
        if text[pos] == 93:
            return n if _skip_space(text, pos + 1, end) == end else -1
        if text[pos] != 44:
            return -1
        pos = _skip_space(text, pos + 1, end)


@compiled
def _read_entries(text: Bytes, ends: Ints, out: Floats, counts: Ints, malformed: Bytes) -> int:
    """Read entry e from text[ends[e-1]:ends[e]] into the next rows of `out`; return the rows in all.

    Fills counts[e] and malformed[e]; a malformed entry gives no rows.
    """
    n = 0
    pos = 0
    for entry in range(ends.size):
        last = _read_entry(text, pos, ends[entry], out, n)
        malformed[entry] = 1 if last < 0 else 0
        counts[entry] = 0 if last < 0 else last - n
        n += counts[entry]
        pos = ends[entry]
    return n


def read_tick_entries(texts: list[bytes]) -> tuple[Floats, list[int], list[int]]:
    """Decode the `ticks` fields of many stream entries at once.

    Returns:
        A float64[n, 10] batch whose column AT_MS is not set, how many rows each entry gave, and the indices
        of the entries that are not in this module's grammar: they gave no rows, see `recover_ticks`.
    """
    joined = b"".join(texts)
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    ticks = np.empty((len(joined) // TICK_BYTES_MIN + 1, BATCH_WIDTH))
    counts = np.zeros(len(texts), np.int64)
    malformed = np.zeros(len(texts), np.uint8)
    n = _read_entries(np.frombuffer(joined, np.uint8), ends, ticks, counts, malformed)
    return ticks[:n], counts.tolist(), np.flatnonzero(malformed).tolist()


_decoder = msgspec.json.Decoder(list[Any])


def recover_ticks(text: bytes) -> tuple[Floats, int]:
    """Read what is valid in an entry that `read_tick_entries` found malformed.

    A row is valid when it is an array of nine numbers or nulls. Text that is no JSON array gives no rows
    and counts as one invalid row.

    Returns:
        The valid rows as a float64[n, 10] batch, and the number of invalid rows.
    """
    try:
        rows = _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return np.empty((0, BATCH_WIDTH)), 1
    valid = [row for row in rows if _is_tick_row(row)]
    ticks = np.empty((len(valid), BATCH_WIDTH))
    for i, row in enumerate(valid):
        ticks[i, :TICK_WIDTH] = [np.nan if cell is None else float(cell) for cell in row]
    return ticks, len(rows) - len(valid)


def _is_tick_row(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) == TICK_WIDTH
        and all(cell is None or (type(cell) in (int, float) and abs(cell) < 1e300) for cell in row)
    )


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
