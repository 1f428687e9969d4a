"""The commands for prefix stores: ``store ls``, ``show``, ``find``, ``warm`` and so on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._io.progress import no_progress
from . import store_servers
from .output import print_json
from .parsers import (
    Commands,
    Run,
    add_command,
    byte_size,
    exit_statuses,
    positive,
    wrapped,
)
from .problems import CommandError
from .progress import shown
from .status import Status
from .store_keys import add_keys, keys, trust, with_keys

if TYPE_CHECKING:
    from ..context.context import Context
    from ..store.places.backend import Backend
    from ..store.upkeep import Tree

_EXITS: Mapping[int, str] = {
    0: "done, or yes",
    1: "no: nothing of a prompt is stored, something is damaged or was not copied",
    2: "wrong use, an unusable store, or a missing library or package",
}
_DONE: Mapping[int, str] = {0: "done", 2: "wrong use, or a store that cannot be read or written"}


def add_commands(commands: Commands) -> None:
    """Add ``store`` and its commands."""
    parser = commands.add_parser(
        "store",
        help="look after a prefix store: list, warm, verify, copy, ...",
        description=wrapped(
            "Look after a prefix store: a folder with state of token prefixes. No command shows"
            " the text or the tokens of a prompt unless asked with --text. All commands but find"
            " and warm work without a libllama."
        ),
        epilog="example:\n  llama-state store ls kv/\n\n" + exit_statuses(_EXITS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_subparsers(
        title="commands", dest="store_command", required=True, metavar="COMMAND"
    )
    _add_looking(group)
    _add_prompts(group)
    _add_changing(group)
    store_servers.add_commands(group)


def _add(
    commands: Commands,
    name: str,
    run: Run,
    summary: str,
    details: str,
    example: str,
    exits: Mapping[int, str] = _DONE,
) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        name,
        run,
        summary=summary,
        details=details,
        example=f"llama-state store {example}",
        exits=exits,
    )
    parser.add_argument(
        "place",
        metavar="PLACE",
        help="the folder of the store, or its URL: file:///dir, redis://host, s3://bucket/prefix",
    )
    add_keys(parser)
    return parser


def _add_looking(commands: Commands) -> None:
    listed = _add(
        commands,
        "ls",
        run_ls,
        "list the stored prompts",
        "List the stored prompts, the last used first: namespace, model, tokens, bytes, bytes"
        " that no other prompt shares, last use, pin, and the beginning of the key.",
        "ls kv/",
    )
    show = _add(
        commands,
        "show",
        run_show,
        "show a stored prompt",
        "Show the chunks of a stored prompt, the points at which memory that cannot be cut can go"
        " on, and all that its model and settings must be equal in.",
        "show kv/ 3fa9c1",
    )
    show.add_argument("key", metavar="KEY", help="the first digits of its key, as ls prints it")
    show.add_argument("--text", action="store_true", help="also print its tokens")
    show.add_argument(
        "--model", metavar="M.gguf", help="print the tokens as the text that they are for this one"
    )
    stats = _add(
        commands,
        "stats",
        run_stats,
        "show how much is stored",
        "Count prompts, objects of each kind, and bytes.",
        "stats kv/ --json",
    )
    for parser in (listed, show, stats):
        _add_json(parser)
    stats.add_argument(
        "--prometheus", action="store_true", help="print the same figures for Prometheus"
    )


def _add_prompts(commands: Commands) -> None:
    find = _add(
        commands,
        "find",
        run_find,
        "show how much of a prompt is stored",
        "Show how many tokens of a text are stored for a model, and why not more. No state is"
        " read.",
        "find kv/ model.gguf prompt.txt",
        {0: "a beginning is stored", 1: "nothing is", 2: "it cannot be told"},
    )
    warm = _add(
        commands,
        "warm",
        run_warm,
        "evaluate a prompt and store it",
        "Evaluate what is not stored of a text, and store it, so that programs find it.",
        "warm kv/ model.gguf system.txt --size 50GiB",
        {0: "all of it is stored", 1: "not all of it could be stored", 2: "nothing was"},
    )
    for parser in (find, warm):
        parser.add_argument("model", metavar="MODEL.gguf", help="the model")
        parser.add_argument("text", metavar="TEXT", help="a file with the prompt, in UTF-8")
        _add_context(parser)
        _add_json(parser)
    _add_size(warm, "PLACE")
    warm.add_argument(
        "--chunk-tokens",
        type=positive,
        default=256,
        metavar="N",
        help="tokens of a chunk (default: %(default)s)",
    )


def _add_context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--namespace", default="", metavar="NAME", help="the namespace of the prompt"
    )
    parser.add_argument(
        "--special", action="store_true", help="read <s> and the like in TEXT as tokens"
    )
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="do not add the tokens that the model wants around a text",
    )
    parser.add_argument(
        "--n-ctx",
        type=positive,
        metavar="N",
        help="cells of the context (default: as many as TEXT needs); some models compute"
        " otherwise in a long one",
    )
    parser.add_argument(
        "--type-k", default="f16", metavar="TYPE", help="cache type of K (default: %(default)s)"
    )
    parser.add_argument(
        "--type-v", default="f16", metavar="TYPE", help="cache type of V (default: %(default)s)"
    )
    parser.add_argument(
        "--library",
        metavar="PATH",
        help="use this libllama (default: the one that doctor shows)",
    )


def _add_changing(commands: Commands) -> None:
    verify = _add(
        commands,
        "verify",
        run_verify,
        "check that everything in a store is sound",
        "Read everything, and compare digests. What is damaged is never given to llama.cpp, with"
        " or without this. Prompts of which nothing can be read are those of another key: they are"
        " counted, and left alone.",
        "verify kv/",
        {0: "all is sound", 1: "something is damaged, or of no use", 2: "it cannot be read"},
    )
    verify.add_argument(
        "--repair",
        action="store_true",
        help="set aside what is damaged, and remove what nothing leads to",
    )
    _add_json(verify)
    evict = _add(
        commands,
        "evict",
        run_evict,
        "remove what was used least recently",
        "Remove what was used least recently until no more than a size is left. What is pinned"
        " stays.",
        "evict kv/ --to 10GiB",
    )
    evict.add_argument(
        "--to", type=byte_size, required=True, metavar="SIZE", help="what may be left: 10GiB, 0"
    )
    rm = _add(
        commands,
        "rm",
        run_rm,
        "remove stored prompts",
        "Remove prompts, and what goes on from them. What other prompts begin with stays.",
        "rm kv/ 3fa9c1",
    )
    rm.add_argument(
        "keys", metavar="KEY", nargs="+", help="the first digits of a key, as ls prints it"
    )
    copy = _add(
        commands,
        "copy",
        run_copy,
        "copy to another store what is missing there",
        "Copy to TARGET what is not there, verified on the way. Pins are not copied.",
        "copy kv/ /mnt/shared/kv --size 200GiB",
        {0: "all of it is in TARGET", 1: "not all of it", 2: "a store cannot be read or written"},
    )
    copy.add_argument("target", metavar="TARGET", help="the store to copy to; made if need be")
    _add_size(copy, "TARGET")
    _add_json(copy)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")


def _add_size(parser: argparse.ArgumentParser, place: str) -> None:
    parser.add_argument(
        "--size",
        type=byte_size,
        metavar="SIZE",
        help=f"the most that {place} may take: 50GiB; needed unless its URL has size=",
    )


# -- running them


def run_ls(options: argparse.Namespace) -> Status:
    """List the stored prompts."""
    from . import store_text

    _, tree = _opened(options)
    entries = list(tree.entries())
    if options.json:
        print_json([asdict(entry) for entry in entries])
    else:
        print("\n".join(store_text.table(entries)))
    return Status.OK


def run_show(options: argparse.Namespace) -> Status:
    """Show one stored prompt."""
    from . import store_text

    _, tree = _opened(options)
    key = _key_of(tree, options.key)
    entry = tree.entry(key)
    if entry is None:
        raise CommandError(f"{key.hex()}: what it goes on from is gone; verify --repair removes it")
    facts: dict[str, Any] = {
        **asdict(entry),
        "identity": dict(tree.identity(key)),
        "chunks": [asdict(chunk) for chunk in tree.chunks(key)],
    }
    if options.text:
        facts["tokens"] = tree.tokens(key)
        if options.model:
            facts["text"] = _text_of(options.model, facts["tokens"])
    if options.json:
        print_json(facts)
    else:
        print("\n".join(store_text.prompt(entry, facts, list(tree.chunks(key)))))
    return Status.OK


def run_stats(options: argparse.Namespace) -> Status:
    """Show how much is stored."""
    from ..store.contents import contents
    from ..store.metrics import of_contents
    from . import store_text

    found = contents(*_opened(options))
    if options.prometheus:
        print(of_contents(found), end="")
    elif options.json:
        print_json(asdict(found))
    else:
        print("\n".join(store_text.figures(found)))
    return Status.OK


def run_find(options: argparse.Namespace) -> Status:
    """Show how much of a text is stored."""
    from ..store import PrefixStore
    from . import store_text

    with (
        PrefixStore(
            options.place, namespace=options.namespace, readonly=True, **keys(options)
        ) as store,
        _context(options) as (ctx, tokens),
    ):
        match = store.find(ctx, tokens)
    facts = {"n_tokens": match.n_tokens, "of": len(tokens), "nbytes": match.nbytes}
    if options.json:
        print_json({**facts, "reason": match.why.reason, "why": str(match.why)})
    else:
        print("\n".join(store_text.found(match, len(tokens))))
    return Status.OK if match.n_tokens else Status.NO


def run_warm(options: argparse.Namespace) -> Status:
    """Evaluate a text and store it."""
    from ..store import PrefixStore
    from . import store_text

    with (
        PrefixStore(
            options.place,
            capacity_bytes=options.size,
            chunk_tokens=options.chunk_tokens,
            namespace=options.namespace,
            **keys(options),
        ) as store,
        _context(options) as (ctx, tokens),
        shown("evaluation", unit="tokens") as progress,
    ):
        recalled = store.prefill(ctx, tokens, progress=progress)
        stats = store.stats()
        whole = store.remember(ctx, tokens).n_tokens == len(tokens) and not stats.refused
    facts = {
        "n_tokens": len(tokens),
        "recalled": len(recalled.tokens),
        "nbytes": stats.bytes_written,
        "stored": whole,
    }
    if options.json:
        print_json(facts)
    else:
        print("\n".join(store_text.warmed(facts)))
    if not whole:
        reasons = ", ".join(stats.failures) or "it has no room for it"
        print(f"{options.place}: not all could be stored: {reasons}", file=sys.stderr)
    return Status.OK if whole else Status.NO


def run_verify(options: argparse.Namespace) -> Status:
    """Check everything in a store."""
    from . import store_text

    _, tree = _opened(options, readonly=not options.repair)
    with shown("verification") as progress:
        found = tree.verify(repair=options.repair, progress=progress or no_progress)
    if options.json:
        print_json({**asdict(found), "ok": found.ok})
    else:
        print("\n".join(store_text.verdict(found)))
    return Status.OK if found.ok else Status.NO


def run_evict(options: argparse.Namespace) -> Status:
    """Remove what was used least recently."""
    from ..inspection.words import size
    from ..store.places.urls import open_existing

    backend = open_existing(options.place, readonly=False)
    freed = backend.evict(options.to)
    print(f"{size(freed)} freed, {size(backend.used_bytes())} left")
    return Status.OK


def run_rm(options: argparse.Namespace) -> Status:
    """Remove stored prompts."""
    from ..inspection.words import size

    freed = 0
    _, tree = _opened(options, readonly=False)
    keys = [_key_of(tree, begin) for begin in options.keys]  # all of them, before one is removed
    for key in keys:
        if tree.keys(key.hex()):  # it may have gone with one before
            freed += tree.remove(key)
    print(f"{size(freed)} freed")
    return Status.OK


def run_copy(options: argparse.Namespace) -> Status:
    """Copy what is missing."""
    from ..store.contents import copy
    from ..store.places.urls import open_place
    from . import store_text

    _, tree = _opened(options)
    place = open_place(options.target, options.size, durable=False, readonly=False)
    target = with_keys(place, trust(options))
    with shown("copy") as progress:
        copied = copy(tree, target, progress or no_progress)
    if options.json:
        print_json({**asdict(copied), "ok": copied.ok})
    else:
        print("\n".join(store_text.copied(copied)))
    return Status.OK if copied.ok else Status.NO


def _opened(options: argparse.Namespace, *, readonly: bool = True) -> tuple[Backend, Tree]:
    from ..store.places.urls import open_existing
    from ..store.upkeep import Tree

    known = trust(options)
    backend = with_keys(open_existing(options.place, readonly=readonly), known)
    return backend, Tree.of(backend, known)


def _key_of(tree: Tree, begin: str) -> bytes:
    """Return the one key that begins so."""
    found = tree.keys(begin.lower())
    if len(found) != 1:
        many = f"{len(found)} keys begin so, give more digits" if found else "no key begins so"
        raise CommandError(f"{begin}: {many}; llama-state store ls --json prints them in full")
    return found[0]


@contextmanager
def _context(options: argparse.Namespace) -> Iterator[tuple[Context, list[int]]]:
    """Yield a context for the text that was named, and the tokens of that."""
    from .._llama.discovery import load_library
    from ..context.model import Model
    from .checks import require_model

    text = _read_text(options.text)
    require_model(options.model)
    with Model(options.model, load_library(options.library)) as model:
        tokens = model.tokenize(text, add_special=not options.no_bos, parse_special=options.special)
        if not tokens:
            raise CommandError(f"{options.text}: no tokens")
        with model.context(
            n_ctx=options.n_ctx or len(tokens), type_k=options.type_k, type_v=options.type_v
        ) as ctx:
            yield ctx, tokens


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not UTF-8, at byte {error.start:,}") from None


def _text_of(model_path: str, tokens: list[int | None]) -> str:
    """Return tokens as text, with a mark for each image or sound."""
    from ..context.model import Model
    from .checks import require_model

    require_model(model_path)
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token is None:
            parts.append([])
        else:
            parts[-1].append(token)
    with Model(model_path) as model:
        return "<media>".join(model.detokenize(part, unparse_special=True) for part in parts)
