"""The house rules that a machine can check."""

import subprocess
import sys
from pathlib import Path

import pytest

from navsim_ext.errors import MissingError
from navsim_ext.runtime.config import check_choices

ROOT = Path(__file__).resolve().parents[1]


def test_imports_point_down():
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_misspelt_choice_names_the_nearest(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "demo.yaml").touch()
    with pytest.raises(MissingError, match="did you mean experiment=demo"):
        check_choices(tmp_path, ["experiment=dmeo"])
    check_choices(tmp_path, ["experiment=demo", "trainer.max_steps=3"])
