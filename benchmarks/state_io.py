"""How fast states are saved and restored, beside memcpy, llama.cpp's own and other bindings.

    python benchmarks/state_io.py [--quick] [--json FILE] [--chart FILE.svg] [--markdown]

Every way there is, taken in turns in one process, with the model of 128 KiB of f16 state for a
token that ``llama_state.testing.models.write_benchmark_model`` makes: with flash attention,
without it, and with q8_0 caches. Where llama-cpp-python is installed, all of it runs on the
libllama and in the ``Llama`` of that, and its own functions take part; else on the libllama that
``load_library()`` finds. Needs the extras ``checkpoint`` and ``testing``, for ``--chart`` also
``plot``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import _machine
import _output
import _small
import _states
import _ways
from _report import Report
from _states import CONFIGURATIONS, Configuration, Subject, subject
from _targets import findings
from _timing import Timing, Way, alternate

import llama_state as ls
from llama_state._install import pip_install

MAIN_SIZE = 512
# The large state, which no pool keeps: 4 GiB, or as many times the size that all ways run at.
_LARGER = 8
SIZES = (64, 128, 256, 512, 1024)
PARTS: dict[str, Callable[[_ways.Work], Iterable[Way]]] = {
    "memory": _ways.memory_ways,
    "restore": _ways.restore_ways,
    "sequence": _ways.sequence_ways,
    "files": _ways.file_ways,
    "checkpoints": _ways.checkpoint_ways,
}
SECTIONS = (*PARTS, "conversions", "sizes", "large", "tiny", "threads")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _check_extras(options)
        _output.report(options, _measure)
    except ls.UnsupportedError as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace) -> Report:
    sizes = options.sizes or ([64] if options.quick else SIZES)
    rounds = options.rounds or (3 if options.quick else 7)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="llama_state-", dir=options.folder)
        folder = Path(stack.enter_context(made))
        bench = Bench(folder, rounds, in_llama=_states.llama_cpp is not None and not options.engine)
        facts = _machine.facts(bench.library, bench.host, folder)
        timings = list(bench.run(sizes, options.only or SECTIONS))
    facts["seconds"] = f"{time.perf_counter() - start:.0f}"
    return Report(facts, rounds, timings, findings(timings))


def _check_extras(options: argparse.Namespace) -> None:
    """Say that something is missing now, not after minutes."""
    measured = [] if options.read else options.only or SECTIONS
    for extra, package, needed in (
        ("testing", "gguf", bool(measured)),
        ("plot", "matplotlib", options.chart is not None),
    ):
        if needed and importlib.util.find_spec(package) is None:
            raise ls.UnsupportedError(f"{package} is missing: {pip_install(extra)}")


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=lines[0])
    parser.add_argument(
        "--quick", action="store_true", help="64 MiB, 3 rounds: about a minute, rough figures"
    )
    parser.add_argument("--rounds", type=int, help="runs of each way that are measured (7)")
    parser.add_argument(
        "--sizes",
        type=_list_of(int),
        metavar="MIB,...",
        help=f"states to measure; all ways at {MAIN_SIZE} or else the largest "
        f"({','.join(map(str, SIZES))})",
    )
    parser.add_argument(
        "--only",
        type=_list_of(_section),
        metavar="PART,...",
        help=f"parts to run, of {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--engine", action="store_true", help="not in llama-cpp-python, even where it is installed"
    )
    _output.add_options(parser)
    return parser


def _list_of(kind: Callable[[str], object]) -> Callable[[str], list[object]]:
    def items(text: str) -> list[object]:
        return [kind(item) for item in text.split(",")]

    return items


def _section(name: str) -> str:
    if name not in SECTIONS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SECTIONS)}")
    return name


class Bench:
    """The runs, on one libllama.

    Args:
        folder: Where model and files go.
        rounds: Times that each way is measured.
        in_llama: In a ``llama_cpp.Llama``.
    """

    def __init__(self, folder: Path, rounds: int, *, in_llama: bool) -> None:
        self._folder = folder
        self._rounds = rounds
        self._in_llama = in_llama
        self._path = _states.write_model(folder)
        with self._subject(1, CONFIGURATIONS[0]) as it:
            self.library: ls.Library = it.ctx.library
        self.host = "llama_cpp_python" if in_llama else _package_of(self.library)

    def run(self, sizes: Sequence[int], sections: Sequence[str]) -> Iterator[Timing]:
        """Measure *sections*, with states of *sizes* MiB."""
        main_size = MAIN_SIZE if MAIN_SIZE in sizes else max(sizes)
        for configuration in CONFIGURATIONS:
            parts = [ways for name, ways in PARTS.items() if name in sections]
            if parts:
                yield from self._states(configuration, main_size, parts)
            if "conversions" in sections:
                ways = [_ways.conversion_ways]
                yield from self._states(configuration, main_size, ways, section="conversions")
            if "sizes" in sections and len(sizes) > 1 and configuration.cache_type == "f16":
                yield from self._sizes(configuration, sizes)
        if "large" in sections:
            yield from self._large(_LARGER * main_size)
        if "tiny" in sections:
            _progress("tiny")
            yield from _small.tiny(self.library, self._folder, self._rounds)
        if "threads" in sections:
            yield from self._threads(main_size)

    def _states(
        self,
        configuration: Configuration,
        mib: int,
        parts: Sequence[Callable[[_ways.Work], Iterable[Way]]],
        section: str = "states",
    ) -> list[Timing]:
        _progress(f"{mib} MiB, {configuration}")
        n_tokens = configuration.tokens_of(mib)
        with self._subject(n_tokens, configuration) as it, self._work(it, n_tokens) as work:
            ways = [_ways.copying(work), *(way for part in parts for way in part(work))]
            return self._alternate([(len(work.blob), ways)], section, configuration)

    def _large(self, mib: int) -> Iterator[Timing]:
        """Measure saves by themselves: those that are compared are only seconds apart then."""
        configuration = CONFIGURATIONS[0]
        _progress(f"{mib} MiB, {configuration}")
        n_tokens = configuration.tokens_of(mib)
        with self._subject(n_tokens, configuration) as it, self._work(it, n_tokens) as work:
            for ways in (_ways.large_ways, _ways.large_saves):
                groups = [(len(work.blob), ways(work))]
                yield from self._alternate(groups, "large", configuration)

    def _sizes(self, configuration: Configuration, sizes: Sequence[int]) -> list[Timing]:
        """States of all sizes in turns: what drifts, drifts for all of them.

        Each in a context of its size: llama.cpp zeroes all of a context that it restores whole.
        """
        _progress(f"{', '.join(map(str, sizes))} MiB, {configuration}")
        with contextlib.ExitStack() as stack:
            groups = []
            for mib in sizes:
                n_tokens = configuration.tokens_of(mib)
                it = stack.enter_context(self._subject(n_tokens, configuration))
                work = stack.enter_context(self._work(it, n_tokens))
                groups.append((len(work.blob), _ways.size_ways(work)))
            return self._alternate(groups, "sizes", configuration)

    def _threads(self, mib: int) -> list[Timing]:
        configuration = CONFIGURATIONS[0]
        _progress(f"threads, {mib} MiB")
        n_tokens = configuration.tokens_of(mib)
        with self._subject(n_tokens, configuration) as it, self._work(it, n_tokens) as work:
            groups = [(len(work.blob), _small.thread_ways(work))]
            return self._alternate(groups, "threads", configuration)

    def _alternate(
        self,
        groups: Iterable[tuple[int, Iterable[Way]]],
        section: str,
        configuration: Configuration,
    ) -> list[Timing]:
        return alternate(groups, self._rounds, section=section, configuration=str(configuration))

    def _subject(
        self, n_tokens: int, configuration: Configuration
    ) -> contextlib.AbstractContextManager[Subject]:
        return subject(self._path, n_tokens, configuration, in_llama=self._in_llama)

    @contextlib.contextmanager
    def _work(self, it: Subject, n_tokens: int) -> Iterator[_ways.Work]:
        """Return a filled context, and a folder for its files that is gone afterwards."""
        blob = _states.fill(it, n_tokens)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            yield _ways.Work(it, blob, n_tokens, Path(folder))


def _package_of(library: ls.Library) -> str | None:
    """Return the package that *library* was found in."""
    return {"xllamacpp": "xllamacpp", "llama_cpp": "llama_cpp_python"}.get(library.source)


def _progress(what: str) -> None:
    print(f"measuring: {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
