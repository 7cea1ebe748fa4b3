"""`pkb bench`: the benchmark table, measured here and now."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pkbrokers_redis.cli.output import AsJson
from pkbrokers_redis.errors import PkbError


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="a tenth of the work, for a first look")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure throughput, latency, memory and bulk reads on this machine, each beside a reference.

    Takes about two minutes. The benchmarks lie beside the package in a checkout (`benchmarks/`).
    """
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "table.py").exists():
        raise PkbError(
            "the benchmarks are not part of an installed package", "run it from a checkout: make bench"
        )
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    table = importlib.import_module("benchmarks.table")
    raise typer.Exit(table.main(quick, as_json))
