"""Figures of finished comparisons of traffic models.

    bash scripts/experiment_traffic.sh
    python benchmarks/bench_traffic_models.py experiment_traffic/{comparison,own,ablation} \
      --output benchmarks/results/traffic_models.json

Nothing is measured here; each folder's ``comparison.json`` (of ``navsim_ext.realism.compare``) is read. Of neighbours
in a comparison the order is the one that was expected; it is shown where the paired interval lies above 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row

ORDERED = "comparison"  # the folder whose order is a promise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="output_dir of navsim_ext.realism.compare")
    parser.add_argument("--name", default="Traffic models on the unseen town", help="title of the table")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    rows = [one for folder in arguments.folders for one in rows_of(folder)]
    report(arguments.name, rows, baseline="each model with the next one, paired by scene", output=arguments.output)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of one comparison."""
    found = json.loads((folder / "comparison.json").read_text())
    name, promised = folder.name, folder.name == ORDERED
    rows = [row(f"{name}: scenes, rules of {found['year']}", found["scenarios"], f"{found['left_out']} left out")]
    for model, of in found["models"].items():
        seeds = found["metametric_by_folder"][model]
        told = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
        meta = of["metametric"]
        rows.append(row(f"{name}: realism of {model}{told}", meta["mean"], interval(meta)))
        rows.append(row(f"{name}: minADE of {model}", of["min_average_displacement_error"]["mean"], "m"))
        rows.append(row(f"{name}: contacts of {model}", of["simulated_collision_rate"]["mean"], "share of road users"))
    for one in found["neighbours"] if promised or len(found["models"]) < 5 else ():
        what = f"{name}: realism, {one['better']} minus {one['worse']}"
        rows.append(row(what, one["difference"]["mean"], interval(one["difference"]), "> 0" if promised else None))
    return rows


def interval(estimate: dict[str, Any]) -> str:
    """The 95 % interval; a dash where there is none."""
    return "-" if estimate["low"] is None else f"[{estimate['low']:.3f}, {estimate['high']:.3f}]"


if __name__ == "__main__":
    main()
