"""Compare the tables of the docs with the code, row by row.

`python -m tests.test_docs` regenerates docs/settings.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pkbrokers_redis.candles.model import CANDLE_FIELDS, FLAG_NAMES, TICK_FIELDS
from pkbrokers_redis.cli.main import COMMANDS
from pkbrokers_redis.client.explain import FLAG_WORDS
from pkbrokers_redis.jobs.cron import DAY
from pkbrokers_redis.jobs.snapshots import KINDS
from pkbrokers_redis.keys import KEY_TABLE, Keys
from pkbrokers_redis.settings import Settings, env_name

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

SETTINGS_HEAD = """# Settings

Environment variables, or lines of a `.env` file in the working directory. `pkb config` prints them with their
values, secrets masked. An invalid value is a one-line error that names the variable. Settings may also
be files in `/run/secrets` (see [deploy.md](deploy.md)).

| name | default | what it sets |
|---|---|---|
"""


def settings_page() -> str:
    """docs/settings.md as the Settings fields have it."""
    rows = [
        f"| `{env_name(name)}` | {default_of(field)} | {field.description}{secret_mark(field)} |\n"
        for name, field in Settings.model_fields.items()
    ]
    return SETTINGS_HEAD + "".join(rows)


def default_of(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "the user's data folder (XDG)"
    if field.default in (None, ""):
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def secret_mark(field: FieldInfo) -> str:
    return " (secret)" if "SecretStr" in str(field.annotation) else ""


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def table_rows(text: str) -> list[list[str]]:
    """The cells of all rows of a page's tables that begin with a `code` cell."""
    return [
        [cell.strip() for cell in line.strip("|\n").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]


def test_settings_page_matches_the_settings_fields() -> None:
    assert page("settings.md") == settings_page(), "run `python -m tests.test_docs`"


def test_every_secret_setting_is_marked_and_shows_no_default() -> None:
    secrets = [field for field in Settings.model_fields.values() if secret_mark(field)]
    assert len(secrets) >= 5
    assert all(field.default is None for field in secrets)


def test_key_table_matches_the_code() -> None:
    documented = [tuple(cell.strip("`") for cell in row[:4]) for row in table_rows(page("keys.md"))]
    assert documented == list(KEY_TABLE)


def test_every_key_of_the_code_is_in_the_key_table() -> None:
    keys = Keys("P", 8)
    built = {
        keys.meta(),
        keys.symbols(),
        keys.instrument(256265),
        keys.worker("W"),
        keys.workers(),
        keys.feed(0),
        keys.feeds(),
        keys.feed_progress(),
        keys.job_outbox(),
        keys.auth(),
        keys.login(),
        keys.login_lock(),
        keys.master(),
        keys.derivatives(),
        keys.exchanges(),
        keys.expired(),
        keys.renamed(),
        keys.watch(),
        keys.limit("history"),
        keys.job("J"),
        keys.job_lock("history"),
        keys.restart("ROLE"),
        keys.bot_lease(),
        keys.bot_update("W"),
        keys.bot_alerts(),
        keys.bot_alert_state(),
        keys.bot_position(),
        keys.bot_outbox(),
        keys.bot_troubles(),
        keys.ticks(1),
        keys.closed(1),
        keys.repairs(1),
        keys.cursor(1),
        keys.state(1),
        keys.lease(1),
        keys.quote(256265),
        keys.current(256265),
        keys.candles(256265, "5m"),
    }
    names = {name for name in vars(Keys) if not name.startswith("_")} - {"prefix", "shards", "shard_of"}
    assert len(built) == len(names), "a key of Keys is not tried here"
    examples = {
        "<token>": "256265",
        "<interval>": "5m",
        "<id>": "W",
        "<n>": "0",
        "<name>": "history",
        "<job>": "J",
        "<role>": "ROLE",
        "{S}": "{1}",
    }
    placeholder = re.compile(r"<\w+>|\{S\}")
    documented = {placeholder.sub(lambda part: examples[part[0]], name) for name, *_ in KEY_TABLE}
    assert built == documented


def test_each_key_has_a_section_in_the_docs() -> None:
    headings = " ".join(line for line in page("keys.md").splitlines() if line.startswith("###"))
    assert [name for name, *_ in KEY_TABLE if f"`{name}`" not in headings] == []


@pytest.mark.parametrize("fields", [TICK_FIELDS, CANDLE_FIELDS], ids=["tick", "candle"])
def test_row_layouts_match_the_code_and_have_an_example(fields: tuple[str, ...]) -> None:
    lines = [line.strip() for line in page("keys.md").splitlines()]
    at = lines.index(f"[{', '.join(fields)}]")
    assert lines[at + 1].count(",") == len(fields) - 1


def test_every_flag_of_a_candle_is_explained() -> None:
    assert [flag for flag in FLAG_NAMES if flag and f'`"{flag}"`' not in page("keys.md")] == [], (
        "not in keys.md"
    )
    assert set(FLAG_WORDS) == set(FLAG_NAMES), "`pkb explain` has words for each flag"


def test_commands_and_sections_of_the_docs_match() -> None:
    sections = set(re.findall(r"^### `pkb ([\w-]+)`$", page("commands.md"), re.M))
    assert set(COMMANDS) - sections == set(), "no section in docs/commands.md"
    assert sections - set(COMMANDS) == set(), "a section in docs/commands.md without a command"


def test_every_snapshot_kind_is_documented() -> None:
    listed = f"pkb snapshot {'|'.join(KINDS)}`"
    assert listed in page("commands.md") and listed in page("files.md"), f"docs do not say {listed}"


def test_every_row_of_the_daily_timetable_is_documented() -> None:
    rows = {name for row in table_rows(page("jobs.md")) for name in re.findall(r"`(\w+)`", row[0])}
    assert {row.name for row in DAY} - rows == set(), "no row in docs/jobs.md"


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_files_and_settings_named_in_a_page_exist(name: str) -> None:
    text = page(name)
    known = {env_name(field) for field in Settings.model_fields}
    assert set(re.findall(r"PKB_[A-Z_]*[A-Z]", text)) - known == set()
    for path in re.findall(r"`((?:pkbrokers_redis|docs|tests|workers)/[\w/.-]*)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(
        r"`((?:candles|kite|store|ingest|aggregate|runtime|client|files|compat|jobs|bot|web|cli|simulator)/[\w/]+\.\w+)`",
        text,
    ):
        assert (ROOT / "pkbrokers_redis" / path).exists(), path


def test_names_in_adding_md_exist_in_the_files_it_names() -> None:
    """`NAME` (`folder/file.py`), `function` of `folder/file.py`: the file contains the name."""
    found = re.findall(r"`(\w+)`,?\s+(?:\(|of\s+|in\s+)`([\w/]+\.\w+)`", page("adding.md"))
    assert len(found) > 30
    for name, path in found:
        place = next((each for each in (ROOT / path, ROOT / "pkbrokers_redis" / path) if each.exists()), None)
        assert place is not None, path
        assert re.search(rf"\b{name}\b", place.read_text(encoding="utf-8")), f"{path} has no {name}"


def test_changelog_has_an_unreleased_section() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    (DOCS / "settings.md").write_text(settings_page(), encoding="utf-8")
