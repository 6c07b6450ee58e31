"""Figures of the finished experiment of stage 2 or of stage 3 on the synthetic world.

    bash scripts/experiment.sh
    python benchmarks/bench_experiments.py 2 --output benchmarks/results/experiment_stage2.json
    python benchmarks/bench_experiments.py 3 --output benchmarks/results/experiment_stage3.json

Nothing is measured here; the results of the run are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row

POINTS = 100.0  # scores in [0, 1] are printed x 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=int, choices=(2, 3))
    parser.add_argument("--folder", type=Path, default=Path("experiment"), help="EXPERIMENT_DIR of the script")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    result = json.loads((arguments.folder / f"stage{arguments.stage}" / "result.json").read_text())
    rows, baseline = {
        2: (imitation_rows, "planners that need no training, and the same planner without sight"),
        3: (reinforcement_rows, "the imitation planner that reinforcement started from"),
    }[arguments.stage]
    baseline += "; paired by scene, bootstrap by log"
    report(f"experiment of stage {arguments.stage}", rows(result), baseline=baseline, output=arguments.output)


def interval(estimate: dict[str, Any]) -> str:
    """The 95 % interval x 100."""
    return f"[{POINTS * estimate['low']:+.1f}, {POINTS * estimate['high']:+.1f}]"


def imitation_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Means of all planners, then the seeing planner minus each rival."""
    required = result["configuration"]["required_points"]
    rows = [row("stage 2: held-out scenes, unseen town", result["scenes"], f"in {result['logs']} logs", ">= 500")]
    means = {**result["means"], "human": result["human"]}
    for name, mean in sorted(means.items(), key=lambda item: -item[1]):
        rows.append(row(f"stage 2: PDMS v1.1 x 100 of {name}", POINTS * mean, ""))
    for name, difference in result["differences"].items():
        best = name == result["best_rival"]
        what = f"stage 2: diffusion_il minus {name}" + (", its best rival" if best else "")
        rows.append(row(what, POINTS * difference["mean"], interval(difference), f">= {required}" if best else None))
    low = POINTS * result["differences"][result["best_rival"]]["low"]
    rows.append(row("stage 2: lower end of that paired 95 % interval", low, "", "> 0"))
    return rows


def reinforcement_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Differences to the imitation planner: means over seeds, then each seed."""
    settings = result["configuration"]
    targets = {
        "pdms_v1": f">= {settings['required_points']}",
        "reverse_tail": f"<= {POINTS * settings['reverse_tail_margin']}",
    }
    rows = [
        row("stage 3: held-out scenes, unseen town", result["scenes"], f"in {result['logs']} logs", ">= 500"),
        row("stage 3: seeds", len(result["by_seed"]), "", ">= 3"),
    ]
    for metric, difference in result["differences"].items():
        before = POINTS * result["means"]["diffusion_il"][metric]
        what = f"stage 3: {metric} x 100, reinforced minus imitation ({before:.1f})"
        rows.append(row(what, POINTS * difference["mean"], interval(difference), targets.get(metric)))
    rows.append(row("stage 3: lower end of the interval of PDMS", POINTS * result["differences"]["pdms_v1"]["low"], "",
                    "> 0"))  # fmt: skip
    rows.append(row("stage 3: EPDMS does not fall", int(result["epdms_holds"]), "1 = holds", ">= 1"))
    rows += [
        row(f"stage 3: {metric} of {name} minus imitation", POINTS * changes[metric]["mean"], interval(changes[metric]))
        for name, changes in result["by_seed"].items()
        for metric in ("pdms_v1", "epdms_v2")
    ]
    return rows


if __name__ == "__main__":
    main()
