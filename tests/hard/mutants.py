"""Mutants of the glue: one line of the program made wrong, and the tests that must notice. None may survive.

    python tests/hard/mutants.py                 all of them, in the order of a seed; exit code 1 if one survives
    python tests/hard/mutants.py --only update   those whose file or line has this word
    python tests/hard/mutants.py --sample 10 --seed 3
    python tests/hard/mutants.py --results FILE  keeps each verdict there, a line of JSON each: killed and given again,
                                                 it goes on with those whose source or tests have no verdict yet

The list is ``mutants.yaml``; the tests must pass without a mutant first. The sources are copied once; each mutant is
tested in a fork of a process that has imported what is slow to import.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("navsim_ext", "stage1_vlm", "stage2_dit", "sim_agents", "stage3_grpo", "configs", "tests", "pyproject.toml")
LISTED = Path(__file__).with_name("mutants.yaml")


@dataclass(frozen=True)
class Mutant:
    """``right`` becomes ``wrong`` in ``file``, where it stands once; ``tests``: paths with an optional ``-k`` word."""

    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    word: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.right.strip()!r} -> {self.wrong.strip()!r}"


def listed() -> list[Mutant]:
    entries = yaml.safe_load(LISTED.read_text())
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def mutated(mutant: Mutant, tree: Path) -> str:
    """The source with the mutation; raises ValueError where the line is not there, or not once."""
    text = (tree / mutant.file).read_text()
    if text.count(mutant.right) != 1:
        raise ValueError(f"{mutant}: stands {text.count(mutant.right)} times; bring the list of mutants up to date")
    return text.replace(mutant.right, mutant.wrong)


def survives(mutant: Mutant, tree: Path) -> bool:
    """Whether the tests of a mutant pass in the tree as it is."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (0, 1):
            raise RuntimeError(f"{mutant}: pytest ended with {status}: no test was chosen, or it could not run")
        return status == 0
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = str(tree)
    import pytest

    chosen = ["-k", mutant.word] if mutant.word else []
    os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *chosen, *mutant.tests])))


class Results:
    """Verdicts by what they depend on: the tests and the source, mutated or not."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, bool] = {}
        if path is not None and path.is_file():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]  # the last line may be cut short
            if whole != text:
                path.write_text(whole)
            self._known = {line["key"]: line["survives"] for line in map(json.loads, whole.splitlines())}

    def survives(self, mutant: Mutant, tree: Path, *, right: bool = False) -> bool:
        """As :func:`survives`, known or tried now; ``right``: the source as it is."""
        files = [tree / mutant.file, *(tree / test for test in mutant.tests)]
        content = b"".join(path.read_bytes() for path in files)
        key = hashlib.sha256(content + f"{mutant.word} {'' if right else mutant}".encode()).hexdigest()
        if key not in self._known:
            self._known[key] = survives(mutant, tree)
            if self.path is not None:
                line = {"key": key, "mutant": None if right else str(mutant), "survives": self._known[key]}
                with open(self.path, "a") as stream:
                    stream.write(json.dumps(line) + "\n")
        return self._known[key]


def copy_sources(to: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)
    return to


def import_what_is_slow() -> None:
    """Libraries only: the program itself must be read anew by each child."""
    import hydra  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import numba  # noqa: F401
    import pandas  # noqa: F401
    import tensorboard.backend.event_processing.event_accumulator  # noqa: F401
    import torch

    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=None, help="so many of them")
    parser.add_argument("--only", default="", help="word in the file or the line")
    parser.add_argument("--results", type=Path, default=None, help="file that keeps the verdicts")
    chosen = parser.parse_args(arguments)
    mutants = [each for each in listed() if chosen.only in str(each)]
    random.Random(chosen.seed).shuffle(mutants)
    mutants = mutants[: chosen.sample]
    import_what_is_slow()
    results, alive = Results(chosen.results), []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_sources(Path(folder))
        failing = [f"{each.tests} -k {each.word!r}" for each in {(m.tests, m.word): m for m in mutants}.values()
                   if not results.survives(each, tree, right=True)]  # fmt: skip
        if failing:
            raise RuntimeError(f"these tests fail without any mutant: {failing}")
        for number, mutant in enumerate(mutants, 1):
            start = time.perf_counter()
            source = tree / mutant.file
            right = source.read_text()
            source.write_text(mutated(mutant, tree))
            lives = results.survives(mutant, tree)
            source.write_text(right)
            alive += [mutant] * lives
            word = "SURVIVES" if lives else "dies"
            sys.stdout.write(f"{number}/{len(mutants)} {word} {mutant} ({time.perf_counter() - start:.0f} s)\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(mutants) - len(alive)} of {len(mutants)} mutants die\n")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
