"""Reading pickles of unknown origin: numpy arrays, plain containers and numbers are admitted, nothing else.

A pickle is a program that may name any importable object. Here a name is looked up in a fixed table and refused
before anything is imported or built, so a hostile file cannot run code. The few callables that numpy's own pickles
name are replaced by stricter ones. Both spellings of numpy's module (``numpy.core``, ``numpy._core``) are known, and
neither is imported, so files of numpy 1 and numpy 2 read the same.
"""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from navsim_ext.errors import DataError, MissingError

# What CPython's unpickler raises on damaged bytes, besides its own UnpicklingError.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    MemoryError,
    OverflowError,
)


class RefusedObject(DataError):
    """The pickle names an object that is not on the allowed list; it was not imported and not constructed."""


class DamagedPickle(DataError):
    """The pickle ends early or its bytes make no sense."""


def _new_array(subtype: type, shape: tuple[int, ...], typecode: bytes | str) -> np.ndarray:
    """Empty array that BUILD fills next; stands for numpy's ``_reconstruct``, which would allocate any size."""
    if subtype is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError(f"array header {subtype!r} {shape!r}; ndarray (0,) was expected")
    del typecode  # the state that follows carries the dtype
    return np.ndarray.__new__(np.ndarray, (0,), np.int8)


def _new_scalar(dtype: np.dtype, content: bytes) -> np.generic:
    """numpy scalar from its bytes; object dtypes are refused (numpy would treat their content as a program)."""
    if dtype.hasobject or len(content) != dtype.itemsize:
        raise pickle.UnpicklingError(f"a scalar of dtype {dtype} from {len(content)} bytes")
    return np.frombuffer(content, dtype=dtype, count=1)[0]


def _from_buffer(content: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """Array from in-band bytes (pickle protocol 5); ``bytes`` become a copy so that the result is writable."""
    return np.frombuffer(bytearray(content), dtype=dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """``bytes`` as protocols 0 to 2 write them: latin-1 text through ``_codecs.encode``."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes stored in the encoding {encoding!r}; latin1 was expected")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
}
for _module in ("numpy.core", "numpy._core"):
    _ALLOWED[_module + ".multiarray", "_reconstruct"] = _new_array
    _ALLOWED[_module + ".multiarray", "scalar"] = _new_scalar
    _ALLOWED[_module + ".numeric", "_frombuffer"] = _from_buffer
for _module in ("builtins", "__builtin__"):
    for _builtin in (set, frozenset, complex, bytearray, list, tuple, dict, int, float, bool, str, bytes):
        _ALLOWED[_module, _builtin.__name__] = _builtin


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, where: str, also_allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(stream, encoding="latin1")  # also reads arrays that Python 2 wrote
        self._where = where
        self._allowed = _ALLOWED | dict(also_allowed)

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise RefusedObject(
                f"{self._where} names the object {module}.{name}, which is not among numpy arrays, plain containers "
                "and numbers: it was not constructed. Convert the file with a program that you trust"
            ) from None


def load(path: str | os.PathLike[str], *, also_allowed: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Content of a pickle file made of numpy arrays, plain containers, strings and numbers.

    ``also_allowed`` maps further (module, name) pairs to stand-in classes of the caller's own, which are built
    instead; the named originals are never imported.
    Raises MissingError (no such file), RefusedObject (names the object) or DamagedPickle (truncated, not a pickle).
    """
    where = os.fspath(path)
    try:
        with open(path, "rb") as stream:
            try:
                return _Unpickler(stream, where, also_allowed or {}).load()
            except RefusedObject:
                raise
            except _DAMAGE as error:
                raise DamagedPickle(
                    f"{where} is truncated or damaged: reading stopped at byte {stream.tell()} of "
                    f"{os.path.getsize(path)} ({type(error).__name__}: {error}). Copy or download the file again"
                ) from error
    except FileNotFoundError as error:
        raise MissingError(f"{where} does not exist: check the data root and the split") from error
