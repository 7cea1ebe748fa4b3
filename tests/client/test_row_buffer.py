"""The row buffers of a mirror: the last rows are contiguous, whatever was put in, and views stand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pkbrokers_redis.client.mirror_rows import Floats, RowBuffer


def row(start: float, close: float = 1.0) -> Floats:
    return np.array([start, 1, 1, 1, close, 1, np.nan, 1], np.float64)


def starts(buffer: RowBuffer, count: int = 99, include_current: bool = False) -> list[float]:
    return buffer.last(count, include_current)[0][:, 0].tolist()


def test_rows_are_appended_and_the_oldest_are_dropped() -> None:
    buffer = RowBuffer(3)
    for start in range(1, 50):
        buffer.add(row(start), 0)
        assert starts(buffer) == list(range(max(1, start - 2), start + 1))
    assert starts(buffer, 2) == [48, 49] and starts(buffer, 0) == []


def test_a_view_is_no_copy_and_does_not_change_when_rows_are_added() -> None:
    buffer = RowBuffer(4)
    for start in range(1, 5):
        buffer.add(row(start), 0)
    view = buffer.last(4)[0]
    assert view.flags.c_contiguous and np.shares_memory(view, buffer.last(2)[0])
    for start in range(5, 60):
        buffer.add(row(start), 0)
    assert view[:, 0].tolist() == [1, 2, 3, 4]


def test_an_amended_row_is_replaced_in_place() -> None:
    buffer = RowBuffer(3, np.array([row(1), row(2), row(3)]), np.array([1, 0, 0], np.int8))
    version = buffer.version
    buffer.add(row(2, 7.0), 2)
    assert starts(buffer) == [1, 2, 3] and buffer.last(3)[0][1, 4] == 7
    assert buffer.last(3)[1].tolist() == [1, 2, 0] and buffer.version > version


def test_a_row_between_two_is_inserted_and_one_older_than_all_is_dropped() -> None:
    buffer = RowBuffer(4, np.array([row(1), row(5), row(6)]))
    held = buffer.last(3)[0]
    buffer.add(row(3), 3)
    assert starts(buffer) == [1, 3, 5, 6] and held[:, 0].tolist() == [1, 5, 6]
    buffer.add(row(4), 3)
    assert starts(buffer) == [3, 4, 5, 6]
    buffer.add(row(2), 3)
    assert starts(buffer) == [3, 4, 5, 6]


def test_the_current_row_is_last_and_becomes_a_completed_row() -> None:
    buffer = RowBuffer(3, np.array([row(1), row(2)]))
    buffer.set_current(row(3, 10))
    assert (
        starts(buffer) == [1, 2]
        and starts(buffer, 99, True) == [1, 2, 3]
        and starts(buffer, 2, True) == [2, 3]
    )
    buffer.set_current(row(3, 11))
    assert buffer.last(1, True)[0][0, 4] == 11
    buffer.add(row(3, 12), 0)  # announced before we looked again
    assert starts(buffer, 99, True) == starts(buffer) == [1, 2, 3] and buffer.last(1)[0][0, 4] == 12


def test_a_current_row_with_a_successor_stays_until_its_announcement_replaces_it() -> None:
    buffer = RowBuffer(3, np.array([row(1)]))
    buffer.set_current(row(2, 10))
    buffer.set_current(row(3, 20))
    assert starts(buffer, 99, True) == [1, 2, 3]
    buffer.add(row(2, 15), 0)
    assert buffer.last(2, True)[0][:, 4].tolist() == [15, 20]
    buffer.set_current(None)
    assert starts(buffer, 99, True) == [1, 2, 3]


def test_an_announcement_older_than_the_current_row_is_inserted_before_it() -> None:
    buffer = RowBuffer(9, np.array([row(1)]))
    buffer.set_current(row(4, 40))
    buffer.add(row(3, 30), 0)
    assert buffer.last(9, True)[0][:, 4].tolist() == [1, 30, 40]


def test_a_stale_current_row_is_left_out() -> None:
    buffer = RowBuffer(3, np.array([row(1), row(2)]))
    buffer.set_current(row(2, 99))
    assert starts(buffer, 99, True) == [1, 2] and buffer.last(1, True)[0][0, 4] == 1


steps = st.lists(
    st.tuples(st.sampled_from(["add", "current"]), st.integers(1, 30), st.integers(0, 9)), max_size=80
)


@given(keep=st.integers(1, 6), steps=steps)
def test_starts_rise_and_the_last_row_of_a_start_counts_in_any_order_of_calls(
    keep: int, steps: list[tuple[str, int, int]]
) -> None:
    buffer = RowBuffer(keep)
    newest: dict[float, float] = {}
    for kind, start, close in steps:
        if kind == "add":
            buffer.add(row(start, close), 0)
            newest[start] = close
        else:
            buffer.set_current(row(start, close))
            if start in buffer.last(99, True)[0][len(buffer.last(99)[0]) :, 0].tolist():
                newest[start] = close
        shown = buffer.last(99, True)[0]
        assert (np.diff(shown[:, 0]) > 0).all()
        assert len(buffer.last(99)[0]) <= keep
        assert {values[0]: values[4] for values in shown.tolist()}.items() <= newest.items()
