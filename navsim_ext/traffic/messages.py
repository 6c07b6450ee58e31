"""Protobuf messages described in a table of field numbers: no ``.proto`` file, no generated code.

A table maps the name of a message to its fields, ``"number name:type"`` each, separated by commas; ``*`` after the
name means repeated, ``**`` repeated and packed. Types are the scalar types of protobuf 2 or names of messages in the
same table. Enumerations are declared as int32: the numbers are the same on the wire, and an unknown one stays visible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.pdm.compiled import kernel

SCALARS = {
    "double": FieldDescriptor.TYPE_DOUBLE,
    "float": FieldDescriptor.TYPE_FLOAT,
    "int32": FieldDescriptor.TYPE_INT32,
    "int64": FieldDescriptor.TYPE_INT64,
    "bool": FieldDescriptor.TYPE_BOOL,
    "string": FieldDescriptor.TYPE_STRING,
    "bytes": FieldDescriptor.TYPE_BYTES,
}
WIRE_TYPES = {"double": 1, "float": 5, "int32": 0, "int64": 0, "bool": 0}


def message_types(package: str, table: Mapping[str, str]) -> dict[str, type[Message]]:
    """Message classes by name. Equal tables may be given to the same program twice; a pool of its own holds them."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    for name, fields in table.items():
        described = file.message_type.add(name=name)
        for one in fields.split(","):
            number, _, rest = one.strip().partition(" ")
            label, _, kind = rest.partition(":")
            field = described.field.add(name=label.rstrip("*"), number=int(number))
            repeated = label.endswith("*")
            field.label = FieldDescriptor.LABEL_REPEATED if repeated else FieldDescriptor.LABEL_OPTIONAL
            if kind in SCALARS:
                field.type = SCALARS[kind]
                field.options.packed = label.endswith("**")
            else:
                field.type, field.type_name = FieldDescriptor.TYPE_MESSAGE, f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in table}


def parse(kind: type[Message], data: bytes, where: str) -> Message:
    """A message from its bytes; raises DataError naming ``where`` when they are none."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise DataError(f"{where}: its {len(data)} bytes are not a {kind.DESCRIPTOR.name} ({error})") from error
    return message


def unknown_fields(message: Message) -> list[int]:
    """Numbers of the fields of a message that its table does not name."""
    return sorted({field.field_number for field in UnknownFieldSet(message)})


class FlatMessages:
    """Decoder of many small messages of scalar fields at once: [n, F] float64, one column per field of the table.

    ``fields`` as in a table, without repeated ones. Python would spend most of its time on them otherwise.
    """

    def __init__(self, fields: str) -> None:
        numbers = [one.strip().partition(" ") for one in fields.split(",")]
        self.name_of = {int(number): rest.partition(":")[0] for number, _, rest in numbers}
        most = max(self.name_of)
        self._wire = np.full(most + 1, -1, np.int64)
        self._column = np.zeros(most + 1, np.int64)
        for column, (number, _, rest) in enumerate(numbers):
            self._wire[int(number)] = WIRE_TYPES[rest.partition(":")[2]]
            self._column[int(number)] = column

    def decode(self, messages: list[bytes], where: str) -> tuple[NDArray[np.float64], int]:
        """(values [n,F], 0 where a message leaves a field out; how many unknown fields were skipped).

        Raises DataError naming the message and field for bytes that do not fit.
        """
        lengths = np.fromiter(map(len, messages), np.int64, len(messages))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        data = np.frombuffer(b"".join(messages), np.uint8)
        values = np.zeros((len(messages), len(self.name_of)))
        unknown, bad, number = _decode(data, starts, self._wire, self._column, values)
        if bad >= 0:
            name = self.name_of.get(number, f"number {number}")
            raise DataError(f"{where}: message {bad} of {len(messages)}: field {name} is cut short or of another type")
        return values, int(unknown)


@kernel
def _varint(data, at, stop):
    """(value, position after it); position -1 where it does not end."""
    value, shift = np.uint64(0), np.uint64(0)
    while at < stop and shift < np.uint64(70):
        byte = data[at]
        at += 1
        value |= np.uint64(byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += np.uint64(7)
    return value, -1


@kernel
def _decode(data, starts, wire, column, out):
    """(unknown fields, message that does not fit or -1, its field number)."""
    unknown = 0
    eight, four = np.zeros(8, np.uint8), np.zeros(4, np.uint8)
    as_double, as_float = eight.view(np.float64), four.view(np.float32)
    for i in range(len(starts) - 1):
        at, stop = starts[i], starts[i + 1]
        while at < stop:
            key, at = _varint(data, at, stop)
            if at < 0:
                return unknown, i, 0
            number, kind = np.int64(key >> np.uint64(3)), np.int64(key & np.uint64(7))
            known = 0 < number < len(wire) and wire[number] >= 0
            if known and wire[number] != kind:
                return unknown, i, number
            value = 0.0
            if kind == 0:
                whole, at = _varint(data, at, stop)
                if at < 0:
                    return unknown, i, number
                value = np.float64(np.int64(whole))
            elif kind == 1 or kind == 5:
                size = 8 if kind == 1 else 4
                if at + size > stop:
                    return unknown, i, number
                if kind == 1:
                    eight[:] = data[at : at + 8]
                    value = as_double[0]
                else:
                    four[:] = data[at : at + 4]
                    value = np.float64(as_float[0])
                at += size
            elif kind == 2:
                size, at = _varint(data, at, stop)
                if at < 0 or np.uint64(stop - at) < size:
                    return unknown, i, number
                at += np.int64(size)
            else:
                return unknown, i, number
            if known:
                out[i, column[number]] = value
            else:
                unknown += 1
    return unknown, -1, 0


def fill(message: Message, **values: Any) -> Message:
    """Sets scalar fields of a message by name and returns it."""
    for name, value in values.items():
        setattr(message, name, value)
    return message
