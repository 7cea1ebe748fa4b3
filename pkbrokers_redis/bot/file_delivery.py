"""Files for a chat: the newest snapshot, or a new one, as a zip in parts with a checksum.

A new snapshot is made by `pkb snapshot` in a process of its own: a file of 9,000 instruments shares neither
the bot's memory nor its interpreter, and an error in it costs one answer.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory

from telegram import Message
from telegram.constants import ParseMode

from pkbrokers_redis.bot.alerts.worker import EQUITY_TOKEN
from pkbrokers_redis.bot.context import CommandContext
from pkbrokers_redis.bot.snapshot_index import (
    FILE_KINDS,
    FileKind,
    MarketState,
    Snapshot,
    is_fresh,
    market_state,
    newest,
)
from pkbrokers_redis.bot.telegram_client import with_retries
from pkbrokers_redis.bot.text import count, day_time, duration, escape, size
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.settings import Settings, env_name
from pkbrokers_redis.store.instruments import load_derivative_tokens

PROGRESS_EVERY_SECONDS = 3.0  # one edit each time: Telegram allows a chat about one per second
SNAPSHOT_SECONDS_MAX = 600.0
SNAPSHOT_COMMAND = (sys.executable, "-c", "from pkbrokers_redis.cli.main import run; run()", "snapshot")


class SnapshotFailed(PkbError):
    """Raised when `pkb snapshot` fails; the message has its last line."""


class NoFile(PkbError):
    """Raised when there is no file to send, and a new snapshot did not contain it."""


async def deliver(context: CommandContext, name: str) -> None:
    """Send the file that FILE_KINDS calls `name`, with progress in the chat.

    Raises:
        SnapshotFailed, NoFile: There is no file to send.
    """
    kind = FILE_KINDS[name]
    title = escape(kind.title)
    settings = context.services.settings
    progress = await context.reply(f"{title}: looking …")
    snapshot = await _find(context, kind, progress)
    await context.edit(progress, f"{title}: zipping {size(snapshot.size_bytes)} …")
    with ExitStack() as stack:
        zipping = zip_parts(
            snapshot.paths, kind.title, settings.files_folder, settings.telegram_file_max_bytes
        )
        parts = await context.read(stack.enter_context, zipping)
        await _send(context, title, snapshot, parts, progress)
    await context.edit(progress, f"{title}: sent.")


async def _find(context: CommandContext, kind: FileKind, progress: Message) -> Snapshot:
    """Return a fresh snapshot, made now if necessary; an older one if that fails."""
    folder = context.services.settings.files_folder
    snapshot = await context.read(newest, folder, kind)
    now_s = context.services.market() / 1000
    if snapshot is not None and is_fresh(snapshot, kind, now_s, await context.read(_market, context, now_s)):
        return snapshot
    started = time.monotonic()
    task = asyncio.create_task(run_snapshot(context.services.settings, kind.snapshot))
    try:
        while not (await asyncio.wait({task}, timeout=PROGRESS_EVERY_SECONDS))[0]:
            seconds = duration(time.monotonic() - started)
            await context.edit(progress, f"{escape(kind.title)}: making a new one … {seconds}")
    finally:
        task.cancel()  # when this command is cancelled
    try:
        task.result()
    except PkbError:
        if snapshot is None:
            raise
        return snapshot  # its caption shows its age
    snapshot = await context.read(newest, folder, kind)
    if snapshot is None:
        raise NoFile(f"there is no {kind.title} yet", "try again once candles have been made (/status)")
    return snapshot


def _market(context: CommandContext, now_s: float) -> MarketState:
    """Return the market of all streamed instruments; NSE's hours before the first tick."""
    settings, store = context.services.settings, context.services.store
    sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
    derivatives = load_derivative_tokens(store.client, store.keys)
    tokens = store.tokens_seen() or {EQUITY_TOKEN}
    schedules = {sessions.schedule_of(token, token in derivatives) for token in tokens}
    return market_state(sessions, schedules, now_s)


async def _send(
    context: CommandContext, title: str, snapshot: Snapshot, parts: ZipParts, progress: Message
) -> None:
    for number in range(1, parts.total + 1):
        content = await context.read(parts.read, number)
        part_note = ""
        if parts.total > 1:
            part_note = f", part {number} of {parts.total}"
            await context.edit(progress, f"{title}: sending part {number} of {parts.total} …")
        caption = (
            f"{title}{part_note} · as of {day_time(snapshot.made_at)}\n"
            f"{count(snapshot.rows)} rows, {size(snapshot.size_bytes)}, zipped {size(parts.size_bytes)}\n"
            f"sha256 of the zip <code>{parts.sha256}</code>"
        )
        await with_retries(
            lambda content=content, number=number, caption=caption: context.bot.send_document(  # type: ignore[misc]
                context.chat_id,
                content,
                filename=parts.part_name(number),
                caption=caption,
                parse_mode=ParseMode.HTML,
            )
        )
    if parts.total > 1:
        stem = escape(parts.name.removesuffix(".zip"))
        await context.reply(
            f"To join the {parts.total} parts: <code>cat {stem}.part*.zip &gt; {stem}.zip</code>, "
            f"then compare <code>sha256sum {stem}.zip</code> with the captions."
        )


@dataclass(frozen=True, slots=True)
class ZipParts:
    """A zip on disk, sent in parts of at most `part_bytes_max`. `name` is its file name in the chat."""

    path: Path
    name: str
    size_bytes: int
    sha256: str
    part_bytes_max: int

    @property
    def total(self) -> int:
        """Return the number of parts."""
        return max(1, -(-self.size_bytes // self.part_bytes_max))

    def part_name(self, number: int) -> str:
        """Return `ticks.json.zip`, or `ticks.json.part01.zip`: `cat` with a `*` joins them in order."""
        if self.total == 1:
            return self.name
        digits = max(2, len(str(self.total)))
        return f"{self.name.removesuffix('.zip')}.part{number:0{digits}d}.zip"

    def read(self, number: int) -> bytes:
        """Return the content of a part, counted from 1."""
        with self.path.open("rb") as file:
            file.seek((number - 1) * self.part_bytes_max)
            return file.read(self.part_bytes_max)


@contextmanager
def zip_parts(paths: Sequence[Path], title: str, root: Path, part_bytes_max: int) -> Iterator[ZipParts]:
    """Zip files into a temporary folder that is deleted afterwards. Names inside are relative to `root`."""
    with TemporaryDirectory(prefix="pkb-bot-") as folder:
        target = Path(folder) / "snapshot.zip"
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for path in paths:
                archive.write(path, path.name if len(paths) == 1 else str(path.relative_to(root)))
        with target.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        yield ZipParts(target, f"{title}.zip", target.stat().st_size, digest, part_bytes_max)


async def run_snapshot(settings: Settings, snapshot: str) -> None:
    """Run `pkb snapshot` to its end. Raise SnapshotFailed."""
    process = await asyncio.create_subprocess_exec(
        *SNAPSHOT_COMMAND,
        snapshot,
        env={**os.environ, **_environment(settings)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(SNAPSHOT_SECONDS_MAX):
            _, stderr = await process.communicate()
    except TimeoutError:
        raise SnapshotFailed(
            f"the snapshot took longer than {SNAPSHOT_SECONDS_MAX:.0f} s", "check Redis and the disk"
        ) from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("pkb: ") if lines else f"exit code {process.returncode}"
        raise SnapshotFailed(f"no snapshot could be made ({last[:300]})", "`pkb snapshot` shows the cause")


def _environment(settings: Settings) -> dict[str, str]:
    """Return the settings that differ from the defaults as environment variables for a child process.

    They are not passed as arguments, because `ps` shows those to every user.
    """
    env: dict[str, str] = {}
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if value is None or (value == field.default and field.default is not None):
            continue
        env[env_name(name)] = value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
    return env
