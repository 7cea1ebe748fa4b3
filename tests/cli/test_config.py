"""`pkb config`: every setting with its source, and never a secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkbrokers_redis.cli.tools import MASK, mask_url
from pkbrokers_redis.settings import Settings, env_name
from tests.cli.conftest import Pkb

SECRETS = {
    "PKB_REDIS_URL": "redis://jo:s3cr3t@cache:6379/0",
    "PKB_KITE_API_SECRET": "s3cr3t",
    "PKB_KITE_PASSWORD": "s3cr3t",
    "PKB_KITE_TOTP_SECRET": "s3cr3t",
    "PKB_KITE_ACCESS_TOKEN": "s3cr3t",
    "PKB_KITE_ENCTOKEN": "s3cr3t",
    "PKB_GITHUB_TOKEN": "s3cr3t",
    "PKB_GITHUB_URL": "https://s3cr3t@github.com/a/b",
    "PKB_TELEGRAM_TOKEN": "s3cr3t",
}


def test_every_setting_is_listed_with_value_source_and_description(
    pkb: Pkb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKB_SHARDS", "16")
    Path(".env").write_text("PKB_PREFIX=mine\nPKB_SHARDS=4\n")
    rows = {row["name"]: row for row in json.loads(pkb("config", "--json").out)}
    assert set(rows) == {env_name(field) for field in Settings.model_fields}
    assert (rows["PKB_SHARDS"]["value"], rows["PKB_SHARDS"]["source"]) == (16, "environment")
    assert (rows["PKB_PREFIX"]["value"], rows["PKB_PREFIX"]["source"]) == ("mine", ".env")
    assert (rows["PKB_REDIS_URL"]["value"], rows["PKB_REDIS_URL"]["source"]) == (None, "default")
    assert all(row["description"] for row in rows.values())


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_no_secret_is_ever_shown(pkb: Pkb, monkeypatch: pytest.MonkeyPatch, form: list[str]) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    ended = pkb("config", *form)
    assert ended.code == 0
    assert "s3cr3t" not in ended.out + ended.err
    assert f"redis://jo:{MASK}@cache:6379/0" in ended.out


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://:pw@h:1/0", f"redis://:{MASK}@h:1/0"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("rediss://h/0?password=pw&db=1", f"rediss://h/0?password={MASK}&db=1"),
        ("redis://:p/w@h:1", MASK),
        ("redis://:p#w@h:1", MASK),
        ("redis://[::1", MASK),
        ("unix:///a/b.sock?db=1", "unix:///a/b.sock?db=1"),
        ("https://pw@h/x", f"https://:{MASK}@h/x"),
        ("jo:pw@h", MASK),
        ("wss://ws.kite.trade", "wss://ws.kite.trade"),
    ],
)
def test_urls_lose_their_passwords(url: str, masked: str) -> None:
    assert mask_url(url) == masked


def test_a_misspelt_setting_is_pointed_out(pkb: Pkb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKB_REDIS_ULR", "x")
    assert pkb("config").err == "pkb: PKB_REDIS_ULR is not a setting: did you mean PKB_REDIS_URL?\n"
