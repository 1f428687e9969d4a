"""A minimal Debian of another release, to run commands in, where this one's Pythons are too old.

``python .ci/debian.py lacks`` says what this machine needs for one and does not have;
``make SUITE ROOT CACHE PACKAGE...`` makes it in the folder ROOT, and keeps it in the folder CACHE;
``run ROOT FOLDER COMMAND...`` runs a command there, in its FOLDER.
"""

# ruff: noqa: S603, S607 - it runs what it is told to

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

KEPT_DAYS = 30
# What says where packages are and who vouches for it, read here and nowhere in the project.
SETTINGS = ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
VARIABLES = ("PIP_", "SSL_CERT_", "REQUESTS_CA_BUNDLE", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY")
# Packages and what explains them are not needed once they are installed.
EMPTIED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man")
NAMESPACE = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
# In a namespace of its own: however it ends, no mount and no process is left.
ENTER = """
mount --make-rprivate /
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
exec chroot "$1" bash -euc 'cd "$1"; shift; exec "$@"' - "${@:2}"
"""


def lacking() -> str:
    """Return why no Debian can be made here, or an empty text."""
    if os.geteuid():
        return "this is not root"
    missing = [name for name in ("apt-get", "debootstrap", "unshare") if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)}"
    # A container can forbid it to root, too.
    trial = [*NAMESPACE, "bash", "-c", "mount --make-rprivate / && mount -t proc proc /proc"]
    if subprocess.run(trial, stderr=subprocess.DEVNULL, check=False).returncode:
        return "no namespace with mounts of its own is allowed"
    return "" if mirrors() else "apt's sources name no archive of Debian (or run apt-get update)"


def lacks() -> None:
    """Say why no Debian can be made here."""
    print(lacking())


def mirrors() -> list[str]:
    """Return the archives of Debian that apt's sources name."""
    form = "$(ORIGIN)|$(LABEL)|$(REPO_URI)"
    command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    fields = [line.split("|", 2) for line in done.stdout.splitlines()]
    return [uri for origin, label, uri in fields if origin == label == "Debian"]


def make(suite: str, root: str, cache: str, *packages: str) -> None:
    """Make a Debian with packages: out of the cache, where a young one is, else new."""
    of = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:8]
    kept = Path(cache) / f"debian-{suite}-{of}.tar"
    if not kept.exists() or time.time() - kept.stat().st_mtime > KEPT_DAYS * 86400:
        _bootstrap(suite, Path(root), packages)
        part = kept.with_suffix(f".{os.getpid()}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        _run("tar", "-C", root, "-cf", str(part), ".")
        part.replace(kept)
    else:
        Path(root).mkdir()
        _run("tar", "-C", root, "-xf", str(kept))
    for path in map(Path, SETTINGS):
        if path.exists():
            shutil.copy(path, f"{root}{path}")


def _bootstrap(suite: str, root: Path, packages: tuple[str, ...]) -> None:
    start = time.monotonic()
    chosen = f"--include={','.join(packages)}"
    log = root.with_suffix(".log")
    with log.open("w") as out:
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", chosen, suite, str(root), mirrors()[0]],
            stdout=out,
            check=False,
        )
    if done.returncode:
        sys.exit(f"debootstrap failed:\n{log.read_text()[-3000:]}")
    for name in EMPTIED:
        for path in (root / name).iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    print(f"Debian {suite} made in {time.monotonic() - start:.0f} s")


def run(root: str, folder: str, *command: str) -> None:
    """Run a command in it, as if it were the machine."""
    env = {name: value for name, value in os.environ.items() if name.upper().startswith(VARIABLES)}
    env |= {"HOME": "/root", "LANG": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    env |= {"PIP_ROOT_USER_ACTION": "ignore", "PIP_NO_INPUT": "1", "PYTHONUNBUFFERED": "1"}
    command = (*NAMESPACE, "bash", "-euc", ENTER, "-", root, folder, *command)
    sys.exit(subprocess.run(command, env=env, check=False).returncode)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


COMMANDS: dict[str, Callable[..., None]] = {"lacks": lacks, "make": make, "run": run}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
