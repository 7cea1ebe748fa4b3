"""The whole table: `make bench`, `pkb bench`, `python -m benchmarks.table [--quick] [--json]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import end_to_end, kernels, latency, memory_and_bulk
from benchmarks.harness import Row, machine


def rows(quick: bool = False, tell: Callable[[str], None] = lambda what: None) -> list[Row]:
    """Every row. `quick` is a tenth of the ticks, for a first look."""
    found: list[Row] = []
    for what, work in (
        ("the parts alone", kernels.run),
        ("end to end, as fast as it goes", lambda: end_to_end.run(500_000 if quick else 5_000_000)),
        ("latency at 9,000 ticks/s", lambda: latency.run(5.0 if quick else 30.0)),
        ("memory and bulk reads", memory_and_bulk.run),
    ):
        tell(what)
        found += work()
    return found


def main(quick: bool = False, as_json: bool = False) -> int:
    """Measure and print; 1 when a goal was missed."""
    state = machine()
    console = Console(stderr=True)
    found = rows(quick, lambda what: console.print(f"measuring {what} …", style="dim"))
    if as_json:
        print(msgspec.json.encode({"machine": state, "rows": [asdict(row) for row in found]}).decode())
    else:
        table = Table(box=box.SIMPLE_HEAD, title=state, title_justify="left")
        for name in ("what", "measured", "reference in the same run", "ratio", "goal"):
            table.add_column(name, overflow="fold")
        for row in found:
            met = "" if row.met is None else (" ✓" if row.met else " ✗")
            table.add_row(row.name, row.figure, row.reference, row.ratio, row.goal + met)
        Console(width=None if sys.stdout.isatty() else 180).print(table)
    return int(any(row.met is False for row in found))


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv, "--json" in sys.argv))
