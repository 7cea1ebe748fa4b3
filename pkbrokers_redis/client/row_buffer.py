"""The last candle rows of one instrument and interval, in one array whose newest rows are contiguous.

    rows    [ dropped | begin … completed … end ) current | room … ]     float64[capacity, 8]
                        └─ at most `keep` ──────┘

Rows are appended into the room. When the room is used up, the kept rows move to a new array. So a view of
the last n rows needs no copy, and a view that a caller still holds does not change: only the candle being
formed and an amended row change under it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.model import CANDLE_FIELDS

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.int8]

WIDTH = len(CANDLE_FIELDS)
ROOM_ROWS_MIN = 8  # rows beyond `keep`: a larger room moves the rows less often and costs memory
ROOM_SHARE = 4  # a fourth of `keep`, if that is more

NO_ROWS: Floats = np.empty((0, WIDTH))
NO_FLAGS: Flags = np.empty(0, np.int8)


class RowBuffer:
    """Completed rows `begin` to `end`, and at `end` the candle being formed if `has_current`.

    `version` rises with each change. `current_at` is when the current candle was last read, on the monotonic
    clock (-inf for never). `tail_start` is the start of the current candle whose predecessors were last read.
    """

    __slots__ = (
        "begin",
        "current_at",
        "end",
        "flags",
        "has_current",
        "keep",
        "rows",
        "tail_start",
        "version",
    )

    def __init__(self, keep: int, rows: Floats = NO_ROWS, flags: Flags | None = None) -> None:
        self.keep = keep
        self.version = 0
        self.has_current = False
        self.current_at = -math.inf
        self.tail_start = 0.0
        self.begin = self.end = 0
        self.rows, self.flags = NO_ROWS, NO_FLAGS
        count = min(len(rows), keep)
        if count:
            self._move(count)
            self.rows[:count] = rows[len(rows) - count :]
            if flags is not None:
                self.flags[:count] = flags[len(rows) - count :]
            self.end = count

    def view(self, count: int, include_current: bool = False) -> Floats:
        """Return the last rows, at most `count`, without a copy."""
        end = self.end + (include_current and self.has_current)
        return self.rows[max(self.begin, end - count) : end]

    def view_flags(self, count: int, include_current: bool = False) -> Flags:
        """Return the flags (index into FLAG_NAMES) of the rows of `view`."""
        end = self.end + (include_current and self.has_current)
        return self.flags[max(self.begin, end - count) : end]

    @property
    def last_start(self) -> float:
        """Start of the newest completed row, 0 without one."""
        return float(self.rows[self.end - 1, 0]) if self.end > self.begin else 0.0

    def add(self, row: Floats, flag: int) -> None:
        """Append a completed row, replace the one with the same start, or insert it between two rows."""
        start = row[0]
        if start > self.last_start:
            self._append(row, flag)
        else:
            index = self.begin + int(np.searchsorted(self.rows[self.begin : self.end, 0], start))
            if self.rows[index, 0] == start:
                self.rows[index], self.flags[index] = row, flag
            elif self.end - self.begin < self.keep or index > self.begin:
                self._insert(index, row, flag)
            else:
                return  # older than all rows kept
        self.version += 1

    def set_current(self, row: Floats | None, flag: int = 0) -> bool:
        """Set the candle being formed (None for no candle); return whether its predecessors are unread.

        A current candle that has a successor stays as a completed row until its announcement replaces it.
        """
        before = float(self.rows[self.end, 0]) if self.has_current else 0.0
        start = 0.0 if row is None else float(row[0])
        if self.has_current and start != before:
            self.has_current = False
            if start > before or row is None:
                self._complete()
        if row is not None and start > self.last_start:
            if before != start or not np.array_equal(self.rows[self.end], row):
                self._make_room(1)
                self.rows[self.end], self.flags[self.end] = row, flag
                self.version += 1
            self.has_current = True
        if before != start:
            self.version += 1
        is_unread = start != self.tail_start
        self.tail_start = start
        return is_unread

    def _append(self, row: Floats, flag: int) -> None:
        current = self.rows[self.end].copy() if self.has_current else None
        current_flag = int(self.flags[self.end]) if self.has_current else 0
        self._make_room(2)
        self.rows[self.end], self.flags[self.end] = row, flag
        self._complete()
        self.has_current = current is not None and current[0] > row[0]
        if current is not None and self.has_current:
            self.rows[self.end], self.flags[self.end] = current, current_flag

    def _complete(self) -> None:
        """Count the row at `end` as completed."""
        self.end += 1
        self.begin = max(self.begin, self.end - self.keep)

    def _insert(self, index: int, row: Floats, flag: int) -> None:
        """Insert between two rows, in a new array: rows must not shift under a reader's view."""
        index -= self.begin
        self._move(1)
        stop = self.end + self.has_current
        self.rows[index + 1 : stop + 1] = self.rows[index:stop].copy()
        self.flags[index + 1 : stop + 1] = self.flags[index:stop].copy()
        self.rows[index], self.flags[index] = row, flag
        self._complete()

    def _make_room(self, rows: int) -> None:
        if self.end + rows > len(self.rows):
            self._move(rows)

    def _move(self, more: int) -> None:
        """Move the kept rows to a new array with room for `more`; a view may still show the old one."""
        kept = self.rows[self.begin : self.end + self.has_current]
        kept_flags = self.flags[self.begin : self.end + self.has_current]
        room = min(max(ROOM_ROWS_MIN, self.keep // ROOM_SHARE), self.keep + ROOM_ROWS_MIN)
        size = len(kept) + more + room
        self.rows, self.flags = np.empty((size, WIDTH)), np.zeros(size, np.int8)
        self.rows[: len(kept)], self.flags[: len(kept)] = kept, kept_flags
        self.begin, self.end = 0, self.end - self.begin
