"""Files for a chat: the newest snapshot, or a new one, as a zip in parts with a checksum.

Only the manifest of the files folder counts: `pkb snapshot` writes it last, so the files that it names are
complete. A new snapshot is made by `pkb snapshot` in a process of its own: a file of 9,000 instruments shares
neither the bot's memory nor its interpreter, and an error in it costs one answer.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatch
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from telegram import Message
from telegram.constants import ParseMode

from pkbrokers_redis.bot.alerts.worker import EQUITY_TOKEN
from pkbrokers_redis.bot.context import Command, CommandContext, Services
from pkbrokers_redis.bot.telegram_client import with_retries
from pkbrokers_redis.bot.text import count, day_time, duration, escape, size
from pkbrokers_redis.candles.calendar import load_sessions
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.files.manifest import read_manifest
from pkbrokers_redis.jobs.cron import Plan
from pkbrokers_redis.settings import Settings, env_name
from pkbrokers_redis.store.instruments import read_hours

CLOSED_AGE_SECONDS_MAX = 12 * 3600.0  # while the market is closed little changes
LOOK_BACK_DAYS = 30  # no exchange is closed for longer
CLOSING_SECONDS = 60.0  # after a close: until the last candles are complete
PROGRESS_EVERY_SECONDS = 3.0  # one edit each time: Telegram allows a chat about one per second
SNAPSHOT_SECONDS_MAX = 600.0
SNAPSHOT_COMMAND = (sys.executable, "-c", "from pkbrokers_redis.cli.main import run; run()", "snapshot")


class SnapshotFailed(PkbError):
    """Raised when `pkb snapshot` fails; the message has its last line."""


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a command sends: the files of `pkb snapshot <snapshot>` that match `pattern`.

    In market hours a file older than `age_seconds_max` is made again first. Of a folder all files are sent
    together, as one zip.
    """

    title: str
    snapshot: str
    pattern: str
    age_seconds_max: float
    is_folder: bool = False


FILE_KINDS: dict[str, FileKind] = {
    "ticks": FileKind("ticks.json", "ticks", "ticks.json", 60),
    "db": FileKind("stock_data.db", "sqlite", "stock_data.db", 900),
    "daily_pkl": FileKind("daily_candles.pkl", "pickle", "stock_data_*.pkl", 3600),
    "intraday_pkl": FileKind("intraday_1m_candles.pkl", "pickle", "intraday_stock_data_*.pkl", 900),
    "candles": FileKind("candles", "parquet", "parquet/*.parquet", 900, is_folder=True),
    "instrument_history": FileKind("instrument_history.db", "sqlite", "stock_data.db", 3600),
}
REQUEST_DATA = ("daily_pkl", "intraday_pkl", "db", "instrument_history")


class Snapshot(NamedTuple):
    """The newest file or files of a kind; `made_at` is market time, epoch seconds."""

    paths: tuple[Path, ...]
    made_at: float
    size_bytes: int
    rows: int


def newest(folder: Path, kind: FileKind) -> Snapshot | None:
    """Return the newest file of a kind, or all files of a folder kind; None when there is none."""
    found: list[Snapshot] = []
    for name, entry in read_manifest(folder).items():
        path = folder / name
        is_meant = entry.kind == kind.snapshot and fnmatch(name, kind.pattern)
        if is_meant and entry.bytes and path.is_file() and path.stat().st_size == entry.bytes:
            found.append(Snapshot((path,), (entry.made_at_ms or 0.0) / 1000, entry.bytes, entry.rows))
    if not found:
        return None
    last = max(found, key=lambda each: (each.made_at, each.paths))
    if not kind.is_folder:
        return last
    paths = sorted(each.paths[0] for each in found)
    size_bytes, rows = sum(each.size_bytes for each in found), sum(each.rows for each in found)
    return Snapshot(tuple(paths), last.made_at, size_bytes, rows)


def is_fresh(snapshot: Snapshot, kind: FileKind, plan: Plan, now_s: float) -> bool:
    """Return whether a snapshot can be sent as it is, at `now_s` of market time.

    While any instrument trades it must be younger than its kind's age; after that, made after the close.
    """
    now_ms = int(now_s * 1000)
    today = plan.sessions.date_of(now_ms)
    windows = [window for days in range(LOOK_BACK_DAYS) for window in plan.windows(today - timedelta(days))]
    if any(opens <= now_ms < closes for opens, closes in windows):
        return now_s - snapshot.made_at <= kind.age_seconds_max
    closed_s = max((closes for _, closes in windows if closes <= now_ms), default=0) / 1000
    return snapshot.made_at >= max(closed_s + CLOSING_SECONDS, now_s - CLOSED_AGE_SECONDS_MAX)


def _newest_fresh(services: Services, kind: FileKind) -> tuple[Snapshot | None, bool]:
    """Return the newest snapshot, and whether it can be sent as it is."""
    settings, store = services.settings, services.store
    snapshot = newest(settings.files_folder, kind)
    if snapshot is None:
        return None, False
    sessions = load_sessions(settings.sessions, settings.timezone, settings.calendar)
    read_hours(store.client, store.keys, sessions)
    tokens = store.tokens_seen() or {EQUITY_TOKEN}
    schedules = sessions.schedules_of(tokens)
    return snapshot, is_fresh(snapshot, kind, Plan(sessions, schedules), services.market() / 1000)


async def deliver(context: CommandContext, name: str) -> None:
    """Send the file that FILE_KINDS calls `name`, with progress. Raise PkbError when there is none."""
    kind, settings = FILE_KINDS[name], context.services.settings
    title = escape(kind.title)
    progress = await context.reply(f"{title}: looking …")
    snapshot = await _find(context, kind, progress)
    await context.edit(progress, f"{title}: zipping {size(snapshot.size_bytes)} …")
    with TemporaryDirectory(prefix="pkb-bot-", ignore_cleanup_errors=True) as folder:
        target = Path(folder) / f"{kind.title}.zip"
        digest, zipped_bytes = await context.read(_zip, target, snapshot.paths, settings.files_folder)
        await _send(context, progress, snapshot, target, digest, zipped_bytes)
    await context.edit(progress, f"{title}: sent.")


async def _find(context: CommandContext, kind: FileKind, progress: Message) -> Snapshot:
    """Return a fresh snapshot, made now if necessary; an older one if that fails."""
    snapshot, can_be_sent = await context.read(_newest_fresh, context.services, kind)
    if snapshot is not None and can_be_sent:
        return snapshot
    started = time.monotonic()
    task = asyncio.create_task(run_snapshot(context.services.settings, kind.snapshot))
    try:
        while not (await asyncio.wait({task}, timeout=PROGRESS_EVERY_SECONDS))[0]:
            seconds = duration(time.monotonic() - started)
            await context.edit(progress, f"{escape(kind.title)}: making a new one … {seconds}")
        task.result()
    except PkbError:
        if snapshot is None:
            raise
        return snapshot  # its caption shows its age
    finally:
        task.cancel()  # when this command is cancelled
    snapshot = await context.read(newest, context.services.settings.files_folder, kind)
    if snapshot is None:
        raise PkbError(f"there is no {kind.title} yet", "try again once candles have been made (/status)")
    return snapshot


def _zip(target: Path, paths: Sequence[Path], root: Path) -> tuple[str, int]:
    """Zip files under their names relative to `root`; return the zip's sha256 and size."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path in paths:
            archive.write(path, path.name if len(paths) == 1 else str(path.relative_to(root)))
    with target.open("rb") as file:
        return file_digest(file, "sha256").hexdigest(), target.stat().st_size


async def _send(
    context: CommandContext,
    progress: Message,
    snapshot: Snapshot,
    target: Path,
    digest: str,
    zipped_bytes: int,
) -> None:
    """Send a zip in parts: `ticks.json.part01.zip`, so that `cat` with a `*` joins them in order."""
    title, part_bytes_max = target.stem, context.services.settings.telegram_file_max_bytes
    total = max(1, -(-zipped_bytes // part_bytes_max))
    with target.open("rb") as file:
        for number in range(1, total + 1):
            name, part_note = target.name, ""
            if total > 1:
                name = f"{title}.part{number:0{max(2, len(str(total)))}d}.zip"
                part_note = f", part {number} of {total}"
                await context.edit(progress, f"{escape(title)}: sending part {number} of {total} …")
            caption = (
                f"{escape(title)}{part_note} · as of {day_time(snapshot.made_at)}\n"
                f"{count(snapshot.rows)} rows, {size(snapshot.size_bytes)}, zipped {size(zipped_bytes)}\n"
                f"sha256 of the zip <code>{digest}</code>"
            )
            content = await context.read(file.read, part_bytes_max)
            await with_retries(
                context.bot.send_document,
                context.chat_id,
                content,
                filename=name,
                caption=caption,
                parse_mode=ParseMode.HTML,
            )
    if total > 1:
        stem = escape(title)
        await context.reply(
            f"To join the {total} parts: <code>cat {stem}.part*.zip &gt; {stem}.zip</code>, "
            f"then compare <code>sha256sum {stem}.zip</code> with the captions."
        )


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
        lines = stderr.decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
        reason = last.removeprefix("pkb: ")[:300]
        raise SnapshotFailed(f"no snapshot could be made ({reason})", "`pkb snapshot` shows the cause")


def _environment(settings: Settings) -> dict[str, str]:
    """Return the settings that differ from the defaults as environment variables for a child process.

    They are not passed as arguments, because `ps` shows those to every user.
    """
    env: dict[str, str] = {}
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if value is not None and (value != field.default or field.default is None):
            secret = getattr(value, "get_secret_value", None)
            env[env_name(name)] = str(value if secret is None else secret())
    return env


def _add_command(name: str, does: str) -> None:
    @Command(name, does, is_slow=True)
    async def handler(context: CommandContext) -> None:
        await deliver(context, name)


_add_command("ticks", "the latest day of every instrument as ticks.json")
_add_command("db", "all candles as an SQLite file")
_add_command("daily_pkl", "daily candles as a pickle")
_add_command("intraday_pkl", "1-minute candles as a pickle")
_add_command("instrument_history", "the history of all instruments as an SQLite file")


@Command("request_data", "all files, one after the other", for_admins=True, is_slow=True)
async def request_data(context: CommandContext) -> None:
    """Send all files that another instance needs; a missing one does not stop the rest."""
    sent = 0
    for name in REQUEST_DATA:
        try:
            await deliver(context, name)
            sent += 1
        except PkbError as error:
            await context.reply(f"/{name}: {escape(str(error))}")
    await context.reply(f"{sent} of {len(REQUEST_DATA)} files sent.")
