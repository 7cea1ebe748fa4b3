"""The last candle rows of one instrument and interval: completed rows, then the candle being formed.

Every change makes new arrays. So a view needs no copy when it is read, and never changes afterwards.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pkbrokers_redis.candles.model import CANDLE_FIELDS

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.int8]

WIDTH = len(CANDLE_FIELDS)
NO_ROWS: Floats = np.empty((0, WIDTH))
NO_FLAGS: Flags = np.empty(0, np.int8)


class RowBuffer:
    """At most `keep` completed rows, and behind them the candle being formed, if there is one.

    Readers need no lock: rows, flags and whether the last row is being formed are replaced together.
    `version` rises with each change. `current_at` is when the current candle was last read, on the monotonic
    clock (-inf for never). `tail_start` is the start of the current candle whose predecessors were last read.
    """

    __slots__ = ("_state", "current_at", "keep", "tail_start", "version")

    def __init__(self, keep: int, rows: Floats = NO_ROWS, flags: Flags | None = None) -> None:
        self.keep = keep
        self.version = 0
        self.current_at = -math.inf
        self.tail_start = 0.0
        first = max(len(rows) - keep, 0)
        kept = rows[first:].copy()
        self._state = kept, np.zeros(len(kept), np.int8) if flags is None else flags[first:].copy(), False

    def view(self, count: int, include_current: bool = False) -> Floats:
        """Return the last rows, at most `count`, without a copy."""
        rows, _, has_current = self._state
        end = len(rows) - (has_current and not include_current)
        return rows[max(end - count, 0) : end]

    def view_flags(self, count: int, include_current: bool = False) -> Flags:
        """Return the flags (index into FLAG_NAMES) of the rows of `view`."""
        _, flags, has_current = self._state
        end = len(flags) - (has_current and not include_current)
        return flags[max(end - count, 0) : end]

    @property
    def size_bytes(self) -> int:
        """Return the memory of the rows."""
        return self._state[0].nbytes

    def add(self, row: Floats, flag: int) -> None:
        """Append a completed row, replace the one with the same start, or insert it between two rows."""
        rows, flags, has_current = self._state
        end = len(rows) - has_current
        index = int(np.searchsorted(rows[:end, 0], row[0]))
        is_replaced = index < end and rows[index, 0] == row[0]
        if not is_replaced and index == 0 and end >= self.keep:
            return  # older than all rows kept
        if has_current and rows[end, 0] <= row[0]:  # the row is the current candle's last state, or later
            rows, flags, has_current = rows[:end], flags[:end], False
        self._replace(*_splice(rows, flags, index, index + is_replaced, row, flag), has_current)

    def set_current(self, row: Floats | None, flag: int = 0) -> bool:
        """Set the candle being formed (None for no candle); return whether its predecessors are unread.

        A current candle that has a successor stays as a completed row until its announcement replaces it.
        """
        rows, flags, has_current = self._state
        end = len(rows) - has_current
        before = float(rows[end, 0]) if has_current else 0.0
        start = 0.0 if row is None else float(row[0])
        if has_current and start != before:
            end += row is None or start > before
            rows, flags, has_current = rows[:end], flags[:end], False
            self._replace(rows, flags, False)
        is_newest = start > (rows[end - 1, 0] if end else 0.0)
        if row is not None and is_newest and not (has_current and np.array_equal(rows[end], row)):
            self._replace(*_splice(rows, flags, end, end + has_current, row, flag), True)
        is_unread = start != self.tail_start
        self.tail_start = start
        return is_unread

    def _replace(self, rows: Floats, flags: Flags, has_current: bool) -> None:
        """Set the state, without the oldest rows beyond `keep`."""
        dropped = max(len(rows) - has_current - self.keep, 0)
        self._state = rows[dropped:], flags[dropped:], has_current
        self.version += 1


def _splice(
    rows: Floats, flags: Flags, start: int, stop: int, row: Floats, flag: int
) -> tuple[Floats, Flags]:
    """Return new arrays with one row in place of rows `start` to `stop`."""
    return (
        np.concatenate((rows[:start], row[None], rows[stop:])),
        np.concatenate((flags[:start], np.array([flag], np.int8), flags[stop:])),
    )
