"""A Redis server for a module's tests, and places in it."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from llama_state.store.places.redis import RedisEngine, open_engine
from llama_state.store.places.remote import RemoteBackend
from tests.servers.redis_server import RedisServer, program, running

MIB = 1 << 20
DEADLINE = 1.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis"), program("redis")) as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    shared.empty()
    shared.client.config_set("maxmemory", 0)
    return shared


def engine(port: int, **options: object) -> RedisEngine:
    """An engine, with a short deadline."""
    given = {"deadline": f"{DEADLINE}s", **{name: str(value) for name, value in options.items()}}
    return open_engine(urlsplit(f"redis://127.0.0.1:{port}"), given)


def place(port: int, *, readonly: bool = False, **options: object) -> RemoteBackend:
    """A place on such an engine."""
    return RemoteBackend(engine(port, **options), 1 << 40, readonly=readonly)
