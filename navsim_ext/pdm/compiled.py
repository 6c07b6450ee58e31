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
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numba

logger = logging.getLogger(__name__)

PACKAGE = "navsim_ext"
ROOT = Path(__file__).resolve().parents[2]  # holds the package's folder
ANEW = "kernels are compiled anew in every process (half a minute)"
REMEDY = "set NUMBA_CACHE_DIR to a folder that you can write to"


def kernel(function: Callable) -> Callable:
    """Compiles without the GIL and without Python objects; division by zero gives inf or nan as in numpy."""
    folder = cache_folder(function.__module__)
    options = {"nogil": True, "error_model": "numpy"}
    if not _writable(folder.parent):
        return numba.njit(**options)(function)
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        return numba.njit(cache=True, **options)(function)
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
def _writable(folder: Path) -> bool:
    """Whether kernels can be kept in ``folder``; says once what it costs when they cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("%s: no cache in %s: %s; %s", ANEW, folder, error, REMEDY)
        return False
    if not os.access(folder, os.W_OK | os.X_OK):
        logger.warning("%s: %s is not writable; %s", ANEW, folder, REMEDY)
        return False
    return True


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
    stem = ROOT.joinpath(*module.split("."))
    path = next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)
    if path is None or module in sources:
        return
    sources[module] = path.read_bytes()
    for name in _imported(ast.parse(sources[module])):
        _collect(name, sources)


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names of modules that a source imports from the package, wherever the import stands (some may be no modules)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
