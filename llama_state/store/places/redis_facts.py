"""What a Redis or Valkey server says of itself, and what that means for a prefix store."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from statistics import median
from typing import Any, Final

from .redis_server import Server
from .remote import Advice

_PINGS: Final = 5
_SLOW_SECONDS: Final = 0.005
_FULL: Final = 0.9
_MIB: Final = 1 << 20


def advice(server: Server, *, ttl: int) -> list[Advice]:
    """Ask each node for its facts, and return what there is to say.

    Args:
        server: The server.
        ttl: Seconds that objects live; 0: for ever.

    Raises:
        OSError: The server cannot be asked.
    """
    found: list[Advice] = []
    nodes = server.nodes()
    for client in nodes:
        with server.told():
            facts = client.info()
            seconds = _round_trip(client)
            saves = facts.get("aof_enabled") or _snapshots(client)
        node = f"{facts.get('tcp_port', '')}: " if len(nodes) > 1 else ""
        said = [*_of_node(facts, seconds, ttl), *_of_place(facts, server)]
        if saves:
            text = "it also writes all to its disk, which a cache does not need: appendonly no"
            said.append(Advice("warning", text + ', and save ""'))
        found += [Advice(each.level, node + each.text) for each in said]
    if server.is_far and not server.encrypts:
        found.append(
            Advice(
                "warning", "the connection is not encrypted: use rediss:// outside of a safe net"
            )
        )
    return found


def _of_node(facts: Mapping[str, Any], seconds: float, ttl: int) -> Iterator[Advice]:
    name = "Valkey" if "valkey_version" in facts else "Redis"
    version = facts.get("valkey_version") or facts.get("redis_version", "?")
    used, most = int(facts.get("used_memory", 0)), int(facts.get("maxmemory", 0))
    room = f"of {most / _MIB:,.0f} MiB" if most else "and no limit"
    yield Advice(
        "ok",
        f"{name} {version}, {used / _MIB:,.0f} MiB used {room}, round trip {seconds * 1e3:.2f} ms",
    )
    yield _of_policy(str(facts.get("maxmemory_policy", "?")), used, most, ttl)
    if seconds > _SLOW_SECONDS:
        text = f"a round trip takes {seconds * 1e3:.1f} ms: short prompts are not worth it"
        yield Advice("warning", text)


def _of_policy(policy: str, used: int, most: int, ttl: int) -> Advice:
    """Return what the server does once it is full."""
    better = "set maxmemory-policy to allkeys-lru"
    if not most:
        return Advice(
            "warning",
            "it has no limit, and takes all memory of its machine: set maxmemory, and "
            "maxmemory-policy to allkeys-lru",
        )
    if policy == "noeviction":
        full = used > _FULL * most
        now = "refuses new objects" if full else "will refuse new objects once it is full"
        return Advice("error" if full else "warning", f"it {now} (noeviction): {better}")
    if policy.startswith("volatile-") and not ttl:
        return Advice(
            "error", f"with ttl=0 it has nothing to let go of ({policy}), and refuses: {better}"
        )
    if not policy.endswith("-lru"):
        return Advice("warning", f"{policy} breaks chains in their middle: {better}")
    return Advice("ok", f"it lets go of what was used least recently ({policy})")


def _of_place(facts: Mapping[str, Any], server: Server) -> Iterator[Advice]:
    if facts.get("role", "master") != "master":
        yield Advice("error", "it is a replica, and refuses to be written to: name its primary")
    if facts.get("cluster_enabled") and not server.cluster:
        yield Advice("error", "it is a node of a cluster: add cluster=1 to the URL")


def _round_trip(client: Any) -> float:
    took = []
    for _ in range(_PINGS):
        start = time.perf_counter()
        client.ping()
        took.append(time.perf_counter() - start)
    return median(took)


def _snapshots(client: Any) -> bool:
    """Return whether it writes snapshots; False where it does not tell."""
    from redis.exceptions import ResponseError

    with suppress(ResponseError):  # CONFIG is not for everybody
        return bool(client.config_get("save").get("save"))
    return False
