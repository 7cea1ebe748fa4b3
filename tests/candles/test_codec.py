"""The text of ticks and rows: what is written reads back equal, and no bytes whatever break the readers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pkbrokers_redis.candles.codec import (
    NUMBER_BYTES_MAX,
    read_tick_entries,
    recover_ticks,
    tick_texts,
    write_number,
)
from pkbrokers_redis.candles.model import TICK_WIDTH, TickArray

INT32_MAX = 2**31 - 1
GOOD = b"[[408065,1500.05,5,1000,null,null,null,null,1767584700000]]"

tokens = st.integers(1, 2**32 - 1)
# Every price of Kite: a 32-bit integer over one of its three divisors.
wire_prices = st.tuples(st.integers(-INT32_MAX, INT32_MAX), st.sampled_from([100.0, 1e4, 1e7])).map(
    lambda pair: pair[0] / pair[1]
)
# And of crypto replays: at most 8 decimals (beyond 2²⁵ a float64 holds the eighth no more for sure).
decimals = st.decimals(-33_000_000, 33_000_000, places=8).map(float)
counts = st.integers(0, 2**32 - 1).map(float)
cells = st.one_of(wire_prices, decimals, counts, st.just(math.nan))
tick_rows = st.tuples(tokens.map(float), *[cells] * (TICK_WIDTH - 1)).map(list)


def batch(rows: list[list[float]]) -> TickArray:
    ticks = np.zeros((len(rows), 10))
    if rows:
        ticks[:, :TICK_WIDTH] = rows
    return ticks


def written(value: float) -> str:
    out = np.zeros(64, np.uint8)
    end = write_number(out, 0, value)
    assert not out[end:].any(), "it wrote behind its end"
    return out[:end].tobytes().decode()


def as_json(text: bytes) -> TickArray:
    """What the standard library reads in a text: the reference for all readers here."""
    rows = json.loads(text)
    numbers = [[math.nan if cell is None else float(cell) for cell in row] for row in rows]
    return np.array(numbers, float).reshape(len(rows), TICK_WIDTH)


# -- writing ---------------------------------------------------------------------------------------


@given(st.one_of(wire_prices, decimals, counts))
def test_a_number_reads_back_equal_and_as_short_as_python_writes_it(value: float) -> None:
    text = written(value)
    assert json.loads(text) == value
    assert len(text) <= NUMBER_BYTES_MAX
    digits = repr(value).lstrip("-").removesuffix(".0")
    if "e" not in digits:
        assert text.lstrip("-") == digits


@given(st.floats(allow_nan=False))
@example(-(2.0**63))
@example(2.0**63)
@example(math.inf)
@example(1e300)
@example(5e-324)
@example(123456789.12345679)
@example(99999999999.123456)
def test_any_float_becomes_json_that_is_near_it_or_null(value: float) -> None:
    text = written(value)
    assert len(text) <= NUMBER_BYTES_MAX
    read = json.loads(text)
    if abs(value) >= 9e18:
        assert read is None
    else:
        assert read == pytest.approx(value, rel=4e-16, abs=6e-13)


def test_nan_is_null() -> None:
    assert written(math.nan) == "null"


@given(st.lists(tick_rows, max_size=40), st.integers(1, 9))
def test_ticks_read_back_equal_shard_by_shard_in_their_order(rows: list[list[float]], shards: int) -> None:
    texts = tick_texts(batch(rows), shards)
    expected: dict[int, list[list[float]]] = {}
    for row in rows:
        expected.setdefault((int(row[0]) >> 8) % shards, []).append(row)
    assert [(shard, n) for shard, n, _ in texts] == [(s, len(expected[s])) for s in sorted(expected)]
    ticks, sizes, odd = read_tick_entries([text for _, _, text in texts])
    assert odd == [] and sizes == [n for _, n, _ in texts]
    in_order = [row for shard in sorted(expected) for row in expected[shard]]
    np.testing.assert_array_equal(ticks[:, :TICK_WIDTH], batch(in_order)[:, :TICK_WIDTH])
    for _, _, text in texts:
        assert json.loads(text), "redis-cli and any language must be able to read it"


# -- reading ticks ---------------------------------------------------------------------------------


@given(st.lists(st.lists(tick_rows, max_size=5), min_size=1, max_size=6), st.data())
def test_a_malformed_entry_among_good_ones_loses_only_itself(
    entries: list[list[list[float]]], data: st.DataObject
) -> None:
    texts = [(tick_texts(batch(rows), 1) or [(0, 0, b"[]")])[0][2] for rows in entries]
    bad = data.draw(st.integers(0, len(texts) - 1))
    damage = data.draw(
        st.sampled_from(
            [lambda t: t[:-1], lambda t: t + b"]", lambda t: b"", lambda t: b"{" + t, lambda t: t + t]
        )
    )
    texts[bad] = damage(texts[bad])
    ticks, sizes, odd = read_tick_entries(texts)
    assert odd == [bad] and sizes[bad] == 0
    good = [row for n, rows in enumerate(entries) if n != bad for row in rows]
    np.testing.assert_array_equal(ticks[:, :TICK_WIDTH], batch(good)[:, :TICK_WIDTH])


@given(st.lists(st.binary(max_size=200), max_size=5))
@example([b""])
@example([b"[" * 5000])
@example([b'[["\xff"]]', GOOD])
@example([b"[[1,-", b"[[1,nul", b"[[1,-]]", b"\x00[[", b"[[1,2,3]]"])
def test_any_bytes_are_read_without_an_error(texts: list[bytes]) -> None:
    ticks, sizes, odd = read_tick_entries([*texts, GOOD])
    assert len(ticks) == sum(sizes)
    assert sizes[-1] == 1 and ticks[-1, 0] == 408065
    for n in odd:
        rows, refused = recover_ticks(texts[n])
        assert rows.shape[1] == 10 and refused >= 0


@given(st.text(alphabet='[],-0123456789.eEnul"+ \t\n', max_size=80))
def test_text_that_almost_is_json_is_read_as_json_or_refused(text: str) -> None:
    raw = text.encode()
    ticks, sizes, odd = read_tick_entries([raw, GOOD])
    assert sizes[1] == 1
    if not odd:
        np.testing.assert_array_equal(ticks[:-1, :TICK_WIDTH], as_json(raw))


numbers = st.one_of(
    st.none(),
    st.integers(-(10**17), 10**17),
    st.floats(allow_nan=False, allow_infinity=False, min_value=-1e18, max_value=1e18),
)
styles = st.sampled_from([{}, {"separators": (",", ":")}, {"indent": 1}, {"separators": (" , ", ":")}])


@given(st.lists(st.lists(numbers, min_size=9, max_size=9), max_size=6), styles)
def test_whatever_json_a_writer_chooses_the_numbers_are_those_of_json(
    rows: list[list[Any]], style: dict[str, Any]
) -> None:
    """Exponents, 17 digits, white space: the fast reader or the careful one, never another number."""
    text = json.dumps(rows, **style).encode()
    ticks, _, odd = read_tick_entries([text])
    if odd:
        ticks, refused = recover_ticks(text)
        assert refused == 0
    np.testing.assert_array_equal(ticks[:, :TICK_WIDTH], as_json(text))


@pytest.mark.parametrize(
    ("text", "rows", "refused"),
    [
        (b"", 0, 1),
        (b"{}", 0, 1),
        (b"17", 0, 1),
        (b"[]", 0, 0),
        (b'[["\xff"]]', 0, 1),
        (b"[[1,1,1,1,1,1,1,1,1],7,[1],[1,1,1,1,1,1,1,1,true]]", 1, 3),
        (b"[[1,1,1,1,1,1,1,1,1e2],[1,1,1,1,1,1,1,1,1e309]]", 0, 1),
        (b"[[1,1,1,1,1,1,1,1," + b"9" * 400 + b"],[1,1,1,1,1,1,1,1,1]]", 1, 1),
        (b'[[1,1,1,1,1,1,1,1,"1"],[1e0,1,1,1,1,1,1,1,1]]', 1, 1),
        (b"[" * 100_000, 0, 1),
    ],
)
def test_valid_rows_of_a_malformed_entry_are_recovered(text: bytes, rows: int, refused: int) -> None:
    ticks, lost = recover_ticks(text)
    assert (len(ticks), lost) == (rows, refused)
