"""A real Sentinel set behind `redis+sentinel://`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import redis

from pkbrokers_redis.cli.redis_cli import cli_arguments
from pkbrokers_redis.errors import RedisUnavailable
from pkbrokers_redis.settings import load_settings
from pkbrokers_redis.store.cluster import Pipe
from pkbrokers_redis.store.connect import connect, describe
from pkbrokers_redis.store.streams import StreamReader
from tests.store.test_connect import SECRET, refusal
from tests.support import wait_until
from tests.topologies import SERVICE, SentinelSet, running_sentinels

pytestmark = pytest.mark.xdist_group("sentinel")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelSet]:
    """A set whose Sentinels want a password, and do nothing of their own accord."""
    folder = tmp_path_factory.mktemp("sentinel")
    with running_sentinels(folder, sentinel_password=SECRET, down_after_ms=60_000) as found:
        yield found


def url_of(found: SentinelSet, service: str = SERVICE, query: str = f"?sentinel_password={SECRET}") -> str:
    servers = ",".join(f"127.0.0.1:{port}" for port in (1, *found.sentinel_ports))  # the first is down
    return f"redis+sentinel://{servers}/{service}/2{query}"


def test_master_is_found_despite_an_unavailable_sentinel_and_no_password_is_described(
    guarded: SentinelSet,
) -> None:
    settings = load_settings(redis_url=url_of(guarded))
    port = guarded.current_port(SECRET)
    with connect(settings) as client, redis.Redis(port=port, db=2) as master:
        client.set("a", "1")
        assert client.get("a") == master.get("a") == b"1"
        pipe = Pipe(client)
        pipe.add("XADD", "s", "7-0", "b", "2")
        assert pipe.execute() == [b"7-0"]
        assert StreamReader(client).read({"s": "0-0"}, 10, 10)[0][1] == [(b"7-0", {b"b": b"2"})]
        options, secrets = cli_arguments(client)
        assert options[:4] == ["-h", "127.0.0.1", "-p", str(port)] and not secrets
    assert SECRET not in describe(settings) and SERVICE in describe(settings)


def test_unknown_service_is_one_line(guarded: SentinelSet) -> None:
    error = refusal(url_of(guarded, service="nobody"))
    assert isinstance(error, RedisUnavailable) and "nobody" in str(error)


def test_sentinels_that_require_a_password_are_one_line(guarded: SentinelSet) -> None:
    url = url_of(guarded, query="").replace("127.0.0.1:1,", "")
    for query in ("", f"?sentinel_password={SECRET}x"):
        assert "sentinel_password" in refusal(url + query).hint


def test_unreachable_sentinels_are_one_line() -> None:
    error = refusal(f"redis+sentinel://:{SECRET}@127.0.0.1:1,127.0.0.1:2/{SERVICE}")
    assert isinstance(error, RedisUnavailable) and "no Sentinel answers" in str(error)


def test_after_a_failover_the_next_commands_go_to_the_new_master(guarded: SentinelSet) -> None:
    """Asked for, not forced: the old master lives on as a replica, and drops us."""
    new_port = ({guarded.master_port, guarded.replica_port} - {guarded.current_port(SECRET)}).pop()
    with connect(load_settings(redis_url=url_of(guarded))) as client:
        client.set("a", "1")
        with redis.Redis(port=guarded.sentinel_ports[0], password=SECRET) as sentinel:
            wait_until(lambda: _accepts(sentinel), what="the Sentinel to agree to a failover")

        numbers = itertools.count()

        def arrives() -> bool:
            """The old master takes a few writes more, which are lost: the workers notice that and resend."""
            number = str(next(numbers))
            try:
                client.set("a", number)
            except redis.ConnectionError:
                return False
            with redis.Redis(port=new_port, db=2) as new:
                return new.role()[0] == b"master" and new.get("a") == number.encode()

        wait_until(lambda: guarded.believed_ports(SECRET) == {new_port}, timeout_seconds=30)
        wait_until(arrives, timeout_seconds=30)


def _accepts(sentinel: redis.Redis) -> bool:
    try:
        return bool(sentinel.execute_command("SENTINEL FAILOVER", SERVICE))
    except redis.ResponseError:  # NOGOODSLAVE: it has not looked at the replica yet
        return False
