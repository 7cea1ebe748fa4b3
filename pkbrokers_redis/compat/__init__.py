"""Upstream's import paths on Redis: PKDevTools, PKScreener and scripts find live data unchanged.

In a program, first of all imports:

    import pkbrokers_redis.compat

For a program and all its child processes, without a line of code:

    export PYTHONPATH="$(python -m pkbrokers_redis.compat)"
"""

from __future__ import annotations

from pkbrokers_redis.compat.import_finder import SHIM_FOLDER, install

__all__ = ["SHIM_FOLDER", "install"]

install()
