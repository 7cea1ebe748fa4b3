"""Quote hashes: every field of the contract as text, the newest packet only, a slice at a time."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from pkbrokers_redis.keys import Keys
from pkbrokers_redis.kite.protocol import encode_frame, encode_packet, parse_frame, quote_fields
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.tick_writer import QUOTE_INTERVAL_MS, QUOTES_PER_CALL, PendingQuotes

KEYS = Keys("pkb", 8)
INFY, NIFTY, USDINR = 408065, 256265, 1201 << 8 | 3
AT_MS = 1_767_584_705_027  # 2026-01-05T09:15:05.027+05:30
TRADED = datetime(2026, 1, 5, 3, 45, 4, tzinfo=UTC)
SEEN = datetime(2026, 1, 5, 3, 45, 5, tzinfo=UTC)
LEVELS = [{"price": 1500.0 - n / 20, "quantity": 100 * n, "orders": n} for n in range(1, 6)]
QUOTE = {
    "last_price": 1500.05, "last_traded_quantity": 7, "average_traded_price": 1498.5, "volume_traded": 123456,
    "total_buy_quantity": 5000, "total_sell_quantity": 6000,
    "ohlc": {"open": 1490.0, "high": 1510.0, "low": 1485.5, "close": 1480.0},
}  # fmt: skip
FULL = {
    **QUOTE, "oi": 11, "oi_day_high": 12, "oi_day_low": 10, "last_trade_time": TRADED,
    "exchange_timestamp": SEEN, "depth": {"buy": LEVELS, "sell": LEVELS},
}  # fmt: skip


class Board:
    """A quote board on a real store, with its clock in hand."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.board = PendingQuotes(KEYS, {INFY: "NSE:INFY", NIFTY: "NSE:NIFTY 50"}, quote_fields)
        self.now_ms = AT_MS

    def note(self, *packets: bytes, at_ms: int = AT_MS) -> None:
        frame = encode_frame(packets)
        parsed = parse_frame(frame, at_ms)
        self.board.add(frame, parsed.tokens.tolist(), parsed.offsets, parsed.lengths, at_ms)

    def write(self) -> list[str]:
        """One round: what was written."""
        pipe = Pipe(self.client)
        keys = self.board.queue(pipe, self.now_ms)
        assert len(pipe) == len(keys)
        assert not any(isinstance(reply, Exception) for reply in pipe.execute())
        self.board.confirm()
        return keys

    def quote(self, token: int) -> dict[str, str]:
        fields: Any = self.client.hgetall(KEYS.quote(token))
        return {name.decode(): value.decode() for name, value in fields.items()}


@pytest.fixture
def board(client: redis.Redis) -> Board:
    return Board(client)


def test_a_full_packet_gives_every_field_of_the_contract(board: Board) -> None:
    board.note(encode_packet("full", INFY, **FULL))
    assert board.write() == ["pkb:{2}:quote:408065"]
    quote = board.quote(INFY)
    depth = json.loads(quote.pop("depth"))
    change = float(quote.pop("change"))
    assert quote == {
        "symbol": "NSE:INFY", "last_price": "1500.05", "last_quantity": "7", "average_price": "1498.5",
        "volume": "123456", "buy_quantity": "5000", "sell_quantity": "6000", "open": "1490.0",
        "high": "1510.0", "low": "1485.5", "close": "1480.0", "oi": "11", "oi_day_high": "12",
        "oi_day_low": "10", "last_trade_time": "2026-01-05T09:15:04+05:30",
        "exchange_time": "2026-01-05T09:15:05+05:30",
        "received_at": "2026-01-05T09:15:05.027+05:30", "mode": "full",
    }  # fmt: skip
    assert change == pytest.approx((1500.05 - 1480) * 100 / 1480)
    assert depth == {"buy": LEVELS, "sell": LEVELS}


def test_a_quote_packet_gives_what_it_has(board: Board) -> None:
    board.note(encode_packet("quote", INFY, **QUOTE))
    board.write()
    assert set(board.quote(INFY)) == {
        "symbol", "last_price", "last_quantity", "average_price", "volume", "buy_quantity", "sell_quantity",
        "open", "high", "low", "close", "change", "received_at", "mode",
    }  # fmt: skip
    assert board.quote(INFY)["mode"] == "quote"


def test_a_price_alone_is_a_quote_too(board: Board) -> None:
    board.note(encode_packet("ltp", INFY, last_price=1500.05))
    board.write()
    assert board.quote(INFY) == {
        "symbol": "NSE:INFY", "last_price": "1500.05", "mode": "ltp",
        "received_at": "2026-01-05T09:15:05.027+05:30",
    }  # fmt: skip


def test_an_index_has_no_volume_and_a_currency_seven_decimals(board: Board) -> None:
    ohlc = {"open": 24_000.0, "high": 24_100.5, "low": 23_950.05, "close": 24_010.0}
    board.note(encode_packet("full", NIFTY, last_price=24_050.5, ohlc=ohlc, exchange_timestamp=SEEN))
    board.note(encode_packet("ltp", USDINR, last_price=85.1234567))
    board.write()
    nifty = board.quote(NIFTY)
    assert (nifty["symbol"], nifty["last_price"], nifty["high"]) == ("NSE:NIFTY 50", "24050.5", "24100.5")
    assert nifty["exchange_time"] == "2026-01-05T09:15:05+05:30" and "volume" not in nifty
    assert board.quote(USDINR)["last_price"] == "85.1234567"
    assert board.quote(USDINR)["symbol"] == str(USDINR), "an unnamed instrument is called by its token"


def test_only_the_newest_packet_is_written(board: Board) -> None:
    for n in range(5):
        board.note(encode_packet("ltp", INFY, last_price=100.0 + n), at_ms=AT_MS + n)
    assert len(board.write()) == 1
    assert board.quote(INFY)["last_price"] == "104.0"
    assert board.quote(INFY)["received_at"].startswith("2026-01-05T09:15:05.031")
    assert board.write() == [] and len(board.board) == 0


def test_an_instrument_is_written_twice_a_second_at_most(board: Board) -> None:
    board.note(encode_packet("ltp", INFY, last_price=100.0))
    board.write()
    board.note(encode_packet("ltp", INFY, last_price=101.0))
    board.now_ms += QUOTE_INTERVAL_MS - 1
    assert board.write() == []
    board.now_ms += 1
    assert len(board.write()) == 1
    assert board.quote(INFY)["last_price"] == "101.0"


def test_many_quotes_go_a_bounded_slice_at_a_time_and_all_in_the_end(board: Board) -> None:
    tokens = [n << 8 | 1 for n in range(1, 201)]
    board.note(*(encode_packet("ltp", token, last_price=5.0) for token in tokens))
    rounds = []
    while len(board.board):
        rounds.append(len(board.write()))
    assert rounds == [QUOTES_PER_CALL] * 3 + [200 - 3 * QUOTES_PER_CALL]
    assert all(board.quote(token)["last_price"] == "5.0" for token in tokens)


def test_a_packet_that_comes_while_its_slice_is_written_is_the_one_written(board: Board) -> None:
    tokens = [n << 8 | 1 for n in range(1, 101)]
    board.note(*(encode_packet("ltp", token, last_price=5.0) for token in tokens))
    first = board.write()
    waiting = [token for token in tokens if KEYS.quote(token) not in first]
    board.note(*(encode_packet("ltp", token, last_price=6.0) for token in waiting))
    board.write()
    assert all(board.quote(token)["last_price"] == "6.0" for token in waiting)


def test_what_redis_did_not_take_waits_and_gives_way_to_what_is_newer(board: Board) -> None:
    other = INFY + 256
    board.note(encode_packet("ltp", INFY, last_price=100.0), encode_packet("ltp", other, last_price=50.0))
    pipe = Pipe(board.client)
    assert len(board.board.queue(pipe, board.now_ms)) == 2
    board.note(encode_packet("ltp", INFY, last_price=101.0))
    board.board.retry()  # the connection was lost
    assert len(board.board) > 0
    assert len(board.write()) == 2
    assert board.quote(INFY)["last_price"] == "101.0"
    assert board.quote(other)["last_price"] == "50.0"
    assert board.write() == []
