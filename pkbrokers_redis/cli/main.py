"""The command `pkb`. A command is a function in one of these files and a row in `COMMANDS`.

A file is imported only when one of its commands runs: `pkb quote` must not wait for a compiler that only
`pkb aggregate` needs.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command as make_command

from pkbrokers_redis import __version__
from pkbrokers_redis.errors import PkbError

# name → module:function below pkbrokers_redis.cli, in the order of `pkb --help`
COMMANDS = {
    "demo": "demo:demo",
    "up": "roles:up",
    "ingest": "roles:ingest",
    "aggregate": "roles:aggregate",
    "jobs": "jobs:jobs",
    "cron": "jobs:cron_",
    "bot": "roles:bot",
    "web": "roles:web",
    "quote": "read:quote",
    "candles": "read:candles",
    "closed": "read:closed",
    "explain": "read:explain",
    "ticks": "read:ticks",
    "top": "pipeline:top",
    "status": "pipeline:status",
    "doctor": "pipeline:doctor",
    "key": "read:key",
    "redis-cli": "redis_cli:redis_cli",
    "backfill": "jobs:backfill",
    "sync": "jobs:sync",
    "calendar": "tools:calendar",
    "login": "kite:login",
    "instruments": "kite:instruments",
    "snapshot": "jobs:snapshot",
    "sim": "sim:sim",
    "replay": "sim:replay",
    "record": "sim:record",
    "config": "tools:config",
    "bench": "tools:bench",
}

PASS_THROUGH = {"redis-cli"}  # their options belong to another program

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class LazyGroup(TyperGroup):
    """Typer's group over the `COMMANDS` table."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary(name)) for name in COMMANDS])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        names: dict[str, Any] = dict.fromkeys(COMMANDS)
        self.commands = names  # only its keys are looked at, for "did you mean"
        return super().resolve_command(ctx, args)


def summary(name: str) -> str:
    """Return the first sentence of a command's docstring without importing it: --help must be fast."""
    module, _, function = COMMANDS[name].partition(":")
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
            return " ".join(paragraph.split()).partition(". ")[0].removesuffix(".")
    return ""


def load_command(name: str) -> Any:
    """Return the click command of a row of the table."""
    module, _, function = COMMANDS[name].partition(":")
    source = importlib.import_module(f"pkbrokers_redis.cli.{module}")
    subcommands = getattr(source, f"{function}_app", None)
    if subcommands is not None:
        return make_command(subcommands)
    callback = getattr(source, function)
    single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    passed_on = {"ignore_unknown_options": True, "allow_interspersed_args": False}
    single.command(name, context_settings=passed_on if name in PASS_THROUGH else None)(callback)
    return make_command(single)


def _be_quiet(requested: bool) -> None:
    if requested:
        os.environ["_PKB_QUIET"] = "1"
        os.environ["PKB_LOG_LEVEL"] = "warning"


def _be_verbose(requested: bool) -> None:
    if requested:
        os.environ["PKB_LOG_LEVEL"] = "debug"


def _print_version(requested: bool) -> None:
    if requested:
        print(f"pkb {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # help texts speak of [start,open,…]: brackets are no markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback()
def pkb(
    version: Annotated[
        bool,
        typer.Option("-V", "--version", callback=_print_version, is_eager=True, help="print the version"),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", callback=_be_quiet, help="print results and errors only")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", callback=_be_verbose, help="log what is done (debug)")
    ] = False,
) -> None:
    """A Redis-backed distributed tick cache for Zerodha Kite: ticks in, candles of every interval out."""


def _prepare_streams() -> None:
    """Write to nowhere instead of a closed stream (`>&-`), and `?` for what an ASCII terminal cannot show."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run() -> None:
    """Run the command line. A user's mistake or an unavailable server is one line and exit code 2."""
    code = 0
    _prepare_streams()
    try:
        app()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        pass
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        print(f"pkb: {line}", file=sys.stderr)
        code = EXIT_USER_ERROR
    if code == EXIT_USER_ERROR and "pkbrokers_redis.store.embedded" in sys.modules:
        _leave_nothing_behind()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the pipe has ended. Python would report it once more at exit: give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _leave_nothing_behind() -> None:
    """Remove an embedded store that the failed command began."""
    from pkbrokers_redis.settings import load_settings
    from pkbrokers_redis.store.embedded import discard_new_stores

    with contextlib.suppress(Exception):  # the command's own error has been said
        discard_new_stores(load_settings().prefix)


def _explained(error: BaseException) -> BaseException:
    """Return what an error of redis-py means; for a key of another type, with the key's name."""
    from pkbrokers_redis.runtime.cluster_state import find_wrong_keys
    from pkbrokers_redis.settings import load_settings
    from pkbrokers_redis.store.connect import ANSWER_SECONDS, connect, describe, explain
    from pkbrokers_redis.store.errors import is_wrong_type

    settings = load_settings()
    if is_wrong_type(error):
        with connect(settings, for_reading=True, socket_timeout_seconds=ANSWER_SECONDS) as client:
            if found := find_wrong_keys(client, settings.keys):
                return found[0]
    return explain(error, describe(settings, for_reading=True))


def one_line(error: BaseException) -> str | None:
    """Return an error as one line for a person; None for a bug, whose traceback is needed."""
    if not isinstance(error, PkbError) and type(error).__module__.partition(".")[0] == "redis":
        error = _explained(error)
    if isinstance(error, PkbError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    return None
