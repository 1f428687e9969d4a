"""What a Redis server's settings mean for a store, and what a URL can say."""

from __future__ import annotations

import sys

import pytest

from llama_state.errors import UnsupportedError
from llama_state.store.places.urls import open_place
from tests.servers.redis_places import MIB, engine, server, shared
from tests.servers.redis_server import RedisServer

__all__ = ["server", "shared"]


@pytest.mark.parametrize(
    ("policy", "memory", "ttl", "level", "text"),
    [
        ("noeviction", 0, 1, "warning", "it has no limit"),
        ("noeviction", 64 * MIB, 1, "warning", "will refuse"),
        ("noeviction", 1, 1, "error", "refuses new objects"),
        ("allkeys-lru", 64 * MIB, 0, "ok", "used least recently"),
        ("volatile-lru", 64 * MIB, 1, "ok", "used least recently"),
        ("volatile-lru", 64 * MIB, 0, "error", "nothing to let go of"),
        ("allkeys-random", 64 * MIB, 1, "warning", "breaks chains"),
    ],
)
def test_advice(
    server: RedisServer, policy: str, memory: int, ttl: int, level: str, text: str
) -> None:
    """What the server does when it is full is said, and what to set."""
    server.client.config_set("maxmemory-policy", policy)
    server.client.config_set("maxmemory", memory)
    found = engine(server.port, ttl=ttl).advise()
    assert [each.level for each in found if text in each.text] == [level], found
    assert found[0].level == "ok"
    assert found[0].text.startswith(("Redis 7", "Redis 8", "Valkey"))


def test_advice_on_disks(server: RedisServer) -> None:
    """A server that writes all to its disk too is told on."""
    assert not [each for each in engine(server.port).advise() if "disk" in each.text]
    server.client.config_set("save", "3600 1")
    assert [each for each in engine(server.port).advise() if "disk" in each.text]
    server.client.config_set("save", "")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://h?nonsense=1", "'nonsense' is not known: cluster, db, deadline, piece, prefix,"),
        ("redis://h?piece=5MiB", "1MiB to 4MiB"),
        ("redis://h?ttl=soon", "is no time"),
        ("redis://h?prefix=a{b}", "prefix"),
        ("redis://h/one", "must be a number"),
        ("redis://h/1?cluster=1", "no databases"),
        ("redis://h?ssl_ca_certs=/x", "is for rediss://"),
        ("unix://?db=1", "unix:///run/redis.sock"),
        ("redis://h?deadline=0", "deadline=0"),
        ("redis://h?size=1GiB", "takes no capacity"),
    ],
)
def test_urls_that_cannot_be(url: str, text: str) -> None:
    """What a URL must not say is said when the store is opened."""
    with pytest.raises(ValueError, match=text.replace("(", r"\(").replace("?", r"\?")):
        open_place(url, None, durable=False, readonly=False)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where redis is not installed the error says how to."""
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(UnsupportedError, match=r"pip install -e '\.\[redis\]'"):
        engine(1)
