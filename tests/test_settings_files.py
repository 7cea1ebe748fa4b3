"""Settings from files: what Docker and Kubernetes mount under /run/secrets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pkbrokers_redis import settings as settings_module
from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.settings import load_settings


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run-secrets"
    folder.mkdir()
    monkeypatch.setattr(settings_module, "SECRETS_DIR", folder)
    return folder


def token() -> str | None:
    secret = load_settings().kite_access_token
    return None if secret is None else secret.get_secret_value()


@pytest.mark.parametrize("name", ["pkb_kite_access_token", "PKB_KITE_ACCESS_TOKEN"])
def test_a_file_named_as_the_variable_is_the_setting(secrets: Path, name: str) -> None:
    (secrets / name).write_text("geheim\n")
    assert token() == "geheim"


def test_the_environment_comes_before_the_file(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (secrets / "pkb_kite_access_token").write_text("file")
    monkeypatch.setenv("PKB_KITE_ACCESS_TOKEN", "environment")
    assert token() == "environment"


def test_missing_folder_and_unknown_files_are_ignored(
    secrets: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    (secrets / "kubernetes.io").mkdir()
    (secrets / "kite_access_token").write_text("another program's")
    assert token() is None
    monkeypatch.setattr(settings_module, "SECRETS_DIR", secrets / "missing")
    assert token() is None
    assert not recwarn.list


def test_invalid_value_in_a_file_is_named_and_not_shown(secrets: Path) -> None:
    (secrets / "pkb_shards").write_text("geheim")
    with pytest.raises(SettingsError, match="PKB_SHARDS") as raised:
        load_settings()
    assert "geheim" not in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_one_line(secrets: Path) -> None:
    path = secrets / "pkb_kite_access_token"
    path.write_text("geheim")
    path.chmod(0)
    with pytest.raises(SettingsError, match="pkb_kite_access_token cannot be read"):
        load_settings()


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0"])
def test_invalid_retention_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PKB_STREAM_RETENTION_SECONDS", value)
    with pytest.raises(SettingsError, match="PKB_STREAM_RETENTION_SECONDS"):
        load_settings()
