"""The official KiteConnect, unchanged, walks its market-data methods; what Kite refuses is refused alike."""

from __future__ import annotations

import gzip
import json
from datetime import date, datetime, timedelta
from typing import Any

import pytest
import requests
from kiteconnect import KiteConnect
from kiteconnect import exceptions as kite_errors

from pkbrokers_redis.simulator.history import DAYS_MAX, SECONDS
from pkbrokers_redis.simulator.kite import SimulatedKite
from pkbrokers_redis.simulator.universe import expired_contracts, universe
from tests.simulator.conftest import INFY, NIFTY
from tests.support import SHARED_DATA


def shape(value: Any) -> Any:
    """Names and kinds of a JSON answer, without its values."""
    if isinstance(value, dict):
        return {name: shape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def recorded(name: str) -> Any:
    path = SHARED_DATA / "rest" / name
    if not path.exists():
        pytest.skip("recorded answers (../shared/data/rest) are absent")
    return json.loads(path.read_text("utf-8-sig"))


def raw(kite: SimulatedKite, path: str, **query: Any) -> requests.Response:
    account, token = kite.accounts.first, kite.accounts.open_session()
    headers = {"Authorization": f"token {account.api_key}:{token}", "X-Kite-Version": "3"}
    return requests.get(kite.api_url + path, params=query, headers=headers, timeout=10)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("profile.json", "/user/profile"),
        ("quote.json", "/quote"),
        ("ohlc.json", "/quote/ohlc"),
        ("ltp.json", "/quote/ltp"),
    ],
)
def test_responses_have_the_shape_of_kites(kite: SimulatedKite, name: str, path: str) -> None:
    assert shape(raw(kite, path, i="NSE:INFY").json()) == shape(recorded(name))


def test_a_session_response_has_the_shape_of_kites(kite: SimulatedKite) -> None:
    account = kite.accounts.first
    client = KiteConnect(account.api_key, root=kite.api_url)
    sess_id = kite.accounts.begin_connect(account.api_key)
    request_token = kite.accounts.finish_connect(sess_id, account.api_key)
    session = client.generate_session(request_token, account.api_secret)
    assert shape(session | {"login_time": ""}) == shape(recorded("generate_session.json")["data"])
    assert isinstance(session["login_time"], datetime)
    assert client.profile()["user_id"] == account.user_id


@pytest.mark.parametrize(("name", "oi"), [("historical_minute.json", 0), ("historical_oi.json", 1)])
def test_candles_have_the_shape_of_kites(kite: SimulatedKite, name: str, oi: int) -> None:
    path = f"/instruments/historical/{INFY}/minute"
    answer = raw(kite, path, **{"from": "2026-09-09 09:15:00", "to": "2026-09-09 15:14:59", "oi": oi}).json()
    kites = recorded(name)
    assert len(answer["data"]["candles"]) == 360
    assert [type(part) for part in answer["data"]["candles"][0]][:1] == [str]
    assert len(answer["data"]["candles"][0]) == len(kites["data"]["candles"][0])
    assert answer["data"]["candles"][0][0] == "2026-09-09T09:15:00+0530"


def test_profile_and_margins(connect: KiteConnect, kite: SimulatedKite) -> None:
    assert connect.profile()["user_id"] == kite.accounts.first.user_id
    assert connect.margins().keys() == {"equity", "commodity"}
    assert connect.margins("equity")["net"] > 0
    with pytest.raises(kite_errors.InputException):
        connect.margins("stamps")


def test_instruments_of_all_exchanges_and_of_one(connect: KiteConnect) -> None:
    rows = connect.instruments()
    assert len(rows) == 60 + len(expired_contracts())
    by_name = {(row["exchange"], row["tradingsymbol"]): row for row in rows}
    assert by_name["NSE", "INFY"]["instrument_token"] == INFY
    assert by_name["NFO", "NIFTY30DECFUT"]["expiry"] == date(2030, 12, 26)
    assert by_name["NFO", "INFY24DECFUT"]["expiry"] == date(2024, 12, 26)
    assert {row["exchange"] for row in connect.instruments("MCX")} == {"MCX"}
    with pytest.raises(kite_errors.InputException):
        connect.instruments("NYSE")


def test_the_instruments_are_public_and_gzipped_on_request(kite: SimulatedKite) -> None:
    headers = {"Accept-Encoding": "gzip"}
    with requests.get(kite.api_url + "/instruments", headers=headers, timeout=10, stream=True) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        unpacked = gzip.decompress(answer.raw.read(decode_content=False))
    plain = requests.get(kite.api_url + "/instruments", headers={"Accept-Encoding": "identity"}, timeout=10)
    assert unpacked == plain.content


def test_quotes_equal_the_last_packet(connect: KiteConnect, kite: SimulatedKite) -> None:
    quote = connect.quote("NSE:INFY", "NSE:NIFTY 50", "NSE:NOSUCH", str(INFY))
    assert quote.keys() == {"NSE:INFY", "NSE:NIFTY 50", str(INFY)}
    assert quote["NSE:NIFTY 50"]["instrument_token"] == NIFTY
    assert "depth" not in quote["NSE:NIFTY 50"]
    infy = quote["NSE:INFY"]
    assert infy["ohlc"]["low"] <= infy["last_price"] <= infy["ohlc"]["high"]
    assert infy["timestamp"].date() == date(2026, 9, 10)
    assert infy["last_trade_time"] <= infy["timestamp"]
    assert infy["depth"]["buy"][0]["price"] <= infy["last_price"]
    assert connect.ohlc(["NSE:INFY"])["NSE:INFY"].keys() == {"instrument_token", "last_price", "ohlc"}
    assert connect.ltp("BSE:SENSEX")["BSE:SENSEX"]["instrument_token"] == 265


def test_too_many_instruments_at_once_are_refused(connect: KiteConnect) -> None:
    names = [f"NSE:X{number}" for number in range(1001)]
    assert connect.quote(names[:500]) == {}
    assert connect.ltp(names[:1000]) == {}
    for method, count in ((connect.quote, 501), (connect.ohlc, 1001), (connect.ltp, 1001), (connect.ltp, 0)):
        with pytest.raises(kite_errors.InputException):
            method(names[:count])


@pytest.mark.parametrize("interval", SECONDS)
def test_every_interval_of_history_to_its_day_limit(connect: KiteConnect, interval: str) -> None:
    last = datetime(2026, 9, 9, 15, 30)
    rows = connect.historical_data(INFY, last - timedelta(days=DAYS_MAX[interval]), last, interval)
    dates = [row["date"] for row in rows]
    assert dates == sorted(set(dates))
    assert dates[-1].date() == last.date()
    assert (dates[-1] - dates[0]).days > DAYS_MAX[interval] * 0.9
    for row in rows:
        assert row["low"] <= min(row["open"], row["close"]) <= max(row["open"], row["close"]) <= row["high"]
    with pytest.raises(kite_errors.InputException, match=str(DAYS_MAX[interval])):
        connect.historical_data(INFY, last - timedelta(days=DAYS_MAX[interval] + 1), last, interval)


def test_candles_have_open_interest_on_request(connect: KiteConnect) -> None:
    nifty_future = 35_001 << 8 | 2
    day = ("2026-09-10 09:15:00", "2026-09-10 11:00:00", "5minute")
    with_oi = connect.historical_data(nifty_future, *day, oi=True)
    assert all(row["oi"] > 0 for row in with_oi)
    assert "oi" not in connect.historical_data(nifty_future, *day)[0]
    assert connect.historical_data(nifty_future, "2026-09-01", "2026-09-09", "day", continuous=True)


@pytest.mark.parametrize(
    ("token", "start", "end", "interval"),
    [
        (INFY, "2026-09-10 09:15:00", "2026-09-10 11:00:00", "7minute"),
        (1, "2026-09-10 09:15:00", "2026-09-10 11:00:00", "minute"),
        (37_001 << 8 | 2, "2026-09-10 09:15:00", "2026-09-10 11:00:00", "minute"),  # expired
        ("x", "2026-09-10 09:15:00", "2026-09-10 11:00:00", "minute"),
        (INFY, "yesterday", "2026-09-10 11:00:00", "minute"),
        (INFY, "0001-01-01", "0001-01-02", "minute"),
        (INFY, "2026-09-10 11:00:00", "2026-09-10 09:15:00", "minute"),
    ],
)
def test_a_wrong_history_request_is_an_input_exception(
    connect: KiteConnect, token: Any, start: str, end: str, interval: str
) -> None:
    with pytest.raises(kite_errors.InputException):
        connect.historical_data(token, start, end, interval)


def test_logging_out_ends_the_session(connect: KiteConnect) -> None:
    assert connect.invalidate_access_token() is True
    with pytest.raises(kite_errors.TokenException) as refused:
        connect.profile()
    assert refused.value.code == 403


def test_expired_sessions_are_token_exceptions_and_call_the_hook(
    connect: KiteConnect, kite: SimulatedKite
) -> None:
    calls: list[bool] = []
    connect.set_session_expiry_hook(lambda: calls.append(True))
    kite.accounts.expire_all()
    for call in (connect.profile, connect.instruments, lambda: connect.ltp("NSE:INFY")):
        with pytest.raises(kite_errors.TokenException):
            call()
    assert len(calls) == 3
    connect.set_access_token(kite.accounts.open_session())
    assert connect.profile()


def test_a_request_token_is_single_use_and_expires(kite: SimulatedKite) -> None:
    accounts, account = kite.accounts, kite.accounts.first
    client = KiteConnect(account.api_key, root=kite.api_url)

    def request_token() -> str:
        return accounts.finish_connect(accounts.begin_connect(account.api_key), account.api_key)

    token = request_token()
    with pytest.raises(kite_errors.TokenException, match="checksum"):
        client.generate_session(token, "another secret")
    client.generate_session(token, account.api_secret)
    with pytest.raises(kite_errors.TokenException, match="expired"):
        client.generate_session(token, account.api_secret)
    late = request_token()
    accounts.request_token_seconds = -1.0
    with pytest.raises(kite_errors.TokenException, match="expired"):
        client.generate_session(late, account.api_secret)


def test_a_new_session_ends_the_one_before(connect: KiteConnect, kite: SimulatedKite) -> None:
    kite.accounts.open_session()
    with pytest.raises(kite_errors.TokenException):
        connect.profile()


def test_beyond_kites_limits_requests_get_429(kite: SimulatedKite, connect: KiteConnect) -> None:
    day = ("2026-09-09", "2026-09-09", "day")
    for _ in range(5):
        connect.historical_data(INFY, *day)  # not limited by default
    kite.limits.enforced = True

    def second_request_within_a_second() -> None:
        while True:
            connect.quote("NSE:INFY")

    with pytest.raises(kite_errors.NetworkException, match="Too many requests") as refused:
        second_request_within_a_second()
    assert refused.value.code == 429
    assert [seen.status for seen in kite.limits.seen][-1] == 429


def test_more_instruments_can_be_listed_than_traded() -> None:
    with SimulatedKite(universe(5), listed=universe(20_000)) as kite:
        client = KiteConnect(kite.accounts.first.api_key, root=kite.api_url)
        assert len(client.instruments()) == 20_000
