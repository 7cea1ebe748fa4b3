"""The ingest worker: `python -m workers.ingest`, the same as `pkb ingest`."""

from __future__ import annotations

import sys

from pkbrokers_redis.ingest.worker import run_ingest
from pkbrokers_redis.runtime.roles import run_role

if __name__ == "__main__":
    sys.exit(run_role(run_ingest, sys.argv[1:]))
