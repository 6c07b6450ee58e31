"""The experiment of stage 2: does a planner that sees what the VLM saw drive better than planners that do not?

    python -m stage2_dit.experiment output_dir=... data.root=WORLD data.hidden_cache=... data.metric_cache=...

Rivals: constant velocity, standing still, constant decelerations, and the same planner trained on zeroed hidden
states. Test scenes are of a town that training never saw; differences are paired by scene, with a 95 % interval by
bootstrap over whole logs. Every step goes on where it was killed: indices, both trainings, planning, scoring.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate
from navsim_ext.dataset import SceneDataset, part_indices
from navsim_ext.evaluation.paired import TABLE_FILE, align, points, rises, scored, to_json
from navsim_ext.evaluation.table import summarise
from navsim_ext.files import write_json_atomic
from navsim_ext.hidden_cache import CachedHiddenStates
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.planners import Planner, baseline
from navsim_ext.runtime.config import configured, job
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.run import run
from navsim_ext.runtime.workers import map_items
from stage2_dit.inference import load_trajectory_planner

log = logging.getLogger(__name__)

SEEING, BLIND = "diffusion_il", "diffusion_il_blind"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class SightVerdict:
    """The seeing planner minus each rival, in score units [0, 1]; ``best_rival`` has the highest mean."""

    metric: str
    scenes: int
    left_out: int  # scenes that could be scored for some planners only
    logs: int
    means: Mapping[str, float]
    differences: Mapping[str, Estimate]
    best_rival: str
    enough_scenes: bool
    passed: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric, "scenes": self.scenes, "left_out": self.left_out, "logs": self.logs,
            "means": dict(self.means), "differences": to_json(self.differences), "best_rival": self.best_rival,
            "enough_scenes": self.enough_scenes, "passed": self.passed,
        }  # fmt: skip


def judge(
    tables: Mapping[str, pd.DataFrame], metric: str, *, required_points: float, minimum_scenes: int
) -> SightVerdict:
    """Passed: the mean over the best rival's is at least ``required_points`` / 100 higher, interval above 0.

    On the scenes that are valid for all planners; raises DataError when there is none.
    """
    aligned = align(tables)
    means = {name: aligned.mean(name, metric) for name in tables}
    rivals = [name for name in tables if name != SEEING]
    differences = {name: aligned.estimate(aligned.change(SEEING, name, metric)) for name in rivals}
    best = max(rivals, key=means.__getitem__)
    enough = aligned.scenes >= minimum_scenes
    return SightVerdict(
        metric, aligned.scenes, aligned.left_out, differences[best].logs, means, differences, best, enough,
        passed=enough and rises(differences[best], required_points),
    )  # fmt: skip


def training(cfg: DictConfig, folders: Mapping[str, Path], name: str) -> DictConfig:
    """The checked configuration of one training; ``name`` says whether it sees."""
    arguments = [
        *cfg.training, f"output_dir={cfg.output_dir}/{name}", f"planner.zero_hidden={str(name == BLIND).lower()}",
        f"data.train={folders['train']}", f"data.val={folders['val']}", f"data.hidden_cache={cfg.data.hidden_cache}",
    ]  # fmt: skip
    return configured("stage2", arguments)


def train(cfg: DictConfig, folders: Mapping[str, Path], name: str) -> Path:
    """The checkpoint of one finished training."""
    return Path(run(training(cfg, folders, name))["last"])


def train_all(cfg: DictConfig, folders: Mapping[str, Path]) -> dict[str, Path]:
    """Both checkpoints by name; the trainings run ``cfg.workers`` at a time, each in a process of its own from 2 on."""
    names = (SEEING, BLIND)
    return dict(zip(names, map_items(partial(train, cfg, folders), names, num_workers=cfg.workers), strict=True))


def planners(cfg: DictConfig, checkpoints: Mapping[str, Path]) -> list[Planner]:
    """The trained planners and their rivals."""
    trained = [
        load_trajectory_planner(str(path), name=name, candidates=cfg.candidates, device=cfg.device)
        for name, path in checkpoints.items()
    ]
    still = [baseline("constant_velocity"), baseline("standing_still")]
    braking = [baseline("constant_deceleration", deceleration=value) for value in cfg.decelerations]
    return [*trained, *still, *braking, baseline("human")]


def tell(console: Console, tables: Mapping[str, pd.DataFrame], verdict: SightVerdict, required_points: float) -> None:
    """One table of at most 80 columns, then the verdict in a sentence."""
    means = summarise(pd.concat(tables.values(), ignore_index=True))
    table = Table(
        title=f"{verdict.metric} x 100 on {verdict.scenes} scenes of {verdict.logs} logs", title_justify="left"
    )
    for title, side in (("planner", "left"), ("mean [95 % by log]", "right"), (f"{SEEING} minus it", "right")):
        table.add_column(title, justify=side)
    for name, columns in means.items():
        difference = verdict.differences.get(name)
        shown = "" if difference is None else points(difference)
        table.add_row(name, columns[verdict.metric].format(), shown)
    console.print(table)
    if verdict.left_out:
        console.print(f"{verdict.left_out} scenes could be scored for some planners only and do not count.")
    if not verdict.enough_scenes:
        console.print(f"{verdict.scenes} scenes are too few for a verdict.")
    margin = verdict.differences[verdict.best_rival]
    word = "beats" if verdict.passed else "does not beat"
    console.print(
        f"The planner {word} its best rival {verdict.best_rival} by {required_points:g} points: {points(margin)}."
    )


@job("stage2_experiment")
def main(cfg: DictConfig) -> None:
    """Runs what is left of the experiment and judges it."""
    training(cfg, {"train": Path("train"), "val": Path("val")}, SEEING)  # a wrong option of a training is said now
    folders = part_indices(cfg.data, Path(cfg.output_dir) / "index")
    dataset = SceneDataset(folders["test"], cameras=())  # before the training, so that what is missing is said now
    hidden = CachedHiddenStates(cfg.data.hidden_cache_test or cfg.data.hidden_cache)
    CachedHiddenStates(cfg.data.hidden_cache)
    MetricCache(cfg.data.metric_cache)
    checkpoints = train_all(cfg, folders)
    tables = {}
    for planner in planners(cfg, checkpoints):
        folder = Path(cfg.output_dir) / "scores" / planner.name
        table = scored(
            planner, dataset, hidden, cfg.data.metric_cache, folder, batch_size=cfg.batch_size, device=cfg.device
        )
        write_table(folder / TABLE_FILE, table)
        tables[planner.name] = table
    ceiling = tables.pop("human")
    verdict = judge(tables, cfg.metric, required_points=cfg.required_points, minimum_scenes=cfg.minimum_scenes)
    content = verdict.to_json() | {
        "human": float(ceiling[cfg.metric][ceiling["valid"]].mean()),
        "checkpoints": {name: str(path) for name, path in checkpoints.items()},
        "configuration": OmegaConf.to_container(cfg, resolve=True),
    }
    write_json_atomic(Path(cfg.output_dir) / RESULT_FILE, json.loads(json.dumps(content)))
    tell(Console(stderr=True), tables | {"human": ceiling}, verdict, cfg.required_points)


if __name__ == "__main__":
    main()
