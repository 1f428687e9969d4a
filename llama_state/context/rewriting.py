"""States written anew, in memory that is lent, as a library wants them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from .. import layout
from .._io.buffers import POOL, write_parts
from ..layout.conversion import Conversion
from ..layout.cut import sequence_pieces
from .form import StateForm


@contextmanager
def rewritten(
    head: bytes, payload: memoryview, parsed: layout.Layout, wanted: layout.Form
) -> Iterator[memoryview]:
    """Yield *head* and a payload in another form, for the block.

    Raises:
        UnsupportedError: More than the form would be another.
    """
    conversion = Conversion.of(payload, parsed, wanted)
    with POOL.lend(len(head) + conversion.nbytes, spill=True) as blob:
        blob[: len(head)] = head
        conversion.write(blob[len(head) :])
        yield blob


@contextmanager
def one_sequence(
    form: StateForm,
    whole: memoryview,
    parsed: layout.Layout,
    seq_id: int,
    wanted: layout.Form | None,
) -> Iterator[memoryview]:
    """Yield the blob of one sequence of a whole state, for the block.

    Args:
        form: How the library writes states.
        whole: The state.
        parsed: What it holds.
        seq_id: The sequence.
        wanted: The form that the blob is to have; None: the one of the whole state.
    """
    n_stream = None if wanted is None else wanted.n_stream
    head = form.native_head(seq_id)
    pieces = [head, *sequence_pieces(whole, parsed, seq_id, n_stream)]
    with POOL.lend(sum(map(len, pieces)), spill=True) as blob:
        write_parts(blob, pieces)
        if wanted is None or wanted == replace(layout.form_of(parsed), n_stream=n_stream):
            yield blob
            return
        payload = blob[len(head) :]
        how = {"headed": False, "version": parsed.version}
        alone = form.parse(seq_id, payload, traits=[parsed.traits], **how)  # type: ignore[arg-type]
        with rewritten(head, payload, alone, wanted) as again:
            yield again
