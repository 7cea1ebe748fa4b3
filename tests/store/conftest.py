"""A real cluster for the tests that need one: three masters on loopback, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from pkbrokers_redis.settings import Settings, load_settings
from pkbrokers_redis.store.connect import connect
from tests.topologies import Cluster, running_cluster


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    """Three masters, empty."""
    for number in range(len(_cluster.ports)):
        with _cluster.node(number) as node:
            node.flushall()
            node.function_flush("SYNC")
    return _cluster


@pytest.fixture
def cluster_settings(cluster: Cluster) -> Settings:
    """Default settings on the cluster."""
    return load_settings(redis_url=cluster.url)


@pytest.fixture
def cluster_client(cluster_settings: Settings) -> Iterator[redis.Redis]:
    """A worker's client of the cluster."""
    with connect(cluster_settings) as client:
        yield client
