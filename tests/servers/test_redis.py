"""Redis and Valkey pass the tests that every back end must pass: one server, and a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from llama_state.store.places.backend import Backend
from llama_state.store.places.guard import Guard
from llama_state.store.places.urls import open_place
from llama_state.testing.stores import BackendTests, name
from tests.servers.redis_server import RedisServer, cluster, kinds, program, running

DEADLINE = "1s"


@pytest.fixture(scope="module", params=kinds())
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis"), program(request.param)) as server:
        yield server


@pytest.fixture(scope="module", params=kinds())
def nodes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[RedisServer]]:
    with cluster(tmp_path_factory.mktemp("cluster"), program(request.param)) as servers:
        yield servers


def opened(url: str) -> Backend:
    """The place at a URL, without the guard that leaves it alone once it failed."""
    found = open_place(url, None, durable=False, readonly=False)
    assert isinstance(found, Guard)
    return found.backend


class Silent(BackendTests):
    """Servers that take connections, and answer nothing."""

    sizes = (*BackendTests.sizes, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, 17 << 20)
    servers: list[RedisServer]

    @contextmanager
    def unreachable(self, backend: Backend) -> Iterator[None]:
        with ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server.silent())
            yield


class TestOneServer(Silent):
    """Over TCP."""

    @pytest.fixture
    def backend(self, server: RedisServer) -> Backend:
        server.empty()
        self.servers = [server]
        return opened(server.url(deadline=DEADLINE))


class TestSocket(Silent):
    """Over a socket of this machine, in another database, nothing living for ever."""

    @pytest.fixture
    def backend(self, server: RedisServer) -> Backend:
        server.empty()
        self.servers = [server]
        return opened(
            f"unix://{server.socket}?db=3&ttl=0&piece=1MiB&deadline={DEADLINE}&prefix=a:b"
        )


class TestCluster(Silent):
    """Three primaries."""

    @pytest.fixture
    def backend(self, nodes: list[RedisServer]) -> Backend:
        for server in nodes:
            server.empty()
        self.servers = nodes
        return opened(nodes[0].url(cluster=1, deadline=DEADLINE))

    def test_all_nodes_have_some(self, backend: Backend, nodes: list[RedisServer]) -> None:
        """What was written is at all nodes, and found wherever it is."""
        self.test_entries(backend)
        for n in range(30):
            backend.put(name(str(n), str(n)), [b"x"])
        assert all(server.client.dbsize() for server in nodes)
