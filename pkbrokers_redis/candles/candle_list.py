"""A candle list as its rows' texts, for the rare work that amends rows which have left the book's slots.

What a foreign hand put between our rows stays where it is. Texts are parsed only when they are looked at.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping

import msgspec

from pkbrokers_redis.candles.model import FLAG_GAP, FLAG_NAMES, FLAG_PARTIAL

Row = list[float | int | str | None]
START, OPEN, HIGH, LOW, CLOSE, VOLUME, OI, TICKS, FLAG = range(9)
START_DIGITS_MAX = 18

_decoder = msgspec.json.Decoder(list[float | int | str | None])
_UNREPAIRED = tuple(b'"%s"]' % FLAG_NAMES[flag].encode() for flag in (FLAG_PARTIAL, FLAG_GAP))


def start_of(text: bytes) -> int | None:
    """The start of a row's text, epoch seconds; None for what is no row."""
    start = text[1 : text.find(b",")]
    return int(start) if start.isdigit() and len(start) <= START_DIGITS_MAX else None


def parse_row(text: bytes) -> Row | None:
    """A row's cells; None for what is no row of ours."""
    try:
        row = _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if len(row) < 8 or not isinstance(row[START], int):
        return None
    return row if all(isinstance(cell, int | float) for cell in (*row[OPEN:OI], row[TICKS])) else None


def row_text(row: Row) -> bytes:
    """A row as the kernels write it: whole numbers without a point."""
    return msgspec.json.encode(
        [int(cell) if isinstance(cell, float) and cell == int(cell) else cell for cell in row]
    )


def number(cell: float | int | str | None) -> float:
    """A cell as a number; 0 for what is none."""
    return float(cell) if isinstance(cell, int | float) else 0.0


def flag_name(row: Row) -> str:
    """`partial`, `gap`, `backfilled`, or "" for a whole candle."""
    return str(row[FLAG]) if len(row) > FLAG else ""


class RowList:
    """The rows of one instrument and interval, oldest first, at most `keep`.

    `changed` are the starts whose text is not what Redis has, in the order of the changes.
    """

    def __init__(self, texts: Iterable[bytes], keep: int) -> None:
        self.keep = keep
        self.changed: dict[int, None] = {}
        self._texts: dict[int, bytes] = {}
        self._parsed: dict[int, Row | None] = {}
        self._foreign: dict[int, list[bytes]] = {}  # behind the row of that start; 0: ahead of all
        last = 0
        for text in texts:
            start = start_of(text)
            if not start:
                self._foreign.setdefault(last, []).append(text)
            else:
                self._texts[start] = text
                last = start
        self._starts = sorted(self._texts)

    def __len__(self) -> int:
        return len(self._starts) + sum(map(len, self._foreign.values()))

    @property
    def forgot_s(self) -> int:
        """Rows that began before this may have been dropped; 0 while the list is not full."""
        return self._starts[0] if self._starts and len(self) >= self.keep else 0

    def get(self, start: int) -> Row | None:
        """The row of that start (not to be changed), if there is one that can be read."""
        if start not in self._parsed:
            text = self._texts.get(start)
            self._parsed[start] = None if text is None else parse_row(text)
        return self._parsed[start]

    def text(self, start: int) -> bytes:
        """The text of the row of that start."""
        return self._texts[start]

    def between(self, from_s: int, to_s: int) -> dict[int, Row]:
        """The rows that begin in [from_s, to_s), by start, ascending (not to be changed)."""
        first, last = bisect_left(self._starts, from_s), bisect_left(self._starts, to_s)
        found = ((start, self.get(start)) for start in self._starts[first:last])
        return {start: row for start, row in found if row is not None}

    def unrepaired(self, from_s: int, to_s: int) -> list[int]:
        """Starts in [from_s, to_s) of the rows that are marked partial or gap."""
        first, last = bisect_left(self._starts, from_s), bisect_left(self._starts, to_s)
        return [start for start in self._starts[first:last] if self._texts[start].endswith(_UNREPAIRED)]

    def put(self, row: Row) -> bool:
        """Replace or insert a row by its start; False when it is older than a full list reaches."""
        start = int(number(row[START]))
        if start not in self._texts:
            if start < self.forgot_s:
                return False
            insort(self._starts, start)
        self._texts[start], self._parsed[start] = row_text(row), row
        self.changed[start] = None
        while len(self) > self.keep and len(self._starts) > 1:
            oldest = self._starts.pop(0)
            del self._texts[oldest]
            self._parsed.pop(oldest, None)
            self._foreign.pop(oldest, None)
            self.changed.pop(oldest, None)
        return True

    def texts(self) -> list[bytes]:
        """The whole list."""
        whole = list(self._foreign.get(0, ()))
        for start in self._starts:
            whole.append(self._texts[start])
            whole += self._foreign.get(start, ())
        return whole


Lists = Mapping[int, RowList]  # interval index → rows of one instrument
