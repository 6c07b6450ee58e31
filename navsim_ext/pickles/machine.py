"""The stack machine of pickle, protocols 0 to 5, for files of unknown origin.

Written out because CPython's own cannot be bounded: it reserves whatever memory a byte asks for, builds structures
whose hash or traversal overflows the C stack, and calls what it is told to. This one

- knows names only from the table it is given; nothing is imported, and nothing but the table's stand-ins is called;
- measures every container as it is filled: how deep it is nested, and how large it would be written out in full, so
  that a structure which shares itself cannot grow beyond what the file could hold; none can hold itself;
- counts opcodes and the bytes that stand-ins are given, so that time and memory are linear in the file's size;
- admits keys whose hashes an attacker cannot choose: texts, bytes, numbers of at most 64 bits.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from struct import Struct
from typing import Any

import numpy as np

from navsim_ext.pickles.arrays import BadContent, NamedDtype, PendingArray, build_array
from navsim_ext.pickles.literals import MAX_INTEGER_BYTES, U32, decimal, integer, line_of, value_of
from navsim_ext.pickles.stand_ins import INTEGERS, KEYS, NUMPY_SCALARS, Holder, Named, members

MAX_DEPTH = 64  # containers in one another; the formats that are read need 20
MAX_OPCODES = 8_000_000  # an OpenScene log takes some 1,600 a frame
MAX_CONTAINERS = 1_000_000  # some 80 to 180 a frame
FREE_SIZE = 1_000_000  # elements that a structure may have whatever the file's size,
SIZE_PER_BYTE = 16  # and how many more for each of its bytes
FREE_WORK = 16 << 20  # bytes that stand-ins may be given, likewise
WORK_PER_BYTE = 8
ELEMENT_BYTES = 16  # an element of a list counts as so many
LEAF_BYTES = 64  # of text, bytes or an array count as one element
_EMPTY = {0x5D: list, 0x7D: dict, 0x8F: set}
_TOO_MANY = f"more than {MAX_CONTAINERS:,} lists, dictionaries and objects"

_U8, _U16, _I32, _F64 = (Struct(layout) for layout in ("B", "<H", "<i", ">d"))

_FLAT = frozenset({int, float, bool, complex, type(None), np.complex64, np.complex128}) | NUMPY_SCALARS
_TEXT = frozenset({str, bytes, bytearray, np.str_, np.bytes_})
_SIZED = frozenset({list, tuple, dict, set, frozenset})


class UnknownName(Exception):
    """A name that is not in the table: (module, name)."""


class Machine:
    """Runs one pickle. ``position`` tells, after an error, the byte at which it stopped.

    ``persistent`` makes an object of what stands for one that is stored elsewhere; without it there is none.
    """

    def __init__(
        self,
        data: bytes,
        table: Mapping[tuple[str, str], Callable[..., Any] | None],
        *,
        persistent: Callable[[Any], Any] | None = None,
        integer_bytes: int = MAX_INTEGER_BYTES,
    ) -> None:
        self.position = 0
        self._persistent, self._integer_bytes = persistent, integer_bytes
        self._data, self._table = data, table
        self._max_size = FREE_SIZE + SIZE_PER_BYTE * len(data)
        self._work_left = FREE_WORK + WORK_PER_BYTE * len(data)
        # (size written out in full, depth) by id. An entry is made when a container is, so that none is of a dead one.
        self._measured: dict[int, tuple[int, int]] = {}
        self._array_maker: Named | None = None  # numpy's _reconstruct, once it was named

    def run(self) -> Any:
        """The object. Raises KeyError((module, name)) wrapped as UnknownName, BadContent, or what Python raises on
        bytes that make no sense."""
        data, end = self._data, len(self._data)
        measured, grow, enter = self._measured, self._grow, self._enter
        memo: dict[int, Any] = {}
        sealed: set[int] = set()  # containers that something may hold already: they must not change any more
        metastack: list[list[Any]] = []
        stack: list[Any] = []
        push = stack.append
        position = 0
        try:
            for _ in range(MAX_OPCODES):
                opcode = data[position]
                position += 1
                if opcode == 0x94:  # MEMOIZE
                    top = stack[-1]
                    if type(top) is PendingArray:
                        top.keys.append(len(memo))
                    memo[len(memo)] = top
                elif opcode == 0x68:  # BINGET
                    fetched = memo[data[position]]
                    position += 1
                    if id(fetched) in measured:
                        sealed.add(id(fetched))
                        if fetched is self._array_maker and (whole := self._whole_array(position, memo)):
                            fetched, position = whole
                    push(fetched)
                elif opcode == 0x8C:  # SHORT_BINUNICODE
                    start = position + 1
                    position = start + data[position]
                    if position > end:
                        raise EOFError("a text is cut off")
                    push(data[start:position].decode())
                elif opcode == 0x47:  # BINFLOAT
                    push(_F64.unpack_from(data, position)[0])
                    position += 8
                elif opcode == 0x4B:  # BININT1
                    push(data[position])
                    position += 1
                elif opcode == 0x28:  # MARK
                    metastack.append(stack)
                    stack = []
                    push = stack.append
                elif opcode == 0x85:  # TUPLE1
                    made = (stack[-1],)
                    stack[-1] = made
                    enter(made, made)
                elif opcode == 0x87:  # TUPLE3
                    made = tuple(stack[-3:])
                    if len(made) != 3:
                        raise IndexError("a tuple of three from a shorter stack")
                    stack[-3:] = (made,)
                    enter(made, made)
                elif opcode == 0x86:  # TUPLE2
                    made = tuple(stack[-2:])
                    if len(made) != 2:
                        raise IndexError("a tuple of two from a shorter stack")
                    stack[-2:] = (made,)
                    enter(made, made)
                elif opcode == 0x74:  # TUPLE
                    made = tuple(stack)
                    stack = metastack.pop()
                    push = stack.append
                    push(made)
                    enter(made, made)
                elif opcode in (0x52, 0x81):  # REDUCE, NEWOBJ
                    args = stack.pop()
                    stack[-1] = self._call(stack[-1], args)
                elif opcode == 0x89:  # NEWFALSE
                    push(False)
                elif opcode == 0x62:  # BUILD
                    state = stack.pop()
                    target = stack[-1]
                    if type(target) is PendingArray:
                        self._charge(state)
                        stack[-1] = array = target.finish(state)
                        if array.dtype.hasobject:
                            enter(array, state[4])
                        for key in target.keys:
                            memo[key] = array
                    elif isinstance(target, NamedDtype | Holder) and id(target) not in sealed:
                        target.fill(state)
                        grow(target, (state,))
                    elif type(target) is OrderedDict and id(target) not in sealed:
                        grow(target, (state,))  # attributes of a dictionary, such as torch's _metadata, are no data
                    else:
                        raise BadContent(f"a state for a {type(target).__name__}, which takes none or has its own")
                elif opcode == 0x43:  # SHORT_BINBYTES
                    start = position + 1
                    position = start + data[position]
                    if position > end:
                        raise EOFError("bytes are cut off")
                    push(data[start:position])
                elif opcode == 0x6A:  # LONG_BINGET
                    fetched = memo[U32.unpack_from(data, position)[0]]
                    position += 4
                    if id(fetched) in measured:
                        sealed.add(id(fetched))
                        if fetched is self._array_maker and (whole := self._whole_array(position, memo)):
                            fetched, position = whole
                    push(fetched)
                elif opcode in _EMPTY:  # EMPTY_LIST, EMPTY_DICT, EMPTY_SET
                    made = _EMPTY[opcode]()
                    measured[id(made)] = (1, 1)
                    if len(measured) > MAX_CONTAINERS:
                        raise BadContent(_TOO_MANY)
                    push(made)
                elif opcode == 0x65:  # APPENDS
                    items = stack
                    stack = metastack.pop()
                    push = stack.append
                    target = stack[-1]
                    if type(target) is not list or id(target) in sealed:
                        raise BadContent("elements for what is no list, or holds itself")
                    target.extend(items)
                    grow(target, items)
                elif opcode == 0x75:  # SETITEMS
                    items = stack
                    stack = metastack.pop()
                    push = stack.append
                    self._set_items(stack[-1], items, sealed)
                elif opcode == 0x4A:  # BININT
                    push(_I32.unpack_from(data, position)[0])
                    position += 4
                elif opcode == 0x4D:  # BININT2
                    push(_U16.unpack_from(data, position)[0])
                    position += 2
                elif opcode == 0x8A:  # LONG1
                    start = position + 1
                    position = start + data[position]
                    if position > end:
                        raise EOFError("an integer is cut off")
                    push(integer(data[start:position], self._integer_bytes))
                elif opcode == 0x4E:  # NONE
                    push(None)
                elif opcode == 0x88:  # NEWTRUE
                    push(True)
                elif opcode == 0x71:  # BINPUT
                    _put(memo, data[position], stack[-1])
                    position += 1
                elif opcode == 0x72:  # LONG_BINPUT
                    _put(memo, U32.unpack_from(data, position)[0], stack[-1])
                    position += 4
                elif opcode in (0x93, 0x63):  # STACK_GLOBAL, GLOBAL
                    if opcode == 0x93:
                        name = stack.pop()
                        module = stack.pop()
                    else:
                        module, position = line_of(data, position)
                        name, position = line_of(data, position)
                        module, name = module.decode(), name.decode()
                    push(self._find(module, name))
                elif opcode == 0x29:  # EMPTY_TUPLE
                    measured[id(())] = (1, 1)
                    push(())
                elif opcode == 0x90:  # ADDITEMS
                    items = stack
                    stack = metastack.pop()
                    push = stack.append
                    target = stack[-1]
                    if type(target) is not set or id(target) in sealed:
                        raise BadContent("members for what is no set")
                    target.update(members(items))
                    grow(target, items)
                elif opcode in (0x91, 0x6C, 0x64):  # FROZENSET, LIST, DICT
                    items = stack
                    stack = metastack.pop()
                    push = stack.append
                    if opcode == 0x91:
                        made = frozenset(members(items))
                        enter(made, items)
                    elif opcode == 0x6C:
                        made = items
                        enter(made, items)
                    else:
                        made = {}
                        measured[id(made)] = (1, 1)
                        self._set_items(made, items, sealed)
                    push(made)
                elif opcode == 0x61:  # APPEND
                    item = stack.pop()
                    target = stack[-1]
                    if type(target) is not list or id(target) in sealed:
                        raise BadContent("an element for what is no list, or holds itself")
                    target.append(item)
                    grow(target, (item,))
                elif opcode == 0x73:  # SETITEM
                    items = stack[-2:]
                    del stack[-2:]
                    self._set_items(stack[-1], items, sealed)
                elif opcode == 0x70:  # PUT
                    line, position = line_of(data, position)
                    _put(memo, decimal(line), stack[-1])
                elif opcode == 0x67:  # GET
                    line, position = line_of(data, position)
                    fetched = memo[decimal(line)]
                    if id(fetched) in measured:
                        sealed.add(id(fetched))
                    push(fetched)
                elif opcode == 0x2E:  # STOP
                    if metastack or len(stack) != 1:
                        raise BadContent("more than one object is left")
                    if type(stack[0]) in (PendingArray, NamedDtype, Named):
                        raise BadContent("the file holds no data")
                    return stack[0]
                elif opcode == 0x51 and self._persistent is not None:  # BINPERSID
                    made = self._persistent(stack.pop())
                    enter(made, ())
                    push(made)
                elif opcode == 0x80:  # PROTO
                    if data[position] > 5:
                        raise BadContent(f"pickle protocol {data[position]}; 5 is the newest")
                    position += 1
                elif opcode == 0x95:  # FRAME
                    position += 8
                else:
                    value, position = value_of(opcode, data, position)
                    push(value)
            raise BadContent(f"more than {MAX_OPCODES:,} opcodes")
        finally:
            self.position = position

    def _find(self, module: Any, name: Any) -> Named:
        if type(module) is not str or type(name) is not str:
            raise BadContent("a name that is no text")
        if (module, name) not in self._table:
            raise UnknownName(module, name)
        found = Named((module, name), self._table[module, name])
        self._measured[id(found)] = (1, 0)
        if found.stand_in is PendingArray:
            self._array_maker = found
        return found

    def _whole_array(self, position: int, memo: dict[int, Any]) -> tuple[np.ndarray, int] | None:
        """The array of which ``position`` follows the first opcode, and where the next begins, if its twenty opcodes
        are the usual ones of protocols 4 and 5; else None. Logs hold thousands of arrays: this halves their time."""
        match = _USUAL_ARRAY.match(self._data, position)
        if match is None:
            return None
        subtype, code, shape, dtype, short, length = match.groups()
        named = memo.get(_memo_key(dtype))
        if type(named) is not NamedDtype or memo.get(_memo_key(subtype)) != _NDARRAY:
            return None
        start = match.end()
        end = start + (short[0] if short else U32.unpack(length)[0])
        if self._data[end : end + 4] != b"\x94t\x94b":
            return None
        content = self._data[start:end]
        self._charge((content,))
        array = build_array(_shape(shape), named.dtype, content, "C")
        # What the opcodes between would have put into the memo. Only the array is ever asked for again, and bytes of
        # length 0 and 1, of which Python has one object each.
        kept = (_NOT_KEPT, b"b") if code[:1] == b"C" else (_NOT_KEPT,)
        for value in (*kept, _NOT_KEPT, array, _NOT_KEPT, content if len(content) < 2 else _NOT_KEPT, _NOT_KEPT):
            memo[len(memo)] = value
        return array, end + 4

    def _call(self, named: Any, args: Any) -> Any:
        if type(named) is not Named or named.stand_in is None:
            raise BadContent(f"a call of {named!r:.60}")
        if type(args) is not tuple:
            raise BadContent(f"arguments in a {type(args).__name__}")
        self._charge(args)
        made = named.stand_in(*args)
        if type(made) is not PendingArray:
            self._enter(made, args)
        return made

    def _charge(self, given: Any) -> None:
        """Takes the lengths of what a stand-in is given from what is left."""
        if type(given) is tuple:
            for value in given:
                if type(value) in _TEXT:
                    self._work_left -= len(value)
                elif type(value) in _SIZED:
                    self._work_left -= len(value) * ELEMENT_BYTES
        if self._work_left < 0:
            raise BadContent("the same bytes or lists are turned into objects over and over")

    def _set_items(self, target: Any, items: list[Any], sealed: set[int]) -> None:
        if type(target) not in (dict, OrderedDict) or id(target) in sealed or len(items) % 2:
            raise BadContent("items for what is no dictionary, or holds itself")
        for position in range(0, len(items), 2):
            key = items[position]
            if type(key) not in KEYS or (type(key) is int and not INTEGERS[0] <= key <= INTEGERS[1]):
                raise BadContent(f"a dictionary key of type {type(key).__name__}, or an integer beyond 64 bits")
            target[key] = items[position + 1]
        self._grow(target, items)

    def _enter(self, made: Any, content: Iterable[Any]) -> None:
        """Measures something new that holds ``content``."""
        self._measured[id(made)] = (1, 1)
        self._grow(made, content)

    def _grow(self, target: Any, items: Any) -> None:
        """Adds ``items`` to the measure of what holds them."""
        measured = self._measured
        size, depth = measured[id(target)]
        size += len(items)
        for item in items:
            kind = type(item)
            if kind in _FLAT:
                continue
            if kind in _TEXT:
                size += len(item) // LEAF_BYTES
            elif kind is np.ndarray and not item.dtype.hasobject:
                size += item.nbytes // LEAF_BYTES
            else:
                inner = measured.get(id(item))
                if inner is None:
                    raise BadContent(f"an unfinished {kind.__name__} inside another object")
                size += inner[0]
                if inner[1] >= depth:
                    depth = inner[1] + 1
        if depth > MAX_DEPTH:
            raise BadContent(f"nested more than {MAX_DEPTH} deep")
        if size > self._max_size:
            raise BadContent(f"shared parts that would be {size:,} elements written out, of {len(self._data):,} bytes")
        if len(measured) > MAX_CONTAINERS:
            raise BadContent(_TOO_MANY)
        measured[id(target)] = (size, depth)


_NDARRAY = Named(("numpy", "ndarray"), None)
_NOT_KEPT = object()  # as an element of anything it is refused: it has no measure
_INTEGER = rb"(?:K.|M..|J.{4})"
_FETCH = rb"(h.|j.{4})"
_USUAL_ARRAY = re.compile(  # ndarray, (0,), b"b" -> _reconstruct; 1, shape, dtype, False, content follow
    _FETCH + rb"K\0\x85\x94(C\x01b\x94|h.|j.{4})\x87\x94R\x94\(K\x01("
    + _INTEGER + rb"\x85|" + 2 * _INTEGER + rb"\x86|" + 3 * _INTEGER + rb"\x87)\x94"
    + _FETCH + rb"\x89(?:C(.)|B(.{4}))",
    re.DOTALL,
)  # fmt: skip


def _memo_key(fetch: bytes) -> int:
    """Memo key of a BINGET or LONG_BINGET."""
    return fetch[1] if len(fetch) == 2 else U32.unpack_from(fetch, 1)[0]


@lru_cache(maxsize=1024)
def _shape(content: bytes) -> tuple[int, ...]:
    """Lengths of the integers before a TUPLE opcode."""
    lengths, position = [], 0
    while position < len(content) - 1:
        kind = content[position : position + 1]
        size, unpack = {b"K": (2, _U8), b"M": (3, _U16), b"J": (5, _I32)}[kind]
        lengths.append(unpack.unpack_from(content, position + 1)[0])
        position += size
    return tuple(lengths)


def _put(memo: dict[int, Any], key: int, value: Any) -> None:
    if type(value) is PendingArray:
        value.keys.append(key)
    memo[key] = value
