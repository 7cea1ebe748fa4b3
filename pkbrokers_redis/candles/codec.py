"""JSON rows of numbers ⇄ float64 arrays, compiled: the text that everybody can read, at binary speed.

The streams, lists and hashes hold plain JSON (`[738561,1412.95,…]`), so redis-cli and any language
read them. This module writes and reads exactly that grammar, arrays of numbers and null, some thirty
times faster than a general JSON library can build Python objects. What it does not know (17-digit
mantissas, strings, nested objects) it reports instead of guessing, and the caller asks msgspec.

Kernels take and return byte positions, so that they compose: `pos = write_number(out, pos, x)`.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.compiled import compiled
from pkbrokers_redis.candles.model import BATCH_WIDTH, FLAG_NAMES, FLAG_PARTIAL, TICK_WIDTH

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
