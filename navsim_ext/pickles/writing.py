"""Writing pickles that name classes of a program that is not installed here.

A pickle stores a class by module and name and, when it is written, wants both to lead to that very class. Stand-ins
take the place of the originals while the bytes are made, and nothing stays behind.
"""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["dumps_as", "original_names"]


def dumps_as(content: Any, stand_ins: Mapping[tuple[str, str], type], protocol: int = 4) -> bytes:
    """Pickle of ``content``; objects of the stand-ins go under the (module, name) that they stand for."""
    with original_names(stand_ins):
        return pickle.dumps(content, protocol=protocol)


@contextmanager
def original_names(stand_ins: Mapping[tuple[str, str], type]) -> Iterator[None]:
    """While open, the stand-ins are importable, and so picklable, under the names of the originals."""
    saved_modules = dict(sys.modules)
    saved_names = {stand_in: (stand_in.__module__, stand_in.__qualname__) for stand_in in stand_ins.values()}
    modules: dict[str, types.ModuleType] = {}
    try:
        for (module_name, class_name), stand_in in stand_ins.items():
            parts = module_name.split(".")
            for depth in range(1, len(parts) + 1):
                name = ".".join(parts[:depth])
                if name not in modules:
                    modules[name] = sys.modules[name] = types.ModuleType(name)
            setattr(modules[module_name], class_name, stand_in)
            stand_in.__module__, stand_in.__qualname__ = module_name, class_name
        yield
    finally:
        for stand_in, (module_name, class_name) in saved_names.items():
            stand_in.__module__, stand_in.__qualname__ = module_name, class_name
        for name in modules:
            if name in saved_modules:
                sys.modules[name] = saved_modules[name]
            else:
                sys.modules.pop(name, None)
