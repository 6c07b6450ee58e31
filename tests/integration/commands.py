"""Running the suite's commands as a user does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import forked


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class Runner:
    """Runs commands one after the other in forks of one process (``tests/forked.py``)."""

    def __call__(
        self,
        module: str,
        *overrides: object,
        kill_after: float | None = None,
        family: bool = False,
        folder: Path | None = None,
    ) -> Ended:
        """Runs a command in ``folder``; killed with -9 after ``kill_after`` s, with ``family`` its workers too."""
        process = forked.start("-m", module, *overrides, folder=folder)
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill(family=family)
            process.wait()
        return Ended(process.returncode, *process.written())


@contextmanager
def forked_commands(modules: Iterable[str]) -> Iterator[Runner]:
    """A runner that starts these modules quickly."""
    forked.preload(modules)
    yield Runner()
