"""Following: every announcement once, in any process, and the truth about those that were missed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import redis

from pkbrokers_redis.client import follow as follow_module
from pkbrokers_redis.client.follow import FollowCore, ShardPosition, parse_position
from pkbrokers_redis.client.store import CandleStore
from pkbrokers_redis.errors import PkbError, UnknownInterval, WrongKeyType
from pkbrokers_redis.settings import Settings
from tests.client.contract import INFY, NIFTY, OPEN_S, RELIANCE, announce, row, tick_frame, write_master


@pytest.fixture
def store(client: redis.Redis, settings: Settings) -> CandleStore:
    write_master(client, settings.keys)
    return CandleStore(settings, client)


def say(store: CandleStore, number: int, token: int = INFY, interval: str = "1m", rev: int = 0) -> None:
    text = row(OPEN_S + 60 * number, 100 + number)
    announce(store.client, store.keys, token, interval, text, rev, symbol=f"S{token}")


def numbers(found: list[follow_module.ClosedCandle]) -> list[int]:
    return [int(closed.candle.close - 100) for closed in found]


def test_a_follower_without_a_position_starts_now(store: CandleStore) -> None:
    say(store, 0)
    follower = store.follow(block_seconds=0)
    say(store, 1)
    say(store, 2, RELIANCE, rev=3)
    first, second = sorted(follower, key=lambda closed: closed.rev)  # one millisecond, two shards: any order
    assert (first.token, first.symbol, first.interval, first.rev) == (INFY, f"S{INFY}", "1m", 0)
    assert first.candle.start == OPEN_S + 60 and second.rev == 3 and second.token == RELIANCE


def test_a_follower_may_start_before_any_stream_exists(store: CandleStore) -> None:
    follower = store.follow(block_seconds=0)
    assert list(follower) == []
    say(store, 5)
    assert numbers(list(follower)) == [5]


def test_a_waiting_follower_returns_a_new_announcement(store: CandleStore) -> None:
    follower = store.follow(block_seconds=20)
    thread = threading.Thread(target=say, args=(store, 7))  # redis-py's pool gives it its own connection
    thread.start()
    assert numbers([next(follower)]) == [7]
    thread.join()


def test_shards_merge_in_the_order_of_time(store: CandleStore) -> None:
    follower = store.follow(position="0", block_seconds=0)
    for i in range(30):
        client_ids = {"token": (i % 8 + 1) << 8 | 1, "interval": "1m", "row": row(OPEN_S, 100 + i), "rev": 0}
        shard = store.keys.shard_of(client_ids["token"])
        store.client.xadd(store.keys.closed(shard), client_ids, id=f"{1000 + i}-0")
    assert numbers(list(follower)) == list(range(30))


def test_a_position_continues_in_another_process_without_loss_or_repeat(
    store: CandleStore, settings: Settings, client: redis.Redis
) -> None:
    for i in range(20):
        say(store, i, [INFY, RELIANCE, NIFTY][i % 3])
    first = store.follow(position="0", block_seconds=0)
    got = [next(first) for _ in range(7)]
    for _ in range(3):
        again = CandleStore(settings, client).follow(position=got[-1].position, block_seconds=0)
        got += [next(again) for _ in range(2)]
        assert again.position == got[-1].position
    got += list(CandleStore(settings, client).follow(position=got[-1].position, block_seconds=0))
    assert sorted(numbers(got)) == list(range(20))
    assert len(got[-1].position) < 200


def test_filtered_candles_still_move_the_position(store: CandleStore) -> None:
    follower = store.follow(["INFY", "NIFTY 50"], ["1m", "1h"], position="0", block_seconds=0)
    say(store, 1, INFY)
    say(store, 2, INFY, "5m")
    say(store, 3, RELIANCE)
    say(store, 4, NIFTY, "60m")
    say(store, 5, INFY, "5m")
    assert sorted(numbers(list(follower))) == [1, 4]
    rest = store.follow(["INFY", "NIFTY 50"], position=follower.position, block_seconds=0)
    assert list(rest) == []


def test_an_unknown_interval_is_an_error(store: CandleStore) -> None:
    with pytest.raises(UnknownInterval):
        store.follow(intervals=["7m"])


def test_what_was_trimmed_unread_is_counted_exactly(store: CandleStore) -> None:
    for i in range(10):
        say(store, i)
    reader = store.follow(position="0", block_seconds=0)
    position = [next(reader) for _ in range(4)][-1].position
    stream = store.keys.closed(store.keys.shard_of(INFY))
    store.client.xtrim(stream, maxlen=6, approximate=False)  # exactly what was read
    assert store.follow(position=position, block_seconds=0).missed == 0
    store.client.xtrim(stream, maxlen=3, approximate=False)
    again = store.follow(position=position, block_seconds=0)
    assert again.missed == 3
    assert numbers(list(again)) == [7, 8, 9]
    assert store.follow(position=again.position, block_seconds=0).missed == 0


def test_a_slow_reader_counts_what_it_missed(store: CandleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FollowCore, "entries_per_read", 5)
    follower = store.follow(block_seconds=0)
    for i in range(20):
        say(store, i)
    got = [next(follower)]  # five are read, one is given out
    stream = store.keys.closed(store.keys.shard_of(INFY))
    store.client.xtrim(stream, maxlen=8, approximate=False)
    got += list(follower)
    assert numbers(got) == [0, 1, 2, 3, 4, *range(12, 20)]
    assert follower.missed == 7


def test_a_reader_with_a_small_pending_batch_counts_what_it_missed_once_caught_up(
    store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FollowCore, "entries_per_read", 5)
    follower = store.follow(block_seconds=0)
    say(store, 0)
    got = [next(follower)]
    for i in range(1, 30):
        say(store, i)
    store.client.xtrim(store.keys.closed(store.keys.shard_of(INFY)), maxlen=12, approximate=False)
    got += list(follower)
    assert numbers(got) == [0, *range(18, 30)]
    assert follower.missed == 17


def test_a_recreated_stream_is_read_from_its_beginning(store: CandleStore) -> None:
    for i in range(5):
        say(store, i)
    position = [*store.follow(position="0", block_seconds=0)][-1].position
    stream = store.keys.closed(store.keys.shard_of(INFY))
    store.client.delete(stream)
    fields = {"token": INFY, "interval": "1m", "row": row(OPEN_S, 142)}
    store.client.xadd(stream, fields, id="5-0")
    assert numbers(list(store.follow(position=position, block_seconds=0))) == [42]


def test_a_stream_recreated_with_later_ids_is_read_from_its_beginning(store: CandleStore) -> None:
    for i in range(20):
        say(store, i)
    position = [*store.follow(position="0", block_seconds=0)][-1].position
    stream = store.keys.closed(store.keys.shard_of(INFY))
    store.client.delete(stream)
    for i in range(12):
        say(store, 100 + i)  # with later ids than the position's
    store.client.xtrim(stream, maxlen=5, approximate=False)
    follower = store.follow(position=position, block_seconds=0)
    assert numbers(list(follower)) == [107, 108, 109, 110, 111]
    assert (follower.missed, follower.restarts) == (7, 1)
    again = store.follow(position=follower.position, block_seconds=0)
    assert (list(again), again.missed, again.restarts) == ([], 0, 0)


def test_a_failover_that_lost_entries_repeats_no_old_ones(store: CandleStore) -> None:
    for i in range(20):
        say(store, i)
    client, stream = store.client, store.keys.closed(store.keys.shard_of(INFY))
    position = [*store.follow(position="0", block_seconds=0)][-1].position
    kept: Any = client.xrange(stream)[10:17]
    client.delete(stream)
    for entry_id, fields in kept:
        client.xadd(stream, fields, entry_id)
    client.execute_command("XSETID", stream, kept[-1][0], "ENTRIESADDED", 17)
    say(store, 20)
    follower = store.follow(position=position, block_seconds=0)
    assert (numbers(list(follower)), follower.missed, follower.restarts) == ([20], 0, 0)


def test_malformed_entries_are_counted_and_skipped(store: CandleStore) -> None:
    stream = store.keys.closed(store.keys.shard_of(INFY))
    follower = store.follow(block_seconds=0)
    store.client.xadd(stream, {"what": "ever"})
    store.client.xadd(stream, {"token": "x", "interval": "1m", "row": row(OPEN_S)})
    store.client.xadd(stream, {"token": INFY, "interval": "1m", "row": "[1,2"})
    say(store, 9)
    assert numbers(list(follower)) == [9]
    assert follower.rows_refused == 3


def test_a_stream_of_another_type_is_named(store: CandleStore) -> None:
    store.client.set(store.keys.closed(0), "mine")
    with pytest.raises(WrongKeyType, match=r"pkb:\{0\}:closed holds a string"):
        store.follow()
    with pytest.raises(WrongKeyType):
        store.last_closed(5)


@pytest.mark.parametrize(
    "text",
    ["", "x", "a.b.c", ";;;;;;;", "1.1.1;2", "!.0.0;" * 8]
    + [";".join([part] + ["..0"] * 7) for part in ("-1.0.0", "..-1", ".-z.0", "z" * 30 + "..0")],
)
def test_a_malformed_position_is_refused(store: CandleStore, text: str) -> None:
    with pytest.raises(PkbError, match="position"):
        store.follow(position=text)


def test_a_position_of_other_shards_is_refused() -> None:
    text = ";".join([str(ShardPosition((1, 2), 3))] * 4)
    assert parse_position(text, 4) == [ShardPosition((1, 2), 3)] * 4
    with pytest.raises(PkbError, match="4 shards, this one has 8"):
        parse_position(text, 8)


def test_last_closed_of_all_shards_is_newest_last(
    store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "ENTRIES_PER_PAGE", 4)
    for i in range(20):
        token = [INFY, RELIANCE, NIFTY][i % 3]
        fields = {"token": token, "interval": "5m" if i % 5 == 0 else "1m", "row": row(OPEN_S, 100 + i)}
        store.client.xadd(store.keys.closed(store.keys.shard_of(token)), fields, id=f"{i + 1}-0")
    assert numbers(store.last_closed(4)) == [16, 17, 18, 19]
    assert numbers(store.last_closed(3, ["5m"])) == [5, 10, 15]
    assert store.last_closed(0) == []


def test_followed_ticks_are_the_instruments_own(store: CandleStore) -> None:
    shard = store.keys.shard_of(INFY)
    tick_frame(store.client, store.keys, shard, [[INFY, 1, 1, 1, None, None, None, None, 1]])
    found = []
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.wait(0.005):
            number += 1
            other = [INFY + 1, 1, 1, 1, None, None, None, None, 1]
            tick_frame(
                store.client, store.keys, shard, [other, [INFY, 1, 1, number, None, None, None, None, 5]]
            )

    thread = threading.Thread(target=write)
    thread.start()
    for tick in store.follow_ticks("INFY", block_seconds=20):
        found.append(tick.volume)
        if len(found) == 5:
            break
    stop.set()
    thread.join()
    assert found == list(range(found[0], found[0] + 5))


def test_the_async_follower_returns_the_same_candles_and_positions(
    store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FollowCore, "entries_per_read", 5)
    for i in range(20):
        say(store, i, [INFY, RELIANCE, NIFTY][i % 3])
    sync = list(store.follow(position="0", block_seconds=0))

    async def follow(position: str, most: int) -> list[follow_module.ClosedCandle]:
        async with store.follow_async(position=position, block_seconds=0) as follower:
            return [closed async for closed, _ in _numbered(follower, most)]

    first = asyncio.run(follow("0", 7))
    rest = asyncio.run(follow(first[-1].position, 99))
    assert sorted(numbers(first + rest)) == sorted(numbers(sync)) == list(range(20))
    assert list(store.follow(position=rest[-1].position, block_seconds=0)) == []


async def _numbered(follower, most):  # type: ignore[no-untyped-def]
    count = 0
    async for closed in follower:
        count += 1
        yield closed, count
        if count == most:
            return


def test_a_waiting_async_follower_returns_a_new_announcement_that_passes_its_filters(
    store: CandleStore,
) -> None:
    async def follow() -> follow_module.ClosedCandle:
        async with store.follow_async(["INFY"], ["1m"], block_seconds=20) as follower:
            waiting = asyncio.create_task(anext(follower))
            await asyncio.to_thread(say, store, 1, RELIANCE)
            await asyncio.to_thread(say, store, 2, INFY, "5m")
            await asyncio.to_thread(say, store, 3)
            return await waiting

    assert numbers([asyncio.run(follow())]) == [3]


def test_an_async_follower_counts_what_was_trimmed_unread(store: CandleStore) -> None:
    for i in range(10):
        say(store, i)
    reader = store.follow(position="0", block_seconds=0)
    position = [next(reader) for _ in range(4)][-1].position
    store.client.xtrim(store.keys.closed(store.keys.shard_of(INFY)), maxlen=3, approximate=False)

    async def follow() -> tuple[int, list[int]]:
        async with store.follow_async(position=position, block_seconds=0) as follower:
            return follower.missed, numbers([closed async for closed in follower])

    assert asyncio.run(follow()) == (3, [7, 8, 9])


def test_an_async_follower_names_a_stream_of_another_type(store: CandleStore) -> None:
    store.client.set(store.keys.closed(0), "mine")

    async def follow() -> None:
        async with store.follow_async():
            pass

    with pytest.raises(WrongKeyType, match=r"pkb:\{0\}:closed holds a string"):
        asyncio.run(follow())


def test_a_reader_that_keeps_up_still_checks_for_losses(
    store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FollowCore, "check_seconds", -1)
    follower = store.follow(block_seconds=0)
    for i in range(9):
        say(store, i)
    store.client.xtrim(store.keys.closed(store.keys.shard_of(INFY)), maxlen=2, approximate=False)
    assert numbers(list(follower)) == [7, 8] and follower.missed == 7


def test_an_async_reader_that_keeps_up_still_checks_for_losses(
    store: CandleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FollowCore, "check_seconds", -1)

    async def follow() -> tuple[list[int], int]:
        async with store.follow_async(block_seconds=0) as follower:
            for i in range(9):
                say(store, i)
            store.client.xtrim(store.keys.closed(store.keys.shard_of(INFY)), maxlen=2, approximate=False)
            return numbers([closed async for closed in follower]), follower.missed

    assert asyncio.run(follow()) == ([7, 8], 7)


def test_a_cancelled_read_of_an_async_follower_loses_nothing(store: CandleStore) -> None:
    async def follow() -> list[int]:
        async with store.follow_async(block_seconds=20) as follower:
            waiting = asyncio.create_task(anext(follower))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.to_thread(say, store, 1)
            await asyncio.to_thread(say, store, 2)
            return numbers([await anext(follower), await anext(follower)])

    assert asyncio.run(follow()) == [1, 2]
