"""``--help`` of every command answers at once: it loads no library that only work has a use for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from navsim_ext.runtime.early_help import job_of, module_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("navsim_ext", "stage1_vlm", "stage2_dit", "sim_agents", "stage3_grpo")
HEAVY = {"PIL", "accelerate", "deepspeed", "diffusers", "geopandas", "gymnasium", "lightning", "matplotlib", "numba",
         "numpy", "pandas", "peft", "pyarrow", "pyogrio", "ray", "scipy", "shapely", "tensorboard", "torch",
         "transformers"}  # fmt: skip
COMMANDS = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): found[1]
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
    if (found := re.search(r'^@job\("([\w/]+)"\)$', file.read_text(encoding="utf-8"), re.MULTILINE))
}
ALL_TEXTS = """
import json, sys
from navsim_ext.runtime.early_help import help_of, job_of
texts = {module: help_of(job_of(module)) for module in sys.argv[1:]}
print(json.dumps([texts, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_every_command_is_known_by_its_module():
    assert len(COMMANDS) > 40
    assert {module: job_of(module) for module in COMMANDS} == COMMANDS
    assert job_of("pytest") is None
    assert job_of("navsim_ext.scene") is None
    runnable = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if "\nif __name__ == " in file.read_text(encoding="utf-8")
    }
    assert runnable == set(COMMANDS)


def test_help_of_every_command_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", ALL_TEXTS, *COMMANDS], capture_output=True, text=True, check=True)
    texts, loaded = json.loads(done.stdout)
    assert HEAVY.intersection(loaded) == set()
    for module, text in texts.items():
        sharing = [other for other in COMMANDS if COMMANDS[other] == COMMANDS[module]]  # one configuration
        assert any(f"python -m {one}" in text for one in sharing), f"the help of {module} has no example"


# one command of each package, by the way that a user takes
@pytest.mark.parametrize(
    "module", ["navsim_ext.evaluation.score", "stage1_vlm.export", "stage2_dit.experiment", "sim_agents.rollout",
               "stage3_grpo.train"]
)  # fmt: skip
def test_a_command_answers_before_it_is_loaded(module):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "output" in done.stdout
    assert HEAVY.intersection(loaded) == set()
    assert {"hydra", "navsim_ext"} <= loaded


def test_only_a_module_that_is_run_is_answered_for():
    assert module_of(["python", "-m", "stage2_dit.train", "--help"]) == "stage2_dit.train"
    assert module_of(["python", "-W", "ignore", "-u", "-m", "stage2_dit.train", "-h"]) == "stage2_dit.train"
    assert module_of(["python", "run.py", "-m", "stage2_dit.train"]) == ""
    assert module_of(["python", "-c", "pass", "-m"]) == ""
    assert module_of(["python", "-m"]) == ""
    assert module_of(["python"]) == ""


def test_the_page_of_commands_is_the_one_that_would_be_written():
    command = [sys.executable, "scripts/commands.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
