"""Text frames → events; malformed ones become `invalid` events and never an exception."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.kite.protocol import EVIDENCE_CHARS_MAX, TextEvent, parse_text


@pytest.mark.parametrize(
    ("frame", "event"),
    [
        (b'{"type":"order","data":{"order_id":"1"}}', TextEvent("order", {"order_id": "1"})),
        (b'{"type":"error","data":"Invalid token"}', TextEvent("error", "Invalid token")),
        (b'{"type":"message","data":"Markets close early"}', TextEvent("message", "Markets close early")),
        (b'{"type":"instruments_meta","data":{"count":7}}', TextEvent("instruments_meta", {"count": 7})),
        (b'{"type":"app_code","timestamp":"2025-08-04"}', TextEvent("app_code", "2025-08-04")),
        (b'{"type":"app_code"}', TextEvent("app_code")),
        (b'{"type":"fish","data":1}', TextEvent("unknown", "fish", evidence='{"type":"fish","data":1}')),
    ],
)  # fmt: skip
def test_every_type_becomes_its_event(frame: bytes, event: object) -> None:
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
def test_a_malformed_frame_is_invalid_and_keeps_bounded_evidence(frame: bytes) -> None:
    event = parse_text(frame)
    assert event.kind == "invalid"
    assert event.reason
    assert len(event.evidence) <= EVIDENCE_CHARS_MAX


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300)))
def test_no_frame_raises(frame: bytes | str) -> None:
    assert isinstance(parse_text(frame), TextEvent)
