"""The small checks of the nox sessions: ``python .ci/checks.py NAME ARGUMENT...``."""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

MINORS = range(11, 16)
COMPILE_SECONDS = 10
# Of the names that users can see, those whose types are written down and not inferred.
TYPED_PERCENT = 98
WHEEL_NAME = re.compile(r"-cp311-abi3-manylinux[^-]*\.whl$")
IN_THE_WHEEL = (
    r"llama_state/_io/_pages\.abi3\.so",
    r"llama_state/_io/_pages\.pyi",
    r"llama_state/_llama/_llama_cffi\.abi3\.so",
    r"llama_state/_llama/_llama_cffi\.pyi",
    r"llama_state/_llama/probe\.gguf",
    r"llama_state/adapters/llama_cpp/__init__\.py",
    r"llama_state/cli/states\.py",
    r"llama_state/inspection/page/page\.(html|css|js)",
    r"llama_state/inspection/source\.py",
    r"llama_state/py\.typed",
    r"llama_state/testing/specs/.*\.json",
)
NOT_IN_THE_WHEEL = r"(.*\.(c|h|o|pyc)|(tests|benchmarks|docs|examples)/.*|(build_ffi|noxfile)\.py)"

# The tests that a run may skip: (run, start of the test's name) and why that is right.
ALLOWED_SKIPS = {
    ("test", "tests.adapters."): "the tests inside llama-cpp-python run in step builds",
    ("test", "::tests.adapters."): "as modules, likewise",
    ("test", "tests.inspection.test_in_browser"): "they run in step browser",
    ("test", "tests.real."): "the tests with real models run in step real",
    ("test", "tests.servers.test_namespaces"): "it needs root, and a kernel that lets it",
    ("pythons", "tests.adapters."): "the tests inside llama-cpp-python run in step builds",
    ("pythons", "::tests.adapters."): "as modules, likewise",
    ("pythons", "tests.inspection.test_in_browser"): "they run in step browser",
}
# Of tests/__init__.py: of modules that -m 'not libllama' leaves out.
LEFT_OUT = "it needs a libllama, and -m leaves these tests out"


class Results(NamedTuple):
    """What a pytest run's XML says; *skips* are (test, reason) of those that are not allowed."""

    passed: int
    failed: int
    skipped: int
    skips: list[tuple[str, str]]


def results(run: str, xml: Path) -> Results:
    """Read the XML that pytest wrote for *run*. An expected failure counts as skipped."""
    passed = failed = skipped = 0
    skips = []
    for case in ElementTree.parse(xml).iter("testcase"):  # noqa: S314 - pytest wrote it
        name = f"{case.get('classname')}::{case.get('name')}"
        reason = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif reason is not None:
            skipped += 1
            # What -m leaves out as a whole module, a test of tests/project checks.
            left_out = (
                run == "pythons" and name.startswith("::") and LEFT_OUT in (reason.text or "")
            )
            allowed = any(run == r and name.startswith(start) for r, start in ALLOWED_SKIPS)
            if not (left_out or allowed):
                skips.append((name, reason.get("message", "")))
        else:
            passed += 1
    return Results(passed, failed, skipped, skips)


def skips(run: str, xml: str) -> None:
    """Fail where a test was skipped that is not on the list, or where none has run."""
    found = results(run, Path(xml))
    for name, reason in found.skips:
        print(f"skipped, and not on the list of .ci/checks.py: {name}: {reason}")
    for (_, start), reason in ALLOWED_SKIPS.items():
        if found.skipped:
            print(f"may be skipped: {start}: {reason}")
    print(f"{run}: {found.passed} passed, {found.failed} failed, {found.skipped} skipped")
    if found.skips or found.failed or not found.passed:
        sys.exit(1)


def command(path: str, mark: str) -> None:
    """Print the shell block below ``<!-- mark -->``."""
    block = re.compile(rf"^<!-- {mark} -->\n+```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    (text,) = block.findall(Path(path).read_text(encoding="utf-8"))
    print(text, end="")


def doctests(*paths: str) -> None:
    """Run the examples of Markdown files, each in an empty folder; the first must have some.

    A page that says ``<!-- needs PACKAGE -->`` is left out where that is not installed.
    """
    failed = 0
    for number, path in enumerate(markdown(paths)):
        text = path.read_text(encoding="utf-8")
        needs = re.match(r"<!-- needs (\w+) -->", text)
        if needs and number and not find_spec(needs[1]):
            print(f"{path.name}: not here, it needs {needs[1]}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = examples(path, Path(folder))
            os.chdir(path.parent)
        failed += outcome.failed + (number == 0 and not outcome.attempted)
    if failed:
        sys.exit(1)


def in_the_clone(path: str) -> None:
    """Run the examples of a Markdown file in its own folder, as one who reads and types them."""
    sys.path.insert(0, "")  # as the interpreter does that is typed into
    outcome = examples(Path(path), Path(path).parent)
    if outcome.failed or not outcome.attempted:
        sys.exit(1)


def examples(path: Path, folder: Path) -> doctest.TestResults:
    """Run the examples of a Markdown file in *folder*, and say what became of them."""
    # A fence is no expected output.
    text = re.sub(r"^\s*```.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)
    os.chdir(folder)
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    print(f"{path.name}: {outcome.attempted} examples, {outcome.failed} failed")
    return outcome


def markdown(paths: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files, and those of the folders."""
    for path in map(Path, paths):
        yield from sorted(path.glob("**/*.md")) if path.is_dir() else [path]


def compile_time() -> None:
    """Compile the extensions of the source tree that this is run in, and say how long it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext"], check=True)
    seconds = time.perf_counter() - start
    print(f"the extensions compile in {seconds:.1f} s (allowed: {COMPILE_SECONDS} s)")
    if seconds > COMPILE_SECONDS:
        sys.exit(1)


def typed() -> None:
    """Ask pyright how many public names have a type that no checker needs to infer."""
    # It takes no package of the folder that it is run in, but one that Python finds elsewhere.
    with tempfile.TemporaryDirectory() as folder:
        found = subprocess.run(  # noqa: S603 - our own words
            [
                *(sys.executable, "-m", "pyright", "--outputjson"),
                *("--ignoreexternal", "--verifytypes", "llama_state"),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            text=True,
            check=False,  # it fails below 100 %
        )
    completeness = json.loads(found.stdout)["typeCompleteness"]
    percent = 100 * completeness["completenessScore"]
    print(f"{percent:.1f} % of the public names have types (needed: {TYPED_PERCENT} %)")
    if percent < TYPED_PERCENT:
        for symbol in completeness["symbols"]:
            if symbol["isExported"] and not symbol["isTypeKnown"]:
                print(f"  {symbol['name']}")
        sys.exit(1)


def wheel(path: str) -> None:
    """Check a wheel's name and files."""
    problems = [] if WHEEL_NAME.search(path) else [f"{path} is not tagged for abi3 and manylinux"]
    names = zipfile.ZipFile(path).namelist()
    problems += [f"no {p}" for p in IN_THE_WHEEL if not any(re.fullmatch(p, n) for n in names)]
    problems += [f"has {n}" for n in names if re.fullmatch(NOT_IN_THE_WHEEL, n)]
    print("\n".join([f"{Path(path).name}: {len(names)} files", *problems]))
    if problems:
        sys.exit(1)


def release(tag: str) -> None:
    """Fail where a tag, the version and the newest entry of the changelog are not one release."""
    root = Path(__file__).parents[1]
    source = (root / "llama_state" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE)
    changelog = (root / "docs" / "changelog.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    problems = [] if tag == f"v{version}" else [f"the tag is {tag}, the version {version}"]
    if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", headings[0]):
        problems.append(f"the changelog begins with {headings[0]!r}, not {version!r} and a date")
    if problems:
        sys.exit("\n".join(problems))


def interpreters(own: str) -> None:
    """Print a line "VERSION PATH" for every Python to test, "VERSION absent" for what is not here.

    Looked for on PATH and among pyenv's; *own* stands for its version.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in MINORS:
        name = f"python3.{minor}"
        places = [own, shutil.which(name), *sorted(pyenv.glob(f"3.{minor}.*/bin/{name}"))]
        good = (str(place) for place in places if place and is_version(str(place), minor))
        print(f"3.{minor}", next(good, "absent"))


def is_version(python: str, minor: int) -> bool:
    """Whether *python* runs, is CPython 3.*minor* and can make environments."""
    code = f"import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, {minor}))"
    done = subprocess.run([python, "-c", code], capture_output=True, check=False)  # noqa: S603
    return done.returncode == 0


def smoke(outside: str) -> None:
    """Round trips with the installed package, from a folder that is not the tree."""
    where = "import llama_state, sys; print(sys.version.split()[0], llama_state.__file__)"
    outputs = [
        subprocess.run(  # noqa: S603 - ourselves
            [sys.executable, *arguments], cwd=outside, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        for arguments in (["-c", where], ["-m", "llama_state", "demo", "--all"])
    ]
    version, place = outputs[0].split()
    print(f"python {version}, {place}: {', '.join(outputs[1].splitlines()[-2:])}")
    if not Path(place).is_relative_to(sys.prefix):
        sys.exit(1)


CHECKS: dict[str, Callable[..., None]] = {
    "skips": skips,
    "command": command,
    "doctests": doctests,
    "in-the-clone": in_the_clone,
    "compile-time": compile_time,
    "typed": typed,
    "wheel": wheel,
    "release": release,
    "interpreters": interpreters,
    "smoke": smoke,
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](*sys.argv[2:])
