"""What pyproject.toml cannot say: the cffi extension and the wheel's abi3 tag."""

import sysconfig

from setuptools import setup

# cffi compiles for the limited API by itself; free-threaded builds of Python have none.
abi3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp311"}
setup(
    cffi_modules=["build_ffi.py:llama_builder", "build_ffi.py:pages_builder"],
    options={"bdist_wheel": abi3},
)
