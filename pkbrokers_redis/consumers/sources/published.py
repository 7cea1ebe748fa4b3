"""Published files, fetched from PKB_FILES_URL: a folder on a web server, a branch on GitHub, or a path.

Where the folder has a `manifest.json`, what is fetched must have the sha256 it names.
"""

from __future__ import annotations

import email.utils
import hashlib
from pathlib import Path
from typing import NamedTuple

import requests

from pkbrokers_redis.consumers.files.manifest import NAME as MANIFEST
from pkbrokers_redis.consumers.files.manifest import parse_manifest
from pkbrokers_redis.consumers.sources.base import Source
from pkbrokers_redis.core.errors import InputFileError
from pkbrokers_redis.settings import Settings

TIMEOUT_SECONDS = (5.0, 60.0)  # to connect, between two pieces
PIECE_BYTES = 1 << 20
MANIFEST_BYTES_MAX = 4 << 20
RAW_GITHUB = "https://raw.githubusercontent.com"


class Fetched(NamedTuple):
    """A file's bytes and when it was written, epoch ms; None when nobody says."""

    data: bytes
    written_ms: float | None


def folder_of(settings: Settings) -> str | None:
    """The folder of the published files: PKB_FILES_URL, else the sync target on GitHub."""
    if settings.files_url:
        return settings.files_url.rstrip("/")
    if settings.github_repo and not settings.github_url:
        parts = (RAW_GITHUB, settings.github_repo, settings.github_branch, settings.github_path)
        return "/".join(part.strip("/") if part is not RAW_GITHUB else part for part in parts).rstrip("/")
    return None


def fetch(folder: str, name: str, bytes_max: int) -> Fetched | None:
    """A file of the folder; None when there is none. Raises InputFileError for one that is too large, is not
    what the manifest says, or cannot be fetched."""
    fetched = _get(folder, name, bytes_max)
    if fetched is None:
        return None
    listed = _get(folder, MANIFEST, MANIFEST_BYTES_MAX)
    if listed is not None:
        entry = parse_manifest(listed.data).get(name)
        if entry is not None and entry.sha256 != hashlib.sha256(fetched.data).hexdigest():
            raise InputFileError(
                f"{name} is not the file its manifest names", "it may be half-way written; try again"
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
        with requests.get(f"{folder}/{name}", timeout=TIMEOUT_SECONDS, stream=True) as answer:
            if answer.status_code == 404:
                return None
            answer.raise_for_status()
            pieces, size = [], 0
            for piece in answer.iter_content(PIECE_BYTES):
                pieces.append(piece)
                size += len(piece)
                if size > bytes_max:
                    raise _too_large(name, bytes_max)
            return Fetched(b"".join(pieces), _date_ms(answer.headers.get("Last-Modified")))
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        why = f"HTTP {status}" if status else type(error).__name__
        raise InputFileError(f"cannot fetch {name} ({why})", "check PKB_FILES_URL") from error


def _date_ms(text: str | None) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() * 1000 if text else None
    except ValueError:
        return None


def _too_large(name: str, bytes_max: int) -> InputFileError:
    return InputFileError(f"{name} is larger than {bytes_max >> 20} MB", "publish it in parts")


class Published(Source):
    """A source whose files are fetched, if it is known from where."""

    is_remote = True

    def is_available(self) -> bool:
        if folder_of(self.context.settings):
            return True
        self.reason = "PKB_FILES_URL is not set"
        return False
