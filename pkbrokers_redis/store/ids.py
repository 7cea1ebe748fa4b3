"""Stream ids, `<ms>-<n>`, and counters, as Redis holds them: as text.

In a module of their own: what only compares them must not wait for a compiler.
"""

from __future__ import annotations


def id_order(entry_id: str) -> tuple[int, int]:
    """A stream id as numbers, to compare it."""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq or 0)


def is_count(text: bytes) -> bool:
    """Whether a field, which a foreign hand may have written, holds a whole number of 18 digits at most."""
    return text.isdigit() and len(text) <= 18
