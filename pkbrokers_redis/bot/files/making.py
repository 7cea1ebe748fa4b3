"""`pkb snapshot KIND` as a process of its own: what makes a file of 9,000 instruments shares neither our
memory nor our interpreter, and a bug in it costs one answer."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress

from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.settings import Settings, env_name

MAKE_SECONDS_MAX = 600.0
COMMAND = (sys.executable, "-c", "from pkbrokers_redis.cli.main import run; run()", "snapshot")


class SnapshotFailed(PkbError):
    """Raised when `pkb snapshot` did not succeed; the message is its own line."""


async def make(settings: Settings, snapshot: str) -> None:
    """Run it to its end. Raises SnapshotFailed."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        snapshot,
        env={**os.environ, **environment_of(settings)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(MAKE_SECONDS_MAX):
            _, said = await process.communicate()
    except TimeoutError:
        raise SnapshotFailed(
            f"the snapshot took longer than {MAKE_SECONDS_MAX:.0f} s", "look at Redis and the disk"
        ) from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("pkb: ") if lines else f"exit code {process.returncode}"
        raise SnapshotFailed(f"no snapshot could be made ({last[:300]})", "`pkb snapshot` shows the cause")


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment in which a child loads these settings: what differs from the defaults.

    Not in its arguments: `ps` shows those to everybody.
    """
    env: dict[str, str] = {}
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if value is None or (value == field.default and field.default is not None):
            continue
        env[env_name(name)] = value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
    return env
