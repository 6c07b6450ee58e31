"""What a package exports, loaded when it is asked for: naming a package costs nothing of what lies in it.

    __getattr__ = exported(__name__, {"score": "scores"})     # in __init__.py: package.score is package.scores.score

Beside it stand ``__all__`` and the same imports under ``TYPE_CHECKING``, for readers and type checkers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def exported(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package; ``homes`` says in which of its modules a name is."""

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return load
