"""The web worker: `python -m workers.web`, the same as `pkb web`."""

from __future__ import annotations

import sys

from pkbrokers_redis.runtime.roles import run_role
from pkbrokers_redis.web.runner import serve

if __name__ == "__main__":
    sys.exit(run_role(serve, sys.argv[1:]))
