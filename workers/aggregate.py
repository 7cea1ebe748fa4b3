"""The aggregate worker: `python -m workers.aggregate`, the same as `pkb aggregate`."""

from __future__ import annotations

import sys

from pkbrokers_redis.runtime import roles

if __name__ == "__main__":
    sys.exit(roles.main(roles.aggregate, sys.argv[1:]))
