"""Cold start: processor time of ``python -m COMMAND --help`` for every command, a process each.

python benchmarks/bench_cold_start.py --output benchmarks/results/cold_start.json

User and system time of the process and its children, the least of ``--repeats`` runs: on a quiet core that is the time
that a user waits. Baseline: the interpreter alone.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("navsim_ext", "stage1_vlm", "stage2_dit", "sim_agents", "stage3_grpo")
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    alone = least([sys.executable, "-c", "pass"], arguments.repeats)
    seconds = {name: least([sys.executable, "-m", name, "--help"], arguments.repeats) for name in commands()}
    slowest = sorted(seconds, key=seconds.get, reverse=True)
    rows = [row("interpreter alone (baseline)", alone, "s"),
            row(f"slowest --help of {len(seconds)} commands", seconds[slowest[0]], "s", "<= 3"),
            row(f"mean over {len(seconds)} commands", sum(seconds.values()) / len(seconds), "s")]  # fmt: skip
    rows += [row(f"{name} --help", seconds[name], "s") for name in slowest[:SHOWN]]
    baseline = "`python -c pass`; processor time, so that other work on the machine counts little"
    report("cold start", rows, baseline=baseline, output=arguments.output)


def commands() -> list[str]:
    """Every module that a user runs."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    runnable = [file for file in files if re.search(r"^if __name__ == ", file.read_text(), re.MULTILINE)]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in runnable]


def least(command: Sequence[str], repeats: int) -> float:
    """Least processor seconds of several runs."""
    return min(processor_seconds(command) for _ in range(repeats))


def processor_seconds(command: Sequence[str]) -> float:
    """User and system seconds of a process and its children; raises CalledProcessError when it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
