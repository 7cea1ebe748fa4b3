"""`python -m pkbrokers_redis.compat`: what to put into PYTHONPATH, with what is in it already."""

from __future__ import annotations

import os

from pkbrokers_redis.compat import SHIM_FOLDER


def main() -> None:
    """Print it."""
    there = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    print(os.pathsep.join(dict.fromkeys([str(SHIM_FOLDER), *there])))  # noqa: T201  it is for a shell


if __name__ == "__main__":
    main()
