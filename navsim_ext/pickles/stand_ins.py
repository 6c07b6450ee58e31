"""What stands for the names of a pickle: holders of fields for its classes, makers of plain containers for the rest.

A name of the table is no callable on the stack (:class:`Named`), so that it is inert wherever a pickle puts it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from navsim_ext.errors import DataError
from navsim_ext.pickles.arrays import BadContent, NamedDtype, PendingArray, from_buffer, scalar

INTEGERS = (-(1 << 63), (1 << 64) - 1)  # least and greatest that are admitted
NUMPY_SCALARS = frozenset(
    np.dtype(code).type for code in ("b1", *(f"{k}{n}" for k in "iu" for n in (1, 2, 4, 8)), "f2", "f4", "f8")
)
KEYS = frozenset({str, bytes, int, float, bool, type(None), np.str_}) | NUMPY_SCALARS
"""Types of keys and members whose hashes an attacker cannot choose."""


class Holder:
    """Stands for an object of a class that is not imported: what its constructor was given (``args``) and its
    attributes (``fields``), the leading underscores of their names dropped; those also by ``holder.name``."""

    __slots__ = ("args", "fields")
    kind = "?"

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.fields: dict[str, Any] = {}

    def fill(self, state: Any) -> None:
        """Attributes as pickle stores them: a dictionary, or (dictionary or None, dictionary of the slots)."""
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if part is None:
                continue
            if not isinstance(part, dict) or not all(type(name) is str for name in part):
                raise BadContent(f"the state of {type(self).kind} is a {type(part).__name__}")
            self.fields.update({name.lstrip("_"): value for name, value in part.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self.fields:
            raise DataError(
                f"the pickled {type(self).kind} has no field {name!r} (it has {sorted(self.fields)!r:.200}): it was "
                "written by another version of the program"
            )
        return self.fields[name]

    def __repr__(self) -> str:
        return f"<{type(self).kind}>"


def holders(names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], type[Holder]]:
    """A stand-in of its own for each (module, class)."""
    return {entry: type(entry[1], (Holder,), {"kind": entry[1], "__slots__": ()}) for entry in names}


@dataclass(frozen=True, slots=True)
class Named:
    """A name of the table on the stack; not callable, so that it is inert wherever a pickle puts it."""

    name: tuple[str, str]
    stand_in: Callable[..., Any] | None  # None: may be named, not called


def _latin1(text: Any, encoding: Any) -> bytes:
    """``bytes`` as protocols 0 to 2 write them: latin-1 text through ``_codecs.encode``."""
    if encoding != "latin1" or not isinstance(text, str):
        raise BadContent(f"bytes stored in the encoding {encoding!r:.20}; latin1 was expected")
    return text.encode("latin1")


def _bytes(*nothing: Any) -> bytes:
    if nothing:
        raise BadContent("bytes made of something else")
    return b""


def _bytearray(content: Any = b"", encoding: Any = None) -> bytearray:
    if isinstance(content, str) and encoding in ("latin-1", "latin1"):
        return bytearray(content.encode("latin1"))
    if not isinstance(content, bytes) or encoding is not None:
        raise BadContent(f"a bytearray made of a {type(content).__name__}")
    return bytearray(content)


def members(content: Any) -> list[Any]:
    if not isinstance(content, list | tuple) or not all(
        type(member) in KEYS and (type(member) is not int or INTEGERS[0] <= member <= INTEGERS[1]) for member in content
    ):
        raise BadContent(f"a set made of a {type(content).__name__}, or of members that are not texts or numbers")
    return list(content)


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise BadContent("a complex number that is not made of two numbers")
    return complex(real, imaginary)


def _ordered(pairs: Any = ()) -> OrderedDict:
    made: OrderedDict[Any, Any] = OrderedDict()
    for pair in pairs if isinstance(pairs, list | tuple) else (None,):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) not in KEYS:
            raise BadContent("an OrderedDict that is not made of pairs")
        made[pair[0]] = pair[1]
    return made


PLAIN: dict[tuple[str, str], Callable[..., Any] | None] = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): NamedDtype,
    ("collections", "OrderedDict"): _ordered,
    ("_codecs", "encode"): _latin1,
}
for _module in ("numpy.core", "numpy._core"):
    PLAIN[_module + ".multiarray", "_reconstruct"] = PendingArray
    PLAIN[_module + ".multiarray", "scalar"] = scalar
    PLAIN[_module + ".numeric", "_frombuffer"] = from_buffer
for _module in ("builtins", "__builtin__"):
    PLAIN[_module, "bytes"] = _bytes
    PLAIN[_module, "bytearray"] = _bytearray
    PLAIN[_module, "complex"] = _complex
    PLAIN[_module, "set"] = lambda content=(): set(members(content))
    PLAIN[_module, "frozenset"] = lambda content=(): frozenset(members(content))
