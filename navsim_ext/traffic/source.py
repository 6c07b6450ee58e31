"""What every source of traffic scenes offers to the build command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.fingerprint import digest_json
from navsim_ext.traffic.checks import BadScene
from navsim_ext.traffic.scene import TrafficScene

Result = TypeVar("Result")
VERSION = 1  # of the readers: raised whenever one of them makes other scenes of the same files
Reading = tuple[str, TrafficScene | TriviumError]
"""(name for messages, the scene, or why it could not be read)"""


@runtime_checkable
class TrafficSource(Protocol):
    """A set of scenes, cut into units of work. Plain values only, so that it travels to other processes."""

    def identity(self) -> dict[str, Any]:
        """What the scenes follow from, as JSON: part of the store's fingerprint."""
        ...

    def units(self) -> list[str]:
        """Names of the units of work (a file, a log, a generated drive), sorted. Raises MissingError for none."""
        ...

    def read(self, unit: str) -> Iterator[Reading]:
        """The scenes of a unit, in a fixed order; a bad one is yielded as its error, the others go on."""
        ...

    def prepare(self, output_dir: Path) -> None:
        """Called once before the work: writes what the scenes need beside them (maps), checks what can be checked."""
        ...


class FileSource:
    """Base of sources that read one file per unit below ``root``; subclasses say which files and how."""

    suffixes: tuple[str, ...] = ()  # how names of the files end
    described = "files"

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)

    def files(self) -> list[Path]:
        """The files below ``root``, sorted; raises MissingError where there is none."""
        root = Path(self.root)
        if not root.is_dir():
            raise MissingError(f"data.root={self.root} is not a folder: {self.described} were expected in it")
        found = sorted(path for path in root.rglob("*") if path.is_file() and self.holds(path))
        if not found:
            raise MissingError(f"data.root={self.root} holds no {self.described} (names that fit {self.suffixes})")
        return found

    def holds(self, path: Path) -> bool:
        """Whether a file is one of this source's."""
        return path.name.endswith(self.suffixes)

    def units(self) -> list[str]:
        return [str(path.relative_to(self.root)) for path in self.files()]

    def identity(self) -> dict[str, Any]:
        """Names and sizes of the files, as a digest: their bytes are checked when they are read."""
        sizes = {str(path.relative_to(self.root)): path.stat().st_size for path in self.files()}
        return {
            "source": type(self).__name__,
            "reader": VERSION,
            "files": len(sizes),
            "names_and_sizes": digest_json(sizes),
        }

    def prepare(self, output_dir: Path) -> None:
        del output_dir

    def path_of(self, unit: str) -> Path:
        return Path(self.root) / unit


def reading(name: str, make: Callable[[], TrafficScene]) -> Reading:
    """``make()`` with its named error as the result: what one bad scene of a unit costs is that scene."""
    try:
        return name, checked(name, make)
    except BadScene as error:
        return name, BadScene(f"{name}: {error}")
    except TriviumError as error:
        return name, error


def checked(where: str, make: Callable[[], Result]) -> Result:
    """``make()``; what content of an unforeseen shape makes Python raise becomes a DataError that names ``where``."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # too large for float32: infinite, and named by validate
            return make()
    except TriviumError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"{type(error).__name__} {error!s:.300}"
        raise DataError(f"{where}: {what}: the content does not fit the format") from error
