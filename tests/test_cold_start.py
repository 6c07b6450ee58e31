"""``--help`` of a training answers at once: it loads no library that only training has a use for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"accelerate", "deepspeed", "diffusers", "lightning", "matplotlib", "numba", "pandas", "peft", "pyarrow", "ray",
         "scipy", "shapely", "transformers"}  # fmt: skip
PROGRAM = """
import json, runpy, sys
module = sys.argv[1]
sys.argv, code = [module, "--help"], 0
try:
    runpy.run_module(module, run_name="__main__", alter_sys=False)
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize("module", ["stage1_vlm.train", "stage2_dit.train", "stage3_grpo.train"])
def test_help_loads_nothing_heavy(module):
    done = subprocess.run([sys.executable, "-c", PROGRAM, module], capture_output=True, text=True, check=True)
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    assert not code
    assert "output_dir" in done.stdout
    assert HEAVY.intersection(loaded) == set()
