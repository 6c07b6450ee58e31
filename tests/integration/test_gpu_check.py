"""scripts/gpu_check.sh on a CPU, in small: the parts run, one that fails or takes too long does not stop the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def check(out: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"DEVICE": "cpu", "SIZE": "tiny", "OUT": str(out), "PYTHON": sys.executable} | variables
    command = ["bash", "scripts/gpu_check.sh"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_parts_leave_their_rows_and_results(tmp_path):
    done = check(tmp_path, PARTS="decode planner", LIMITS="2000")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    differing = [each for each in rows if "differ" in each["what"]]
    assert len(differing) == 5
    assert all(each["value"] == 0 and each["met"] for each in differing)
    text = (tmp_path / "results.md").read_text()
    assert "DDIM-5, 64 scene(s), eager" in text
    assert "- grpo: it was not run" in text


def test_a_part_that_does_not_end_is_told_and_the_next_one_runs(tmp_path):
    done = check(tmp_path, PARTS="decode planner", LIMITS="2")  # decode: 0 s, which timeout takes for no limit
    assert done.returncode == 1
    assert "took longer than 1 s" in json.loads((tmp_path / "planner.json").read_text())["failed"]
    assert json.loads((tmp_path / "decode.json").read_text())["rows"]


def test_what_is_missing_and_where_it_would_come_from_is_told(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(
        f'#!/bin/sh\n[ "$1" = scripts/gpu_needs.py ] && {{ echo hydra-core; exit 0; }}\nexec {sys.executable} "$@"\n'
    )
    bare.chmod(0o755)
    done = check(tmp_path / "out", PYTHON=str(bare), WHEELS=str(tmp_path / "none"))
    assert done.returncode == 64
    assert "lacks hydra-core" in done.stderr
    assert "gpu_wheels.sh" in done.stderr


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    done = check(tmp_path, LIMITS="1000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was not run" not in (tmp_path / "results.md").read_text()
