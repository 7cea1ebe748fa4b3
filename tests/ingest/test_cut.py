"""Feeds: cut alike everywhere, and cut again without moving who is there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.errors import SettingsError
from pkbrokers_redis.ingest.feeds import Feed, cut_feeds, list_id, recut
from pkbrokers_redis.kite.websocket import TOKENS_PER_CONNECTION_MAX


@given(tokens=st.lists(st.integers(1, 2**31), max_size=400), sessions=st.integers(1, 4))
def test_every_token_is_in_exactly_one_feed(tokens: list[int], sessions: int) -> None:
    feeds = cut_feeds(tokens, sessions)
    assert [token for feed in feeds for token in feed.tokens] == sorted(set(tokens))
    assert [feed.number for feed in feeds] == list(range(len(feeds)))


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (0, []),
        (1, [1]),
        (3_000, [3_000]),
        (3_001, [1_500, 1_501]),
        (7_500, [2_500] * 3),
        (9_000, [3_000] * 3),
    ],
)
def test_there_are_as_few_feeds_as_possible_and_they_are_even(count: int, sizes: list[int]) -> None:
    assert [len(feed.tokens) for feed in cut_feeds(range(count), 1)] == sizes


def test_the_order_and_repeats_of_a_list_do_not_matter() -> None:
    assert cut_feeds([3, 1, 2, 3], 1) == cut_feeds([1, 2, 3], 1)
    assert list_id([3, 1, 2, 3]) == list_id([1, 2, 3]) != list_id([1, 2])


def test_three_feeds_an_api_key() -> None:
    feeds = cut_feeds(range(20_000), 3)
    assert [feed.session for feed in feeds] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(("count", "sessions", "needed"), [(9_001, 1, 2), (27_001, 3, 4), (100_000, 2, 12)])
def test_too_many_instruments_say_how_many_keys_are_needed(count: int, sessions: int, needed: int) -> None:
    with pytest.raises(SettingsError, match=rf"{count:,}.* {needed} api keys"):
        cut_feeds(range(count), sessions)
    assert cut_feeds(range(count), needed)


# --- cutting again


def tokens_of(feeds: list[Feed]) -> list[tuple[int, ...]]:
    return [feed.tokens for feed in feeds]


@given(
    st.sets(st.integers(1, 20_000), max_size=7_000),
    st.sets(st.integers(1, 20_000), max_size=300),
    st.sets(st.integers(1, 20_000), max_size=300),
)
def test_who_stays_keeps_its_feed(before: set[int], added: set[int], removed: set[int]) -> None:
    first = cut_feeds(before, 3)
    wanted = (before | added) - removed
    second = recut(tokens_of(first), wanted, 3)
    home = {token: feed.number for feed in first for token in feed.tokens}
    if before & wanted:
        assert all(home.get(token, n) == n for n, feed in enumerate(second) for token in feed.tokens)
    assert sorted(token for feed in second for token in feed.tokens) == sorted(wanted)
    assert all(len(feed.tokens) <= TOKENS_PER_CONNECTION_MAX for feed in second)
    assert tokens_of(recut(tokens_of(second), wanted, 3)) == tokens_of(second)


def test_what_is_new_goes_where_most_room_is() -> None:
    feeds = recut([[1, 2, 3], [4]], [1, 2, 3, 4, 5, 6, 7], 1)
    assert tokens_of(feeds) == [(1, 2, 3, 7), (4, 5, 6)]


def test_a_feed_is_opened_only_when_all_are_full() -> None:
    full = list(range(1, 3_001))
    assert [len(feed.tokens) for feed in recut([full], [*full, 9_000], 1)] == [3_000, 1]
    assert [len(feed.tokens) for feed in recut([full[1:]], [*full[1:], 9_000], 1)] == [3_000]


def test_an_empty_last_feed_is_closed_and_an_inner_one_waits_for_the_next() -> None:
    assert tokens_of(recut([[1], [2], [3]], [1, 2], 1)) == [(1,), (2,)]
    assert tokens_of(recut([[1], [2], [3]], [1, 3], 1)) == [(1,), (), (3,)]
    assert tokens_of(recut([[1], [], [3]], [1, 3, 4], 1)) == [(1,), (4,), (3,)]


@pytest.mark.parametrize(
    "odd",
    [[], [[1], [1, 2]], [list(range(1, 3_002))], [[1], [2], [3], [4]], [[77]]],
    ids=["none", "a token twice", "too long", "too many", "strangers"],
)
def test_a_cut_that_cannot_be_kept_is_made_anew(odd: list[list[int]]) -> None:
    wanted = range(1, 3_002) if odd and len(odd[0]) > 3_000 else [1, 2, 3, 4]
    assert recut(odd, wanted, 1) == cut_feeds(wanted, 1)


def test_cutting_again_knows_the_limit_too() -> None:
    with pytest.raises(SettingsError, match="9,001"):
        recut([[1]], range(1, 9_002), 1)
