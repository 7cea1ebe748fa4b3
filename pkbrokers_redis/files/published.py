"""Sources of candles, and the published files that some of them read.

    class Mine(Source):
        name = "mine"

        def is_available(self) -> bool: ...
        def fetch_data(self, symbols, start_date, end_date) -> Frames: ...

A source needs a row in `compat.sources.SOURCES`. Published files come from PKB_FILES_URL: a folder on a web
server, a branch on GitHub, or a path. If the folder has a `manifest.json`, a file must match its sha256.
"""

from __future__ import annotations

import email.utils
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import requests

from pkbrokers_redis.errors import InputFileError
from pkbrokers_redis.files.frames import Frames
from pkbrokers_redis.files.manifest import NAME as MANIFEST
from pkbrokers_redis.files.manifest import parse_manifest
from pkbrokers_redis.settings import Settings

if TYPE_CHECKING:
    from pkbrokers_redis.client.store import CandleStore


@dataclass
class Context:
    """The tools of sources. `now_ms` returns market time; `store` opens the store, or raises."""

    settings: Settings
    folder: Path
    now_ms: Callable[[], float]
    store: Callable[[], CandleStore]
    names: dict[str, Path] = field(default_factory=dict)


class Source(ABC):
    """A place that day candles come from. Its exceptions are the reason why it is skipped."""

    name: ClassVar[str]
    has_history: ClassVar[bool] = True  # False: only the current day
    is_remote: ClassVar[bool] = False  # True: used only for symbols that no local source has

    def __init__(self, context: Context) -> None:
        self.context = context
        self.reason = ""  # one line: why it is not available, or what it left out
        self.refused = 0  # entries that were no candles

    @abstractmethod
    def is_available(self) -> bool:
        """Return whether the source can be read now, without reading it; set `reason` if not."""

    @abstractmethod
    def fetch_data(self, symbols: Sequence[str] | None, start_date: date, end_date: date) -> Frames:
        """Return symbol → frame (`files.frames`) of the days from `start_date` to `end_date`, both included.

        `symbols` None means all symbols of the source. Unknown symbols are left out.
        """

    def as_of_ms(self) -> float | None:
        """Return the time of its data, market time in epoch ms; None means the time of its newest row."""
        return None

    def close(self) -> None:  # noqa: B027 - most sources hold nothing open
        """Release connections and files."""


TIMEOUT_SECONDS = (5.0, 60.0)  # to connect, between two chunks
CHUNK_BYTES = 1 << 20
MANIFEST_BYTES_MAX = 4 << 20
RAW_GITHUB = "https://raw.githubusercontent.com"


class Fetched(NamedTuple):
    """A file's bytes and the time of its writing in epoch ms, None if unknown."""

    data: bytes
    written_ms: float | None


def folder_of(settings: Settings) -> str | None:
    """Return the folder of the published files: PKB_FILES_URL, else the sync target on GitHub."""
    if settings.files_url:
        return settings.files_url.rstrip("/")
    if settings.github_repo and not settings.github_url:
        parts = (RAW_GITHUB, settings.github_repo, settings.github_branch, settings.github_path)
        return "/".join(part.strip("/") if part is not RAW_GITHUB else part for part in parts).rstrip("/")
    return None


def fetch(folder: str, name: str, bytes_max: int) -> Fetched | None:
    """Return a file of the folder, or None if it does not exist.

    Raises:
        InputFileError: It is too large, differs from its manifest entry, or cannot be fetched.
    """
    fetched = _get(folder, name, bytes_max)
    if fetched is None:
        return None
    listed = _get(folder, MANIFEST, MANIFEST_BYTES_MAX)
    if listed is not None:
        entry = parse_manifest(listed.data).get(name)
        if entry is not None and entry.sha256 != hashlib.sha256(fetched.data).hexdigest():
            raise InputFileError(
                f"{name} differs from its manifest entry", "it may be half written; try again"
            )
        if entry is not None:
            return Fetched(fetched.data, entry.made_at_ms)
    return fetched


def _get(folder: str, name: str, bytes_max: int) -> Fetched | None:
    if "://" not in folder or folder.startswith("file://"):
        path = Path(folder.removeprefix("file://")).expanduser() / name
        if not path.exists():
            return None
        if path.stat().st_size > bytes_max:
            raise _too_large(name, bytes_max)
        return Fetched(path.read_bytes(), path.stat().st_mtime * 1000)
    try:
        with requests.get(f"{folder}/{name}", timeout=TIMEOUT_SECONDS, stream=True) as response:
            if response.status_code == 404:
                return None
            response.raise_for_status()
            chunks, size = [], 0
            for chunk in response.iter_content(CHUNK_BYTES):
                chunks.append(chunk)
                size += len(chunk)
                if size > bytes_max:
                    raise _too_large(name, bytes_max)
            return Fetched(b"".join(chunks), _date_ms(response.headers.get("Last-Modified")))
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        reason = f"HTTP {status}" if status else type(error).__name__
        raise InputFileError(f"cannot fetch {name} ({reason})", "check PKB_FILES_URL") from error


def _date_ms(text: str | None) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() * 1000 if text else None
    except ValueError:
        return None


def _too_large(name: str, bytes_max: int) -> InputFileError:
    return InputFileError(f"{name} is larger than {bytes_max >> 20} MB", "publish it in parts")


class Published(Source):
    """A source of published files."""

    is_remote = True

    def is_available(self) -> bool:
        if folder_of(self.context.settings):
            return True
        self.reason = "PKB_FILES_URL is not set"
        return False
