"""Stream entries → ticks, a whole read decoded at once. What a foreign hand wrote is told and gives none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pkbrokers_redis.core.model import AT_MS, TickArray
from pkbrokers_redis.core.text import read_odd_ticks, read_tick_entries
from pkbrokers_redis.store.ids import is_count

EVIDENCE_BYTES = 120  # of bad input, in a log line


class Pending(NamedTuple):
    """One entry, read and not yet applied. `source` is empty where a foreign hand wrote it."""

    id: bytes
    source: bytes
    seq: int
    ticks: TickArray


class EntryDecoder:
    """Counts `odd_entries` and `odd_rows` in `counts`; `tell(event, place, **evidence)` hears of both."""

    def __init__(self, counts: dict[str, int], tell: Callable[..., None]) -> None:
        self._counts = counts
        self._tell = tell

    def decode(self, key: str, entries: Sequence[tuple[bytes, Any]]) -> list[Pending]:
        """The entries of one stream (`XREAD`'s: id and fields) in order."""
        heads: list[tuple[bytes, bytes, int, float]] = []
        texts: list[bytes] = []
        for entry_id, cells in entries:
            fields = fields_of(cells)
            source, seq, at = fields.get(b"src", b""), fields.get(b"seq", b""), fields.get(b"at", b"")
            text = fields.get(b"ticks")
            if text is None or not source or not is_count(seq):
                self._counts["odd_entries"] += 1
                evidence = repr(cells)[:EVIDENCE_BYTES]
                self._tell(
                    "foreign_entry", key, id=entry_id.decode(), lacks="src, seq or ticks", evidence=evidence
                )
                text, source, seq = b"[]", b"", b"0"
            texts.append(text)
            heads.append((entry_id, source, int(seq), float(at) if is_count(at) else 0.0))
        if not texts:
            return []
        ticks, counts, odd = read_tick_entries(texts)
        pending: list[Pending] = []
        first = 0
        for n, (entry_id, source, number, at_ms) in enumerate(heads):
            rows = ticks[first : first + counts[n]]
            first += counts[n]
            if n in odd:
                rows = self._salvage(key, entry_id, texts[n])
            rows[:, AT_MS] = at_ms
            pending.append(Pending(entry_id, source, number, rows))
        return pending

    def _salvage(self, key: str, entry_id: bytes, text: bytes) -> TickArray:
        """The rows of an entry that is not whole, as far as they are ticks."""
        rows, refused = read_odd_ticks(text)
        if refused:
            self._counts["odd_rows"] += refused
            evidence = repr(text[:EVIDENCE_BYTES])
            self._tell("odd_rows", key, id=entry_id.decode(), rows=refused, evidence=evidence)
        return rows


def fields_of(cells: Any) -> dict[bytes, bytes]:
    """The fields of a stream entry as a mapping, whichever way the client gave them."""
    if isinstance(cells, dict):
        return cells
    return dict(zip(cells[::2], cells[1::2], strict=False)) if cells else {}
