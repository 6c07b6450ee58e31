"""Running the suite's commands as a user does."""

from __future__ import annotations

import subprocess
import sys


def run_module(module: str, *overrides: str, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Runs ``python -m module overrides...`` and returns what it printed."""
    command = [sys.executable, "-m", module, *map(str, overrides)]
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result
