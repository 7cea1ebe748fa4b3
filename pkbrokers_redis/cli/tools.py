"""`pkb config`: every setting, its value, where it comes from, and no secret.

`pkb bench`: the benchmark table, measured here and now.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr

from pkbrokers_redis.cli.common import AsCsv, AsJson, choose_form, emit, note
from pkbrokers_redis.errors import PkbError
from pkbrokers_redis.settings import Settings, env_name, load_settings, set_names, unknown_names

MASK = "********"
COLUMNS = ("name", "value", "source", "description")
_secret_option = re.compile(r"([?&][^=&]*(?:pass|secret|token|key|auth)[^=&]*=)[^&]*", re.IGNORECASE)


def config(as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """Print all settings with their values and sources; secrets are masked."""
    form = choose_form(as_json, as_csv)
    settings = load_settings()
    places = set_names()
    rows: list[dict[str, Any]] = []
    for field, info in Settings.model_fields.items():
        name = env_name(field)
        source = places.get(name, "default")
        value = shown(getattr(settings, field), is_url=field.endswith("url"))
        rows.append({"name": name, "value": value, "source": source, "description": info.description})
    emit(rows, COLUMNS, form)
    for name, meant in unknown_names().items():
        note(f"{name} is not a setting" + (f": did you mean {meant}?" if meant else ""))


def shown(value: Any, is_url: bool) -> Any:
    """A setting's value without what is secret in it: None, number, bool or text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, SecretStr):
        return mask_url(value.get_secret_value()) if is_url else MASK
    return mask_url(str(value)) if is_url else str(value)


def mask_url(text: str) -> str:
    """A URL with its password (and secret-looking query options) masked; all of it if it cannot be read."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return MASK
    if "://" not in text:
        return MASK if "@" in text else text
    login, at, place = parts.netloc.rpartition("@")
    rest = parts.path + parts.query + parts.fragment
    if "@" in rest and parts.scheme != "unix":
        return MASK  # a password with a bare / ? or # in it: what looks like a path is part of it
    user = login.partition(":")[0]
    if login and ":" not in login and parts.scheme in ("http", "https"):
        user = ""  # https://<token>@host
    masked = f"{user}:{MASK}@{place}" if at else place
    query = _secret_option.sub(rf"\1{MASK}", f"?{parts.query}") if parts.query else ""
    return f"{parts.scheme}://{masked}{parts.path}{query}"


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="a tenth of the work, for a first look")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure throughput, latency, memory and bulk reads on this machine, each with a reference.

    Takes about two minutes. The benchmarks are in a checkout of the repository (`benchmarks/`).
    """
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "table.py").exists():
        raise PkbError(
            "the benchmarks are not part of an installed package", "run it from a checkout: make bench"
        )
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    table = importlib.import_module("benchmarks.table")
    raise typer.Exit(table.main(quick, as_json))
