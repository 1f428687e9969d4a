"""What pyproject.toml cannot say: the extensions, the wheel's abi3 tag, the README of an index."""

import re
import sysconfig
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def readme() -> str:
    """Return the README with absolute links, which work on any page."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = f"{project['urls']['Source']}/blob/main/"
    return re.sub(
        r"\]\((?!\w+:|#)", f"]({source}", (ROOT / "README.md").read_text(encoding="utf-8")
    )


# cffi compiles for the limited API by itself; free-threaded builds of Python have none.
abi3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp311"}
setup(
    cffi_modules=["build_ffi.py:llama_builder", "build_ffi.py:pages_builder"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    options={"bdist_wheel": abi3},
)
