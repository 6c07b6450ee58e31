"""What checking of shapes costs the tests: the same tests with it and without, by processor time.

python benchmarks/bench_shape_checks.py --output benchmarks/results/shape_checks.json

All files run in one process, as the suite runs them in two, by turns without and with; the least of ``--repeats``
counts. The files are those that call functions with stated shapes most. Outside of tests nothing is wrapped
(``test_shapes.py``).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/stage3_grpo/test_stage3_core.py", "tests/stage2_dit/test_stage2_golden.py",
         "tests/sim_agents/test_network.py", "tests/navsim_ext/test_closed_loop_geometry.py")  # fmt: skip
SWITCH = "TRIVIUM_SHAPE_CHECKS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    rows = []
    for what, more, target in (
        ("all of them in one process", (), "<= 10"), ("of it importing and collecting", ("--collect-only",), None),
    ):  # fmt: skip
        seconds = {"off": [], "on": []}
        for switch in ("off", "on") * arguments.repeats:
            seconds[switch].append(processor_seconds([*arguments.tests, *more], switch))
        off, on = min(seconds["off"]), min(seconds["on"])
        rows.append(row(f"{what}: {off:.1f} s without", 100.0 * (on / off - 1.0), "% more with", target))
    report("shape checks in tests", rows, baseline=f"the same tests with {SWITCH}=off", output=arguments.output)


def processor_seconds(tests: list[str], switch: str) -> float:
    """User and system seconds of one run; raises CalledProcessError when a test fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | {SWITCH: switch})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
