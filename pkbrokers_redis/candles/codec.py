"""JSON rows of numbers ⇄ float64 arrays, compiled: the text that everybody can read, at binary speed.

The streams, lists and hashes hold plain JSON (`[738561,1412.95,…]`), so redis-cli and any language
read them. This module writes and reads exactly that grammar, arrays of numbers and null, some thirty
times faster than a general JSON library can build Python objects. What it does not know (17-digit
mantissas, strings, nested objects) it reports instead of guessing, and the caller asks msgspec.

Kernels take and return byte positions, so that they compose: `pos = write_number(out, pos, x)`.
"""

from __future__ import annotations

import re
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

# What became of one entry of a batch.
ENTRY_OK, ENTRY_ODD = 0, 1


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

    NaN, and what is too large for any field of ours, writes null.
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
def write_flag(out: Bytes, pos: int, flag: int) -> int:
    """Write the ninth element of a candle row, `,"partial"` and its like; nothing for a whole candle."""
    if not 0 <= flag < _FLAG_SIZES.size:  # no code of ours, so not a whole candle of ours
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
                pos = write_number(out, pos, ticks[i, column])
                out[pos] = 44  # ,
                pos += 1
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
    """A JSON number or null at `pos` → (value, position behind it); position -1: not ours to read."""
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
        return 0.0, -1  # 1e5: nobody of ours writes it
    value = np.float64(mantissa) / _POW10[-exponent]
    return (-value if negative else value), pos


@compiled
def _read_flag(text: Bytes, pos: int, end: int) -> tuple[float, int]:
    """`"partial"` and its like at `pos` → (flag code, position behind it)."""
    for code in range(1, _FLAG_SIZES.size):
        size = int(_FLAG_SIZES[code]) - 1  # without the comma
        if pos + size <= end:
            same = True
            for k in range(size):
                if text[pos + k] != _FLAG_BYTES[code, k + 1]:
                    same = False
                    break
            if same:
                return float(code), pos + size
    return 0.0, -1


@compiled
def _read_row(text: Bytes, pos: int, end: int, least: int, width: int, row: Floats) -> int:
    """The numbers of one array, `pos` behind its `[` → position behind its `]`, or -1."""
    column = 0
    while True:
        while pos < end and text[pos] <= 32:
            pos += 1
        if pos >= end or column == width:
            return -1
        if text[pos] == 34:  # "
            if column < least:
                return -1
            row[column], pos = _read_flag(text, pos, end)
        else:
            row[column], pos = _read_number(text, pos, end)
        if pos < 0:
            return -1
        column += 1
        while pos < end and text[pos] <= 32:
            pos += 1
        if pos >= end:
            return -1
        if text[pos] == 44:
            pos += 1
        elif text[pos] == 93:
            if column < least:
                return -1
            for rest in range(column, width):
                row[rest] = 0.0
            return pos + 1
        else:
            return -1


@compiled
def _read_entries(
    text: Bytes, ends: Ints, least: int, width: int, nested: bool, out: Floats, counts: Ints, odd: Bytes
) -> int:
    """Entry e is text[ends[e-1]:ends[e]]: `[[row],[row]]` when nested, else rows one after the other.

    Fills out row by row, counts[e] and odd[e]; an odd entry gives no rows. Returns the rows in all.
    """
    n = 0
    pos = 0
    for entry in range(ends.size):
        end = ends[entry]
        first = n
        ok = True
        depth = 0
        closed = not nested
        wants_row = True  # rows of a nested entry are comma-separated, nothing else
        while pos < end:
            c = text[pos]
            if c <= 32:
                pos += 1
            elif c == 91:
                if nested and depth == 0 and not closed:
                    depth = 1
                    pos += 1
                    continue
                if (nested and (depth == 0 or not wants_row)) or n >= out.shape[0]:
                    ok = False
                    break
                pos = _read_row(text, pos + 1, end, least, width, out[n])
                if pos < 0:
                    ok = False
                    break
                n += 1
                wants_row = False
            elif c == 44 and (depth == 1 or not nested) and not (nested and wants_row):
                wants_row = True
                pos += 1
            elif c == 93 and nested and depth == 1 and not (wants_row and n > first):
                depth = 0
                closed = True
                pos += 1
            else:
                ok = False
                break
        if not ok or depth != 0 or not closed:
            odd[entry] = ENTRY_ODD
            n = first
        else:
            odd[entry] = ENTRY_OK
        counts[entry] = n - first
        pos = end
    return n


def read_tick_entries(texts: list[bytes]) -> tuple[Floats, list[int], list[int]]:
    """The `ticks` fields of many stream entries, decoded at once.

    Returns `(ticks, counts, odd)`: a float64[n, 10] batch with column AT_MS left unset, how many rows
    each entry gave, and the indices of entries that are not in our grammar (they gave no rows; ask
    `read_odd_ticks`).
    """
    joined = b"".join(texts)
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    ticks = np.empty((len(joined) // TICK_BYTES_MIN + 1, BATCH_WIDTH))
    counts = np.zeros(len(texts), np.int64)
    odd = np.zeros(len(texts), np.uint8)
    n = _read_entries(np.frombuffer(joined, np.uint8), ends, TICK_WIDTH, TICK_WIDTH, True, ticks, counts, odd)
    return ticks[:n], counts.tolist(), np.flatnonzero(odd).tolist()


_odd_decoder = msgspec.json.Decoder(list[Any])
_BETWEEN_ROWS = re.compile(rb"\]\s*\[")


def read_odd_ticks(text: bytes) -> tuple[Floats, int]:
    """What can be saved of an entry the fast reader refused: `(ticks, rows refused)`.

    A row counts when it is an array of nine numbers or nulls; text that is no JSON array at all
    gives nothing and counts one.
    """
    try:
        rows = _odd_decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return np.empty((0, BATCH_WIDTH)), 1
    good = [row for row in rows if _is_tick_row(row)]
    ticks = np.empty((len(good), BATCH_WIDTH))
    for i, row in enumerate(good):
        ticks[i, :TICK_WIDTH] = [np.nan if cell is None else float(cell) for cell in row]
    return ticks, len(rows) - len(good)


def _is_tick_row(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) == TICK_WIDTH
        and all(cell is None or (type(cell) in (int, float) and abs(cell) < 1e300) for cell in row)
    )


def read_rows(text: bytes, width: int, least: int | None = None) -> Floats:
    """JSON arrays of numbers, one after the other with commas or white space → float64[n, width].

    null reads as NaN. A row of fewer than `width` (but at least `least`) cells is filled with 0; the
    word in a candle row's ninth cell reads as its code in `model.FLAG_NAMES`. Raises ValueError for
    anything else.
    """
    least = width if least is None else least
    out = np.empty((text.count(b"[") + 1, width))
    counts = np.zeros(1, np.int64)
    odd = np.zeros(1, np.uint8)
    ends = np.array([len(text)], np.int64)
    n = _read_entries(np.frombuffer(text, np.uint8), ends, least, width, False, out, counts, odd)
    if odd[0]:
        return _read_odd_rows(text, width, least)
    return out[:n]


def _read_odd_rows(text: bytes, width: int, least: int) -> Floats:
    """`read_rows` for numbers the kernel leaves to msgspec (17 digits, exponents)."""
    joined = b"[" + _BETWEEN_ROWS.sub(b"],[", text) + b"]"
    try:
        rows = msgspec.json.decode(joined, type=list[list[float | str | None]])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a row of numbers: {error}") from None
    out = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        if not least <= len(row) <= width:
            raise ValueError(f"a row of {len(row)} cells where {width} are expected")
        for column, cell in enumerate(row):
            if isinstance(cell, str):
                if column < least or cell not in FLAG_NAMES:
                    raise ValueError(f"the word {cell[:20]!r} in a row of numbers")
                out[i, column] = FLAG_NAMES.index(cell)
            else:
                out[i, column] = np.nan if cell is None else cell
    return out
