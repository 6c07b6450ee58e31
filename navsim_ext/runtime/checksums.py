"""The one way in which files say what their bytes are, so that damage is named before it becomes a number.

Everything that Trivium writes and reads again to make a number carries XXH3 checksums, and whoever reads compares them.
They are there against faults (a flipped bit, a file cut short, a half-finished copy), not against forgery. Four forms:

    files of a folder    ``file_checksums`` gives an entry for each; it goes into a JSON file that is written last.
                         ``CheckedFiles`` compares: a file as a whole, or an array by the blocks that a read touches.
    one file with text   ``PLACE`` stands somewhere in it (a JSON value, metadata of Parquet or safetensors); ``stamp``
                         fills in the checksum of the file with that place empty, ``check_stamp`` compares.
    JSON                 ``write_checked_json`` and ``read_checked_json``: stamped under the key ``checksum``.
    journals             ``checked_line`` and ``checked_lines``: one JSON object a line, each with its own checksum.

Shards have their own (:mod:`navsim_ext.shards`): a checksum per record and one over header and index.
"""

from __future__ import annotations

import ast
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from navsim_ext.errors import CorruptFile, MissingError
from navsim_ext.files import write_json_atomic

CHECKSUMS_FILE = "checksums.json"  # of a folder whose files have no JSON of their own to carry the entries
CHECKSUM_KEY = "checksum"  # of the stamp in a JSON object
MARK = b"trivium-xxh3:"
PLACE = (MARK + b"0" * 32).decode()  # where a stamp goes
SMALLEST_BLOCK = 1 << 14  # bytes
MOST_BLOCKS = 1024  # of one file; larger files have larger blocks
_DIGITS = 16  # hexadecimal digits of a block's XXH3


def block_bytes(size: int) -> int:
    """Bytes of one block of a file: the smallest power of two from 16 KiB on that gives at most 1,024 blocks."""
    block = SMALLEST_BLOCK
    while size > block * MOST_BLOCKS:
        block *= 2
    return block


def file_checksums(folder: str | os.PathLike[str], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{name: {"bytes": size, "xxh3": 16 hexadecimal digits for each block}} of files of a folder, as JSON."""
    entries = {}
    for name in sorted(names):
        path = Path(folder) / name
        size = path.stat().st_size
        with open(path, "rb") as stream:
            blocks = [xxhash.xxh3_64_hexdigest(block) for block in iter(lambda: stream.read(block_bytes(size)), b"")]  # noqa: B023
        entries[name] = {"bytes": size, "xxh3": "".join(blocks)}
    return entries


def seal_folder(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Writes ``checksums.json`` over the named files (paths relative to the folder), after them and atomically."""
    write_checked_json(Path(folder) / CHECKSUMS_FILE, {"files": file_checksums(folder, names)})


def check_listed(folder: str | os.PathLike[str], path: Path, remedy: str) -> None:
    """Compares a file below a folder, where the folder has a ``checksums.json`` that lists it.

    For data in other people's formats: the synthetic world lists its logs and maps, a download lists nothing.
    """
    if (Path(folder) / CHECKSUMS_FILE).is_file():
        files, name = CheckedFiles.sealed(folder, remedy), str(path.relative_to(folder))
        if name in files.entries:
            files.check(name)


class CheckedFiles:
    """The files of a folder with their stored checksums; ``remedy`` ends every message.

    Raises CorruptFile for entries that are none.
    """

    def __init__(self, folder: str | os.PathLike[str], entries: Mapping[str, Any], remedy: str) -> None:
        self.folder, self.remedy = Path(folder), remedy
        self.entries: dict[str, tuple[int, str]] = {}
        for name, entry in entries.items():
            try:
                size, digests = int(entry["bytes"]), str(entry["xxh3"])
            except (TypeError, KeyError, ValueError) as error:
                where = f"{folder}: the checksum entry of {name}"
                raise CorruptFile(f"{where} is damaged ({error!s:.300}); {remedy}") from error
            self.entries[name] = (size, digests)

    @classmethod
    def sealed(cls, folder: str | os.PathLike[str], remedy: str) -> CheckedFiles:
        """Of a folder that ``seal_folder`` finished; raises MissingError or CorruptFile."""
        content = read_checked_json(Path(folder) / CHECKSUMS_FILE, remedy)
        return cls(folder, content["files"], remedy)

    def check(self, name: str) -> Path:
        """Compares every byte of a file; returns its path. Raises MissingError, CorruptFile."""
        size, digests = self._entry(name)
        path = self.folder / name
        self._require_size(path, size)
        step = block_bytes(size)
        with open(path, "rb") as stream:
            for start in range(0, len(digests), _DIGITS):
                found = xxhash.xxh3_64_hexdigest(stream.read(step))
                if found != digests[start : start + _DIGITS]:
                    raise self._damaged(path, start // _DIGITS, step, found, digests[start : start + _DIGITS])
        return path

    def check_all(self) -> None:
        """Compares every byte of every file."""
        for name in self.entries:
            self.check(name)

    def read(self, name: str) -> bytes:
        """The bytes of a file, compared."""
        return self.check(name).read_bytes()

    def array(self, name: str) -> CheckedArray:
        """A ``.npy`` file mapped into memory, whose blocks are compared when they are first read."""
        size, digests = self._entry(name)
        path = self.folder / name
        self._require_size(path, size)
        return CheckedArray(self, path, size, digests)

    def _entry(self, name: str) -> tuple[int, str]:
        if name not in self.entries:
            raise CorruptFile(f"{self.folder}: no checksum of {name} is stored; {self.remedy}")
        return self.entries[name]

    def _require_size(self, path: Path, size: int) -> None:
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise MissingError(f"{path} is missing; {self.remedy}") from None
        if found != size:
            raise CorruptFile(f"{path}: {found:,} bytes on disk, {size:,} were written; {self.remedy}")

    def _damaged(self, path: Path, block: int, step: int, found: str, stored: str) -> CorruptFile:
        return CorruptFile(
            f"{path}: bytes {block * step:,} to {(block + 1) * step:,} have checksum {found}, {stored or 'none'} was "
            f"written: the file is damaged; {self.remedy}"
        )


class CheckedArray:
    """A read-only ``.npy`` array [N,...] in mapped memory; what a read touches is compared first, once per process.

    ``array[i]``, ``array[a:b]`` and ``array[a:b, ...]`` compare the blocks of those rows; any other index, and
    ``np.asarray``, compare all.
    """

    def __init__(self, files: CheckedFiles, path: Path, size: int, digests: str) -> None:
        self._files, self._path, self._digests = files, path, digests
        self._step = block_bytes(size)
        self._left = len(digests) // _DIGITS  # blocks that were not compared yet
        self._unchecked = bytearray(b"\1" * self._left)
        with open(path, "rb") as stream:
            self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        self._check_bytes(0, min(size, SMALLEST_BLOCK))
        self._array, self._offset = self._map()
        self._row_bytes = self._array[:1].nbytes
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def __getitem__(self, key: Any) -> NDArray:
        if self._left:
            rows = key[0] if isinstance(key, tuple) and key else key
            if isinstance(rows, slice) and rows.step in (None, 1):
                start, stop, _ = rows.indices(len(self))
            elif isinstance(rows, int | np.integer) and -len(self) <= rows < len(self):
                start = int(rows) % len(self)
                stop = start + 1
            else:
                start, stop = 0, len(self)
            self._check_rows(start, stop)
        return self._array[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        self._check_rows(0, len(self))
        return np.array(self._array, dtype=dtype, copy=copy)

    def _check_rows(self, start: int, stop: int) -> None:
        if stop > start:
            self._check_bytes(self._offset + start * self._row_bytes, self._offset + stop * self._row_bytes)

    def _check_bytes(self, start: int, stop: int) -> None:
        for block in range(start // self._step, -(-stop // self._step)):
            if not self._unchecked[block]:
                continue
            first = block * self._step
            found = xxhash.xxh3_64_hexdigest(memoryview(self._bytes)[first : first + self._step])
            stored = self._digests[block * _DIGITS : (block + 1) * _DIGITS]
            if found != stored:
                raise self._files._damaged(self._path, block, self._step, found, stored)  # noqa: SLF001
            self._unchecked[block] = 0
            self._left -= 1

    def _map(self) -> tuple[NDArray, int]:
        """The array in the mapped bytes and where it begins, by the header of the ``.npy`` format (its first block)."""
        content = memoryview(self._bytes)
        try:
            major = content[6]
            width = 2 if major == 1 else 4
            offset = 8 + width + int.from_bytes(content[8 : 8 + width], "little")
            header = ast.literal_eval(bytes(content[8 + width : offset]).decode("latin1"))
            order = "F" if header["fortran_order"] else "C"
            return np.ndarray(header["shape"], header["descr"], self._bytes, offset, order=order), offset
        except (IndexError, KeyError, TypeError, ValueError, SyntaxError) as error:
            raise CorruptFile(f"{self._path} is no array of the .npy format ({error}); {self._files.remedy}") from error


def stamp(path: str | os.PathLike[str]) -> None:
    """Fills the ``PLACE`` in a finished file with the checksum of the file while the place is empty, and syncs it."""
    with open(path, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as content:
        where = content.find(PLACE.encode())
        if where < 0 or content.find(MARK) != where or content.find(MARK, where + 1) >= 0:
            raise CorruptFile(f"{path} cannot be stamped: {MARK.decode()!r} must stand in it once, followed by zeros")
        digest = xxhash.xxh3_128_hexdigest(content)
        content[where + len(MARK) : where + len(PLACE)] = digest.encode()
        content.flush()
        os.fsync(stream.fileno())


def check_stamp(path: str | os.PathLike[str], remedy: str, *, required: bool = True) -> None:
    """Compares the checksum that ``stamp`` left in a file. Raises MissingError, CorruptFile.

    ``required=False`` accepts a file without one: for forms that others write, too.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"{path} is missing; {remedy}")
    if not path.stat().st_size:
        raise CorruptFile(f"{path} is empty; {remedy}")
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _check_stamp(content, path, remedy, required)


def _check_stamp(content: bytes | mmap.mmap, path: Path, remedy: str, required: bool) -> None:
    where = content.find(MARK)
    if where < 0:
        if required:
            raise CorruptFile(f"{path} carries no checksum: it is damaged or an earlier version wrote it; {remedy}")
        return
    start, stop = where + len(MARK), where + len(PLACE)
    stored = bytes(content[start:stop])
    digest = xxhash.xxh3_128()
    view = memoryview(content)
    try:
        digest.update(view[:start])
        digest.update(b"0" * (stop - start))
        digest.update(view[stop:])
    finally:
        view.release()
    if digest.hexdigest().encode() != stored:
        raise CorruptFile(
            f"{path} has checksum {digest.hexdigest()}, {stored.decode('latin1')} was written into it: it is damaged "
            f"or was edited; {remedy}"
        )


def write_checked_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a JSON object, stamped under ``checksum``, atomically."""
    write_json_atomic(Path(path), {**content, CHECKSUM_KEY: PLACE}, finish=stamp)


def read_checked_json(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """Reads and compares what ``write_checked_json`` wrote. Raises MissingError, CorruptFile."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MissingError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise CorruptFile(f"{path} cannot be read ({error}); {remedy}") from error
    _check_stamp(content, path, remedy, required=True)
    found = json.loads(content)
    del found[CHECKSUM_KEY]
    return found


def checked_line(content: Mapping[str, Any]) -> str:
    """One line of a journal: the object as JSON with the XXH3 of the JSON without it under ``checksum``, last."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return f'{text[:-1]}{", " if content else ""}"{CHECKSUM_KEY}": "{xxhash.xxh3_64_hexdigest(text.encode())}"}}\n'


def checked_lines(content: bytes, *, required: bool = True) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(1-based number, object) of each line of a journal; None for a line that is damaged or cut short.

    ``required=False`` accepts lines without a checksum: of an earlier version, where making them again is too dear.
    """
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line:
            yield number, _parse_line(line, required)


def _parse_line(line: bytes, required: bool) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
        stored = found.pop(CHECKSUM_KEY, None)
        if stored is None and not required:
            return found
        intact = checked_line(found).encode() == line + b"\n"
    except (ValueError, TypeError, AttributeError):
        return None
    return found if intact else None
