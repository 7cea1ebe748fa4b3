"""A long job in slices: it works for a while, steps back behind the others, and comes again.

So a warm start of 3,000 instruments (twenty minutes at three requests a second) does not hold up the repair
of an outage, a run needs no timeout of hours, and a stop or a crash costs one part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from rq import Retry, get_current_job

from pkbrokers_redis.jobs.progress import Figures, Progress, add_up

SLICE_SECONDS = 30.0
RUNS_MAX = 100_000  # of one job; more slices than any list of instruments needs

Work = Callable[[str], Figures]


def run_parts(
    progress: Progress,
    parts: Iterable[str],
    work: Work,
    *,
    seconds_max: float | None = SLICE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Figures | None:
    """Do what is left of `parts`; the figures of all, or None when the slice was over first.

    `work` does one part and returns its counts. At least one part is done in each slice; with `seconds_max`
    None all of them are.
    """
    left = progress.begin(parts)
    finished = progress.figures()
    total = len(finished) + len(left)
    began = clock()
    for number, part in enumerate(left):
        if number and seconds_max is not None and clock() - began >= seconds_max:
            return None
        finished[part] = work(part)
        progress.note(part, finished[part], len(finished), total)
    return add_up(finished.values())


def come_again(after_seconds: float = 0.0) -> Retry:
    """What a job returns to be run again: behind what waits now, or after so many seconds."""
    return Retry(max=RUNS_MAX, interval=max(0, round(after_seconds + 0.499)))


def current_job_id(otherwise: str) -> str:
    """The id of the RQ job we are; `otherwise` outside of a worker."""
    job = get_current_job()
    return otherwise if job is None else job.id
