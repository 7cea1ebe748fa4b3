"""Every command end to end: a person writes over HTTP, the bot answers over HTTP."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis

from pkbrokers_redis.bot import files
from pkbrokers_redis.bot.commands import COMMANDS
from pkbrokers_redis.bot.context import Command
from pkbrokers_redis.files.manifest import Entry, update_manifest
from pkbrokers_redis.settings import Settings
from pkbrokers_redis.store.auth import Session, save_session
from tests.bot.conftest import running_bot
from tests.bot.telegram import ALICE, BOB, GROUP, Telegram
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, push, row
from tests.support import wait_until

pytestmark = pytest.mark.parametrize("server_kind", ["valkey"], indirect=True)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "bot.md"


def put_quote(client: redis.Redis, settings: Settings, token: int, **cells: Any) -> None:
    client.hset(settings.keys.quote(token), mapping={name: str(cell) for name, cell in cells.items()})


def put_day(client: redis.Redis, settings: Settings, token: int, close: float, **cells: Any) -> None:
    """A day candle that is forming."""
    client.hset(settings.keys.current(token), "day", row(OPEN_S, close, **cells))
    client.hset(settings.keys.state(settings.keys.shard_of(token)), str(token), "[]")


# --- contract: every command of the table


def test_every_command_has_help_and_a_row_in_the_docs(server_kind: str) -> None:
    rows = set(re.findall(r"^\| `(/[^`]+)` \|", DOCS.read_text(encoding="utf-8"), re.M))
    usages = {each.usage for each in COMMANDS.values()}
    assert usages - rows == set(), "no row in docs/bot.md"
    assert rows - usages == set(), "a row in docs/bot.md without a command"
    for command in COMMANDS.values():
        assert command.does and not command.does.endswith(".")
        assert len(command.name) <= 32 and re.fullmatch(r"[a-z_]+", command.name), "Telegram's rule"


def test_the_menu_is_published(running: None, telegram: Telegram) -> None:
    wait_until(lambda: telegram.commands, what="setMyCommands")
    assert {each["command"] for each in telegram.commands} == set(COMMANDS)


def test_arguments_beyond_the_maximum_are_answered_with_the_usage(
    bot_settings: Settings, telegram: Telegram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkbrokers_redis.bot.application.COMMANDS_BURST", 100)

    def nonsense(command: Command) -> str:
        return f"/{command.name} " + " ".join(["<b>nonsense"] * (command.words_max + 1))

    with running_bot(bot_settings):
        for command in COMMANDS.values():
            answer = telegram.ask(ALICE, nonsense(command))
            assert "Sorry" not in answer.text and "<b>nonsense" not in answer.text, command.name
            assert f"/{command.name}" in answer.text, (command.name, answer.text)


def test_an_unknown_command_is_answered_with_the_nearest(running: None, telegram: Telegram) -> None:
    assert "Did you mean /quote?" in telegram.ask(BOB, "/qoute INFY").text
    assert "/help" in telegram.ask(BOB, "/xyzzy").text


# --- reading


def test_quote_shows_price_change_and_the_days_prices(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    put_quote(
        client,
        bot_settings,
        INFY,
        last_price=1500.05,
        close=1485.2,
        open=1490,
        high=1510,
        low=1480,
        volume=1234567,
    )
    answer = telegram.ask(BOB, "/quote infy")
    assert "<b>NSE:INFY</b>  1,500.05  +1.00 %" in answer.text
    assert "O 1,490.00  H 1,510.00  L 1,480.00  C 1,485.20" in answer.text
    assert "volume 1,234,567" in answer.text


def test_quote_accepts_several_symbols_and_an_index_with_a_blank(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    put_quote(client, bot_settings, NIFTY, last_price=24518.0, close=24500.0)
    answer = telegram.ask(BOB, "/quote NIFTY 50")
    assert "<b>NSE:NIFTY 50</b>  24,518.00" in answer.text
    both = telegram.ask(BOB, '/quote "NIFTY 50" RELIANCE').text
    assert "NIFTY 50" in both and "NSE:RELIANCE</b>\nno quote yet" in both


def test_a_misspelt_symbol_is_answered_with_the_nearest(running: None, telegram: Telegram) -> None:
    for question in ("/quote RELIANC", "/chart RELIANC", "/watch RELIANC", "/alert RELIANC above 5"):
        assert telegram.ask(BOB, question).text == "RELIANC?: did you mean RELIANCE?", question


def test_markup_in_data_is_escaped(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    client.hset(bot_settings.keys.symbols(), "NSE:<b>&X", 4097)
    client.hset(bot_settings.keys.instrument(4097), mapping={"exchange": "NSE", "tradingsymbol": "<b>&X"})
    put_quote(client, bot_settings, 4097, last_price=5.0)
    assert "<b>NSE:&lt;b&gt;&amp;X</b>" in telegram.ask(BOB, "/quote 4097").text


def test_candles_of_an_instrument_are_a_table(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    push(client, bot_settings.keys, INFY, "5m", [row(OPEN_S, 100.5, flag="partial"), row(OPEN_S + 300, 102)])
    answer = telegram.ask(BOB, "/candles INFY 5m")
    lines = re.sub("<[^>]+>", "", answer.text).splitlines()
    assert lines[2].split() == ["09:15", "100.50", "100.50", "100.50", "100.50", "10*"]
    assert lines[3].split() == ["09:20", "102.00", "102.00", "102.00", "102.00", "10"]
    assert "no 7m" not in answer.text
    assert "7m" in telegram.ask(BOB, "/candles INFY 7m").text


def test_gainers_losers_active_and_top_rank_the_days_movers(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    for token, close, before, volume, ticks in ((INFY, 110, 100, 5, 7), (RELIANCE, 90, 100, 50, 3)):
        put_day(client, bot_settings, token, close, volume=volume, ticks=ticks)
        put_quote(client, bot_settings, token, close=before)
    first = {
        name: re.sub("<[^>]+>", "", telegram.ask(BOB, f"/{name}").text).splitlines()[2].split()
        for name in ("gainers", "losers", "active", "top")
    }
    assert first["gainers"] == ["INFY", "110.00", "+10.00", "%"]
    assert first["losers"] == ["RELIANCE", "90.00", "-10.00", "%"]
    assert first["active"][0] == "RELIANCE"
    assert first["top"] == ["INFY", "7", "110.00"]
    assert "from 1 to 50" in telegram.ask(BOB, "/gainers 999").text


def test_start_and_help_list_the_commands_a_user_may_send(running: None, telegram: Telegram) -> None:
    assert "/quote" in telegram.ask(BOB, "/start").text
    everything = telegram.ask(BOB, "/help").text
    assert "/chart SYMBOL [INTERVAL]" in everything and "/restart" not in everything, "operators' only"
    assert "/restart" in telegram.ask(ALICE, "/help").text
    assert "candlestick" in telegram.ask(BOB, "/help chart").text


def test_status_shows_the_pipelines_health(running: None, telegram: Telegram) -> None:
    answer = telegram.ask(BOB, "/status").text
    assert "The pipeline is down" in answer and "no worker reads Kite" in answer
    assert "bot: alive" in answer


def test_watch_updates_its_message_until_stopped(
    running: None,
    telegram: Telegram,
    client: redis.Redis,
    bot_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pkbrokers_redis.bot.commands_market.WATCH_EVERY_SECONDS", 0.02)
    put_quote(client, bot_settings, INFY, last_price=100.0)
    message = telegram.ask(BOB, "/watch INFY")
    put_quote(client, bot_settings, INFY, last_price=101.0)
    telegram.wait(lambda m: m.message_id == message.message_id and "101.00" in m.text)
    telegram.press(message, "Stop")
    last = telegram.wait(lambda m: "watched for" in m.text)
    assert last.message_id == message.message_id and not last.buttons


def test_watch_reports_when_the_bot_is_busy(
    running: None, telegram: Telegram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkbrokers_redis.bot.context.BACKGROUND_MAX", 0)
    message = telegram.ask(BOB, "/watch INFY")
    last = telegram.wait(lambda m: "try again in a minute" in m.text)
    assert last.message_id == message.message_id and not last.buttons


# --- files


def put_file(settings: Settings, name: str, kind: str, content: bytes, made_at: str = "") -> None:
    """A snapshot as `pkb snapshot` leaves it, by default now: the file and its entry in the manifest."""
    path = settings.files_folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    now = made_at or datetime.now(UTC).isoformat()
    digest = hashlib.sha256(content).hexdigest()
    update_manifest(settings.files_folder, {name: Entry(digest, len(content), 7, 1, "", "", now, kind)})


FILES = {
    "ticks": ("ticks.json", "ticks"),
    "db": ("stock_data.db", "sqlite"),
    "instrument_history": ("stock_data.db", "sqlite"),
    "daily_pkl": ("stock_data_05012026.pkl", "pickle"),
    "intraday_pkl": ("intraday_stock_data_05012026.pkl", "pickle"),
    "candles": ("parquet/interval=1m/date=2026-01-05/candles.parquet", "parquet"),
}


def test_every_file_is_sent_zipped_with_its_checksum(
    running: None, telegram: Telegram, bot_settings: Settings
) -> None:
    for file, kind in FILES.values():
        put_file(bot_settings, file, kind, file.encode())
    chats = itertools.cycle([BOB, ALICE, GROUP])  # one file at a time a chat
    for command, (file, _) in FILES.items():
        since = len(telegram.sent)
        telegram.say(next(chats), f"/{command}")
        sent = telegram.wait(lambda m: m.method == "sendDocument", since)
        assert hashlib.sha256(sent.content).hexdigest() in sent.text
        with zipfile.ZipFile(io.BytesIO(sent.content)) as archive:
            [name] = archive.namelist()
            assert name.endswith(Path(file).name), command
            assert archive.read(name) == file.encode()
        telegram.wait(lambda m: m.method == "editMessageText" and m.text.endswith("sent."), since)


def test_a_large_file_is_sent_in_parts_that_join(
    make_settings: Callable[..., Settings], telegram: Telegram, bot_settings: Settings
) -> None:
    settings = bot_settings.model_copy(update={"telegram_file_max_bytes": 1000})
    content = hashlib.shake_256(b"x").digest(2500)  # does not shrink
    put_file(settings, "ticks.json", "ticks", content)
    with running_bot(settings):
        telegram.say(BOB, "/ticks")
        telegram.wait(lambda m: "To join the 3 parts" in m.text)
    parts = sorted((m for m in telegram.sent if m.method == "sendDocument"), key=lambda m: m.file_name)
    assert [m.file_name for m in parts] == [f"ticks.json.part0{n}.zip" for n in (1, 2, 3)]
    assert all(len(m.content) <= 1000 for m in parts)
    whole = b"".join(m.content for m in parts)
    assert hashlib.sha256(whole).hexdigest() in parts[0].text
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        assert archive.read("ticks.json") == content


def test_a_missing_file_is_made_with_progress(
    running: None,
    telegram: Telegram,
    client: redis.Redis,
    bot_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    put_day(client, bot_settings, INFY, 110.0)
    code = (
        "import sys, time; time.sleep(0.3); "
        "from pkbrokers_redis.jobs.snapshots import snapshot; snapshot(sys.argv[-1])"
    )
    monkeypatch.setattr(files, "SNAPSHOT_COMMAND", (sys.executable, "-c", code, "snapshot"))
    monkeypatch.setattr("pkbrokers_redis.bot.files.PROGRESS_EVERY_SECONDS", 0.05)
    telegram.say(BOB, "/ticks")
    telegram.wait(lambda m: "making a new one" in m.text)
    sent = telegram.wait(lambda m: m.method == "sendDocument")
    with zipfile.ZipFile(io.BytesIO(sent.content)) as archive:
        assert json.loads(archive.read("ticks.json"))[str(INFY)]["ohlcv"]["close"] == 110


def test_a_snapshot_that_fails_is_one_line(
    running: None, telegram: Telegram, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    code = "import sys; print('pkb: the disk <is> full', file=sys.stderr); sys.exit(2)"
    monkeypatch.setattr(files, "SNAPSHOT_COMMAND", (sys.executable, "-c", code))
    telegram.say(BOB, "/ticks")
    assert telegram.wait(lambda m: "No snapshot could be made (the disk &lt;is&gt; full)" in m.text)


def test_request_data_sends_the_files_that_exist(
    running: None, telegram: Telegram, bot_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SNAPSHOT_COMMAND", ("false",))
    put_file(bot_settings, "stock_data.db", "sqlite", b"x")
    telegram.say(ALICE, "/request_data")
    telegram.wait(lambda m: m.text == "2 of 4 files sent.")
    assert [m.file_name for m in telegram.sent if m.method == "sendDocument"] == [
        "stock_data.db.zip",
        "instrument_history.db.zip",
    ]


# --- the Kite session


SECRET = "the-access-token-itself"


def test_token_shows_age_and_expiry_and_never_the_token(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    import time

    from pydantic import SecretStr

    now = time.time()  # the end is given: at six in the morning a session of two hours ago has ended
    session = Session(
        "key", "AB1234", access_token=SecretStr(SECRET), login_at=now - 7200, expires_at=now + 3600
    )
    save_session(client, bot_settings.keys, session)
    answer = telegram.ask(ALICE, "/token").text
    assert "2 h 00 min ago" in answer and "ends" in answer and "AB1234" in answer
    telegram.ask(ALICE, "/status")
    assert SECRET not in json.dumps([each.text for each in telegram.sent])


def test_refresh_token_logs_in_after_confirmation(
    running: None,
    telegram: Telegram,
    client: redis.Redis,
    bot_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import time

    from pydantic import SecretStr

    from pkbrokers_redis.kite.session import SessionManager

    def log_in(manager: SessionManager) -> Session:
        made = Session("key", "AB1234", access_token=SecretStr(SECRET), login_at=time.time())
        return save_session(client, bot_settings.keys, made)

    monkeypatch.setattr(SessionManager, "log_in", log_in)
    question = telegram.ask(ALICE, "/refresh_token")
    assert [label for label, _ in question.buttons] == ["Yes", "No"]
    telegram.press(question, "Yes")
    assert "Kite session" in telegram.wait(lambda m: m.text.startswith("✅")).text
    assert SECRET not in json.dumps([each.text for each in telegram.sent])


def test_a_login_without_credentials_is_one_line(running: None, telegram: Telegram) -> None:
    telegram.press(telegram.ask(ALICE, "/refresh_token"), "Yes")
    assert "PKB_KITE" in telegram.wait(lambda m: "PKB_" in m.text).text


def test_restart_asks_the_ingest_workers_to_begin_anew(
    running: None, telegram: Telegram, client: redis.Redis, bot_settings: Settings
) -> None:
    telegram.press(telegram.ask(ALICE, "/restart"), "Yes")
    telegram.wait(lambda m: "restart within seconds" in m.text)
    assert client.exists(bot_settings.keys.restart("ingest"))


def test_test_ticks_counts_entries(
    running: None,
    telegram: Telegram,
    client: redis.Redis,
    bot_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pkbrokers_redis.bot.operators.COUNT_SECONDS", 0.3)
    telegram.say(ALICE, "/test_ticks")
    telegram.wait(lambda m: "Counting" in m.text)
    assert "no tick came" in telegram.wait(lambda m: "entries in" in m.text).text
