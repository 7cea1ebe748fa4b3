"""The aggregate worker: `python -m workers.aggregate`, the same as `pkb aggregate`."""

from __future__ import annotations

import sys

from pkbrokers_redis.aggregate.worker import run_aggregate
from pkbrokers_redis.runtime.roles import run_role

if __name__ == "__main__":
    sys.exit(run_role(run_aggregate, sys.argv[1:]))
