"""`compiled`: numba's njit for the kernels of the core, with a cache that knows all their sources.

numba keeps what it compiled for a function until that function's own file changes. The kernels call each
other across files and share the columns of `candles/arrays.py`: after an update one of them would go on with
another's old rules, or with old columns, and write past an array. So the cache's folder is named after all of
the core's sources.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import platformdirs

OLD_FOLDERS_MAX = 4  # of other versions and edits, 3 MB each

_config: Any = numba.config
_SOURCES = Path(__file__).parent
_F = TypeVar("_F", bound=Callable[..., object])


def _find_folder() -> str:
    """In NUMBA_CACHE_DIR, else beside the sources as Python's own cache, else in the user's; "": nowhere."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.glob("*.py")):
        digest.update(path.read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    bases = [_SOURCES / "__pycache__", platformdirs.user_cache_path("pkbrokers-redis")]
    for base in [Path(_config.CACHE_DIR)] if _config.CACHE_DIR else bases:
        found = base / name
        try:
            found.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(found, os.W_OK):
            others = sorted((each for each in base.glob("kernels-*") if each != found), key=_changed_at)
            for old in others[:-OLD_FOLDERS_MAX]:
                shutil.rmtree(old, ignore_errors=True)
            return str(found)
    return ""


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # another process removes it, too


folder = _find_folder()


def compiled(function: _F) -> _F:
    """Compile at the first call, or take it from the cache; left as it is with NUMBA_DISABLE_JIT=1."""
    theirs, _config.CACHE_DIR = _config.CACHE_DIR, folder
    try:
        return cast("_F", numba.njit(cache=bool(folder), error_model="numpy")(function))
    finally:
        _config.CACHE_DIR = theirs  # for other users of numba in this process
