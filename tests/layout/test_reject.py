"""What is damaged or is something else is refused, with the place and the reason."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from llama_state.errors import FormatError, StateError, TruncatedError, UnsupportedError
from llama_state.layout import Layout, Traits, model_traits, parse_sequence, parse_whole
from tests.layout.blobs import F16, F32, State, text, u32
from tests.layout.test_parse import CHAT, traits_of

WHOLE = State("kv", arch="llama")
"""Arch at 0, streams at 9, cell count at 13, cells from 17, settings at 53, K at 69."""
SEQUENCE = WHOLE.only(0)
RECURRENT = State("recurrent", cells=CHAT, arch="mamba")
HUGE = 0xFFFFFFFF


def patched(state: State, *changes: tuple[int, bytes]) -> bytes:
    blob = bytearray(state.blob())
    for offset, new in changes:
        blob[offset : offset + len(new)] = new
    return bytes(blob)


def refuse(state: State, *changes: tuple[int, bytes]) -> FormatError:
    """Return the error that the changed bytes of *state* raise."""
    with pytest.raises(FormatError) as caught:
        read(state, patched(state, *changes))
    return caught.value


def read(state: State, blob: bytes) -> Layout:
    """Read *blob* as what *state* is."""
    traits = traits_of(state)
    if state.seq is None:
        return parse_whole(blob, version=state.version, traits=traits)
    return parse_sequence(blob, version=state.version, traits=traits, partial=state.partial)


def row_head(kind: int, row: int) -> bytes:
    return struct.pack("<iQ", kind, row)


@pytest.mark.parametrize(
    ("offset", "new", "reason", "at"),
    [
        pytest.param(0, u32(0), "name of 0 bytes", 0, id="no architecture"),
        pytest.param(0, u32(65), "name of 65 bytes", 0, id="long architecture"),
        pytest.param(4, b"ll\0ma", "name with bytes", 4, id="architecture not text"),
        pytest.param(9, u32(0), "0 streams", 9, id="no stream"),
        pytest.param(9, u32(257), "257 streams", 9, id="many streams"),
        pytest.param(13, u32(HUGE), "4294967295 cells: need", 17, id="many cells"),
        pytest.param(17, u32(HUGE), "position -1", 17, id="negative position"),
        pytest.param(29, u32(0x7FFFFFFF), "position 2147483647", 29, id="last position"),
        pytest.param(21, u32(0), "cell of 0 sequences", 17, id="orphan"),
        pytest.param(21, u32(257), "cell of 257 sequences", 17, id="many owners"),
        pytest.param(21, u32(HUGE), "cell of -1 sequences", 17, id="negative owners"),
        pytest.param(25, u32(256), "sequence 256", 17, id="sequence id too large"),
        pytest.param(25, u32(HUGE), "sequence -1", 17, id="negative sequence id"),
        pytest.param(53, u32(2), "V layout 2", 53, id="V layout"),
        pytest.param(57, u32(HUGE), "cache: 4294967295 layers", 57, id="many layers"),
        pytest.param(57, u32(512), "512 layers: need", 69, id="more layers than bytes"),
        pytest.param(61, u32(32), "rotation size 32", 61, id="small rotation"),
        pytest.param(65, u32(96), "rotation size 96", 65, id="odd rotation"),
        pytest.param(69, row_head(99, 64), "type 99", 69, id="unknown type"),
        pytest.param(69, row_head(F16, 63), "not whole f16", 69, id="half a value"),
        pytest.param(69, row_head(8, 64), "not whole q8_0", 69, id="half a block"),
        pytest.param(69, row_head(F16, 2**64 - 2), "K: need", 81, id="huge row"),
    ],
)
def test_whole(offset: int, new: bytes, reason: str, at: int) -> None:
    """A field that cannot be so is refused where it stands."""
    error = refuse(WHOLE, (offset, new))
    assert reason in str(error)
    assert error.offset == at


def test_a_layer_less_leaves_bytes_over() -> None:
    """What is not consumed is refused: a state ends where its last block ends."""
    error = refuse(WHOLE, (57, u32(1)))
    assert "after the last cache" in error.reason
    longer = WHOLE.blob() + b"\0"
    with pytest.raises(FormatError, match=r"1 bytes after the last cache") as caught:
        parse_whole(longer, version=11)
    assert caught.value.offset == len(longer) - 1


def test_ids_of_a_cell_increase() -> None:
    """A sequence owns a cell once."""
    state = State("kv", cells=text(2, 1, 2))
    offset = state.blob().index(u32(2, 1, 2)) + 8
    assert "do not increase" in refuse(state, (offset, u32(1))).reason


def test_split_streams_hold_their_own_sequence() -> None:
    """In a split context stream *s* holds cells of sequence *s*, and of no other."""
    state = State("kv", cells=text(3, 1), split=2)
    error = refuse(state, (state.blob().index(u32(0, 1, 1)) + 8, u32(0)))
    assert "sequence 0 among those of sequence 1" in error.reason


def test_streams_of_a_cache_agree() -> None:
    """Streams of one cache have one type and one layer count."""
    state = State("kv", cells=(*text(1, 0), *text(1, 1)), split=2, n_layer=1)
    other = row_head(F32, 64)
    offset = state.blob().rindex(row_head(F16, 64))
    assert "differ in settings" in refuse(state, (offset, other)).reason


def test_transposed_elements_are_those_of_their_type() -> None:
    """Element size and type agree; transposed V is never quantized."""
    state = State("kv", v_trans=True, n_layer=1)
    offset = state.blob().index(struct.pack("<iII", F16, 2, 16))
    for kind, size in ((F16, 4), (8, 34)):
        assert "elements of" in refuse(state, (offset, struct.pack("<iI", kind, size))).reason


@pytest.mark.parametrize(
    ("offset", "new", "reason", "at"),
    [
        pytest.param(0, u32(7), "magic 0x00000007", 0, id="magic"),
        pytest.param(4, u32(HUGE), "state of sequence -1", 4, id="saved as all sequences"),
        pytest.param(4, u32(256), "state of sequence 256", 4, id="source too large"),
        pytest.param(4, u32(1), "sequence 0 among those of sequence 1", 16, id="not its source"),
        pytest.param(20, u32(2), "cell of 2 sequences", 16, id="shared cell"),
        pytest.param(36, u32(1), "sequence 1 among those of sequence 0", 28, id="another's cell"),
    ],
)
def test_sequence(offset: int, new: bytes, reason: str, at: int) -> None:
    """The state of a sequence holds cells of that sequence alone."""
    error = refuse(SEQUENCE, (offset, new))
    assert reason in str(error)
    assert error.offset == at


def test_sequence_in_one_stream() -> None:
    """llama.cpp would take two filled streams and keep the last."""
    state = State("kv", seq=0, n_layer=1)
    stream = state.payload()[4:]
    for headed in (True, False):
        blob = u32(0xAF143CD8, 0)[: 8 * headed] + u32(2) + stream + stream
        with pytest.raises(FormatError, match="several streams"):
            parse_sequence(blob, version=11, headed=headed, traits=Traits("", "kv"))


def test_headless_cells_have_one_owner() -> None:
    """Without a head the first cell says whose state it is."""
    payload = bytearray(SEQUENCE.payload())
    payload[16:20] = u32(3)
    with pytest.raises(FormatError, match="sequence 0 among those of sequence 3"):
        parse_sequence(bytes(payload), version=11, headed=False, traits=Traits("", "kv"))


@pytest.mark.parametrize(
    ("state", "offset", "new", "reason"),
    [
        pytest.param(RECURRENT, 9, u32(HUGE), "4294967295 recurrent cells", id="many cells"),
        pytest.param(RECURRENT, 13, u32(HUGE), "position -1", id="position"),
        pytest.param(RECURRENT, 17, u32(0), "of 0 sequences", id="orphan"),
        pytest.param(RECURRENT, 17, u32(HUGE), "of 4294967295 sequences", id="many owners"),
        pytest.param(RECURRENT, 33, u32(0), "sequence 0 cannot own", id="two cells of one"),
        pytest.param(RECURRENT, 33, u32(256), "sequence 256 cannot own", id="id too large"),
        pytest.param(RECURRENT, 49, u32(1), "S layout 1", id="transposed S"),
        pytest.param(RECURRENT, 53, u32(2), "no number of layers fills", id="fewer layers"),
        pytest.param(RECURRENT, 53, u32(4), "no number of layers fills", id="more layers"),
        pytest.param(RECURRENT, 57 + 84, row_head(F32, 28), "no number of layers", id="R rows"),
        pytest.param(RECURRENT.only(0), 8, u32(2), "2 recurrent cells", id="two in a sequence"),
        pytest.param(RECURRENT.only(0), 16, u32(1), "of 1 sequences", id="id in a sequence"),
    ],
)
def test_recurrent(state: State, offset: int, new: bytes, reason: str) -> None:
    """Recurrent cells have one place for each sequence, and uniform rows."""
    assert reason in str(refuse(state, (offset, new)))


def test_one_s_block_for_each_r_block() -> None:
    """A recurrent layer has both."""
    state = State("recurrent", seq=0)
    short = state.blob()[: -(12 + state.row_s)]
    with pytest.raises(FormatError, match="no number of layers fills"):
        read(state, short)


@pytest.mark.parametrize("module", ["dsa", "dsa-iswa", "msa", "hybrid-idx"])
def test_mirrored_caches(module: str) -> None:
    """An indexer cache repeats the cells of its main cache."""
    state = State(module, n_layer=1, seq=0)
    cells = b"".join(struct.pack("<iIi", pos, 1, 0) for pos in (0, 1, 2))
    start = state.blob().index(cells)
    offset = state.blob().index(cells, start + 1)
    assert "lacks" in refuse(state, (offset, u32(9))).reason


@pytest.mark.parametrize("module", ["iswa", "hybrid-iswa", "dsa-iswa", "dsv4"])
def test_windowed_caches(module: str) -> None:
    """A sliding-window cache holds no cell that the full cache lacks."""
    state = State(module, n_layer=1, split=1, seq=0)
    cells = b"".join(struct.pack("<iIi", pos, 1, 0) for pos in (0, 1, 2))
    offset = state.blob().rindex(cells)
    assert "swa has cells that" in refuse(state, (offset, u32(9))).reason


def test_sub_caches_have_equally_many_streams() -> None:
    """The streams of two sub-caches belong together."""
    one, two = (State("kv", cells=text(2), split=n).payload() for n in (1, 2))
    blob = u32(5) + b"gemma" + one + two
    with pytest.raises(FormatError, match="swa has 2 streams, base 1"):
        parse_whole(blob, version=11, traits=Traits("gemma", "iswa"))


DSV4 = State("dsv4", seq=0, split=2)


@pytest.mark.parametrize(
    ("find", "new", "reason"),
    [
        (u32(0x34565344), u32(1), "not a deepseek4 payload"),
        (u32(0x34565344), u32(0x34565344, 2), "version 2 of a deepseek4 payload"),
        (u32(0x34565344), u32(0x34565344, 1, 1), "a partial deepseek4 payload"),
        (u32(2, 0, 1, 1), u32(3), "csa: version 3"),
        (u32(2, 0, 1, 1), u32(2, 0, 2), "csa: 2 streams"),
        (u32(2, 0, 1, 1), u32(2, 0, 1, HUGE), "csa: 4294967295 layers"),
        (u32(2, 0, 1, 1), u32(2, HUGE), "csa: 0 rows instead of 4294967295"),
        (u32(1, 4, 8, 4), u32(2), "csa state: version 2"),
        (u32(1, 4, 8, 4), u32(1, 4, 9), "csa state: 8 rows instead of 9"),
        (u32(1, 4, 8, 4, 1), u32(1, 4, 8, 4, 0), "csa state: 0 streams"),
        (struct.pack("<QQQ", 16, 0, 64), struct.pack("<QQQ", 16, 0, 60), "60 bytes for 16"),
    ],
)
def test_deepseek4(find: bytes, new: bytes, reason: str) -> None:
    """Each part of a deepseek4 state is recognized by its head."""
    assert reason in str(refuse(DSV4, (DSV4.blob().index(find), new)))


MAGIC = 0x34565344


def damaged_at(blob: bytes, at: int) -> Iterator[bytes]:
    """The blob cut there, and with other numbers and more bytes in that place."""
    yield blob[:at]
    yield blob[:at] + bytes(len(blob))
    for new in (u32(0xFFFFFFFF), u32(0x7FFFFFF), u32(3)):
        yield blob[:at] + new + blob[at + 4 :]
    yield blob[:at] + u32(1, 2) + blob[at:]


@pytest.mark.parametrize("word", [{}, {"hybrid": True}, {"recurrent": True}, {"n_swa": 0}])
@pytest.mark.parametrize("arch", ["", "deepseek4", "deepseek5", "llama", "mamba2", "jamba", "lfm2"])
@pytest.mark.parametrize("seq", [None, 0])
def test_the_magic_of_deepseek4_is_not_read_as_a_number(
    arch: str, word: dict[str, Any], seq: int | None
) -> None:
    """Whatever is said of the model, and wherever behind its head the state is damaged."""
    state = State("dsv4", seq=seq, arch=arch or "deepseek4", split=1)
    blob, traits = state.blob(), model_traits(arch, **word)
    parse_any = parse_whole if seq is None else parse_sequence
    start = blob.index(u32(MAGIC))
    for at in (*range(start + 4, start + 60, 4), *range(start + 60, len(blob), 197)):
        for damaged in damaged_at(blob, at):
            assert str(MAGIC) not in (said(parse_any, damaged, traits) or "")


@pytest.mark.parametrize("seq", [None, 0])
def test_damage_of_deepseek4_is_told_as_what_it_is(seq: int | None) -> None:
    """Also in its head: no build makes a state of other memory of this architecture."""
    blob = State("dsv4", seq=seq, arch="deepseek4", split=1).blob()
    parse_any = parse_whole if seq is None else parse_sequence
    start = blob.index(u32(MAGIC))
    for word in ({"hybrid": True}, {"recurrent": True, "hybrid": False}, {}):
        traits = model_traits("deepseek4", rope_type=0, n_swa=0, **word)
        (alone,) = model_traits("deepseek4", rope_type=0, n_swa=0)
        for at in range(start, min(start + 400, len(blob)), 12):
            for damaged in damaged_at(blob, at):
                assert said(parse_any, damaged, traits) == said(parse_any, damaged, alone)


def said(
    parse_any: Callable[..., Layout], blob: bytes, traits: Traits | Sequence[Traits]
) -> str | None:
    """The text of the error that a state is refused with, or None."""
    try:
        parse_any(blob, version=11, traits=traits)
    except StateError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("arch", "module", "hybrid"),
    [("llama", "kv", True), ("mamba2", "recurrent", False), ("jamba", "hybrid", False)],
)
def test_where_library_and_table_differ_the_error_is_that_of_the_table(
    arch: str, module: str, hybrid: bool
) -> None:
    """What is only guessed can read the caches of other memory, and fail behind them."""
    blob = State(module, cells=text(40), arch=arch).blob()
    (alone,) = model_traits(arch, rope_type=0)
    traits = model_traits(arch, hybrid=hybrid, recurrent=False, n_swa=0, rope_type=0)
    assert parse_whole(blob, version=11, traits=traits).module == module
    for at in range(0, len(blob), 20):
        for damaged in damaged_at(blob, at):
            assert said(parse_whole, damaged, alone) == said(parse_whole, damaged, traits)
    longer = blob + u32(1) * 12
    assert said(parse_whole, longer, alone) == said(parse_whole, longer, traits) is not None


class TestOtherKinds:
    """What is sound but something else is named."""

    def test_sequence_as_whole(self) -> None:
        with pytest.raises(FormatError, match="whole context, this is the state of one sequence"):
            parse_whole(SEQUENCE.blob(), version=11)

    @pytest.mark.parametrize("headed", [True, False])
    def test_whole_as_sequence(self, headed: bool) -> None:
        with pytest.raises(FormatError, match=r"one sequence, this is .* whole context \(llama\)"):
            parse_sequence(WHOLE.blob(), version=11, headed=headed)

    @pytest.mark.parametrize("magic", [0x6767736E, 0x67677371])
    def test_files(self, magic: int) -> None:
        data = u32(magic, 11, 0) + WHOLE.payload()
        reads: tuple[Callable[[], Layout], ...] = (
            lambda: parse_whole(data, version=11),
            lambda: parse_sequence(data, version=11),
            lambda: parse_sequence(data, version=11, headed=False),
        )
        for read in reads:
            with pytest.raises(FormatError, match="file, not its payload"):
                read()

    def test_headed_as_headless(self) -> None:
        with pytest.raises(FormatError, match="with its head"):
            parse_sequence(SEQUENCE.blob(), version=11, headed=False)

    def test_headless_as_headed(self) -> None:
        with pytest.raises(FormatError, match="not the state of a sequence"):
            parse_sequence(SEQUENCE.payload(), version=11)

    def test_headless_as_whole(self) -> None:
        with pytest.raises(FormatError, match="architecture name"):
            parse_whole(replace(SEQUENCE, cells=text(97)).payload(), version=11)

    @pytest.mark.parametrize(("version", "other"), [(9, 11), (10, 11), (11, 10)])
    def test_another_version(self, version: int, other: int) -> None:
        """A state does not tell its version, but does not read as another."""
        blob = State("kv", version=version, ext=True).blob()
        with pytest.raises(FormatError):
            read(State("kv", version=other, ext=True), blob)

    def test_partial_as_full_and_back(self) -> None:
        full = State("hybrid", seq=0)
        partial = replace(full, partial=True)
        for written, expected in ((full, partial), (partial, full)):
            with pytest.raises(FormatError):
                read(expected, written.blob())


def test_unknown_architecture() -> None:
    """Where nothing is known of a model, what fits no known memory may be a new one."""
    blob = replace(WHOLE, arch="nova").blob() + b"\0"
    with pytest.raises(UnsupportedError, match="'nova' is not known"):
        parse_whole(blob, version=11)
    with pytest.raises(UnsupportedError, match="no known kind of memory"):
        parse_sequence(SEQUENCE.blob() + b"\0", version=11)
    with pytest.raises(FormatError):
        parse_whole(blob, version=11, traits=Traits("nova", "kv"))


def test_big_endian_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are in host byte order; only little-endian ones are read."""
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(UnsupportedError, match="little-endian"):
        parse_whole(WHOLE.blob(), version=11)


def test_truncation_says_how_much_is_missing() -> None:
    """The error of a state that was cut off has the numbers."""
    blob = WHOLE.blob()
    with pytest.raises(TruncatedError) as caught:
        parse_whole(blob[:-1], version=11)
    assert (caught.value.need, caught.value.have) == (len(blob), len(blob) - 1)
