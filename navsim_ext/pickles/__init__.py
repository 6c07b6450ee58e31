"""Reading pickles of unknown origin: numpy arrays, plain containers and numbers are admitted, nothing else.

A pickle is a program that may name any importable object. Here a name is looked up in a fixed table and refused
before anything is imported or built, and what the table holds are stand-ins of our own (``stand_ins``, ``arrays``).
Both spellings of numpy's module (``numpy.core``, ``numpy._core``) are known, and neither is imported, so files of
numpy 1 and numpy 2 read the same.

A format with classes of its own adds its names: ``load(path, also_allowed=holders({("module", "Class"), ...}))`` gives
:class:`Holder` objects with the stored fields. Tables are plain dictionaries and are joined with ``|``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

from navsim_ext.errors import DataError, MissingError
from navsim_ext.pickles.arrays import BadContent
from navsim_ext.pickles.machine import Machine, UnknownName
from navsim_ext.pickles.stand_ins import PLAIN, Holder, holders

__all__ = ["BadContent", "DamagedPickle", "Holder", "RefusedObject", "holders", "load", "loads"]

MAX_BYTES = 1 << 30  # of a file
# What Python raises where the bytes make no sense.
_DAMAGE = (
    BadContent,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    MemoryError,
    OverflowError,
    struct.error,
)


class RefusedObject(DataError):
    """The pickle names an object that is not on the allowed list; it was not imported and not constructed."""


class DamagedPickle(DataError):
    """The pickle ends early, its bytes make no sense, or it asks for more than data needs."""


def load(
    path: str | os.PathLike[str], *, also_allowed: Mapping[tuple[str, str], Callable[..., Any]] | None = None
) -> Any:
    """Content of a pickle file made of numpy arrays, plain containers, strings and numbers.

    ``also_allowed`` maps further (module, name) pairs to stand-ins of the caller's own, which are called instead; the
    named originals are never imported.
    Raises MissingError (no such file), RefusedObject (names the object) or DamagedPickle (truncated, not a pickle,
    nested or shared beyond what the file could hold written out).
    """
    where = os.fspath(path)
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise DamagedPickle(f"{where} has {size:,} bytes; a pickle of more than {MAX_BYTES:,} is not read")
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES)
    except FileNotFoundError as error:
        raise MissingError(f"{where} does not exist: check the data root and the split") from error
    except (OSError, MemoryError) as error:
        raise DamagedPickle(f"{where} cannot be read ({error}): check the path and its permissions") from error
    return loads(data, where, also_allowed=also_allowed)


def loads(data: bytes, where: str, *, also_allowed: Mapping[tuple[str, str], Callable[..., Any]] | None = None) -> Any:
    """Content of pickled bytes; as :func:`load`, with ``where`` to name them by in messages."""
    machine = Machine(data, PLAIN | dict(also_allowed or {}))
    try:
        return machine.run()
    except UnknownName as error:
        module, name = error.args
        raise RefusedObject(
            f"{where} names the object {module}.{name}, which is not among numpy arrays, plain containers "
            "and numbers: it was not constructed. Convert the file with a program that you trust"
        ) from None
    except _DAMAGE as error:
        raise DamagedPickle(
            f"{where} is truncated or damaged: reading stopped at byte {machine.position} of {len(data)} "
            f"({type(error).__name__}: {error!s:.200}). Copy or download the file again"
        ) from error
