"""What commands share: output forms, options, the store for reading, a progress bar.

A command makes rows (dicts) and names its columns; the form is chosen here: a table on a terminal,
tab-separated text in a pipe, `--csv`, `--json`. Prices and times are the same in every form: rupees, and
ISO 8601 with +05:30.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import redis
import typer

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.candles.model import Candle
from pkbrokers_redis.errors import RedisUnavailable, SettingsError
from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import ANSWER_SECONDS, connect
from pkbrokers_redis.store.embedded import reader_data_dir, store_folder

if TYPE_CHECKING:
    from pkbrokers_redis.client.store import CandleStore

Form = Literal["table", "tsv", "csv", "json"]
Row = Mapping[str, Any]

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
AsCsv = Annotated[bool, typer.Option("--csv", help="print comma-separated values with a header")]
InQueue = Annotated[bool, typer.Option("--enqueue", help="leave it to a `pkb jobs` worker")]
Symbol = Annotated[str, typer.Argument(metavar="SYMBOL", help="NSE:INFY, INFY or a token")]
IntervalName = Annotated[str, typer.Argument(metavar="INTERVAL", help="1m, 5m, 1h, day, …")]
Seconds = Annotated[float | None, typer.Option(min=0, help="stop after this long")]

PRICES = {"open", "high", "low", "close", "last_price", "average_price", "change"}
PRICES |= {"day_open", "day_high", "day_low"}
COUNTS = {"volume", "ticks", "oi", "last_quantity", "buy_quantity", "sell_quantity", "token", "rev"}
NUMBERS = PRICES | COUNTS
EPOCH_DIGITS_MIN = 9  # epoch seconds since 1973; a shorter number is not a time
# Columns of a table that a narrow terminal lacks first; then the last ones.
DROPPED_FIRST = (
    *("received_at", "start", "token", "oi", "does", "retries_left", "ticks", "exchange_time", "why", "next"),
    *("previous", "open", "high", "low"),
)
WIDTHS = {"interval": 6, "ticks": 6, "flag": 6, "rev": 6, "symbol": 14}  # of rows that are not known yet


def new_group() -> typer.Typer:
    """Return an empty group of subcommands, such as `pkb sync push` and `pull`."""
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def choose_form(as_json: bool, as_csv: bool = False) -> Form:
    """Return the requested form; by default a table on a terminal and tabs in a pipe."""
    if as_json and as_csv:
        raise typer.BadParameter("choose one of --json and --csv")
    if as_json:
        return "json"
    if as_csv:
        return "csv"
    return "table" if sys.stdout.isatty() else "tsv"


def iso(epoch_s: float) -> str:
    """Return epoch seconds as `2026-01-02T09:15:00+05:30`, with milliseconds where there are any."""
    moment = datetime.fromtimestamp(epoch_s, IST)
    return moment.isoformat(timespec="milliseconds" if moment.microsecond else "seconds")


def parse_date(text: str, option: str = "") -> date:
    """Return the date of `2026-11-20`. Raises SettingsError, which names the option."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        name = f"{option} {text!r}".strip()
        raise SettingsError(f"{name} is not a date", "write it as 2026-11-20") from None


def parse_moment(text: str, now_s: float) -> int:
    """Return the epoch seconds of a time as people write it: `10:05`, `2026-08-03T10:05`, epoch seconds.

    Without a date it is the day of `now_s`, without a zone Kolkata's time. Raises SettingsError.
    """
    text = text.strip()
    if text.isascii() and text.isdecimal() and EPOCH_DIGITS_MIN <= len(text) <= 10:
        return int(text)
    today = datetime.fromtimestamp(now_s, IST).date().isoformat()
    for candidate in (text, f"{today}T{text.rjust(5, '0')}"):
        try:
            moment = datetime.fromisoformat(candidate)
            if moment.year >= 1970:
                return int((moment if moment.tzinfo else moment.replace(tzinfo=IST)).timestamp())
        except (ValueError, OverflowError):
            continue
    raise SettingsError(f"{text[:40]!r} is not a time", "write 10:05, 2026-08-03T10:05 or epoch seconds")


def candle_row(candle: Candle) -> dict[str, Any]:
    """Return a candle as an object: `time`, then the fields of its row, then its flag."""
    return {"time": iso(candle.start), **candle.as_dict()}


def note(text: str) -> None:
    """Print a line for a person on stderr, unless `--quiet`: stdout holds data only."""
    if "_PKB_QUIET" not in os.environ:
        print(f"pkb: {text}", file=sys.stderr)


def dump(value: Any) -> str:
    """Return JSON of one line."""
    return msgspec.json.encode(value).decode()


def show(document: Any, as_json: bool, text: str) -> None:
    """Print a result: the document as JSON, or the text for people."""
    print(dump(document) if as_json else text)


def emit(rows: Sequence[Row], columns: Sequence[str], form: Form, title: str = "") -> None:
    """Print all rows at once. JSON is an array of whole rows; the other forms show `columns`."""
    if form == "json":
        print(dump(rows))
    elif form == "table":  # without the columns that are empty in every row
        filled = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
        columns = filled if rows else columns
        cells = {name: [name, *(_cell(name, row.get(name)) for row in rows)] for name in columns}
        widths = {name: max(map(len, texts)) for name, texts in cells.items()}
        shown = fitting(widths, shutil.get_terminal_size().columns)
        if title:
            print(title)
        for line in zip(*(cells[name] for name in shown), strict=True):
            print(_line(shown, line, [widths[name] for name in shown]))
        if len(shown) < len(columns):
            hidden = ", ".join(name for name in columns if name not in shown)
            note(f"not shown for want of width: {hidden} (--csv and --json have all)")
    else:
        writer = _writer(form)
        writer.writerow(columns)
        writer.writerows([_plain(row.get(name)) for name in columns] for row in rows)


def fitting(widths: Mapping[str, int], width: int) -> list[str]:
    """Return the columns of a table that fit into so many characters; DROPPED_FIRST goes first."""
    shown = list(widths)
    droppable = [name for name in DROPPED_FIRST if name in widths]
    droppable += [name for name in reversed(shown[1:]) if name not in droppable]
    while droppable and sum(widths[name] + 2 for name in shown) - 2 > width:
        shown.remove(droppable.pop(0))
    return shown


def emit_each(rows: Iterable[Row], columns: Sequence[str], form: Form) -> None:
    """Print each row as it arrives. JSON is one object a line."""
    writer = _writer(form)
    if form == "table":
        known = {name: WIDTHS.get(name, 19 if _is_time(name) else 10) for name in columns}
        columns = fitting(known, shutil.get_terminal_size().columns)
    widths = [WIDTHS.get(name, 19 if _is_time(name) else 10) for name in columns]
    if form == "table":
        print(_line(columns, columns, widths), flush=True)
    elif form != "json":
        writer.writerow(columns)
        sys.stdout.flush()
    for row in rows:
        if form == "json":
            print(dump(row))
        elif form == "table":
            print(_line(columns, [_cell(name, row.get(name)) for name in columns], widths))
        else:
            writer.writerow([_plain(row.get(name)) for name in columns])
        sys.stdout.flush()


def _writer(form: Form) -> Any:
    return csv.writer(sys.stdout, delimiter="," if form == "csv" else "\t", lineterminator="\n")


def _line(columns: Sequence[str], cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line of a table, numbers on the right."""
    parts = [
        cell.rjust(width) if name in NUMBERS else cell.ljust(width)
        for name, cell, width in zip(columns, cells, widths, strict=True)
    ]
    return "  ".join(parts).rstrip()


def _is_time(name: str) -> bool:
    return name == "time" or name.endswith("_time")


def _cell(name: str, value: Any) -> str:
    """Return a value for people."""
    if value is None:
        return "–"
    if name in NUMBERS and isinstance(value, (int, float)):
        if name == "change":
            return f"{value:,.2f}"
        if name in PRICES:
            return f"{value:,.2f}" if round(value, 2) == value else f"{value:,.4f}"
        return str(value) if name == "token" else f"{value:,}"
    if _is_time(name):
        return str(value).replace("T", " ").removesuffix("+05:30").removesuffix(":00")
    return str(value)


def _plain(value: Any) -> str:
    """Return a value for programs: nothing for None, JSON for what has parts, fractions without noise."""
    if isinstance(value, float):
        return repr(round(value, 7))
    if value is None:
        return ""
    return dump(value) if isinstance(value, (dict, list)) else str(value)


def require_store(settings: Settings) -> None:
    """Check that there is a store to read; name the demo's store if that is the one.

    Reading must not create an embedded store: the empty one would hide the demo's from all readers.

    Raises:
        RedisUnavailable: No Redis is configured and there is no embedded store.
    """
    if settings.redis_url is not None:
        return
    folder, is_demo = reader_data_dir(settings)
    if not store_folder(folder).exists():
        raise RedisUnavailable(
            f"there is no store in {folder} yet", "run `pkb demo` or `pkb up`, or set PKB_REDIS_URL"
        )
    if is_demo:
        note(f"reading the demo's store in {folder}; set PKB_REDIS_URL or run `pkb up` for another")


@contextlib.contextmanager
def open_client() -> Iterator[tuple[redis.Redis, Settings]]:
    """Connect to the configured store for reading, which must exist."""
    settings = load_settings()
    require_store(settings)
    with connect(settings, for_reading=True, socket_timeout_seconds=ANSWER_SECONDS) as client:
        yield client, settings


@contextlib.contextmanager
def open_store() -> Iterator[CandleStore]:
    """Open the configured store for reading; afterwards name rows that had to be left out."""
    from pkbrokers_redis.client.store import CandleStore

    settings = load_settings()
    require_store(settings)
    client = connect(settings, for_reading=True, socket_timeout_seconds=ANSWER_SECONDS)
    with client, CandleStore(settings, client=client) as store:
        yield store
        if store.rows_refused:
            note(f"left out {store.rows_refused} malformed rows in Redis")


@contextlib.contextmanager
def progress_bar(*, hidden: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Draw a progress bar on a terminal. Yields a listener for `(done, total, part)`, or None."""
    if hidden or "_PKB_QUIET" in os.environ or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task("", total=None)
        yield lambda done, total, part: drawn.update(task, completed=done, total=total, description=part)
