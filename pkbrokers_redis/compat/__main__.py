"""`python -m pkbrokers_redis.compat`: print a PYTHONPATH for upstream's imports."""

from __future__ import annotations

import os

from pkbrokers_redis.compat import SHIM_FOLDER


def main() -> None:
    """Print the shim's folder, followed by what PYTHONPATH holds already."""
    present = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    print(os.pathsep.join(dict.fromkeys([str(SHIM_FOLDER), *present])))  # noqa: T201  it is for a shell


if __name__ == "__main__":
    main()
