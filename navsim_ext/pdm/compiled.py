"""``@kernel``: numba's nopython compilation with a disk cache that cannot go stale.

numba's own cache looks only at the file of the compiled function; a kernel whose callee changed in another file would
be loaded as it was, and score wrongly in silence. Here the cache folder is named after a digest of the kernel's source
file and of all project files that it imports, so any change of source compiles anew. The first call compiles
(seconds); later processes load from ``$NUMBA_CACHE_DIR``, or ``~/.cache/trivium/kernels``.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numba

PACKAGE = "navsim_ext"


def kernel(function: Callable) -> Callable:
    """Compiles without the GIL and without Python objects; division by zero gives inf or nan as in numpy."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_folder(function.__module__))
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = before


def cache_folder(module: str) -> Path:
    """Where the compiled kernels of a module in its present state live."""
    base = os.environ.get("NUMBA_CACHE_DIR")
    if not base:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = str(Path(home) / "trivium" / "kernels")
    return Path(base) / source_digest(module)


@functools.cache
def source_digest(module: str) -> str:
    """Hex digest (16 characters) of a module's source and of all modules of the package that it reaches by import."""
    sources: dict[str, bytes] = {}
    _collect(module, sources)
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + sources[name] + b"\0")
    return digest.hexdigest()[:16]


def _collect(module: str, sources: dict[str, bytes]) -> None:
    """Adds the sources of ``module`` and of what it imports from the package, recursively."""
    if module in sources:
        return
    loaded = sys.modules.get(module)
    if loaded is not None and getattr(loaded, "__file__", None):
        path = loaded.__file__
    else:
        spec = importlib.util.find_spec(module)
        path = spec.origin if spec is not None else None
    if path is None or not path.endswith(".py"):
        return
    text = Path(path).read_bytes()
    sources[module] = text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            _collect(node.module, sources)
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == PACKAGE:
                    _collect(name.name, sources)
