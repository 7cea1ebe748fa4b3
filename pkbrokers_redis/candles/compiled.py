"""`compiled`, `internal` and their inlined forms: numba's njit, with a cache that depends on all kernels.

numba keeps the compiled form of a function until that function's own file changes. The kernels call each
other across files and share the columns of `columns.py`: after an update, one of them could run with
another's old rules, or with old columns, and write beyond an array. So the cache's folder is named after the
contents of all files of this package.

A power cut, a full disk or a copied image can truncate a cache file. numba loads it unchecked, and the
process aborts. So damaged files are removed first, and compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import platformdirs

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
    bases = [_SOURCES / "__pycache__"]
    with contextlib.suppress(RuntimeError):  # a user without a home
        bases.append(platformdirs.user_cache_path("pkbrokers-redis"))
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


def _remove_damaged() -> int:
    """Remove the cache's files that are no whole pickles, numba's form; return how many there were."""
    damaged = 0
    for path in Path(folder).rglob("*.nb[ci]") if folder else ():
        try:
            is_whole = _is_whole(path.read_bytes())
            if not is_whole:
                path.unlink()
                damaged += 1
        except OSError:
            continue  # another process removes it at the same time
    return damaged


class _Anything:
    """Stands for every object in a pickle: nothing of the file runs."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _Skimmer(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        return _Anything


def _is_whole(data: bytes) -> bool:
    """Return whether the data are pickles from the first byte to the last."""
    stream = io.BytesIO(data)
    try:
        while stream.tell() < len(data):
            _Skimmer(stream).load()
    except Exception:  # pickle raises nearly anything for damaged data
        return False
    return len(data) > 0


folder = _find_folder()
removed = _remove_damaged()  # how many cache files were damaged


def compiled(function: _F) -> _F:
    """Compile a kernel that Python calls, at its first call; load it from the cache if it is there.

    With NUMBA_DISABLE_JIT=1 the function stays as it is.
    """
    return _compile(function)


def compiled_inlined(function: _F) -> _F:
    """Compile a kernel that Python calls, and insert its machine code into the kernels that call it.

    A call copies the arguments, and a `ShardArrays` has 1.3 KB: too much for what runs for every tick.
    """
    return _compile(function, forceinline=True)


def _compile(function: _F, *, forceinline: bool = False) -> _F:
    users, _config.CACHE_DIR = _config.CACHE_DIR, folder
    try:
        options: dict[str, Any] = {"cache": bool(folder), "forceinline": forceinline}
        return cast("_F", numba.njit(error_model="numpy", **options)(function))
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
