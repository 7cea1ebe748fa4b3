"""What clients ask of the simulator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.simulator.subscriptions import (
    MODE_FULL,
    InvalidRequest,
    SetMode,
    Subscribe,
    Unsubscribe,
    parse_request,
)


@pytest.mark.parametrize(
    ("message", "request_"),
    [
        ('{"a":"subscribe","v":[408065,884737]}', Subscribe([408065, 884737])),
        ('{"a":"unsubscribe","v":[408065]}', Unsubscribe([408065])),
        (b'{"a":"mode","v":["full",[408065,408065]]}', SetMode(MODE_FULL, [408065])),
        ('{"a":"subscribe","v":["408065",true,null,1.5,7]}', Subscribe([7])),
    ],
)
def test_kites_requests_are_parsed(message: str | bytes, request_: object) -> None:
    assert parse_request(message) == request_


@pytest.mark.parametrize(
    "message",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        '{"a":"dance","v":[1]}',
        '{"a":"subscribe"}',
        '{"a":"subscribe","v":7}',
        '{"a":"mode","v":["full"]}',
        '{"a":"mode","v":[{},[1]]}',
        '{"a":"mode","v":["depth",[1]]}',
        '{"a":["subscribe"],"v":[1]}',
        b"\xff",
        "[" * 50_000,
    ],
)
def test_any_other_message_is_an_invalid_request_with_a_reason(message: str | bytes) -> None:
    request = parse_request(message)
    assert isinstance(request, InvalidRequest)
    assert request.reason


@given(st.one_of(st.binary(max_size=100), st.text(max_size=100)))
def test_no_message_makes_the_parser_raise(message: str | bytes) -> None:
    parse_request(message)
