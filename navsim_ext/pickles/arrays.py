"""numpy's arrays, scalars and dtypes rebuilt from what a pickle says of them: plain bytes, a shape, a type code.

numpy's own callables are never given to a pickle: ``ndarray`` takes an address, ``dtype.__setstate__`` takes forged
fields, ``_reconstruct`` allocates any size. Here a type code comes from a fixed list, every size is compared with the
bytes that are there, and an object array is filled element by element from a list.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from navsim_ext.errors import DataError

MAX_DIMENSIONS = 32  # numpy 1's limit
MAX_EMPTY_CELLS = 1_000_000  # of an array without content, lengths of 0 counted as 1
_CODE = re.compile(r"[<>|=]?(?:(b1|[iu][1248]|f[248]|c8|c16|O8?)|([SUV])(\d{1,9}))")
_ORDERS = ("<", ">", "|", "=")
_LAST_CHARACTER = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


class BadContent(DataError):
    """What a pickle says contradicts itself or is not admitted; the reader of the file adds where."""


class NamedDtype:
    """A dtype on its way: its code from the constructor, byte order and fields from the state that follows."""

    __slots__ = ("_base", "_dtype")

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        match = _CODE.fullmatch(code) if isinstance(code, str) else None
        if match is None:
            raise BadContent(f"arrays of dtype {code!r:.40}; booleans, numbers, texts and objects are admitted")
        simple, kind, length = match.groups()
        self._base = np.dtype(simple[:1] if simple in ("O8", "O") else simple or f"{kind}{length}")
        self._dtype: np.dtype | None = None if kind == "V" else self._base

    def fill(self, state: Any) -> None:
        """State as numpy writes it: (3, byte order, subarray, names, fields, size, alignment, flags)."""
        if not isinstance(state, tuple) or len(state) != 8 or state[0] != 3 or state[1] not in _ORDERS:
            raise BadContent(f"the dtype state {state!r:.80}; numpy's version 3 was expected")
        _, order, subarray, names, fields, size, _, _ = state
        if subarray is not None or (size != -1 and size != self._base.itemsize):
            raise BadContent(f"a dtype of {size!r:.20} bytes with the subarray {subarray!r:.20}; {self._base} has none")
        if self._base.kind == "V":
            self._dtype = _structured(names, fields, self._base.itemsize)
        elif names is not None or fields is not None:
            raise BadContent(f"fields in the dtype {self._base}, which has none")
        else:
            self._dtype = self._base.newbyteorder(order if order != "|" else "=")

    @property
    def dtype(self) -> np.dtype:
        if self._dtype is None:
            raise BadContent("a raw dtype without fields")
        return self._dtype


def _structured(names: Any, fields: Any, size: int) -> np.dtype:
    """A record of plain numbers and texts, every field inside its ``size`` bytes."""
    if not isinstance(names, tuple) or not isinstance(fields, dict) or set(names) != set(fields) or not names:
        raise BadContent("a structured dtype whose names and fields differ")
    formats, offsets = [], []
    for name in names:
        entry = fields[name]
        if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[0], NamedDtype):
            raise BadContent(f"the field {name!r:.40} of a structured dtype is no pair of dtype and offset")
        dtype, offset = entry[0].dtype, entry[1]
        if dtype.hasobject or not _is_count(offset) or offset + dtype.itemsize > size or not isinstance(name, str):
            raise BadContent(f"the field {name!r:.40} of a structured dtype holds objects or lies outside its record")
        formats.append(dtype)
        offsets.append(offset)
    return np.dtype({"names": list(names), "formats": formats, "offsets": offsets, "itemsize": size})


class PendingArray:
    """An array on its way: made by ``_reconstruct`` without content, finished by the state that follows."""

    __slots__ = ("keys",)

    def __init__(self, subtype: Any, shape: Any, code: Any) -> None:
        if getattr(subtype, "name", None) != ("numpy", "ndarray") or shape != (0,):
            raise BadContent(f"the array header {shape!r:.40}; ndarray (0,) was expected")
        self.keys: list[int] = []  # of the memo: there the finished array takes its place

    @staticmethod
    def finish(state: Any) -> np.ndarray:
        """State as numpy writes it: (1, shape, dtype, is Fortran-ordered, content)."""
        if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1 or not isinstance(state[2], NamedDtype):
            raise BadContent("an array state that is not numpy's version 1")
        _, shape, named, fortran, content = state
        return build_array(shape, named.dtype, content, "F" if fortran is True else "C")


def from_buffer(content: Any, named: Any, shape: Any, order: Any) -> np.ndarray:
    """Array from in-band bytes (pickle protocol 5)."""
    if not isinstance(named, NamedDtype) or order not in ("C", "F"):
        raise BadContent("an array of protocol 5 without a dtype or an order")
    return build_array(shape, named.dtype, content, order)


def scalar(named: Any, content: Any) -> np.generic:
    """numpy scalar from its bytes; object dtypes are refused (numpy would treat their content as a program)."""
    if not isinstance(named, NamedDtype) or named.dtype.kind in "OV":
        raise BadContent("a numpy scalar that is no number or text")
    return build_array((1,), named.dtype, content, "C")[0]


def build_array(shape: Any, dtype: np.dtype, content: Any, order: str) -> np.ndarray:
    """A writable array in native byte order; ``content`` (bytes, latin-1 text, a list for objects) must fill it."""
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        raise BadContent(f"an array of shape {shape!r:.60}")
    count = 1
    for length in shape:
        if not _is_count(length):
            raise BadContent(f"an array of shape {shape!r:.60}")
        count *= length
    if dtype.hasobject:
        if not isinstance(content, list) or len(content) != count:
            raise BadContent(f"an object array of shape {shape} from {type(content).__name__}")
        content_bytes = None
    else:
        content_bytes = content.encode("latin1") if type(content) is str else content
        expected = count * dtype.itemsize
        if type(content_bytes) not in (bytes, bytearray) or len(content_bytes) != expected:
            raise BadContent(f"an array of shape {shape} and dtype {dtype} that is not made of {expected:,} bytes")
    if not content and math.prod(max(length, 1) for length in shape) > MAX_EMPTY_CELLS:
        raise BadContent(f"an array of shape {shape} without content")
    if content_bytes is None:
        objects = np.empty(count, dtype=object)
        for position, element in enumerate(content):
            objects[position] = element
        return objects.reshape(shape, order=order)
    array = np.ndarray(shape, dtype, bytearray(content_bytes), order=order)
    if dtype.kind == "b" and content_bytes.translate(None, b"\0\1"):
        raise BadContent("a boolean that is neither 0 nor 1")
    if dtype.kind == "U":
        _require_characters(content_bytes, dtype)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _require_characters(content: bytes, dtype: np.dtype) -> None:
    codes = np.frombuffer(content, dtype=np.dtype(np.uint32).newbyteorder(dtype.byteorder))
    low, high = _SURROGATES
    if codes.size and bool(((codes > _LAST_CHARACTER) | ((codes >= low) & (codes <= high))).any()):
        raise BadContent("a text with code points that are no characters")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40
