"""Every check of the project, one session each: ``nox -s SESSION``, ``nox -l`` lists them.

``bash .ci/run`` runs all of them, each in a new copy of the tree. Called by hand they work in the
checkout itself. What follows ``--`` goes to the tool that a session runs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests", "docs"]

ROOT = Path(__file__).parent
CHECKS = str(ROOT / ".ci" / "checks.py")
DEBIAN = str(ROOT / ".ci" / "debian.py")
MATRIX = str(ROOT / ".ci" / "matrix.py")
MODELS = str(ROOT / ".ci" / "models.py")

# The builds of llama.cpp that the tests have downloaded or compiled, and the models, kept between
# runs.
_CACHE_HOME = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
CACHE = Path(os.environ.get("LLAMA_STATE_CI_CACHE") or Path(_CACHE_HOME, "llama_state-ci"))

# Processes that test at the same time.
CORES = 2

# The release of Debian that has the newest Python, and what the tests need there.
NEWEST = "sid"
NEWEST_PACKAGES = (
    *("ca-certificates", "gcc", "git", "iproute2", "libc6-dev", "openssl"),
    *("python3-all-dev", "python3-all-venv", "redis-server"),
)
# What differs most from one Python to the next: where they look for signals.
SIGNALS = ("tests/io/test_locks.py", "tests/context/test_interruptions.py::test_signals")

# With a libllama there: one kind of model of each memory, and what is not about kinds.
QUICK = (
    *("tests/llama", "tests/cli", "tests/context/test_context.py", "tests/context/test_files.py"),
    *("tests/context/test_buffers.py", "tests/context/test_checkpoints.py"),
    *("tests/context/test_lifetime.py", "tests/context/test_prefix_store.py"),
    *("tests/context/test_threads.py", *SIGNALS),
    *("-k", "not moe and not mamba2 and not qwen2vl and not lfm2"),
)

# Minutes, and less a matter of the Python than of the system: not there, unless all is asked for.
NOT_QUICK = (
    "--ignore=tests/servers",
    "--ignore=tests/inspection/test_costs.py",
    "--deselect=tests/io/test_faults.py::test_saves_that_are_interrupted",
)

# What is made in the tree, and is another's there.
MADE = (".git", ".nox", "*.so", "*.egg-info", "build", "__pycache__", ".*_cache")

# The version of llama-cpp-python that is tested.
HOST = "0.3.36"

# One build of each state format, for the fuzz session.
FUZZ_BUILDS = ("2026.8.10566", "2026.9.11063", "2026.10.11549")

# llama.cpp's threads wait by spinning; where cores are shared that takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# These would change which package or which library is tested.
for _name in (
    *("LLAMA_STATE_LIBRARY", "LLAMA_STATE_REAL_MODELS"),
    *("PYTEST_ADDOPTS", "PYTHONPATH", "PYTHONHOME"),
):
    os.environ.pop(_name, None)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install(*extra("lint"))
    session.run("ruff", "check", "--no-cache", *session.posargs)
    session.run("ruff", "format", "--no-cache", "--check", *session.posargs)


@nox.session
def workflows(session: nox.Session) -> None:
    """Check the workflows of GitHub: actionlint, and zizmor for what an attacker could do."""
    session.install(*extra("workflows"))
    session.run("actionlint", *map(str, workflow_files()))
    session.run("zizmor", "--offline", "--pedantic", *map(str, workflow_files()))


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy, strictly, and with pyright that all public names have them."""
    session.install("-e", ".[lint,test]", "nox", "setuptools>=77")
    with TemporaryDirectory() as cache:
        session.run("mypy", f"--cache-dir={cache}", *session.posargs)
        session.run("mypy", f"--cache-dir={cache}", ".ci")
        # The parts for other systems, as a type checker sees them there.
        for system in ("darwin", "win32"):
            options = (f"--cache-dir={cache}", f"--platform={system}")
            session.run("mypy", *options, "llama_state")
    session.run("python", CHECKS, "typed")


@nox.session
def demo(session: nox.Session) -> None:
    """Run the README's demo command as written, then its examples where the reader is."""
    readme(session, "demo")
    session.run("llama-state", "demo", "--all")
    for _ in range(2):  # a reader may type them again, and the files are there then
        session.run("python", CHECKS, "in-the-clone", str(ROOT / "README.md"))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the README's test command as written, or with the options for pytest behind --."""
    if session.posargs:
        readme(session, "test", *session.posargs)
        return
    with TemporaryDirectory() as folder:
        xml = f"{folder}/results.xml"
        options = f"--junitxml={xml} -n {CORES} --dist worksteal"
        readme(session, "test", HYPOTHESIS_PROFILE="ci", PYTEST_ADDOPTS=options)
        session.run("python", CHECKS, "skips", "test", xml)


@nox.session
def browser(session: nox.Session) -> None:
    """Look at pages of states in Chromium."""
    session.install("-e", ".[test,browser]")
    with TemporaryDirectory() as folder:
        xml = f"{folder}/results.xml"
        options = ("-q", f"--junitxml={xml}", *session.posargs)
        session.run("python", "-m", "pytest", *options, "tests/inspection/test_in_browser.py")
        session.run("python", CHECKS, "skips", "browser", xml)


@nox.session
def pythons(session: nox.Session) -> None:
    """Test on the oldest Python that is here, and on the newest of all, which Debian sid has.

    What needs no libllama is run where there is none, but for the slowest, and on the newest a
    quick part of the others too. Behind -- is what pytest is to run there instead of that part:
    ``nox -s pythons -- tests`` is all of it. What signals leave is tested on that Debian's other
    Pythons, too.
    """
    version, oldest = interpreters(session)[0]
    with TemporaryDirectory() as folder:
        if version == f"3.{sys.version_info[1]}":
            session.log(f"oldest: python {version}, on which the session tests runs everything")
        else:
            session.log(f"oldest: python {version}")
            on_python(session, [venv(session, Path(folder, version), oldest)], Path(folder))
        root = Path(folder, "debian")
        if not newest_debian(session, root):
            return
        shutil.copytree(ROOT, root / "src", symlinks=True, ignore=shutil.ignore_patterns(*MADE))
        inside = ["python", DEBIAN, "run", str(root), "/src"]
        names = [path.name for path in (root / "usr" / "bin").glob("python3.[0-9][0-9]")]
        newest = max(names, key=lambda name: int(name.partition(".")[2]))
        session.log(f"newest: {newest} of {', '.join(sorted(names))} in Debian {NEWEST}")
        for name in {*names} - {newest}:
            look_at_signals(session, inside, name)
        session.run(*inside, newest, "-m", "venv", "/venv")
        python = [*inside, "/venv/bin/python"]
        on_python(session, python, root / "tmp", "/tmp")  # noqa: S108 - the one of that Debian
        session.run(*python, "-m", "pip", "install", "-q", *extra("engine"))
        session.run(
            *python, "-X", "dev", "-W", "error", "-m", "pytest", "-q", *(session.posargs or QUICK)
        )


def look_at_signals(session: nox.Session, inside: list[str], name: str) -> None:
    """Test what signals leave with a Python of another system."""
    python = partial(session.run, *inside, f"/signals-{name}/bin/python")
    session.run(*inside, name, "-m", "venv", f"/signals-{name}")
    python("-m", "pip", "install", "-q", "-e", ".[test]")
    python("tests/handlers.py")
    python("-m", "pytest", "-q", *SIGNALS)


@nox.session
def strangers(session: nox.Session) -> None:
    """Do on fresh Debians what the README says, in a clean clone, and install a wheel there.

    Behind -- stand the releases (bookworm trixie sid). Only what is committed is cloned; it takes
    the time of all tests on each.
    """
    session.install(*extra("release"))
    with TemporaryDirectory() as folder:
        session.run("pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT))
        wheel = manylinux(session, next(Path(folder).glob("*.whl")))
        for suite in session.posargs or ("bookworm", "trixie", NEWEST):
            follow_readme(session, suite)
            install_wheel(session, suite, wheel)


def follow_readme(session: nox.Session, suite: str) -> None:
    """Do what the README says in a clone, on a Debian with only what it names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (packages,) = re.findall(r"`apt install ([^`]*)`", text)
    commands = [readme_command(session, mark) for mark in ("demo", "test")]
    # Every example of the page behind the first command, as it says.
    commands.insert(1, "python -m doctest -o ELLIPSIS README.md")
    with TemporaryDirectory() as folder:
        root = Path(folder, "debian")
        make_debian(session, suite, root, *packages.split())
        session.run("git", "clone", "-q", str(ROOT), str(root / "clone"), external=True)
        inside = ("python", DEBIAN, "run", str(root), "/clone")
        session.run(*inside, "python3", "-m", "venv", ".venv")
        for command in commands:
            script = f". .venv/bin/activate && {command}"
            session.run(*inside, "bash", "-euo", "pipefail", "-c", script)


def install_wheel(session: nox.Session, suite: str, wheel: Path) -> None:
    """Install a wheel on a Debian without a compiler, and run the demo."""
    with TemporaryDirectory() as folder:
        root = Path(folder, "debian")
        make_debian(session, suite, root, "libgomp1", "python3-venv")
        shutil.copy(wheel, root / "srv")
        inside = ("python", DEBIAN, "run", str(root), "/srv")
        session.run(*inside, "python3", "-m", "venv", "/venv")
        wanted = f"./{wheel.name}[engine,testing]"
        session.run(*inside, "/venv/bin/pip", "install", "-q", wanted)
        session.run(*inside, "/venv/bin/llama-state", "demo")


def make_debian(session: nox.Session, suite: str, root: Path, *packages: str) -> None:
    """Make a minimal Debian with packages."""
    make = ("python", DEBIAN, "make", suite, str(root), str(CACHE))
    session.run(*make, "ca-certificates", *packages)


@nox.session
def builds(session: nox.Session) -> None:
    """Run the libllama tests on every build of llama.cpp, or whole on the versions behind --."""
    session.install("-e", ".[test]")
    session.run("python", MATRIX, "fetch", str(CACHE), *session.posargs)
    with TemporaryDirectory() as folder:
        host = venv(session, Path(folder, "llama_cpp_python"))
        pip(session, host, *map(str, CACHE.glob("llama_cpp_python-*.whl")), "-e", ".[test]")
        options = ("--host", host, "--work", f"{folder}/work")
        session.run("python", MATRIX, "run", *options, str(CACHE), *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Restore damaged states on a build of each state format; damage and kill some stores."""
    session.install("-e", ".[test]")
    session.run("python", MATRIX, "fetch", str(CACHE), *FUZZ_BUILDS)
    for version in FUZZ_BUILDS:
        library = CACHE / f"xllamacpp-{version}" / "xllamacpp" / "xllamacpp.abi3.so"
        session.run(
            *("python", "-m", "tests.fuzz", *(session.posargs or ("--cases", "4000"))),
            env={"LLAMA_STATE_LIBRARY": str(library), "GGML_NO_BACKTRACE": "1"},
        )
    if not session.posargs:
        damage_stores(session, cases=650, kills=30)


@nox.session
def stores(session: nox.Session) -> None:
    """Damage 20,000 objects of stores, kill 1,000 processes, let every call of the system fail."""
    session.install("-e", ".[test]")
    damage_stores(session, cases=20_000, kills=1000)
    env = {"HYPOTHESIS_PROFILE": "whole", "GGML_NO_BACKTRACE": "1"}
    session.run("python", "-m", "pytest", "-q", "tests/context/test_store_faults.py", env=env)


@nox.session
def real(session: nox.Session) -> None:
    """Test with two real models, on the newest wheel and inside llama-cpp-python."""
    session.install("-e", ".[test]")
    session.run("python", MODELS, str(CACHE), *extra("real"))
    session.run("python", MATRIX, "fetch", str(CACHE), HOST)
    models = str(CACHE / "models")
    with TemporaryDirectory() as folder:
        host = venv(session, Path(folder, "host"))
        pip(session, host, *map(str, CACHE.glob(f"llama_cpp_python-{HOST}-*.whl")), "-e", ".[test]")
        for python, mark in (("python", "not llama_cpp"), (host, "llama_cpp")):
            xml = f"{folder}/results.xml"
            options = ("-q", f"--junitxml={xml}", "-m", f"real_model and {mark}", "tests/real")
            env = {"LLAMA_STATE_REAL_MODELS": models, "GGML_NO_BACKTRACE": "1"}
            arguments = (*options, *session.posargs)
            session.run(python, "-m", "pytest", *arguments, external=python == host, env=env)
            session.run("python", CHECKS, "skips", "real", xml)


@nox.session
def kinds(session: nox.Session) -> None:
    """Test in full the kinds of model of which the other sessions try few examples."""
    session.install("-e", ".[test]")
    names = ("context/test_round_trips", "context/test_machine", "context/test_store_machine")
    slow = [f"tests/{name}.py" for name in (*names, "servers/test_machine")]
    env = {"HYPOTHESIS_PROFILE": "whole", "GGML_NO_BACKTRACE": "1"}
    session.run("python", "-m", "pytest", "-q", *(session.posargs or slow), env=env)
    session.run("python", "-m", "tests.fuzz", "--cases", "11050", env=env)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel from the sdist, check both, and try it on every Python that is found."""
    session.install("setuptools>=77", "cffi>=2.0", *extra("release"))
    with TemporaryDirectory() as folder:
        dist, sources, outside = (Path(folder, name) for name in ("dist", "sources", "outside"))
        session.run("python", "setup.py", "-q", "sdist", "-d", str(dist))
        (sdist,) = dist.glob("*.tar.gz")
        for new in (sources, outside):
            new.mkdir()
        command = ("tar", "-xzf", str(sdist), "-C", str(sources), "--strip-components=1")
        session.run(*command, external=True)
        with session.chdir(sources):
            session.run("python", CHECKS, "compile-time")
            # The sdist has all that its tests need: these open files outside of the package.
            session.install("-e", ".[test]")
            files = ("tests/project", "tests/context/test_examples.py")
            session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
        # From here on the package of the tree is not in the folder that commands run in.
        with session.chdir(outside):
            session.run("pip", "wheel", "-q", "--no-deps", "-w", str(dist), str(sdist))
            built = manylinux(session, *dist.glob("*.whl"))
            session.run("python", CHECKS, "wheel", str(built))
            session.run("twine", "check", "--strict", str(sdist), str(built))
            session.run("check-wheel-contents", str(built))
            session.run("abi3audit", "--strict", "--verbose", str(built))
            for version, python in interpreters(session):
                own = venv(session, Path(folder, version), python)
                pip(session, own, f"{built}[engine,testing]")
                session.run(own, CHECKS, "smoke", str(outside), external=True)
            # What a user's type checker sees.
            session.install(f"{built}[testing,lint]")
            shutil.copy(ROOT / "tests" / "typing_api.py", outside)
            session.run("mypy", "--strict", f"--cache-dir={folder}/mypy", "typing_api.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Run the examples of the README and the pages, and build the site."""
    session.install(".[all,docs]")
    with TemporaryDirectory() as folder:
        with session.chdir(folder):
            session.run("python", CHECKS, "doctests", str(ROOT / "README.md"), str(ROOT / "docs"))
        session.run("mkdocs", "build", "--strict", "--site-dir", f"{folder}/site")


# -- what they are made of


def damage_stores(session: nox.Session, *, cases: int, kills: int) -> None:
    """Damage objects of prefix stores, and kill processes that use one."""
    env = {"GGML_NO_BACKTRACE": "1"}
    session.run("python", "-m", "tests.fuzz", "--of", "objects", "--cases", str(cases), env=env)
    session.run("python", "-m", "tests.fuzz.kills", "--kills", str(kills), env=env)


def newest_debian(session: nox.Session, root: Path) -> bool:
    """Make a Debian with the newest Python; where that cannot be done say why, and return False."""
    lacks = str(session.run("python", DEBIAN, "lacks", silent=True, log=False)).strip()
    if not lacks:
        try:
            session.run("python", DEBIAN, "make", NEWEST, str(root), str(CACHE), *NEWEST_PACKAGES)
        except nox.command.CommandFailed:  # its packages change every day, and cannot always be had
            lacks = "it could not be made"
    if lacks:
        session.warn(f"newest: absent, there is no Debian {NEWEST} here: {lacks}")
    return not lacks


def on_python(session: nox.Session, python: list[str], folder: Path, seen: str = "") -> None:
    """Run the tests that need no libllama with a Python that gets none.

    Args:
        session: The session.
        python: The command; its environment is empty.
        folder: For the results.
        seen: The path of that folder as the command sees it, if another.
    """
    run = partial(session.run, *python, external=True)
    run("-m", "pip", "install", "-q", "-e", ".[test]")
    run("-m", "pip", "uninstall", "-q", "-y", "xllamacpp")
    name = "results.xml"
    marked = "not libllama and not llama_cpp and not real_model"
    slow = () if session.posargs else NOT_QUICK
    options = ("-q", "-m", marked, f"--junitxml={seen or folder}/{name}", *slow)
    run("-X", "dev", "-W", "error", "-m", "pytest", *options)  # as in the command of the README
    session.run("python", CHECKS, "skips", "pythons", str(folder / name))


def readme(session: nox.Session, mark: str, *arguments: str, **env: str) -> None:
    """Run the README's command of that *mark*, with further *arguments*, as a reader does.

    The session's environment is the reader's: nothing is installed into it before.
    """
    text = " ".join([readme_command(session, mark), *map(shlex.quote, arguments)])
    session.run("bash", "-euo", "pipefail", "-c", text, external=True, env=env)


def readme_command(session: nox.Session, mark: str) -> str:
    """Return the README's command of that *mark*."""
    command = ("python", CHECKS, "command", str(ROOT / "README.md"), mark)
    return str(session.run(*command, silent=True, log=False)).strip()


def manylinux(session: nox.Session, wheel: Path) -> Path:
    """Return the wheel as one for any Linux, as an index takes it."""
    folder = wheel.parent / "manylinux"
    session.run("auditwheel", "repair", "--wheel-dir", str(folder), str(wheel))
    (repaired,) = folder.glob("*.whl")
    return repaired


def workflow_files() -> list[Path]:
    """Return the workflows of the project, and those that its examples show."""
    return [*ROOT.glob(".github/workflows/*.yml"), *ROOT.glob("examples/*.yml")]


def extra(name: str) -> list[str]:
    """Return the requirements of an extra, to install them without the package."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    return list(project["optional-dependencies"][name])


def venv(session: nox.Session, folder: Path, python: str = sys.executable) -> str:
    """Make a further virtual environment and return its Python."""
    session.run(python, "-m", "venv", str(folder), external=True)
    return str(folder / "bin" / "python")


def pip(session: nox.Session, python: str, *what: str) -> None:
    """Install into a further virtual environment."""
    session.run(python, "-m", "pip", "install", "-q", *what, external=True)


def interpreters(session: nox.Session) -> list[tuple[str, str]]:
    """Return version and path of each Python to test, and say which are not here."""
    output = session.run("python", CHECKS, "interpreters", sys.executable, silent=True)
    lines = [line.split(maxsplit=1) for line in str(output).splitlines()]
    for version, place in lines:
        session.log(f"python {version}: {place}")
    return [(version, place) for version, place in lines if place != "absent"]
