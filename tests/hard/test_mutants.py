"""No mutant of the glue survives: the list is ``mutants.yaml``, the command ``python tests/hard/mutants.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import mutants


def test_every_mutant_is_of_a_line_that_is_there():
    found = mutants.listed()
    assert len(found) >= 40
    assert len(set(map(str, found))) == len(found)
    for mutant in found:
        assert mutants.mutated(mutant, mutants.ROOT) != (mutants.ROOT / mutant.file).read_text()
        assert all((mutants.ROOT / test).is_file() for test in mutant.tests)


@pytest.mark.slow
def test_none_survives():
    done = subprocess.run([sys.executable, mutants.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
