"""The keys of a prefix store, as arguments of commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from .parsers import add_key_file, positive, read_key
from .problems import CommandError

if TYPE_CHECKING:
    from ..store.places.backend import Backend
    from ..store.trust import Trust


class Keys(TypedDict):
    """As :class:`llama_state.PrefixStore` takes them."""

    key: bytes | None
    shared_key: bytes | None
    shared_tokens: int
    encrypt: bool


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`keys` reads."""
    add_key_file(parser, "of the store")
    parser.add_argument(
        "--shared-key-file", metavar="KEY", help="a file whose bytes are the key of the shared part"
    )
    parser.add_argument(
        "--shared-tokens", type=positive, default=0, metavar="N", help="tokens of the shared part"
    )
    parser.add_argument("--encrypt", action="store_true", help="the store is encrypted")


def keys(options: argparse.Namespace) -> Keys:
    """Return what the arguments say."""
    shared = options.shared_key_file
    return {
        "key": read_key(options),
        "shared_key": None if shared is None else Path(shared).read_bytes(),
        "shared_tokens": options.shared_tokens,
        "encrypt": options.encrypt,
    }


def trust(options: argparse.Namespace) -> Trust:
    """Return the keys; raise CommandError where one is of no use without another."""
    from ..store.trust import Trust

    given = keys(options)
    try:
        return Trust(
            given["key"],
            given["shared_key"],
            given["shared_tokens"],
            encrypted=given["encrypt"],
        )
    except ValueError as error:
        raise CommandError(str(error)) from None


def with_keys(place: Backend, trust: Trust) -> Backend:
    """Return a place as it is with these keys: encrypted, where they are of such a store."""
    from ..store.places.encrypted import EncryptedBackend

    return place if trust.aes is None else EncryptedBackend(place, trust)
