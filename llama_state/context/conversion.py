"""States of another form on their way into a context: rewritten, and put into it then.

Another session version, other streams, V the other way round: that is only form. A context that is
empty does not say how it keeps V, nor how it rotates the rows of an indexer. So a state is tried as
it is, and what llama.cpp says when it refuses tells the rest. The path of a state that needs none
of this does not lead through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from .. import layout
from .._llama.calls import Target
from ..errors import Difference, FormatError, MismatchError, UnsupportedError
from ..layout.conversion import ROTATED_VERSION, Conversion, indexer_caches
from .fit import Fit
from .form import StateForm
from .restore import Incoming
from .rewriting import rewritten

if TYPE_CHECKING:
    from .state import Restored

_FORM: Final = frozenset({"session version", "n_stream", "flash attention"})
_ROTATIONS: Final = ("n_rot_k", "n_rot_v")


def is_form(incoming: Incoming, differences: Sequence[Difference]) -> bool:
    """Return whether *differences* of a state are only form, so that it can be rewritten."""
    return incoming.parsed is not None and all(
        _is_form(incoming.parsed, difference.name) for difference in differences
    )


def _is_form(parsed: layout.Layout, name: str) -> bool:
    # Of an older version the words are not part of the state.
    return name in _FORM or (name in _ROTATIONS and parsed.version < ROTATED_VERSION)


def read_otherwise(
    form: StateForm, target: Target, blob: memoryview, partial: bool
) -> layout.Layout | None:
    """Describe a blob of another session version than the library's.

    Returns:
        None where it reads as one of no known version.
    """
    for version in sorted(layout.SEQUENCE_VERSION, reverse=True):
        if version != form.version and form.version in layout.SEQUENCE_VERSION:
            with suppress(FormatError, UnsupportedError):
                return form.parse(
                    target,
                    blob,
                    headed=target is not None and layout.has_sequence_head(blob),
                    partial=partial,
                    version=version,
                )
    return None


def put_converted(
    put: Callable[[Incoming], Restored],
    form: StateForm,
    fit: Fit,
    target: Target,
    incoming: Incoming,
    differences: Sequence[Difference],
) -> Restored:
    """Put a state into a context in the form of the context.

    Args:
        put: Puts it there; a refusal leaves the context as it was.
        form: How the context's states are written.
        fit: What is known of its caches.
        target: Where it is to go.
        incoming: The state.
        differences: Why it was refused as it is: all of it is form.

    Raises:
        MismatchError: More than the form would be another.
    """
    assert incoming.parsed is not None
    saved = layout.form_of(incoming.parsed)
    tried = [saved]
    while True:
        wanted = _wanted(form.version, fit.known, incoming.parsed, tried[-1], differences)
        if wanted in tried:  # it was made so, and that was refused too
            raise MismatchError(differences)
        tried.append(wanted)
        try:
            with _in_form(form, target, incoming, wanted) as converted:
                return replace(put(converted), converted=_words(saved, wanted))
        except UnsupportedError as error:
            raise MismatchError(differences, hint=str(error)) from error
        except MismatchError as error:
            differences = error.differences
            if not is_form(incoming, differences):
                raise


def _wanted(
    version: int,
    known: layout.Geometry | None,
    parsed: layout.Layout,
    tried: layout.Form,
    differences: Sequence[Difference],
) -> layout.Form:
    """Return the form that a state needs which was refused, as *tried*, for *differences*."""
    refused = {difference.name: difference for difference in differences}
    caches = known.caches if known else ()
    streams = (cache.n_stream for cache in caches if cache.n_stream is not None)
    rotations = {
        cache.name: (cache.n_rot_k, cache.n_rot_v)
        for cache in caches
        if cache.n_rot_k is not None and cache.n_rot_v is not None
    }
    if refused.keys() & set(_ROTATIONS):
        # llama.cpp does not say of which cache: only those of indexers are rotated in any case.
        for name in indexer_caches(parsed.module):
            before = tried.rotations.get(name, (0, 0))
            words = (refused.get(n) for n in _ROTATIONS)
            rotations[name] = tuple(  # type: ignore[assignment]
                int(str(new.current)) if new else old
                for new, old in zip(words, before, strict=True)
            )
    turned = "flash attention" in refused
    return layout.Form(
        version,
        next(streams, None),
        not tried.v_trans if turned else tried.v_trans,
        {**tried.rotations, **rotations},
    )


@contextmanager
def _in_form(
    form: StateForm, target: Target, incoming: Incoming, wanted: layout.Form
) -> Iterator[Incoming]:
    """Yield a state in another form, for the length of the block."""
    parsed, payload = incoming.parsed, incoming.blob
    assert parsed is not None
    # The head names the destination, the cells name where they come from: it is left out.
    head = form.native_head(target)
    if head or len(payload) != parsed.nbytes:
        payload = payload[len(head) :]
        parsed = _parsed(form, target, payload, parsed, parsed.version)
    if target is None and wanted.n_stream not in (None, layout.form_of(parsed).n_stream):
        # What is more than form is refused here, before a sequence is touched.
        Conversion.of(payload, parsed, replace(wanted, n_stream=None))
        yield replace(incoming, form=wanted)
        return
    with rewritten(head, payload, parsed, wanted) as blob:
        again = _parsed(form, target, blob[len(head) :], parsed, wanted.version)
        yield replace(incoming, blob=blob, parsed=again)


def _parsed(
    form: StateForm, target: Target, payload: memoryview, like: layout.Layout, version: int
) -> layout.Layout:
    how = {"partial": like.partial, "traits": [like.traits], "version": version}
    return form.parse(target, payload, headed=False, **how)  # type: ignore[arg-type]


def _words(saved: layout.Form, wanted: layout.Form) -> str:
    """Return what is another between two forms, to be read."""
    on_off = {True: "off", False: "on"}
    pairs = [
        ("session version", saved.version, wanted.version),
        ("streams", saved.n_stream, wanted.n_stream),
        (
            "flash attention",
            *(on_off.get(one.v_trans) for one in (saved, wanted)),  # type: ignore[arg-type]
        ),
    ]
    return ", ".join(f"{name} {a} to {b}" for name, a, b in pairs if a != b and None not in (a, b))
