"""One libllama: find it, bind it, call it, free what it made. The only room that calls its C."""

from __future__ import annotations

from .._install import pip_install
from ..errors import LibraryNotFoundError

try:
    from ._llama_cffi import lib as _lib  # noqa: F401
except ImportError as error:
    if error.name == "_cffi_backend":
        raise LibraryNotFoundError("cffi is not installed: pip install cffi") from error
    if isinstance(error, ModuleNotFoundError):
        _state = "not built"
    else:
        _state = f"built for another Python or system ({error})"
    raise LibraryNotFoundError(
        f"the extension {__name__}._llama_cffi is {_state}: run {pip_install()} (it "
        "needs a C compiler)"
    ) from error
