"""The folder of a run's checkpoints: their names, which are whole, where ``last.ckpt`` points, what is removed.

Nothing here opens a checkpoint (:mod:`navsim_ext.runtime.checkpoint_file` does).
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path

from navsim_ext.errors import TriviumError

STEP_PATTERN = re.compile(r"epoch=(\d+)-step=(\d+)\.ckpt")
BEST_PATTERN = re.compile(r"best-epoch=(\d+)-step=(\d+)\.ckpt")
LAST_STEM = "last"
LAST_NAME = f"{LAST_STEM}.ckpt"
NOTHING_YET = ".nothing-yet"  # where last.ckpt points until the first checkpoint counts
COMPLETE_MARK = ".complete"  # inside a checkpoint that is a folder (DeepSpeed); files are complete when they exist


class RunCheckpointError(TriviumError):
    """A checkpoint cannot be written or read."""


def discard(path: Path) -> None:
    """Removes a checkpoint; a folder loses its mark first, so that half of one never counts."""
    if path.is_dir() and not path.is_symlink():
        (path / COMPLETE_MARK).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def relink(link: Path, target: str) -> None:
    """Makes ``link`` point to a name beside it, at once: a reader sees the old target or the new one."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def numbered(folder: Path) -> list[tuple[Path, int]]:
    """The ``epoch=E-step=S.ckpt`` of a folder with their steps, the newest first."""
    found = [(path, int(match[2])) for path in folder.glob("epoch=*-step=*.ckpt")
             if (match := STEP_PATTERN.fullmatch(path.name))]  # fmt: skip
    return sorted(found, key=lambda pair: (pair[1], pair[0].name), reverse=True)


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end (its name alone already says so for files that we wrote)."""
    return (path / COMPLETE_MARK).is_file() if path.is_dir() else zipfile.is_zipfile(path)


def newest_complete(folder: Path) -> Path | None:
    """The complete ``epoch=E-step=S.ckpt`` with the highest step in a checkpoints folder."""
    return next((path for path, _ in numbered(folder) if is_complete(path)), None)


def resume_point(folder: Path) -> Path | None:
    """What a run continues from: where ``last.ckpt`` points, and where that is not known the newest complete one.

    None where it points to nothing yet: a checkpoint that is there all the same has no row in the loggers' tables.
    """
    last = folder / LAST_NAME
    if last.is_symlink() and os.readlink(last) == NOTHING_YET:
        return None
    if last.is_symlink():
        target = folder / os.readlink(last)
        if target.parent == folder and STEP_PATTERN.fullmatch(target.name) and target.exists() and is_complete(target):
            return target
    return newest_complete(folder)


def step_of(path: Path) -> int:
    """Optimizer steps that a checkpoint stands for, from its name (links are followed)."""
    return place_of(path)[1]


def place_of(path: Path) -> tuple[int, int]:
    """Epoch and optimizer steps that a checkpoint stands for, from its name (links are followed)."""
    match = STEP_PATTERN.fullmatch(path.resolve().name)
    if match is None:
        raise RunCheckpointError(f"{path} is not named epoch=E-step=S.ckpt: resume from one that a run wrote")
    return int(match[1]), int(match[2])
