"""How commands print: a table for people, tab-separated text for pipes, `--csv`, `--json` for programs.

A command makes rows (dicts) and names its columns; the form is chosen here. Prices and times are the
same in every form: rupees, and ISO 8601 with +05:30.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
import typer

from pkbrokers_redis.candles.calendar import IST
from pkbrokers_redis.candles.model import Candle

Form = Literal["table", "tsv", "csv", "json"]
Row = Mapping[str, Any]

AsJson = Annotated[bool, typer.Option("--json", help="machine-readable")]
AsCsv = Annotated[bool, typer.Option("--csv", help="comma-separated, with a header")]


PRICES = {"open", "high", "low", "close", "last_price", "average_price", "change"}
PRICES |= {"day_open", "day_high", "day_low"}
COUNTS = {"volume", "ticks", "oi", "last_quantity", "buy_quantity", "sell_quantity", "token", "rev"}
SHORT = {"interval", "ticks", "flag", "rev"}
TABLE_WIDTH_MAX = 160


def choose(as_json: bool, as_csv: bool) -> Form:
    """The form asked for; without one a table on a terminal and tabs into a pipe."""
    if as_json and as_csv:
        raise typer.BadParameter("choose one of --json and --csv")
    if as_json:
        return "json"
    if as_csv:
        return "csv"
    return "table" if sys.stdout.isatty() else "tsv"


def iso(start_s: float) -> str:
    """Epoch seconds → `2026-01-02T09:15:00+05:30`, with milliseconds where there are any."""
    moment = datetime.fromtimestamp(start_s, IST)
    return moment.isoformat(timespec="milliseconds" if moment.microsecond else "seconds")


def candle_row(candle: Candle) -> dict[str, Any]:
    """A candle as an object: `time`, then the fields of the row by name, then its flag."""
    return {"time": iso(candle.start), **candle.as_dict()}


def note(text: str) -> None:
    """A line for the person, on stderr: data alone goes to stdout."""
    print(f"pkb: {text}", file=sys.stderr)


def say_enqueued(job: str, is_new: bool, as_json: bool) -> None:
    """What every `--enqueue` prints: the job's id, and whether it is in the queue only now."""
    if as_json:
        print(dump({"job": job, "new": is_new}))
    else:
        print(f"{job} {'is in the queue' if is_new else 'was there already'}; look: pkb jobs --list")


def dump(value: Any) -> str:
    """JSON of one line."""
    return msgspec.json.encode(value).decode()


def emit(rows: Sequence[Row], columns: Sequence[str], form: Form, title: str = "") -> None:
    """Print all rows at once. JSON is an array of whole rows, the other forms show `columns`."""
    if form == "json":
        print(dump(rows))
    elif form == "table":
        _print_table(rows, columns, title)
    else:
        writer = _writer(form)
        writer.writerow(columns)
        writer.writerows([_plain(row.get(name)) for name in columns] for row in rows)


def emit_each(rows: Iterable[Row], columns: Sequence[str], form: Form) -> None:
    """Print rows as they come, each at once. JSON is an object a line."""
    if form == "table":
        print(_line(columns, columns), flush=True)
    elif form != "json":
        writer = _writer(form)
        writer.writerow(columns)
        sys.stdout.flush()
    for row in rows:
        if form == "json":
            print(dump(row))
        elif form == "table":
            print(_line(columns, [_cell(name, row.get(name)) for name in columns]))
        else:
            writer.writerow([_plain(row.get(name)) for name in columns])
        sys.stdout.flush()


def _writer(form: Form) -> Any:
    return csv.writer(sys.stdout, delimiter="\t" if form == "tsv" else ",", lineterminator="\n")


def _print_table(rows: Sequence[Row], columns: Sequence[str], title: str) -> None:
    """A table as wide as it needs to be, without the columns that say nothing."""
    from rich import box  # only a terminal needs it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", padding=(0, 1, 0, 0))
    shown = [name for name in columns if not rows or any(row.get(name) not in (None, "") for row in rows)]
    for name in shown:
        table.add_column(name, justify="right" if _is_number(name) else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_cell(name, row.get(name))) for name in shown))
    console = Console()
    console.width = max(console.width, TABLE_WIDTH_MAX)  # rather wrapped by the terminal than cut short
    console.print(table)


def _line(columns: Sequence[str], cells: Sequence[str]) -> str:
    """One line of a table whose rows are not known yet."""
    widths = (
        19 if _is_time(name) else 6 if name in SHORT else 14 if name == "symbol" else 10 for name in columns
    )
    padded = (
        cell.rjust(width) if _is_number(name) else cell.ljust(width)
        for name, cell, width in zip(columns, cells, widths, strict=True)
    )
    return "  ".join(padded).rstrip()


def _is_number(name: str) -> bool:
    return name in PRICES or name in COUNTS


def _is_time(name: str) -> bool:
    return name == "time" or name.endswith("_time")


def _cell(name: str, value: Any) -> str:
    """A value for people."""
    if value is None:
        return "–"
    if name in PRICES and isinstance(value, (int, float)):
        return f"{value:,.2f}" if round(value, 2) == value else f"{value:,.4f}"
    if name in COUNTS and isinstance(value, (int, float)):
        return str(value) if name == "token" else f"{value:,}"
    if _is_time(name):
        return str(value).replace("T", " ").removesuffix("+05:30").removesuffix(":00")
    return str(value)


def _plain(value: Any) -> str:
    """A value for programs; nothing for None. JSON inside a cell stays JSON."""
    if value is None:
        return ""
    return dump(value) if isinstance(value, (dict, list)) else str(value)
