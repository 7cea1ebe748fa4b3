"""One line an event, and no credential in it."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis import logs
from pkbrokers_redis.settings import load_settings


@pytest.fixture(autouse=True)
def _quiet_afterwards() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, before = list(root.handlers), root.level, vars(logs._output).copy()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    vars(logs._output).update(before)


def test_an_event_is_one_line_of_key_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    log = logs.get("ingest")
    logs.configure(load_settings())
    log.info("subscribed", tokens=3000, whole=True, note="a b")
    out, line = capsys.readouterr()
    assert out == ""
    assert line.endswith('Z level=info logger=ingest event=subscribed tokens=3000 whole=true note="a b"\n')


def test_json_is_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(load_settings(log_format="json"))
    logs.get("ingest").info("subscribed", tokens=3000)
    event = json.loads(capsys.readouterr().err)
    assert (event["level"], event["logger"], event["event"], event["tokens"]) == (
        "info",
        "ingest",
        "subscribed",
        3000,
    )


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_is_a_setting(capsys: pytest.CaptureFixture[str], level: str, shown: int) -> None:
    logs.configure(load_settings(log_level=level))
    log = logs.get("x")
    for method in (log.debug, log.info, log.warning, log.error):
        method("said")
    assert len(capsys.readouterr().err.splitlines()) == shown


@pytest.mark.parametrize("log_format", ["text", "json"])
@given(text=st.text())
def test_nothing_breaks_out_of_its_line(log_format: str, text: str) -> None:
    logs.configure(load_settings(log_format=log_format))
    before, sys.stderr = sys.stderr, io.StringIO()
    try:
        logs.get("x").warning("read", symbol=text, error=ValueError(text))
        written = sys.stderr.getvalue()
    finally:
        sys.stderr = before
    assert len(written.splitlines()) == 1


def test_a_traceback_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("no\nway")
    except ValueError:
        logs.get("x").exception("failed")
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "redis://user:S3CRET@host:6379/0",
        "cannot reach rediss://:S3CRET@host",
        "wss://ws.kite.trade?api_key=k&access_token=S3CRET&uid=1",
        "wss://ws.kite.trade/?enctoken=S3CRET",
        "https://api.telegram.org/bot123456:S3CRET/getMe",
        "{'Authorization': 'token key:S3CRET'}",
    ],
)
def test_credentials_are_masked_whoever_logs_them(capsys: pytest.CaptureFixture[str], text: str) -> None:
    logs.configure(load_settings())
    logs.get("x").warning("failed", error=RuntimeError(text), text=text, many=[text])
    logging.getLogger("websocket").warning("cannot connect: %s", text)
    shown = capsys.readouterr().err
    assert "S3CRET" not in shown and logs.MASK in shown
    assert len(shown.splitlines()) == 2


def test_settings_in_a_log_line_keep_their_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_settings(kite_password="S3CRET", redis_url="redis://:S3CRET@host")
    logs.get("x").warning("loaded", settings=settings, password=settings.kite_password)
    assert "S3CRET" not in capsys.readouterr().err


def test_a_closed_stderr_loses_the_line_and_not_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    logs.get("x").warning("said")


def test_evidence_is_shown_once_a_key_and_for_so_many_keys_only() -> None:
    once = logs.Once(keys_max=2)
    assert [once.first(key) for key in ("a", "a", "b", "c", "b")] == [True, False, True, False, False]
    assert once.repeats == 3
