"""Figures of a finished run on real recordings: data, losses, rewards, scores with their label.

    bash scripts/real_data.sh
    python benchmarks/bench_real_data.py --output benchmarks/results/real_data.json

Nothing is measured here; the files of the run are read. Only figures leave them.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row

PLANNERS = ("human", "constant_velocity", "pdm_closed", "diffusion_il", "diffusion_rl")
WINDOW = 10  # steps at either end of a curve that are averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/real_data"), help="OUTPUT_DIR of the script")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    rows = [*data_rows(arguments.folder), *curve_rows(arguments.folder), *score_rows(arguments.folder)]
    baseline = "planners that need no training, on the same windows; maps rebuilt from lane centre lines (approx)"
    report("real_data", rows, baseline=baseline, output=arguments.output)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def data_rows(folder: Path) -> list[dict[str, Any]]:
    """What was read, and what was left out."""
    drivelm = load(folder / "stage1" / "metrics.json")["data"]["datasets"]["DriveLM"]
    rows = [
        row("DriveLM questions on real photographs", drivelm["lines"], ""),
        row("of these left out (longer than the sequence)", drivelm["skipped"], ""),
        row("DriveLM tokens of one pass", drivelm["tokens"], ""),
    ]
    for part in ("train", "test"):
        cached = load(folder / "metric_cache" / part / "report.json")
        logs = load(folder / "world" / part / "index" / "index.json")["logs"]
        rows.append(row(f"nuScenes scenes for {part}: {', '.join(logs)}", len(logs), ""))
        rows.append(row(f"their windows of 4 + 10 frames, {part}", cached["cached"], ""))
        rows.append(row(f"windows left out: drive leaves the rebuilt road, {part}", cached["invalid"], ""))
    return rows


def column(path: Path, name: str) -> list[float]:
    with open(path, newline="") as stream:
        return [float(line[name]) for line in csv.DictReader(stream) if line.get(name)]


def curve_rows(folder: Path) -> list[dict[str, Any]]:
    """Both ends of the training curves."""
    rows = []
    for stage, table, name, what in (
        ("stage1", "metrics", "loss", "stage 1, loss per answer token"),
        ("stage2", "metrics", "train/loss", "stage 2, imitation loss"),
        ("stage3", "rewards", "reward", "stage 3, reward of its training scenes"),
    ):
        values = column(folder / stage / "version_0" / f"{table}.csv", name)
        width = min(WINDOW, len(values) // 2)
        rows.append(row(f"{what}: mean of the first {width} of {len(values)} entries", sum(values[:width]) / width, ""))
        rows.append(row(f"{what}: mean of the last {width}", sum(values[-width:]) / width, ""))
    return rows


def score_rows(folder: Path) -> list[dict[str, Any]]:
    """Scores x 100 of every planner on the test scenes, with the label of the maps, the tokens and the scorer."""
    rows = []
    for planner in PLANNERS:
        aggregate = load(folder / "scores" / planner / "aggregate.json")
        scorer = load(folder / "scores" / planner / "fingerprint.json")["parents"]["scorer"]["digest"][:12]
        identity = aggregate["identity"]
        made = f"{'/'.join(identity['map_labels'])}, tokens {identity['token_digest']}, scorer {scorer}"
        for metric, title in (("pdms_v1", "PDMS v1.1"), ("epdms_v2", "EPDMS v2.2")):
            estimate = aggregate["estimates"][planner][metric]
            interval = f"[{100.0 * estimate['low']:.1f}, {100.0 * estimate['high']:.1f}]"
            rows.append(row(f"{title} x 100 of {planner} ({made})", 100.0 * estimate["mean"], interval))
    return rows


if __name__ == "__main__":
    main()
