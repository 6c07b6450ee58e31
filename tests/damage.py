"""Seeded damage of files and processes, and what a reader made of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np

from navsim_ext.errors import TriviumError


def damages(content: bytes, rng: np.random.Generator, count: int) -> Iterator[bytes]:
    """``count`` copies of a file's bytes, three of four with one bit flipped, the fourth cut short."""
    for number in range(count):
        if number % 4 == 3:
            yield content[: rng.integers(len(content))]
        else:
            flipped = bytearray(content)
            flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
            yield bytes(flipped)


def judge_damage(
    folder: Path, read: Callable[[], Any], rng: np.random.Generator, count: int = 12
) -> dict[str, dict[str, int]]:
    """Damages every file below ``folder`` ``count`` times, one at a time; {file: {"named", "without effect"}}.

    Raises AssertionError when the damage changed what ``read`` returns, or when the error does not name the file.
    """
    whole = read()
    verdicts = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        name = str(path.relative_to(folder))
        verdict = verdicts[name] = {"named": 0, "without effect": 0}
        content = path.read_bytes()
        for damaged in damages(content, rng, count):
            path.write_bytes(damaged)
            said = error_of(read, whole, name)
            if said is None:
                verdict["without effect"] += 1
            elif path.name in said or path.stem in said or str(path.parent) in said:
                verdict["named"] += 1
            else:
                raise AssertionError(f"{name} was damaged, the error does not name it: {said}")
        path.write_bytes(content)
    return verdicts


def error_of(read: Callable[[], Any], whole: Any, name: str) -> str | None:
    """The message of the TriviumError that ``read`` raises; None when it returns what it returned before."""
    try:
        found = read()
    except TriviumError as error:
        return str(error)
    if found != whole:
        raise AssertionError(f"{name} was damaged, and other values were read without a word")
    return None


def kill_storm(script: Path, folder: Path, kills: int, count: int, lines: tuple[int, int]) -> set[str]:
    """Kills ``kills`` runs of ``script FOLDER WRITER COUNT``, each after some of its ``lines``; returns their lines.

    The numbers of the writers are 0 and 1 in turn. A last line that the kill cut is left out.
    """
    rng, promised = random.Random(kills), set()
    for kill in range(kills):
        process, enough = forked.start(script, folder, kill % 2, count), rng.randrange(*lines)
        while process.said().count("\n") < enough and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.004)
        process.kill()
        promised.update(process.communicate()[0].split("\n")[:-1])
    return promised - {""}
