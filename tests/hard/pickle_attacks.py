"""Pickles made to do harm: run code, read an address, take all memory or all time, overflow the C stack.

``ATTACKS`` maps a name to its bytes, or to a function that makes them. ``CODE_RUNS`` is the path that those which run
code would create.
"""

from __future__ import annotations

import lzma
import pickle
import struct
from collections.abc import Callable

CODE_RUNS = "trivium-attack-ran-code"

U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
DTYPE = b"cnumpy\ndtype\n"
NDARRAY = b"cnumpy\nndarray\n"


def text(value: str) -> bytes:
    return b"X" + U32(len(value)) + value.encode()


def long_bytes(value: bytes) -> bytes:
    return b"B" + U32(len(value)) + value


def dtype(code: str) -> bytes:
    return DTYPE + text(code) + b"\x89\x88\x87R"


def state(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


OBJECT_FIELD = state(  # a record whose one field is an object
    b"K\3", text("|"), b"N", text("a") + b"\x85", b"}" + text("a") + dtype("O8") + b"K\0\x86s", b"K\x08", b"K\1", b"K?"
)
FORGED = dtype("V8") + OBJECT_FIELD + b"b"
FORGED_FLAT = dtype("f8") + state(b"K\3", text("|"), b"N", b"N", b"N", b"K\x08", b"K\1", b"K?") + b"b"
ADDRESS = long_bytes(b"\x41" * 8)


def array(named: bytes, shape: bytes, content: bytes) -> bytes:
    """An array as numpy pickles it."""
    header = b"cnumpy.core.multiarray\n_reconstruct\n" + NDARRAY + b"K\0\x85" + b"C\1b" + b"\x87R"
    return header + state(b"K\1", shape, named, b"\x89", content) + b"b"


def call(module: str, name: str, *args: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + state(*args) + b"R"


def nested(opening: bytes, closing: bytes, depth: int = 1_000_000) -> bytes:
    return b"\x80\4" + opening * depth + closing * depth


def shared(levels: int, width: int = 10) -> bytes:
    """Lists of lists: each level holds the one before ``width`` times."""
    content = b"]" + text("x") + b"aq\0"
    for level in range(1, levels):
        content += b"](" + (b"h" + bytes([level - 1])) * width + b"eq" + bytes([level])
    return content


def over_and_over(first: bytes, each: bytes, times: int) -> bytes:
    """``first`` put into the memo as 0, then ``each`` many times, all of it in a list."""
    return b"\x80\4(" + first + b"q\0" + each * times + b"l."


class Evil:
    def __init__(self, *args: object) -> None:
        self.args = args

    def __reduce__(self) -> tuple:
        import os

        return os.mkdir, self.args


def big_list(count: int = 1_000_000) -> bytes:
    return b"(" + b"K\1" * count + b"l"


ATTACKS: dict[str, bytes | Callable[[], bytes]] = {
    # objects from addresses
    "ndarray_of_objects": b"cnumpy\nndarray\n" + state(b"K\1\x85", text("O"), ADDRESS) + b"R.",
    "forged_dtype_array": array(FORGED, b"K\1\x85", ADDRESS) + b".",
    "forged_flag_array": array(FORGED_FLAT, b"K\1\x85", ADDRESS) + b".",
    "forged_dtype_scalar": call("numpy.core.multiarray", "scalar", FORGED, ADDRESS) + b".",
    "forged_dtype_buffer": call("numpy.core.numeric", "_frombuffer", ADDRESS, FORGED, b"K\1\x85", text("C")) + b".",
    "object_buffer": call("numpy.core.numeric", "_frombuffer", ADDRESS, dtype("O8"), b"K\1\x85", text("C")) + b".",
    "object_array_of_bytes": array(dtype("O8"), b"K\1\x85", ADDRESS) + b".",
    "array_larger_than_its_bytes": array(dtype("f8"), b"J\0\0\0\x7f\x85", ADDRESS) + b".",
    "array_of_negative_length": array(dtype("f8"), b"J\xff\xff\xff\xff\x85", ADDRESS) + b".",
    "subarray_dtype": array(
        dtype("V8")
        + state(b"K\3", text("|"), dtype("O8") + b"K\1\x85\x86", b"N", b"N", b"K\x08", b"K\1", b"K?")
        + b"b",
        b"K\1\x85",
        ADDRESS,
    ) + b".",
    "date_dtype": array(dtype("M8"), b"K\1\x85", ADDRESS) + b".",
    "texts_beyond_unicode": array(dtype("U1"), b"K\1\x85", long_bytes(b"\xff" * 4)) + b".",
    "booleans_of_two": array(dtype("b1"), b"K\1\x85", long_bytes(b"\2")) + b".",
    "array_in_itself": (
        b"cnumpy.core.multiarray\n_reconstruct\n" + NDARRAY + b"K\0\x85C\1b\x87Rq\0"
        + state(b"K\1", b"K\1\x85", dtype("O8"), b"\x89", b"]h\0a") + b"b."
    ),
    # memory
    "set_of_huge_bytes": call("builtins", "set", call("builtins", "bytes", b"J\xff\xff\xff\x7f")) + b".",
    "huge_bytes": call("builtins", "bytes", b"J\xff\xff\xff\x7f") + b".",
    "huge_bytearray": call("__builtin__", "bytearray", b"J\xff\xff\xff\x7f") + b".",
    "huge_list": call("builtins", "list", call("builtins", "bytes", b"J\xff\xff\xff\x7f")) + b".",
    "huge_memo_key": b"\x80\4]r\xff\xff\xff\x7f.",
    "huge_memo_key_text": b"]p2147483647\n.",
    "announced_bytes": b"\x80\4\x8e" + U64(1 << 62) + b"x.",
    "announced_text": b"\x80\4\x8d" + U64(1 << 62) + b"x.",
    "announced_bytearray": b"\x80\5\x96" + U64(1 << 62) + b"x.",
    "announced_integer": b"\x80\4\x8b" + U32(0x7FFFFFFF) + b"x.",
    "announced_frame": b"\x80\4\x95" + U64(1 << 62) + b"N.",
    "empty_but_long": array(dtype("f8"), b"\x8a\5\0\0\0\0\1K\0\x86", b"C\0") + b".",
    "items_without_size": array(dtype("S0"), b"J\xff\xff\xff\x7f\x85", b"C\0") + b".",
    "shared_buffer": over_and_over(
        long_bytes(bytes(1 << 20)),
        b"cnumpy.core.numeric\n_frombuffer\n(h\0" + dtype("u1") + b"J\0\0\x10\0\x85" + text("C") + b"tR",
        20_000,
    ),
    "shared_bytearray": over_and_over(long_bytes(bytes(1 << 20)), b"cbuiltins\nbytearray\nh\0\x85R", 20_000),
    "shared_scalar": over_and_over(
        long_bytes(bytes(1 << 20)), call("numpy.core.multiarray", "scalar", dtype("S1048576"), b"h\0"), 20_000
    ),
    "marks": b"(" * 3_000_000 + b".",
    "empty_lists": lambda: b"(" + b"]" * 30_000_000 + b"l.",
    # the C stack
    "tuples_nested": nested(b")", b"") + b"\x85" * 1_000_000 + b".",
    "tuple_as_key": b"}" + b")" + b"\x85" * 1_000_000 + b"Ns.",
    "tuple_in_a_set": b"\x80\4\x8f(" + b")" + b"\x85" * 1_000_000 + b"\x90.",
    "tuple_in_a_frozenset": b"\x80\4()" + b"\x85" * 1_000_000 + b"\x91.",
    "tuple_in_an_old_set": b"cbuiltins\nset\n(]" + b")" + b"\x85" * 1_000_000 + b"atR.",
    "lists_nested": b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "dictionaries_nested": b"}" + b"K\0}" * 300_000 + b"s" * 300_000 + b".",
    "object_arrays_nested": b"".join(
        [b"cnumpy.core.multiarray\n_reconstruct\n" + NDARRAY + b"K\0\x85C\1b\x87R(K\1K\1\x85" + dtype("O8") + b"\x89]"]
        * 10_000
        + [b"N"]
        + [b"atb"] * 10_000
    ) + b".",
    # time
    "shared_lists": shared(30) + b".",
    "shared_lists_as_array": b"}" + text("gt_boxes") + shared(12) + b"s.",
    "shared_tuples": b")" + b"2\x86" * 60 + b".",
    "shared_tuples_by_memo": (
        b"\x80\4)q\0"
        + b"".join(b"h" + bytes([k]) + b"h" + bytes([k]) + b"\x86q" + bytes([k + 1]) for k in range(60))
        + b"."
    ),
    "list_in_itself": b"]q\0h\0a.",
    "dictionary_in_itself": b"}q\0K\1h\0s.",
    "sets_of_a_shared_list": over_and_over(big_list(), b"cbuiltins\nset\nh\0\x85R", 20_000),
    "frozensets_of_a_shared_list": over_and_over(big_list(), b"cbuiltins\nfrozenset\nh\0\x85R", 20_000),
    "colliding_keys": lambda: b"}(" + b"".join(
        b"\x8a\x10" + (k * ((1 << 61) - 1)).to_bytes(16, "little") + b"N" for k in range(1, 200_000)
    ) + b"u.",
    "colliding_tuples": b"}(" + b"K\1K\2\x86N" * 100_000 + b"u.",
    "many_digits": b"L" + b"9" * 3_000_000 + b"L\n.",
    "many_digits_int": b"I" + b"9" * 3_000_000 + b"\n.",
    "many_nothings": lambda: b"(" + b"N" * 40_000_000 + b"l.",
    "line_without_end": b"V" + b"x" * 5_000_000,
    # code and names
    "mkdir": b"cposix\nmkdir\n(" + text(CODE_RUNS) + b"tR.",
    "system": b"cos\nsystem\n(" + text(f"mkdir {CODE_RUNS}") + b"tR.",
    "eval": b"cbuiltins\neval\n(" + text(f"__import__('os').mkdir('{CODE_RUNS}')") + b"tR.",
    "evil_of_protocol_0": pickle.dumps(Evil(CODE_RUNS), protocol=0),
    "evil_of_protocol_4": pickle.dumps([Evil(CODE_RUNS)], protocol=4),
    "old_instance": b"(" + text(CODE_RUNS) + b"iposix\nmkdir\n.",
    "old_object": b"(cposix\nmkdir\n" + text(CODE_RUNS) + b"o.",
    "dotted": b"\x80\4" + text("numpy") + text("ndarray.__init__.__globals__") + b"\x93.",
    "getattr": b"cbuiltins\ngetattr\n(cbuiltins\nset\n" + text("__class__") + b"tR.",
    "numpy_load": b"cnumpy\nload\n(" + text("/etc/passwd") + b"tR.",
    "numpy_fromfile": b"cnumpy.core.multiarray\nfromfile\n(" + text("/etc/passwd") + b"tR.",
    "name_of_no_text": b"\x80\4K\1K\2\x93.",
    "persistent": b"Psomething\n.",
    "extension": b"\x80\2\x82\1.",
    "buffer_out_of_band": b"\x80\5\x97.",
    "attributes_of_a_function": b"cbuiltins\nset\nN}" + text("__defaults__") + b"K\1s\x86b.",
    "attributes_of_a_type": b"cnumpy\nndarray\nN}" + text("__len__") + b"K\1s\x86b.",
    "attributes_of_a_list": b"]N}" + text("append") + b"K\1s\x86b.",
    "new_array": b"\x80\4" + NDARRAY + b"K\1\x85\x81.",
    "type_as_value": b"]" + NDARRAY + b"a.",
    "function_as_value": b"}" + text("token") + b"cbuiltins\nset\ns.",
    "call_of_a_text": text("os.system") + b")R.",
    # damage
    "nothing": b"",
    "stop": b".",
    "two_objects": b"NN.",
    "mark_left": b"N(N.",
    "zeros": bytes(100_000),
    "protocol_9": b"\x80\x09N.",
    "no_stop": b"K\1",
    "lone_surrogate": b"\x80\4\x8c\3\xed\xa0\x80.",
}  # fmt: skip


def content_of(name: str) -> bytes:
    made = ATTACKS[name]
    return made if isinstance(made, bytes) else made()


def nested_geometry(depth: int = 200_000) -> bytes:
    """WKB of a collection that holds a collection that holds ..."""
    return (b"\1" + U32(7) + U32(1)) * depth + b"\1" + U32(1) + bytes(16)


def geometry(wkb: bytes) -> bytes:
    return b"cshapely\nfrom_wkb\n" + long_bytes(wkb) + b"\x85R."


GEOMETRY_ATTACKS: dict[str, bytes] = {
    "collections_nested": geometry(nested_geometry()),
    "multipolygons_nested": geometry((b"\1" + U32(6) + U32(1)) * 200_000 + b"\1" + U32(1) + bytes(16)),
    "polygon_of_many_rings": geometry(b"\1" + U32(3) + U32(0xFFFFFFFF) + b"\0" * 40),
    "line_of_many_points": geometry(b"\1" + U32(2) + U32(0xFFFFFFFF) + b"\0" * 40),
    "ring_of_many_points": geometry(b"\1" + U32(3) + U32(1) + U32(0xFFFFFFFF)),
    "empty_rings": geometry(b"\1" + U32(3) + U32(500_000) + bytes(2_000_000)),
    "curve": geometry(b"\1" + U32(8) + U32(1) + bytes(16)),
    "unknown_byte_order": geometry(b"\7" + U32(1) + bytes(16)),
    "geometry_of_no_bytes": b"cshapely\nfrom_wkb\nK\1\x85R.",
    "not_finite": geometry(b"\1" + U32(1) + struct.pack("<dd", float("nan"), float("inf"))),
    "cut_off": geometry(b"\1" + U32(3) + U32(1) + U32(4) + bytes(10)),
}


def packed(content: bytes) -> bytes:
    return lzma.compress(content, preset=0)


def packed_zeros(size: int = 2 << 30) -> bytes:
    """An xz file that unpacks to a great many zeros."""
    packer, block = lzma.LZMACompressor(preset=1), bytes(1 << 24)
    return b"".join(packer.compress(block) for _ in range(size >> 24)) + packer.flush()


def packed_with_huge_dictionary() -> bytes:
    """An xz file whose header asks for a dictionary of 1.5 GB."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]
    made = bytearray(lzma.compress(b"N.", filters=filters))
    place = made.index(b"\x21\x01\x00")  # filter id, size of properties, dictionary of 4 KiB
    made[place + 2] = 37
    return bytes(made)
