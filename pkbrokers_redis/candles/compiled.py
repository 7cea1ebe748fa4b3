"""`compiled`, `internal`, `inlined`: numba's njit, with a cache that depends on all kernels.

numba keeps the compiled form of a function until that function's own file changes. The kernels call each
other across files and share the columns of `columns.py`: after an update, one of them could run with
another's old rules, or with old columns, and write beyond an array. So the cache's folder is named after the
contents of all files of this package.

A power cut, a full disk or a copied image can truncate a cache file, and the process that loads it aborts. So
`seal` records the checksums of complete files, and files without a matching one are removed before they load.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import platformdirs

SEALS = "seals.json"  # in the folder: file → CRC-32
UNSEALED_SECONDS = 300.0  # another process may still be compiling
OLD_FOLDERS_MAX = 4  # kept of other versions and edits, 3 MB each

_config: Any = numba.config
_SOURCES = Path(__file__).parent
_F = TypeVar("_F", bound=Callable[..., object])


def _find_folder() -> str:
    """Return a folder in NUMBA_CACHE_DIR, `__pycache__` or the user's cache; "" if none is writable."""
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
            older = sorted((path for path in base.glob("kernels-*") if path != found), key=_changed_at)
            for path in older[:-OLD_FOLDERS_MAX]:
                shutil.rmtree(path, ignore_errors=True)
            return str(found)
    return ""


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # another process removes it at the same time


def _checksums() -> dict[str, int]:
    """Return file → CRC-32 of the cache's files."""
    found: dict[str, int] = {}
    for path in Path(folder).rglob("*.nb[ci]") if folder else ():
        try:
            found[path.relative_to(folder).as_posix()] = zlib.crc32(path.read_bytes())
        except OSError:
            continue  # another process removed it
    return found


def _remove_damaged() -> int:
    """Remove the cache's files that do not have their sealed checksum; return how many there were."""
    try:
        seals = dict(json.loads((Path(folder) / SEALS).read_bytes()))
    except (OSError, ValueError, TypeError):
        seals = {}
    damaged = 0
    for name, crc in _checksums().items():
        path = Path(folder) / name
        is_being_made = name not in seals and time.time() - _changed_at(path) < UNSEALED_SECONDS
        if seals.get(name) != crc and not is_being_made:
            path.unlink(missing_ok=True)
            damaged += 1
    return damaged


def seal() -> None:
    """Record the checksums of the cache's files, which are complete now; also at the end of a process."""
    checksums = _checksums()
    if checksums == _sealed:
        return
    new = Path(folder) / f"{SEALS}.{os.getpid()}"
    try:
        new.write_text(json.dumps(checksums))
        new.replace(Path(folder) / SEALS)
        _sealed.clear()
        _sealed.update(checksums)
    except OSError:
        new.unlink(missing_ok=True)  # a full disk: the files are compiled again next time


folder = _find_folder()
removed = _remove_damaged()  # cache files found damaged
_sealed = _checksums()
atexit.register(seal)


def compiled(function: _F) -> _F:
    """Compile a kernel that Python calls, at its first call; load it from the cache if it is there.

    With NUMBA_DISABLE_JIT=1 the function stays as it is.
    """
    users, _config.CACHE_DIR = _config.CACHE_DIR, folder
    try:
        return cast("_F", numba.njit(cache=bool(folder), error_model="numpy")(function))
    finally:
        _config.CACHE_DIR = users  # for other users of numba in this process


def internal(function: _F) -> _F:
    """Compile a kernel that only other kernels call: without a wrapper for Python, as part of its callers."""
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast("_F", numba.njit(error_model="numpy", **options)(function))


def inlined(function: _F) -> _F:
    """Compile a kernel and insert its machine code into its callers: for those that run for every tick."""
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}
    return cast("_F", numba.njit(error_model="numpy", **options)(function))
