"""Opcodes of a pickle that stand for one value: texts, bytes, integers and numbers in all their spellings."""

from __future__ import annotations

import codecs
from struct import Struct
from typing import Any

from navsim_ext.pickles.arrays import BadContent
from navsim_ext.pickles.stand_ins import INTEGERS

MAX_TEXT = 1 << 22  # characters of one text
MAX_INTEGER_BYTES = 9  # 64 bits and a sign
U32 = Struct("<I")
_U64 = Struct("<Q")


def line_of(data: bytes, position: int) -> tuple[bytes, int]:
    """Bytes up to the end of the line, and where the next begins."""
    stop = data.index(b"\n", position)
    return data[position:stop], stop + 1


def decimal(line: bytes) -> int:
    value = int(line) if len(line) <= 21 else INTEGERS[1] + 1
    if not INTEGERS[0] <= value <= INTEGERS[1]:
        raise BadContent("an integer of more than 64 bits")
    return value


def integer(content: bytes, most: int = MAX_INTEGER_BYTES) -> int:
    if len(content) > most:
        raise BadContent(f"an integer of {len(content)} bytes; at most 64 bits are admitted")
    value = int.from_bytes(content, "little", signed=True)
    if most > MAX_INTEGER_BYTES:
        return value
    if not INTEGERS[0] <= value <= INTEGERS[1]:
        raise BadContent("an integer of more than 64 bits")
    return value


def value_of(opcode: int, data: bytes, position: int) -> tuple[Any, int]:
    """(value, next position) of the rarer opcodes that push one value. Raises BadContent for all that is left: POP and
    DUP (only structures that hold themselves need them), persistent ids, extension codes, buffers out of band."""
    sizes = {0x58: U32, 0x42: U32, 0x54: U32, 0x8D: _U64, 0x8E: _U64, 0x96: _U64}
    if opcode in sizes or opcode == 0x55:
        head = 1 if opcode == 0x55 else sizes[opcode].size
        length = data[position] if opcode == 0x55 else sizes[opcode].unpack_from(data, position)[0]
        start, stop = position + head, position + head + length
        if stop > len(data):
            raise EOFError(f"{length:,} bytes are announced, {len(data) - start:,} are left")
        if opcode not in (0x42, 0x8E, 0x96) and length > MAX_TEXT:
            raise BadContent(f"a text of {length:,} bytes")
        if opcode in (0x58, 0x8D):  # BINUNICODE, BINUNICODE8
            return data[start:stop].decode(), stop
        if opcode in (0x54, 0x55):  # BINSTRING, SHORT_BINSTRING of Python 2
            return data[start:stop].decode("latin1"), stop
        return (bytearray if opcode == 0x96 else bytes)(data[start:stop]), stop  # BYTEARRAY8, BINBYTES, BINBYTES8
    if opcode == 0x8B:  # LONG4
        start = position + 4
        stop = start + U32.unpack_from(data, position)[0]
        if stop - start > MAX_INTEGER_BYTES:
            raise BadContent("an integer of more than 64 bits")
        return integer(data[start:stop]), stop
    if opcode in (0x49, 0x4C, 0x46, 0x53, 0x56):  # INT, LONG, FLOAT, STRING, UNICODE
        line, position = line_of(data, position)
        if len(line) > MAX_TEXT:
            raise BadContent(f"a text of {len(line):,} bytes")
        if opcode == 0x49:
            return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else decimal(line), position
        if opcode == 0x4C:
            return decimal(line.removesuffix(b"L")), position
        if opcode == 0x46:
            return float(line), position
        if opcode == 0x56:
            text = line.decode("raw-unicode-escape")
            text.encode()  # no lone surrogates
            return text, position
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise BadContent("a text without quotation marks")
        return codecs.escape_decode(line[1:-1])[0].decode("latin1"), position
    raise BadContent(f"the opcode {opcode:#04x}, which data does not need")
