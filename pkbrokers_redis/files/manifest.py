"""`manifest.json`: what a folder of snapshots holds, so that a reader can check a file before it believes it.

    {"version": 1,
     "files": {"stock_data_20112026.pkl": {
         "sha256": "…", "bytes": 113123123, "rows": 2259000, "instruments": 9000, "kind": "pickle",
         "from": "2025-11-14", "to": "2026-11-20", "made_at": "2026-11-20T15:36:02+05:30",
         "position": {"0": "1795152605000-0", …}}}}

`position` is how far the store's aggregators were when the file was made: the cursor of each shard, an id of
its tick stream. Paths are relative to the folder. While files are being replaced a second table of entries
stands beside `files`, `coming`: what a kill leaves there counts where the file is that one.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.files.atomic import replacing, sha256_of

NAME = "manifest.json"
VERSION = 1
FILES_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One file. `from_` and `to` are the first and last moment (or date) in it, ISO."""

    sha256: str
    bytes: int
    rows: int
    instruments: int
    from_: str
    to: str
    made_at: str
    kind: str
    position: Mapping[str, str] = field(default_factory=dict)

    @property
    def made_at_ms(self) -> float | None:
        """`made_at` in epoch ms; None when it is no time."""
        try:
            return datetime.fromisoformat(self.made_at).timestamp() * 1000
        except ValueError:
            return None


Entries = dict[str, Entry]


def read_manifest(folder: Path) -> Entries:
    """File → entry; {} when there is no manifest. Raises InputFileError for a damaged one."""
    files, coming = _read(folder)
    return files | _arrived(folder, coming)


def parse_manifest(data: bytes) -> Entries:
    """The same from its text."""
    return _parse(data)[0]


def announce(folder: Path, coming: Mapping[str, Entry]) -> None:
    """Say what is about to take these files' places; `update_manifest` says that it has.

    In between, and for good after a kill there, an entry counts once its file is in place.
    """
    with _rewriting(folder) as (_, announced):
        announced.update(coming)


def update_manifest(folder: Path, changed: Mapping[str, Entry], gone: Iterable[str] = ()) -> None:
    """Put these entries in, take those out. Other writers wait their turn; a damaged file is begun anew."""
    with _rewriting(folder) as (files, announced):
        files.update(changed)
        for name in gone:
            files.pop(name, None)
            announced.pop(name, None)
        for name in changed:
            announced.pop(name, None)


def problems(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with the folder, a line each: files missing, shorter, or not what was written."""
    found: list[str] = []
    files = read_manifest(folder)
    for name in files if names is None else names:
        entry, path = files.get(name), folder / name
        if entry is None:
            found.append(f"{name} is not in the manifest")
        elif not path.exists():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry.bytes:
            found.append(f"{name} has {path.stat().st_size:,} bytes, not {entry.bytes:,}")
        elif sha256_of(path) != entry.sha256:
            found.append(f"{name} has another sha256")
    return found


def _read(folder: Path) -> tuple[Entries, Entries]:
    try:
        return _parse((folder / NAME).read_bytes())
    except FileNotFoundError:
        return {}, {}


def _parse(data: bytes) -> tuple[Entries, Entries]:
    """(files, what is coming)"""
    try:
        tree = msgspec.json.decode(data)
        tables: list[dict[str, Any]] = [tree["files"], tree.get("coming") or {}]
        if tree["version"] != VERSION or any(len(table) > FILES_MAX for table in tables):
            raise ValueError("another version")
        files, coming = (
            {_checked_name(name): _entry(told) for name, told in table.items()} for table in tables
        )
        return files, coming
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputFileError(
            f"{NAME} cannot be read ({str(error)[:80]})", "make the snapshots anew"
        ) from error


def _arrived(folder: Path, coming: Entries) -> Entries:
    """Those whose file is in place."""
    found: Entries = {}
    for name, entry in coming.items():
        path = folder / name
        try:
            if path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256:
                found[name] = entry
        except OSError:
            pass  # not there, or gone in this moment
    return found


def _entry(told: Mapping[str, Any]) -> Entry:
    position = told.get("position") or {}
    return Entry(
        sha256=str(told["sha256"]),
        bytes=int(told["bytes"]),
        rows=int(told["rows"]),
        instruments=int(told["instruments"]),
        from_=str(told["from"]),
        to=str(told["to"]),
        made_at=str(told["made_at"]),
        kind=str(told["kind"]),
        position={str(shard): str(stream_id) for shard, stream_id in position.items()},
    )


def _told(entry: Entry) -> dict[str, Any]:
    told = asdict(entry)
    return {"from" if name == "from_" else name: value for name, value in told.items()}


def _checked_name(name: str) -> str:
    """A path inside the folder, whatever the manifest of a stranger says."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not name or "\0" in name:
        raise ValueError(f"a path outside the folder: {name[:40]!r}")
    return name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time, also among processes; the lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{NAME}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _rewriting(folder: Path) -> Iterator[tuple[Entries, Entries]]:
    """(files, what is coming) to be changed in the block, then written."""
    with _locked(folder):
        try:
            files, coming = _read(folder)
        except InputFileError:
            files, coming = {}, {}
        for name, entry in _arrived(folder, coming).items():
            files[name] = entry
            del coming[name]
        yield files, coming
        tree: dict[str, Any] = {"version": VERSION, "files": _table(files)}
        if coming:
            tree["coming"] = _table(coming)
        with replacing(folder / NAME) as file:
            file.write(msgspec.json.format(msgspec.json.encode(tree), indent=1))


def _table(entries: Entries) -> dict[str, Any]:
    return {name: _told(entries[name]) for name in sorted(entries)}
