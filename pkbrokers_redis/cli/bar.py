"""A progress bar on a terminal, for commands that take longer than a moment."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from pkbrokers_redis.jobs.progress import Listener


@contextlib.contextmanager
def bar(*, hidden: bool) -> Iterator[Listener | None]:
    """What hears of finished parts and draws them; None where nobody looks."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task("", total=None)
        yield lambda done, total, part: drawn.update(task, completed=done, total=total, description=part)
