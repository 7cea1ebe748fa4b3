"""`manifest.json`: the files of a folder of snapshots with their hashes, so that a reader can check a file.

    {"version": 1,
     "files": {"stock_data_20112026.pkl": {
         "sha256": "…", "bytes": 113123123, "rows": 2259000, "instruments": 9000, "kind": "pickle",
         "from": "2025-11-14", "to": "2026-11-20", "made_at": "2026-11-20T15:36:02+05:30",
         "position": {"0": "1795152605000-0", …}}}}

`position` is the aggregators' position when the file was made: the cursor of each shard, an id of its tick
stream. Paths are relative to the folder. Entries of files that are being replaced are listed under `coming`.
After a crash such an entry is valid if the file on disk matches its hash.
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
    """One file. `from_` and `to` are its first and last moment (or date), ISO."""

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
        """Return `made_at` in epoch ms, or None if it is no time."""
        try:
            return datetime.fromisoformat(self.made_at).timestamp() * 1000
        except ValueError:
            return None


Entries = dict[str, Entry]


def read_manifest(folder: Path) -> Entries:
    """Return file → entry, {} if there is no manifest. Raise InputFileError if it is damaged."""
    files, coming = _read(folder)
    return files | _in_place(folder, coming)


def parse_manifest(data: bytes) -> Entries:
    """Return the entries of a manifest's text. Raise InputFileError if it is damaged."""
    return _parse(data)[0]


def encode_manifest(entries: Mapping[str, Entry], coming: Mapping[str, Entry] | None = None) -> bytes:
    """Return the text of a manifest."""
    tree: dict[str, Any] = {"version": VERSION, "files": _table(entries)}
    if coming:
        tree["coming"] = _table(coming)
    return msgspec.json.format(msgspec.json.encode(tree), indent=1)


def announce(folder: Path, coming: Mapping[str, Entry]) -> None:
    """List files under `coming` that are about to be renamed; call `update_manifest` after the rename."""
    with _rewriting(folder) as (_, announced):
        announced.update(coming)


def update_manifest(folder: Path, changed: Mapping[str, Entry], removed: Iterable[str] = ()) -> None:
    """Add or replace entries, and remove others. Concurrent writers wait; a damaged manifest is replaced."""
    with _rewriting(folder) as (files, announced):
        files.update(changed)
        for name in removed:
            files.pop(name, None)
            announced.pop(name, None)
        for name in changed:
            announced.pop(name, None)


def problems(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Return a line for each file that is missing, or differs from its entry in size or hash."""
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
    """Return (files, coming)."""
    try:
        tree = msgspec.json.decode(data)
        tables: list[dict[str, Any]] = [tree["files"], tree.get("coming") or {}]
        if tree["version"] != VERSION or any(len(table) > FILES_MAX for table in tables):
            raise ValueError("another version")
        files, coming = (
            {_checked_name(name): _entry(fields) for name, fields in table.items()} for table in tables
        )
        return files, coming
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputFileError(
            f"{NAME} cannot be read ({str(error)[:80]})", "write the snapshots again"
        ) from error


def _in_place(folder: Path, coming: Entries) -> Entries:
    """Return the entries whose file is in place."""
    found: Entries = {}
    for name, entry in coming.items():
        path = folder / name
        try:
            if path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256:
                found[name] = entry
        except OSError:
            pass  # missing, or deleted meanwhile
    return found


def _entry(fields: Mapping[str, Any]) -> Entry:
    position = fields.get("position") or {}
    return Entry(
        sha256=str(fields["sha256"]),
        bytes=int(fields["bytes"]),
        rows=int(fields["rows"]),
        instruments=int(fields["instruments"]),
        from_=str(fields["from"]),
        to=str(fields["to"]),
        made_at=str(fields["made_at"]),
        kind=str(fields["kind"]),
        position={str(shard): str(stream_id) for shard, stream_id in position.items()},
    )


def _checked_name(name: str) -> str:
    """Return the name if it is a path inside the folder: a manifest can come from anywhere."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not name or "\0" in name:
        raise ValueError(f"a path outside the folder: {name[:40]!r}")
    return name


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the manifest's lock, also against other processes; it ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{NAME}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _rewriting(folder: Path) -> Iterator[tuple[Entries, Entries]]:
    """Yield (files, coming) to be changed in the block, then write them."""
    with _locked(folder):
        try:
            files, coming = _read(folder)
        except InputFileError:
            files, coming = {}, {}
        for name, entry in _in_place(folder, coming).items():
            files[name] = entry
            del coming[name]
        yield files, coming
        with replacing(folder / NAME) as file:
            file.write(encode_manifest(files, coming))


def _table(entries: Mapping[str, Entry]) -> dict[str, Any]:
    table = {}
    for name in sorted(entries):
        fields = asdict(entries[name])
        table[name] = {"from" if key == "from_" else key: value for key, value in fields.items()}
    return table
