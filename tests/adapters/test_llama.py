"""``attach(Llama)``: the whole API, and a Llama that stays true whatever is done through it.

What counts is what the ``Llama`` does next: its greedy answers must be those of one that nothing
interrupted, token for token, and it must not evaluate what was brought back.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_state as ls
from llama_state.adapters.llama_cpp import LlamaContext
from tests.adapters.llamas import (
    CUT,
    GREEDY,
    KINDS,
    MORE,
    answer,
    generated,
    is_true,
    llama_cpp,
    prompt_of,
)

pytestmark = pytest.mark.llama_cpp

Make = Callable[..., Any]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def test_the_library_is_theirs(make: Make) -> None:
    """attach(llm) binds what llama_cpp has loaded, whatever else load_library() would find."""
    llm = make()
    ctx = ls.attach(llm)
    assert isinstance(ctx, LlamaContext)
    theirs = Path(llama_cpp.llama_cpp._lib._name).resolve()
    assert ctx.library.path == theirs
    assert ls.attach(llm, ctx.library).library is ctx.library
    assert ctx.pointer == ctypes.cast(llm.ctx, ctypes.c_void_p).value


def test_another_library_is_refused(make: Make) -> None:
    """A Llama knows its library; naming another one is an error."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="only one library is installed")
    other = ls.load_library(next(Path(xllamacpp.__file__).parent.glob("*.so")))
    with pytest.raises(ls.StateError, match="this Llama is of"):
        ls.attach(make(), other)


def test_two_attachments_are_one_lock(make: Make) -> None:
    llm = make()
    one, two = ls.attach(llm), ls.attach(llm)
    raw = ls.attach(one.pointer, one.library)
    assert one._handle.pointer is two._handle.pointer is raw._handle.pointer


def test_the_llama_is_kept_alive_and_never_freed(make: Make) -> None:
    """The attachment is enough to keep it; closing the attachment leaves it working."""
    llm = llama_cpp.Llama(str(make.path("llama-dense")), n_ctx=256, verbose=False)
    alive = weakref.ref(llm)
    ctx = ls.attach(llm)
    prompt = prompt_of(llm)
    llm.eval(prompt)
    del llm
    gc.collect()
    assert ctx.n_past() == len(prompt)
    llm = alive()
    assert llm is not None
    ctx.close()
    ctx.close()
    with pytest.raises(ls.ClosedError):
        ctx.n_past()
    assert generated(llm, [*prompt, *MORE])[1] == len(MORE)
    llm.close()
    del llm
    gc.collect()
    assert alive() is None


def test_a_closed_llama(make: Make) -> None:
    """ClosedError at attach, and at every call of an attachment made before."""
    llm = make()
    ctx = ls.attach(llm)
    prompt = prompt_of(llm)
    llm.eval(prompt)
    blob, kept = ctx.snapshot(), ctx.seq_device_snapshot()
    llm.close()
    with pytest.raises(ls.ClosedError):
        ls.attach(llm)
    calls: tuple[Callable[[], object], ...] = (
        ctx.n_past,
        ctx.snapshot,
        ctx.clear,
        ctx.state_size,
        ctx.logits,
        kept.restore,
        lambda: ctx.tokens,
        lambda: ctx.rewind_min,
        lambda: ctx.pointer,
        lambda: ctx.decode([65]),
        lambda: ctx.restore(blob, tokens=prompt),
        lambda: ctx.seq_rm(0),
    )
    for call in calls:
        with pytest.raises(ls.ClosedError):
            call()
    assert "closed" in repr(ctx)
    assert kept.stale
    with pytest.raises(ls.ClosedError), ctx.savepoint():
        pass


def test_a_llama_that_is_closed_in_a_savepoint(make: Make) -> None:
    """There is nothing to put back into, and the block's own exception comes out."""
    llm = make()
    with pytest.raises(KeyError), ls.attach(llm).savepoint():
        llm.close()
        raise KeyError


# -- it stays true

Way = Callable[[LlamaContext, Path], Callable[[], Any]]


def whole_blob(ctx: LlamaContext, folder: Path) -> Callable[[], Any]:
    blob, tokens = ctx.snapshot(), ctx.tokens
    return lambda: ctx.restore(blob, tokens=tokens)


def sequence_blob(ctx: LlamaContext, folder: Path) -> Callable[[], Any]:
    blob, tokens = ctx.seq_snapshot(), ctx.tokens
    return lambda: ctx.seq_restore(blob, tokens=tokens)


def unchecked_blob(ctx: LlamaContext, folder: Path) -> Callable[[], Any]:
    blob, tokens = ctx.snapshot(), ctx.tokens
    return lambda: ctx.restore(blob, tokens=tokens, validate=False)


def whole_file(ctx: LlamaContext, folder: Path) -> Callable[[], Any]:
    ctx.save_state(folder / "whole")
    return lambda: ctx.load_state(folder / "whole")


def sequence_file(ctx: LlamaContext, folder: Path) -> Callable[[], Any]:
    ctx.seq_save_state(folder / "sequence")
    return lambda: ctx.seq_load_state(folder / "sequence")


def file_without_tokens(ctx: LlamaContext, folder: Path) -> Callable[[], Any]:
    tokens = ctx.tokens
    ctx.save_state(folder / "bare", ())
    return lambda: ctx.load_state(folder / "bare", tokens=tokens)


def their_state(ctx: LlamaContext, folder: Path) -> Callable[[], Any]:
    state = ctx._llama.llm.save_state()
    return lambda: ctx.restore_llama_state(state)


def device(ctx: LlamaContext, folder: Path) -> Callable[[], Any]:
    return ctx.seq_device_snapshot().restore


WAYS: tuple[Way, ...] = (
    whole_blob,
    sequence_blob,
    unchecked_blob,
    whole_file,
    sequence_file,
    file_without_tokens,
    their_state,
    device,
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@EVERY_KIND
def test_it_goes_on_as_if_nothing_had_happened(
    make: Make, kind: str, way: Way, tmp_path: Path
) -> None:
    """Restored in place of something else, the prompt is not evaluated again, nor its answer
    another."""
    llm = make(kind)
    ctx = ls.attach(llm)
    prompt = prompt_of(llm)
    llm.eval(prompt)
    restore = way(ctx, tmp_path)
    expected = generated(llm, [*prompt, *MORE])
    assert expected[1] == len(MORE)
    llm.reset()
    llm.eval(list(range(60, 130)))
    assert restore().sequences[0].n_past == len(prompt)
    is_true(llm, ctx, prompt)
    assert generated(llm, [*prompt, *MORE]) == expected
    # And by text, through the whole of create_completion, beside one that was never interrupted.
    calm = make(kind)
    calm.eval(prompt)
    restore()
    assert answer(llm, [*prompt, *MORE]) == answer(calm, [*prompt, *MORE])


@EVERY_KIND
def test_the_same_prompt_again(make: Make, kind: str) -> None:
    """Its last token is decoded for the logits; memory that cannot be cut begins anew."""
    llm = make(kind)
    ctx = ls.attach(llm)
    prompt = prompt_of(llm)
    expected, _ = generated(llm, prompt)
    llm.reset()
    llm.eval(prompt)
    blob = ctx.snapshot()
    ctx.clear()
    ctx.restore(blob, tokens=prompt)
    assert generated(llm, prompt) == (expected, 1 if kind in CUT else len(prompt))
    # Saved before its last token, a prompt is resumed by every memory.
    llm.reset()
    llm.eval(prompt[:-1])
    blob = ctx.snapshot()
    ctx.clear()
    ctx.restore(blob, tokens=prompt[:-1])
    assert generated(llm, prompt) == (expected, 1)


@EVERY_KIND
def test_another_llama(make: Make, kind: str, tmp_path: Path) -> None:
    """A file restores in another Llama of the same model, as after a restart."""
    llm, other = make(kind), make(kind)
    prompt = prompt_of(llm)
    llm.eval(prompt)
    ls.attach(llm).save_state(tmp_path / "chat")
    ctx = ls.attach(other)
    assert list(ctx.load_state(tmp_path / "chat").tokens) == prompt
    is_true(other, ctx, prompt)
    assert generated(other, [*prompt, *MORE]) == generated(llm, [*prompt, *MORE])


def test_a_chat_goes_on(make: Make) -> None:
    """create_chat_completion after a restore evaluates the new turn only, and answers alike."""
    llm = make()
    ctx = ls.attach(llm)
    turns = [{"role": "user", "content": "Hello there"}]
    options = {"max_tokens": 8, **GREEDY}
    first = llm.create_chat_completion(turns, **options)["choices"][0]["message"]
    blob, tokens = ctx.snapshot(), ctx.tokens
    turns += [first, {"role": "user", "content": "And now?"}]
    expected = llm.create_chat_completion(turns, **options)["choices"][0]["message"]
    llm.reset()
    llm.eval([70, 71, 72])
    ctx.restore(blob, tokens=tokens)
    assert llm.create_chat_completion(turns, **options)["choices"][0]["message"] == expected


@EVERY_KIND
def test_decoded_here_it_samples_there(make: Make, kind: str) -> None:
    """After decode() the Llama holds the tokens and their logits: nothing is evaluated again."""
    llm = make(kind)
    ctx = ls.attach(llm)
    prompt = prompt_of(llm)
    expected, _ = generated(llm, prompt)
    ctx.clear()
    is_true(llm, ctx, [])
    ctx.decode(prompt[:10])
    ctx.decode(prompt[10:])
    ctx.decode([])
    assert list(ctx.tokens) == prompt
    assert not llm._requires_eval
    assert generated(llm, prompt) == (expected, 0)


@pytest.mark.parametrize("kind", CUT)
def test_removing_the_end(make: Make, kind: str) -> None:
    """seq_rm of the end shortens the Llama; of anything else of its sequence it is refused."""
    llm = make(kind)
    ctx = ls.attach(llm)
    prompt = prompt_of(llm)
    expected, _ = generated(llm, [*prompt[:30], *MORE])
    llm.reset()
    llm.eval(prompt)
    with pytest.raises(ls.UnsupportedError, match="only the end"):
        ctx.seq_rm(0, 3, 10)
    with pytest.raises(ls.UnsupportedError):
        ctx.seq_rm(0, 0, 10)
    assert list(ctx.tokens) == prompt
    ctx.seq_rm(0, 30)
    is_true(llm, ctx, prompt[:30])
    assert generated(llm, [*prompt[:30], *MORE]) == (expected, len(MORE))
    ctx.seq_rm(0)
    is_true(llm, ctx, [])


@EVERY_KIND
def test_a_savepoint_puts_the_llama_back(make: Make, kind: str) -> None:
    """Whatever the block did with the Llama itself or through the attachment."""
    llm = make(kind)
    ctx = ls.attach(llm)
    prompt = prompt_of(llm)
    llm.eval(prompt)
    expected = generated(llm, [*prompt, *MORE])

    def mess() -> None:
        generated(llm, list(range(90, 120)))
        raise KeyError

    for seq_ids in ((), (0,)):
        ctx.clear()
        llm.eval(prompt)
        with pytest.raises(KeyError), ctx.savepoint(*seq_ids):
            mess()
        is_true(llm, ctx, prompt)
        assert generated(llm, [*prompt, *MORE]) == expected
    before = list(ctx.tokens)
    with ctx.savepoint():
        ctx.decode([65])
    assert list(ctx.tokens) == [*before, 65]


@EVERY_KIND
def test_a_partial_rewind(make: Make, kind: str) -> None:
    """The tokens of a rewind are known: they are the sequence's own."""
    llm = make(kind)
    ctx = ls.attach(llm)
    prompt = prompt_of(llm)
    llm.eval(prompt)
    checkpoint = ctx.seq_snapshot(partial=True)
    expected = generated(llm, [*prompt, *MORE])
    ctx.seq_restore(checkpoint, partial=True)
    is_true(llm, ctx, prompt)
    assert generated(llm, [*prompt, *MORE]) == expected


@pytest.mark.parametrize("kind", CUT)
def test_what_the_llama_cuts_lazily(make: Make, kind: str) -> None:
    """After reset() a plain Llama still has its cells; to us it is empty, as it says."""
    llm = make(kind)
    ctx = ls.attach(llm)
    llm.eval(prompt_of(llm))
    size = ctx.state_size()
    llm.reset()
    assert ctx.n_past() == 0
    assert ctx.tokens == ()
    assert ctx.state_size() < size
    blob = ctx.snapshot()
    llm.eval([65, 66])
    assert ctx.restore(blob).sequences == {}
    is_true(llm, ctx, [])


def test_other_sequences_do_not_concern_it(make: Make) -> None:
    """Several sequences (of an embedding Llama): only what goes into sequence 0 needs tokens."""
    llm = make(embedding=True, n_batch=4, n_ubatch=4)
    assert llm.context_params.n_seq_max == 4
    ctx = ls.attach(llm)
    ctx.decode([65, 66, 67], 1)
    is_true(llm, ctx, [])
    with pytest.raises(ls.MismatchError, match="pass tokens="):
        ctx.seq_cp(1, 0)
    is_true(llm, ctx, [])
    ctx.seq_cp(1, 0, tokens=[65, 66, 67])
    is_true(llm, ctx, [65, 66, 67])
    ctx.seq_cp(0, 2, 0, 2)
    blob = ctx.seq_snapshot(2)
    ctx.seq_restore(blob, 3)
    assert [ctx.n_past(i) for i in range(4)] == [3, 3, 2, 2]
    with pytest.raises(ls.UnsupportedError, match="begins at position 0"):
        ctx.seq_cp(1, 0, 1, 3, tokens=[66, 67])
    kept = ctx.seq_device_snapshot(2)
    with pytest.raises(ls.MismatchError):
        kept.restore(0)
    kept.restore(1)
    with pytest.raises(KeyError), ctx.savepoint(1):
        ctx.decode([70], 1)
        ctx.seq_rm(0, 1)
        raise KeyError
    is_true(llm, ctx, [65])
    assert ctx.n_past(1) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_llama_that_is_closed_in_the_middle_of_a_call(
    make: Make, kind: str, tmp_path: Path
) -> None:
    """Its context is gone then: the call is a ClosedError, and touches nothing of it."""
    llm = make(kind)
    ctx = ls.attach(llm)
    llm.eval(prompt_of(llm))
    ctx.save_state(tmp_path / "state", ctx.tokens)

    def close(done: int, total: int) -> None:
        llm.close()

    with pytest.raises(ls.ClosedError, match="the Llama was closed"):
        ctx.load_state(tmp_path / "state", progress=close)
    with pytest.raises(ls.ClosedError, match="the Llama was closed"):
        ctx.n_past()


def test_a_context_made_anew_at_the_same_address_inherits_nothing(make: Make) -> None:
    """A Llama that was made again is another one, wherever its context lies."""
    llm = make()
    ctx = ls.attach(llm)
    ctx.clear()
    ctx.decode(prompt_of(llm))
    ctx.logits()
    llm._ctx = type("Again", (), {"ctx": llm._ctx.ctx, "close": llm._ctx.close})()
    with pytest.raises(ls.ClosedError):
        ctx.logits()
    with pytest.raises(ls.StateError, match="decode a token first"):
        ls.attach(llm).logits()
