"""The web worker: `python -m workers.web`, the same as `pkb web`."""

from __future__ import annotations

import sys

from pkbrokers_redis.runtime import roles
from pkbrokers_redis.web.runner import serve

if __name__ == "__main__":
    sys.exit(roles.main(serve, sys.argv[1:]))
