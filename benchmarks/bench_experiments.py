"""Figures of the finished experiments of stage 2, of stage 3, and of the demo's planners in closed loop.

    bash scripts/experiment.sh
    python benchmarks/bench_experiments.py 2 --output benchmarks/results/experiment_stage2.json
    python benchmarks/bench_experiments.py 3 --output benchmarks/results/experiment_stage3.json
    bash scripts/demo.sh && bash scripts/experiment_closed_loop.sh
    python benchmarks/bench_experiments.py closed_loop --folder demo/closed_loop \
        --output benchmarks/results/experiment_closed_loop.json

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
    parser.add_argument("experiment", choices=("2", "3", "closed_loop"))
    parser.add_argument("--folder", type=Path, default=Path("experiment"), help="EXPERIMENT_DIR of the script")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.experiment == "closed_loop":
        result = json.loads((arguments.folder / "table" / "closed_loop.json").read_text())
        baseline = "the human's recording, IDM and constant velocity; paired by scene, bootstrap by scene"
        report("planners in closed loop", closed_loop_rows(result), baseline=baseline, output=arguments.output)
        return
    result = json.loads((arguments.folder / f"stage{arguments.experiment}" / "result.json").read_text())
    rows, baseline = {
        "2": (imitation_rows, "planners that need no training, and the same planner without sight"),
        "3": (reinforcement_rows, "the imitation planner that reinforcement started from"),
    }[arguments.experiment]
    baseline += "; paired by scene, bootstrap by log"
    report(f"experiment of stage {arguments.experiment}", rows(result), baseline=baseline, output=arguments.output)


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


def closed_loop_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Open-loop scores, then for each kind of traffic scores, shares before the first fault, differences and orders."""
    rows = [
        row(f"open loop: PDMS v1.1 x 100 of {name}", POINTS * one["mean"], interval(one))
        for name, one in result["open"].items()
    ]
    for traffic, found in result["traffic"].items():
        among = f"closed loop among {traffic}"
        rows.append(row(f"{among}: scenes of 15 s", found["scenes"], "", ">= 200"))
        for measure, what in (("score", "score"), ("clean", "share of the drive before the first fault")):
            for name, means in sorted(found["means"].items(), key=lambda item: -item[1][measure]["mean"]):
                one = means[measure]
                rows.append(row(f"{among}: {what} x 100 of {name}", POINTS * one["mean"], interval(one)))
            for name, changes in found["differences"].items():
                one = changes[measure]
                rows.append(row(f"{among}: {what} x 100, {name}", POINTS * one["mean"], interval(one)))
            order = (found["order"] or {}).get(measure)
            if order is not None and order["spearman"] is not None:
                said = result["verdicts"][traffic][measure]
                rows.append(row(f"{among}: Spearman of PDMS and {what}. {said}", order["spearman"], ""))
    return rows


if __name__ == "__main__":
    main()
