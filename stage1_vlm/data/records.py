"""Question records of other people's data sets: one a line, or the elements of one JSON array, each checked.

What cannot be used is a :class:`SkipLine` with a short reason to count by.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from navsim_ext.errors import CorruptFile, DataError
from navsim_ext.pictures import open_picture, picture_size
from navsim_ext.prompts import IMAGE_PLACEHOLDER

OTHER_MEDIA = ("video", "videos", "audio", "audios")
HUMAN = ("human", "user")
_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"\s*(?:,\s*(?!\])|(?=\]))")


class SkipLine(Exception):
    """One line cannot be used; ``reason`` is a short class of failure, ``detail`` says what exactly."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def parse_record(content: bytes | str) -> dict[str, Any]:
    """One question record as everything after expects it; raises SkipLine naming what is wrong.

    ``images`` is another name for ``image``. Pictures without any placeholder stand before the first question, as in
    InternVL's own data.
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SkipLine("broken line", str(error)) from error
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise SkipLine("malformed record", "an object with a list `conversations` was expected")
    media = next((key for key in OTHER_MEDIA if record.get(key)), None)
    if media is not None:
        raise SkipLine("other media", f"the record has {media!r}: pictures alone are read (keys image, images)")
    if record.get("images") and record.get("image"):
        raise SkipLine("malformed record", "both `image` and `images`")
    if record.get("images"):
        record["image"] = record["images"]
    paths = picture_paths(record)
    asked = [message for message in record["conversations"] if _is_question(message)]
    if paths and asked and not any(IMAGE_PLACEHOLDER in message["value"] for message in asked):
        asked[0]["value"] = f"{IMAGE_PLACEHOLDER}\n" * len(paths) + asked[0]["value"]
    return record


def _is_question(message: Any) -> bool:
    return isinstance(message, dict) and message.get("from") in HUMAN and isinstance(message.get("value"), str)


def picture_paths(record: dict[str, Any]) -> list[str]:
    """``image`` is absent, a path, or a list of paths."""
    image = record.get("image")
    if image is None or image == "":
        return []
    paths = [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) and path.strip() for path in paths):
        raise SkipLine("malformed record", f"image is {image!r:.200}; a path or a list of paths was expected")
    return paths


def _stated_sizes(record: dict[str, Any], count: int) -> list[tuple[int, int]] | None:
    """``image_size``: (width, height) of the one picture, or of each."""
    stated = record.get("image_size")
    if stated is None:
        return None
    one = count == 1 and isinstance(stated, list) and bool(stated) and not isinstance(stated[0], list)
    sizes = [stated] if one else stated
    if not isinstance(sizes, list) or len(sizes) != count or not all(_is_size(size) for size in sizes):
        raise SkipLine("malformed record", f"image_size {stated!r:.200} for {count} pictures")
    return [(width, height) for width, height in sizes]


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(length) is int and length > 0 for length in size)


def picture_sizes(record: dict[str, Any], paths: list[str], root: Path, verify: bool) -> list[tuple[int, int]]:
    """(width, height) of each picture, from ``image_size`` where it is given, else from the file's header."""
    sizes = _stated_sizes(record, len(paths))
    found = []
    for position, path in enumerate(paths):
        if not _is_file(root, path):
            raise SkipLine("missing picture", f"{root / path!s:.300}")
        if sizes is not None and not verify:
            found.append(sizes[position])
            continue
        try:
            found.append(open_picture(root / path).size if verify else picture_size(root / path))
        except DataError as error:
            raise SkipLine("unreadable picture", str(error)) from error
        if sizes is not None and sizes[position] != found[-1]:
            raise SkipLine("wrong image_size", f"{root / path} is {found[-1]}, the line says {sizes[position]}")
    return found


def _is_file(root: Path, path: str) -> bool:
    try:
        return (root / path).is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with characters that none has
        return False


def is_array(path: Path) -> bool:
    """Whether the file is one JSON array instead of a record a line."""
    with open(path, "rb") as stream:
        return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of a file."""
    offset = 0
    with open(path, "rb") as stream:
        for line in stream:
            yield offset, line
            offset += len(line)


def elements(path: Path) -> Iterator[tuple[int, bytes]]:
    """(byte offset, element) of a file that is a JSON array, which is held in memory once."""
    try:
        text = path.read_bytes().decode()
    except (UnicodeDecodeError, MemoryError) as error:
        raise CorruptFile(f"{path} is no JSON array in UTF-8 ({error}): copy or download it again") from error
    decoder, offset = json.JSONDecoder(), 0
    position = before = _SPACE.match(text, text.index("[") + 1).end()
    offset = len(text[:position].encode())
    while text[position : position + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, position)
            following = _SEPARATOR.match(text, end)
            if following is None:
                raise ValueError("a comma or ] was expected")
        except (ValueError, RecursionError) as error:
            raise CorruptFile(
                f"{path} is no JSON array: after character {position} {error!s:.200}: copy or download it again"
            ) from error
        offset += len(text[before:position].encode())
        yield offset, text[position:end].encode()
        before, position = position, following.end()


def first_value(stream: BinaryIO) -> str:
    """Text of the JSON value that begins at the stream's position, however many lines it has."""
    content, size = b"", 1 << 14
    while True:
        more = stream.read(size)
        content, size = content + more, 2 * size
        text = content.decode(errors="ignore")
        try:
            return text[: json.JSONDecoder().raw_decode(text)[1]]
        except ValueError:
            if not more:
                return text
