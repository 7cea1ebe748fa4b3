"""Settings that cannot be used are one line that names the variable, when they are read."""

from __future__ import annotations

import pytest

from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.settings import URL_SCHEMES, env_name, load_settings

NO_URLS = ["nonsense", "ftp://h", "http://[::1", "://h", "ws://", "wss://", "https://", "libsql://", "http://h:99999",
           "ws://h:99999", "ws://[::1", "libsql://h:x", "https://a b", "wss://a b"]  # fmt: skip


@pytest.mark.parametrize("url", NO_URLS)
@pytest.mark.parametrize("field", URL_SCHEMES)
def test_malformed_url_is_named_with_its_schemes(
    monkeypatch: pytest.MonkeyPatch, field: str, url: str
) -> None:
    monkeypatch.setenv(env_name(field), url)
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert str(error.value).startswith(
        f"{env_name(field)} is not a URL that begins with {URL_SCHEMES[field][0]}://"
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "url"),
    [
        ("kite_ws_url", "http://127.0.0.1:1"),
        ("kite_api_url", "wss://ws.kite.trade"),
        ("kite_login_url", "ws://h"),
        ("files_url", "https://[::1"),
        ("github_url", "https://h:99999/a"),
    ],
)
def test_url_of_another_scheme_is_refused(field: str, url: str) -> None:
    with pytest.raises(SettingsError, match=f"{env_name(field)} is not a URL"):
        load_settings(**{field: url})


@pytest.mark.parametrize(
    ("field", "url"),
    [
        ("kite_ws_url", "ws://127.0.0.1:8765/ws?a=1"),
        ("kite_ws_url", "WSS://ws.kite.trade"),
        ("kite_api_url", "http://[::1]:80/oms"),
        ("turso_url", "libsql://mine-org.turso.io"),
        ("files_url", "../published"),
        ("files_url", "file:///srv/files"),
        ("github_url", "git@github.com:me/mine.git"),
        ("github_url", "/srv/mine.git"),
    ],
)
def test_urls_and_paths_are_accepted(field: str, url: str) -> None:
    assert getattr(load_settings(**{field: url}), field) == url


@pytest.mark.parametrize(
    "name", ["PKB_KITE_ACCESS_TOKEN", "PKB_KITE_ENCTOKEN", "PKB_GITHUB_TOKEN", "PKB_KITE_API_KEY"]
)
@pytest.mark.parametrize("character", ["\u2019", "\u2013", "\n", "\x1b"])
def test_a_token_that_no_header_can_carry_is_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, character: str
) -> None:
    monkeypatch.setenv(name, f"geheim{character}es")
    with pytest.raises(
        SettingsError, match=rf"{name} holds a character that no HTTP header can carry"
    ) as error:
        load_settings()
    assert "geheim" not in str(error.value) and "\n" not in str(error.value)


def test_tokens_of_several_keys_are_a_comma_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKB_KITE_ACCESS_TOKEN", " one, two\n")
    assert load_settings().kite_access_token is not None
