"""What a folder holds, without what tells the time or is the work place of a writer: for folders that must be equal."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path
from typing import Any

TIMES = {"samples_per_s", "data_wait", "seconds", "wall_s", "seconds_per_scene"}  # columns and keys
WORK = {".lock", ".lock.json", "locks", "training_log.txt", "tensorboard", "hydra"}  # names


def contents(folder: Path, unequal: frozenset[str] = frozenset()) -> dict[str, str]:
    """By name, what every file below a folder is: a link's target, a table or JSON without times, a digest.

    ``unequal``: names of files of which only the presence counts.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if WORK & set(name.parts) or path.suffix == ".log" or (path.is_dir() and not path.is_symlink()):
            continue
        found[str(name)] = "" if path.name in unequal else _content(path)
    return found


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    if path.suffix == ".csv":
        with open(path, newline="") as stream:
            return str([sorted(_timeless(row).items()) for row in csv.DictReader(stream)])
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(path.read_bytes())), sort_keys=True)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _timeless(value) for key, value in content.items() if key not in TIMES and value not in ("", None)}
    return [_timeless(value) for value in content] if isinstance(content, list) else content


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    """What differs between two of :func:`contents`, in words; empty for nothing."""
    lines = [f"left over: {name}" for name in sorted(found.keys() - expected.keys())]
    lines += [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            lines.append(f"other content: {name}\n  {found[name]:.300}\n  {expected[name]:.300}")
    return "\n".join(lines)
