"""Text frames → events; hostile ones become `Invalid` and never an exception."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.kite.websocket import (
    EVIDENCE_CHARS_MAX,
    TEXT_KINDS,
    AppCode,
    InstrumentsMeta,
    Invalid,
    Notice,
    OrderUpdate,
    ServerError,
    Unknown,
    parse_text,
)


@pytest.mark.parametrize(
    ("frame", "event"),
    [
        (b'{"type":"order","data":{"order_id":"1"}}', OrderUpdate({"order_id": "1"})),
        (b'{"type":"error","data":"Invalid token"}', ServerError("Invalid token")),
        (b'{"type":"message","data":"Markets close early"}', Notice("Markets close early")),
        (b'{"type":"instruments_meta","data":{"count":86481,"etag":"W/x"}}', InstrumentsMeta(86481, "W/x")),
        (b'{"type":"app_code","timestamp":"2025-08-04"}', AppCode("2025-08-04")),
        (b'{"type":"app_code"}', AppCode(None)),
        (b'{"type":"fish","data":1}', Unknown("fish", '{"type":"fish","data":1}')),
    ],
)  # fmt: skip
def test_each_type_becomes_its_event(frame: bytes, event: object) -> None:
    assert parse_text(frame) == event
    assert parse_text(frame.decode()) == event


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"type":"\xff"}',
        b"[]",
        b'{"type":1}',
        b'{"type":"order","data":"text"}',
        b'{"type":"error","data":{}}',
        b'{"type":"message"}',
        b'{"type":"instruments_meta","data":[1]}',
        b"[" * 100_000,
    ],
)
def test_what_is_not_of_its_shape_is_invalid_and_keeps_a_bounded_evidence(frame: bytes) -> None:
    event = parse_text(frame)
    assert isinstance(event, Invalid)
    assert event.reason
    assert len(event.evidence) <= EVIDENCE_CHARS_MAX


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300)))
def test_no_frame_whatever_makes_it_raise(frame: bytes | str) -> None:
    assert parse_text(frame).kind in TEXT_KINDS
