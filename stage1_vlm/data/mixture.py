"""Mixtures of data sets: a meta JSON names files and how often each is repeated.

Form (InternVL's): ``{"name": {"root": picture folder, "annotation": JSONL, "repeat_time": 2 | 1 | 0.2,
"data_augment": false, "length": lines}}``. ``$VARIABLES`` in paths are expanded; relative paths start at the JSON's
folder. Counts are exact: n items with repeat_time r give floor(r n) entries: floor(r) whole copies and, for the
rest, a seeded choice without replacement.

The programs here that write question files add ``"checksum"`` of the JSONL, which is compared when the mixture is
read; whoever edits such a file takes the key away.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import read_json
from navsim_ext.runtime.checksums import CHECKSUM_KEY, CheckedFiles
from navsim_ext.runtime.rng import derive_seed

MAX_REPEAT = 1_000_000
_KEYS = {"root", "annotation", "repeat_time", "data_augment", "length", CHECKSUM_KEY}


@dataclass(frozen=True)
class DatasetEntry:
    """One data set of a mixture; ``length`` is the number of lines it is said to have (None: not stated)."""

    name: str
    annotation: Path
    root: Path
    repeat_time: Fraction = Fraction(1)
    data_augment: bool = False
    length: int | None = None

    def repeated_count(self, count: int) -> int:
        """floor(repeat_time * count), in exact arithmetic (0.2 is one fifth, not its nearest float)."""
        return math.floor(self.repeat_time * count)

    def repeat(self, count: int, seed: int) -> NDArray[np.int64]:
        """Which of ``count`` items enter the mixture, in order of copies; a pure function of name, count and seed."""
        copies, rest = divmod(self.repeated_count(count), count) if count else (0, 0)
        generator = np.random.default_rng(derive_seed(seed, "repeat", self.name))
        choice = np.sort(generator.permutation(count)[:rest])
        return np.concatenate([np.tile(np.arange(count), copies), choice]).astype(np.int64)


def read_mixture(
    path: str | Path, names: Sequence[str] | None = None, repeat: Mapping[str, float] | None = None
) -> list[DatasetEntry]:
    """The data sets of a meta JSON, or those named; raises MissingError or DataError naming key and remedy.

    ``repeat`` replaces repeat_time of the data sets whose names match a pattern (``*_trajectory``).
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"mixture file {path} does not exist")
    content = read_json(path, "correct or copy it again")
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} must hold an object of data sets by name")
    for name in names or ():
        if name not in content:
            near = difflib.get_close_matches(name, content, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {sorted(content)}"
            raise DataError(f"{path} has no data set {name!r}: {hint}")
    entries = [_entry(path, name, content[name]) for name in (names or content)]
    for pattern, times in (repeat or {}).items():
        if times <= 0 or not any(fnmatchcase(entry.name, pattern) for entry in entries):
            raise DataError(
                f"repeat {pattern}={times}: it must be positive and match one of {[e.name for e in entries]}"
            )
        entries = [
            replace(entry, repeat_time=Fraction(str(times))) if fnmatchcase(entry.name, pattern) else entry
            for entry in entries
        ]
    return entries


def _entry(path: Path, name: str, fields: Any) -> DatasetEntry:
    if not isinstance(fields, dict):
        raise DataError(f"{path}, data set {name!r} is {fields!r:.80}; an object with root and annotation was expected")
    unknown, missing = set(fields) - _KEYS, {"root", "annotation"} - set(fields)
    if unknown or missing:
        raise DataError(f"{path}, data set {name!r}: unknown keys {sorted(unknown)}, missing {sorted(missing)}")
    stated = fields.get("repeat_time", 1)
    if type(stated) not in (int, float) or not 0 < stated <= MAX_REPEAT:
        raise DataError(
            f"{path}, data set {name!r}: repeat_time {stated!r:.80}; it must be positive, up to {MAX_REPEAT:,}"
        )
    repeat = Fraction(str(stated))
    length, augment = fields.get("length"), fields.get("data_augment", False)
    if length is not None and (type(length) is not int or length < 0):
        raise DataError(f"{path}, data set {name!r}: length {length!r:.80}; a number of lines was expected")
    if type(augment) is not bool:
        raise DataError(f"{path}, data set {name!r}: data_augment {augment!r:.80}; true or false was expected")
    annotation = _resolve(path, name, fields["annotation"])
    if CHECKSUM_KEY in fields:
        remedy = f"write it again, or take {CHECKSUM_KEY!r} of {name!r} out of {path} if you edited it"
        CheckedFiles(annotation.parent, {annotation.name: fields[CHECKSUM_KEY]}, remedy).check(annotation.name)
    return DatasetEntry(
        name=name,
        annotation=annotation,
        root=_resolve(path, name, fields["root"]),
        repeat_time=repeat,
        data_augment=augment,
        length=length,
    )


def _resolve(path: Path, name: str, text: Any) -> Path:
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise DataError(f"{path}, data set {name!r}: {text!r:.80} is no path")
    expanded = os.path.expandvars(text)
    if unset := re.findall(r"\$\{?(\w+)", expanded):
        raise MissingError(f"{path}, data set {name!r}: environment variables {unset} of {text!r} are not set")
    return (path.parent / expanded).resolve()
