"""Stream ids, `<ms>-<n>`, in a module of their own: what only compares them must not wait for a compiler."""

from __future__ import annotations


def id_order(entry_id: str) -> tuple[int, int]:
    """A stream id as numbers, to compare it."""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq or 0)
