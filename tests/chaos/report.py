"""What a chaos run came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pkbrokers_redis.candles.model import CANDLE_FIELDS


@dataclass
class Report:
    """What happened, and what it came to. `ok` is the verdict."""

    seed: int
    seconds: float
    faults: Counter[str] = field(default_factory=Counter)
    entries: int = 0
    repeated_entries: int = 0
    ticks: int = 0
    rows: int = 0
    rows_different: int = 0
    rows_in_outages: int = 0  # marked `gap`, else as they should be
    losses: int = 0  # times of which news never arrived
    notices: int = 0  # of outages, from ingest
    repairs_unseen: int = 0  # trimmed before the recorder came; then the flags cannot be judged
    outages_wrong: list[str] = field(default_factory=list)  # untold losses, unfounded notices, wrong flags
    announced: int = 0
    announced_twice: int = 0
    announced_differently: int = 0
    columns_different: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No row differs, no candle is announced twice, exactly the outages are reported and flagged."""
        wrong = self.rows_different or self.announced_twice or self.announced_differently
        return not (wrong or self.outages_wrong) and self.rows > 0


def difference(rows: list[list[Any] | None]) -> str:
    """Which columns differ, and from what: `oracle ticks`."""
    row_read = rows[0]
    words = []
    for name, row in zip(("oracle", "calm"), rows[1:], strict=True):
        if row_read is None or row is None:
            words.append(f"{name} missing" if row is None else "row missing in the pipeline")
        else:
            columns = (n for n, (a, b) in enumerate(zip(row_read, row, strict=False)) if a != b)
            words += [f"{name} {(*CANDLE_FIELDS, 'flag')[n]}" for n in columns]
    return ", ".join(words)
