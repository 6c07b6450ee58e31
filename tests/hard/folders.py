"""What a folder holds, without what tells the time or is the work place of a writer: for folders that must be equal."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from navsim_ext.runtime.checkpoint_file import load_checkpoint

TIMES = re.compile(r"(train/)?seconds(_\w+)?|samples_per_s|data_wait")  # columns and keys
WORK = {".lock", ".lock.json", "locks", "training_log.txt", "tensorboard", "hydra"}  # names


def contents(folder: Path, *, timed: bool = False) -> dict[str, str]:
    """By name, what every file below a folder is: a link's target, a table or JSON without times, a digest.

    ``timed``: checkpoints hold times too; all else in them is compared.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if WORK & set(name.parts) or path.suffix == ".log" or (path.is_dir() and not path.is_symlink()):
            continue
        found[str(name)] = _without_times(path) if timed and path.suffix == ".ckpt" else _content(path)
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


def _without_times(path: Path) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    digest = hashlib.sha256()

    def add(content: Any) -> None:
        if isinstance(content, torch.Tensor):
            digest.update(f"{content.dtype} {tuple(content.shape)}".encode() + content.numpy().tobytes())
        elif isinstance(content, dict):
            for key, value in content.items():
                if not TIMES.fullmatch(str(key)):
                    digest.update(repr(key).encode())
                    add(value)
        elif isinstance(content, list | tuple):
            digest.update(str(len(content)).encode())
            for value in content:
                add(value)
        else:
            digest.update(repr(content).encode())

    add(load_checkpoint(path))
    return digest.hexdigest()


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if not TIMES.fullmatch(str(key))}
        return {key: _timeless(value) for key, value in kept.items() if value not in ("", None)}
    return [_timeless(value) for value in content] if isinstance(content, list) else content


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    """What differs between two of :func:`contents`, in words; empty for nothing."""
    lines = [f"left over: {name}" for name in sorted(found.keys() - expected.keys())]
    lines += [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            one, two = found[name], expected[name]
            same = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), 0)
            at = max(same - 80, 0)
            lines.append(f"other content: {name}\n  ...{one[at : at + 200]}\n  ...{two[at : at + 200]}")
    return "\n".join(lines)
