"""The cron worker: `python -m workers.cron`, the same as `pkb cron`."""

from __future__ import annotations

import sys

from pkbrokers_redis.jobs.cron import cron
from pkbrokers_redis.runtime import roles

if __name__ == "__main__":
    sys.exit(roles.main(cron, sys.argv[1:]))
