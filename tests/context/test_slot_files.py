"""Slot files of a real llama-server, and the media that llama.cpp itself can read."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llama_state as ls
from llama_state.inspection import convert_file
from llama_state.testing.models import write_model
from tests.layout.slots import AUDIO, IMAGE, audio, image
from tests.libllama import LIBRARY

pytestmark = pytest.mark.libllama

SERVER = """
import json, sys, urllib.request
import xllamacpp

folder, model = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = model
params.slot_save_path = folder + "/"
params.n_ctx, params.n_parallel, params.warmup, params.port = 256, 1, False, 0
server = xllamacpp.Server(params)

def post(path, data):
    request = urllib.request.Request(server.listening_address + path, json.dumps(data).encode())
    return json.load(urllib.request.urlopen(request, timeout=60))

post("/completion", {"prompt": "hello", "n_predict": 1, "id_slot": 0, "cache_prompt": True})
print(json.dumps(post("/slots/0?action=save", {"filename": "slot"})))
"""


def test_the_prompt_is_found(tmp_path: Path) -> None:
    """The prompt of a real one is found, and no packed word is taken for a token."""
    model = write_model(tmp_path / "m.gguf", text=True)
    with ls.Model(model, LIBRARY) as opened:
        prompt = opened.tokenize("hello")
    command = [sys.executable, "-c", SERVER, str(tmp_path), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    saved = json.loads(done.stdout)
    found = ls.inspect_file(tmp_path / "slot", model=model)
    assert (found.kind, found.problem, found.nbytes) == ("slot file", None, saved["n_written"])
    assert len(found.tokens) == saved["n_saved"]
    assert list(found.tokens[: len(prompt)]) == prompt
    assert found.layout is not None
    assert found.layout.spans == {0: (0, len(found.tokens) - 1)}
    convert_file(tmp_path / "slot", tmp_path / "c")
    convert_file(tmp_path / "c", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "slot").read_bytes()


@pytest.mark.parametrize(("chunk", "kind"), [(image, IMAGE), (audio, AUDIO)])
def test_media_chunks_are_those_of_llama_cpp(chunk: Callable[..., bytes], kind: int) -> None:
    """llama.cpp's own reader understands the chunks that the parser is tested with."""
    native = ctypes.CDLL(str(LIBRARY.path))
    if not hasattr(native, "mtmd_input_chunk_load"):  # a library without llama-server, or older
        return
    native.mtmd_input_chunk_load.restype = ctypes.c_void_p
    native.mtmd_input_chunk_load.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    native.mtmd_input_chunk_get_id.restype = ctypes.c_char_p
    native.mtmd_input_chunk_get_id.argtypes = [ctypes.c_void_p]
    native.mtmd_input_chunk_get_n_tokens.restype = ctypes.c_size_t
    native.mtmd_input_chunk_get_n_tokens.argtypes = [ctypes.c_void_p]
    native.mtmd_input_chunk_get_type.argtypes = [ctypes.c_void_p]
    native.mtmd_input_chunk_free.argtypes = [ctypes.c_void_p]
    sizes = (4, 3) if kind == IMAGE else (12,)
    written = (chunk(*sizes, "a hash", version=version) for version in (1, 2))
    (loaded,) = filter(None, (native.mtmd_input_chunk_load(raw, len(raw)) for raw in written))
    assert native.mtmd_input_chunk_get_type(loaded) == kind
    assert native.mtmd_input_chunk_get_id(loaded) == b"a hash"
    assert native.mtmd_input_chunk_get_n_tokens(loaded) == 12
    native.mtmd_input_chunk_free(loaded)
