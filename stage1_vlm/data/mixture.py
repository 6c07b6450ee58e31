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
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError, MissingError
from navsim_ext.runtime.checksums import CHECKSUM_KEY, CheckedFiles
from navsim_ext.runtime.rng import derive_seed

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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
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


def _entry(path: Path, name: str, fields: dict) -> DatasetEntry:
    unknown, missing = set(fields) - _KEYS, {"root", "annotation"} - set(fields)
    if unknown or missing:
        raise DataError(f"{path}, data set {name!r}: unknown keys {sorted(unknown)}, missing {sorted(missing)}")
    repeat = Fraction(str(fields.get("repeat_time", 1)))
    if repeat <= 0:
        raise DataError(f"{path}, data set {name!r}: repeat_time {fields['repeat_time']} must be positive")
    annotation = _resolve(path, name, fields["annotation"])
    if CHECKSUM_KEY in fields:
        remedy = f"write it again, or take {CHECKSUM_KEY!r} of {name!r} out of {path} if you edited it"
        CheckedFiles(annotation.parent, {annotation.name: fields[CHECKSUM_KEY]}, remedy).check(annotation.name)
    return DatasetEntry(
        name=name,
        annotation=annotation,
        root=_resolve(path, name, fields["root"]),
        repeat_time=repeat,
        data_augment=bool(fields.get("data_augment", False)),
        length=fields.get("length"),
    )


def _resolve(path: Path, name: str, text: str) -> Path:
    expanded = os.path.expandvars(text)
    if unset := re.findall(r"\$\{?(\w+)", expanded):
        raise MissingError(f"{path}, data set {name!r}: environment variables {unset} of {text!r} are not set")
    return (path.parent / expanded).resolve()
