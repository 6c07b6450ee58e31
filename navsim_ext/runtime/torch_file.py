"""``torch.load`` for files of unknown origin: tensors and plain containers, nothing that runs, nothing that overflows.

``weights_only`` keeps code from running; it does not keep a small file from taking all memory (a set of a bytearray of
2 GB) or from overflowing the C stack (a key of tuples nested a million deep). So the pickle inside is first read by the
bounded machine of :mod:`navsim_ext.pickles`, in which whatever torch would make is an inert holder.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from navsim_ext.errors import CorruptFile, MissingError
from navsim_ext.pickles import BadContent, Holder
from navsim_ext.pickles.machine import Machine
from navsim_ext.pickles.stand_ins import PLAIN

MAX_PICKLE_BYTES = 256 << 20  # without the tensors, which lie beside it
SAVE_AGAIN = "save it again with torch 1.6 or newer, or as safetensors"
_RANDOM_STATE_BYTES = 17  # numpy's generators hold integers of 128 bits


class NotAdmitted(CorruptFile):
    """The file holds objects beyond tensors and plain containers, or asks for more than those need."""


class _Inert(Holder):
    """Whatever torch would make of a name."""

    __slots__ = ()
    kind = "object of torch"

    def fill(self, state: Any) -> None:
        self.fields = {"state": state}


class _Names(Mapping[tuple[str, str], Callable[..., Any] | None]):
    """Every name is inert; what it may stand for is torch's own decision, once the structure is known to be bounded."""

    _special: ClassVar[dict[tuple[str, str], Callable[..., Any] | None]] = {
        **PLAIN,
        ("collections", "defaultdict"): lambda *_: OrderedDict(),
        ("collections", "Counter"): lambda *_: OrderedDict(),
    }

    def __getitem__(self, name: tuple[str, str]) -> Callable[..., Any] | None:
        return self._special.get(name, _Inert)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._special)

    def __len__(self) -> int:
        return len(self._special)

    def __contains__(self, name: object) -> bool:
        return True


def load_torch(path: str | os.PathLike[str], *, map_location: str = "cpu", mmap: bool = False) -> Any:
    """Content of a file that ``torch.save`` wrote (torch 1.6 or newer).

    Raises MissingError, CorruptFile for one that is cut short or of another kind, NotAdmitted.
    """
    require_bounded(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise NotAdmitted(f"{path} is no checkpoint, or holds objects that are not admitted: {error!s:.600}") from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, MemoryError) as error:
        raise CorruptFile(f"{path} cannot be read ({error!s:.300}): it was cut short") from error


def require_stored(archive: zipfile.ZipFile, path: str | os.PathLike[str]) -> None:
    """Raises NotAdmitted where reading every entry would take more than reading the file: packed or shared bytes.

    torch.save packs nothing, so a small file that unpacks to much is none of its files.
    """
    entries = archive.infolist()
    packed = sum(each.compress_type != zipfile.ZIP_STORED or each.file_size != each.compress_size for each in entries)
    held, size = sum(entry.file_size for entry in entries), os.path.getsize(path)
    if packed or held > size:
        raise NotAdmitted(
            f"{path} is no file of torch.save: {packed} packed entries, {held} bytes in a file of {size}; {SAVE_AGAIN}"
        )


def require_bounded(path: str | os.PathLike[str]) -> None:
    """Raises MissingError, CorruptFile or NotAdmitted where :func:`load_torch` would; reads no tensor."""
    if not Path(path).is_file():
        raise MissingError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            require_stored(archive, path)
            pickles = [entry for entry in archive.infolist() if entry.filename.split("/")[-1] == "data.pkl"]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise NotAdmitted(f"{path} is no file of torch.save: it has {len(pickles)} data.pkl; {SAVE_AGAIN}")
            data = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, LookupError, NotImplementedError, struct.error) as error:
        reason = f"it was cut short, or is no file of torch.save ({error!s:.300})"
        raise CorruptFile(f"{path} cannot be read: {reason}") from error
    machine = Machine(data, _Names(), persistent=_Inert, integer_bytes=_RANDOM_STATE_BYTES)
    try:
        machine.run()
    except BadContent as error:
        raise NotAdmitted(
            f"{path} holds what is not admitted (byte {machine.position} of its pickle): {error}"
        ) from error
    except (LookupError, EOFError, TypeError, ValueError, MemoryError, OverflowError, struct.error) as error:
        raise CorruptFile(f"{path} has a damaged pickle ({error!s:.200}): it was cut short") from error
