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


def test_a_verdict_is_kept_and_asked_for_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(mutants, "survives", lambda mutant, tree: asked.append(mutant) or len(asked) == 2)
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "test_a.py").write_text("")
    mutant = mutants.Mutant("a.py", "1", "2", ("test_a.py",))
    file = tmp_path / "results"
    assert [mutants.Results(file).survives(mutant, tmp_path) for _ in range(3)] == [False] * 3
    assert mutants.Results(file).survives(mutant, tmp_path, right=True)  # another question
    assert len(asked) == 2
    with open(file, "a") as stream:
        stream.write('{"key": "cut sh')
    (tmp_path / "test_a.py").write_text("assert x\n")  # other tests: tried anew
    assert not mutants.Results(file).survives(mutant, tmp_path)
    assert len(asked) == 3


@pytest.mark.slow
def test_none_survives():
    done = subprocess.run([sys.executable, mutants.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
