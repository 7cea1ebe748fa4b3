"""The ingest worker: `python -m workers.ingest`, the same as `pkb ingest`."""

from __future__ import annotations

import sys

from pkbrokers_redis.runtime import roles

if __name__ == "__main__":
    sys.exit(roles.main(roles.ingest, sys.argv[1:]))
