"""The jobs worker: `python -m workers.jobs`, the same as `pkb jobs`."""

from __future__ import annotations

import sys

from pkbrokers_redis.jobs.worker import jobs
from pkbrokers_redis.runtime.roles import run_role

if __name__ == "__main__":
    sys.exit(run_role(jobs, sys.argv[1:]))
