"""Upstream's import paths on Redis: PKDevTools, PKScreener and scripts find live data without a change.

    import pkbrokers_redis.compat                       # first; then `import pkbrokers.kite.…` finds ours

or, with no line of code, for a program and all its children:

    export PYTHONPATH="$(python -m pkbrokers_redis.compat)"
"""

from __future__ import annotations

from pkbrokers_redis.compat.finder import SHIM_FOLDER, install

__all__ = ["SHIM_FOLDER", "install"]

install()
