"""Running the suite's commands as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


def run_module(module: str, *overrides: str, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Runs ``python -m module overrides...`` and returns what it printed."""
    command = [sys.executable, "-m", module, *map(str, overrides)]
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class Runner:
    """Runs commands one after the other in forks of one process (``fork_runner.py``)."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def __call__(self, module: str, *overrides: str, kill_after: float | None = None, family: bool = False) -> Ended:
        """Runs a command; ``kill_after`` that many seconds it is killed with -9, with ``family`` its workers too."""
        asked = {"command": [module, *map(str, overrides)], "kill_after": kill_after, "family": family}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


@contextmanager
def forked_commands(modules: Iterable[str]) -> Iterator[Runner]:
    """A runner that starts these modules quickly."""
    command = [sys.executable, str(Path(__file__).with_name("fork_runner.py")), *modules]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Runner(process)
        process.stdin.close()
