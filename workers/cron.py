"""The cron worker: `python -m workers.cron`, the same as `pkb cron`."""

from __future__ import annotations

import sys

from pkbrokers_redis.jobs.cron import cron
from pkbrokers_redis.runtime.roles import run_role

if __name__ == "__main__":
    sys.exit(run_role(cron, sys.argv[1:]))
