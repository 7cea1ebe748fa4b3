"""The last candles of one instrument and interval, in one array whose newest rows are always contiguous.

        rows    [ gone | begin … completed … end ) current | room … ]     float64[capacity, 8]
                        └─ at most `keep` ──────┘

Rows are appended into the room; when it is used up, the rows that are kept move to a new array. So a view of
the last n rows needs no copy, and a view that somebody still holds goes on showing what it showed: only the
candle that forms changes under it, and a row that is amended.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.core.model import CANDLE_FIELDS

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.int8]

WIDTH = len(CANDLE_FIELDS)
ROOM_MIN = 8  # rows beyond `keep`: how often the rows move, against memory
ROOM_SHARE = 4  # … or a fourth of them, whichever is more


class Ring:
    """Completed rows `begin` to `end`, and the candle that forms at `end` where there is one."""

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

    def __init__(self, keep: int, rows: Floats | None = None, flags: Flags | None = None) -> None:
        self.keep = keep
        self.version = 0  # raised by each change
        self.has_current = False
        self.current_at = 0.0  # when `current` was last asked for, monotonic seconds
        self.tail_start = 0.0  # start of the current candle whose predecessors were looked at
        self.begin = self.end = 0
        self.rows = np.empty((0, WIDTH))
        self.flags = np.empty(0, np.int8)
        if rows is not None and len(rows):
            count = min(len(rows), keep)
            self._grow(count)
            self.rows[:count] = rows[len(rows) - count :]
            if flags is not None:
                self.flags[:count] = flags[len(rows) - count :]
            self.end = count

    def view(self, count: int, include_current: bool = False) -> Floats:
        """The last rows, at most `count`, without copying; the current one is among them if asked."""
        end = self.end + (include_current and self.has_current)
        return self.rows[max(self.begin, end - count) : end]

    def view_flags(self, count: int, include_current: bool = False) -> Flags:
        """The flags (index into FLAG_NAMES) of the rows of `view`."""
        end = self.end + (include_current and self.has_current)
        return self.flags[max(self.begin, end - count) : end]

    @property
    def last_start(self) -> float:
        """Start of the newest completed row, 0 without one."""
        return float(self.rows[self.end - 1, 0]) if self.end > self.begin else 0.0

    def put(self, row: Floats, flag: int) -> None:
        """A completed row: behind the others, over the one of the same start, or between two."""
        start = row[0]
        if start > self.last_start:
            current = self.rows[self.end].copy() if self.has_current else None
            current_flag = int(self.flags[self.end]) if self.has_current else 0
            self._make_room(2)
            self.rows[self.end], self.flags[self.end] = row, flag
            self.end += 1
            self.begin = max(self.begin, self.end - self.keep)
            self.has_current = current is not None and current[0] > start
            if current is not None and self.has_current:
                self.rows[self.end], self.flags[self.end] = current, current_flag
        else:
            place = self.begin + int(np.searchsorted(self.rows[self.begin : self.end, 0], start))
            if self.rows[place, 0] == start:
                self.rows[place], self.flags[place] = row, flag
            elif self.end - self.begin < self.keep or place > self.begin:
                self._insert(place, row, flag)
            else:
                return  # older than all that is kept
        self.version += 1

    def set_current(self, row: Floats | None, flag: int = 0) -> bool:
        """The candle that forms, None for none. True: it is another candle than before.

        One that was there and is no longer stays as a completed row, until its announcement says better.
        """
        before = float(self.rows[self.end, 0]) if self.has_current else 0.0
        start = 0.0 if row is None else float(row[0])
        if self.has_current and start != before:
            self.has_current = False
            if start > before or row is None:
                self.end += 1
                self.begin = max(self.begin, self.end - self.keep)
        if row is not None and start > self.last_start:
            if before != start or not np.array_equal(self.rows[self.end], row):
                self._make_room(1)
                self.rows[self.end], self.flags[self.end] = row, flag
                self.version += 1
            self.has_current = True
        if before != start:
            self.version += 1
        return start != self.tail_start

    def _make_room(self, rows: int) -> None:
        if self.end + rows > len(self.rows):
            self._grow(rows)

    def _grow(self, more: int) -> None:
        """Move to a new array: the old one may be looked at."""
        kept = self.rows[self.begin : self.end + self.has_current]
        kept_flags = self.flags[self.begin : self.end + self.has_current]
        size = len(kept) + more + min(max(ROOM_MIN, self.keep // ROOM_SHARE), self.keep + ROOM_MIN)
        self.rows, self.flags = np.empty((size, WIDTH)), np.zeros(size, np.int8)
        self.rows[: len(kept)], self.flags[: len(kept)] = kept, kept_flags
        self.begin, self.end = 0, self.end - self.begin

    def _insert(self, place: int, row: Floats, flag: int) -> None:
        """Between two rows: a repaired one. In a new array, too: rows must not shift under a reader."""
        place -= self.begin
        self._grow(1)
        stop = self.end + self.has_current
        self.rows[place + 1 : stop + 1] = self.rows[place:stop].copy()
        self.flags[place + 1 : stop + 1] = self.flags[place:stop].copy()
        self.rows[place], self.flags[place] = row, flag
        self.end += 1
        self.begin = max(self.begin, self.end - self.keep)
