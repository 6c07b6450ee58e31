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

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from navsim_ext.bootstrap import Estimate
from navsim_ext.dataset import SceneDataset, part_indices
from navsim_ext.errors import DataError
from navsim_ext.evaluation.compare import compare
from navsim_ext.evaluation.planning import plan_scenes
from navsim_ext.evaluation.table import summarise
from navsim_ext.files import write_json_atomic
from navsim_ext.hidden_cache import CachedHiddenStates
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm import score
from navsim_ext.planners import Planner, baseline
from navsim_ext.runtime.config import compose, job
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.run import run
from navsim_ext.runtime.workers import map_items
from stage2_dit.inference import load_trajectory_planner

log = logging.getLogger(__name__)

SEEING, BLIND = "diffusion_il", "diffusion_il_blind"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Verdict:
    """The seeing planner minus each rival, in score units [0, 1]; ``best_rival`` has the highest mean."""

    metric: str
    scenes: int
    logs: int
    means: Mapping[str, float]
    differences: Mapping[str, Estimate]
    best_rival: str
    enough_scenes: bool
    passed: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric, "scenes": self.scenes, "logs": self.logs, "means": dict(self.means),
            "differences": {name: estimate.to_json() for name, estimate in self.differences.items()},
            "best_rival": self.best_rival, "enough_scenes": self.enough_scenes, "passed": self.passed,
        }  # fmt: skip


def judge(tables: Mapping[str, pd.DataFrame], metric: str, *, required_points: float, minimum_scenes: int) -> Verdict:
    """Passed: the mean over the best rival's is at least ``required_points`` / 100 higher, interval above 0.

    Raises DataError when scenes are valid for some planners only (the comparison would not be paired).
    """
    valid = [set(table["token"][table["valid"]]) for table in tables.values()]
    if any(tokens != valid[0] for tokens in valid) or not valid[0]:
        counts = {name: len(tokens) for name, tokens in zip(tables, valid)}
        raise DataError(f"planners were scored on different scenes: {counts} valid; look at their reasons")
    means = {name: float(table[metric][table["valid"]].mean()) for name, table in tables.items()}
    rivals = {name: table for name, table in tables.items() if name != SEEING}
    differences = {name: compare(table, tables[SEEING]).differences[metric] for name, table in rivals.items()}
    best = max(rivals, key=means.__getitem__)
    margin = differences[best]
    enough = len(valid[0]) >= minimum_scenes
    return Verdict(
        metric, len(valid[0]), margin.logs, means, differences, best, enough,
        passed=enough and margin.mean * 100 >= required_points and margin.low > 0,
    )  # fmt: skip


def train(cfg: DictConfig, folders: Mapping[str, Path], name: str) -> Path:
    """The checkpoint of one finished training; ``name`` says whether it sees."""
    overrides = [
        *cfg.training, f"output_dir='{cfg.output_dir}/{name}'", f"planner.zero_hidden={str(name == BLIND).lower()}",
        f"data.train='{folders['train']}'", f"data.val='{folders['val']}'",
        f"data.hidden_cache='{cfg.data.hidden_cache}'",
    ]  # fmt: skip
    return Path(run(compose("stage2", overrides))["last"])


def train_all(cfg: DictConfig, folders: Mapping[str, Path]) -> dict[str, Path]:
    """Both checkpoints by name; the trainings run ``cfg.workers`` at a time, each in a process of its own from 2 on."""
    names = (SEEING, BLIND)
    return dict(zip(names, map_items(partial(train, cfg, folders), names, num_workers=cfg.workers), strict=True))


def scored(
    cfg: DictConfig, planner: Planner, dataset: SceneDataset, hidden: CachedHiddenStates, cache: MetricCache
) -> pd.DataFrame:
    """Plans and scores one planner on the test scenes: token, name, log_name, poses, valid, reason, scores."""
    folder = Path(cfg.output_dir) / "scores" / planner.name
    planned, _ = plan_scenes(planner, dataset, hidden, folder, batch_size=cfg.batch_size, device=cfg.device)
    trajectories = np.stack(planned["poses"].tolist()).reshape(len(planned), -1, 3)
    scores = score(planned["token"].tolist(), trajectories, cache).to_frame().drop(columns="token")
    table = pd.concat([planned, scores], axis=1)
    write_table(folder / "scores.parquet", table)
    return table


def planners(cfg: DictConfig, checkpoints: Mapping[str, Path]) -> list[Planner]:
    """The trained planners and their rivals."""
    trained = [
        load_trajectory_planner(str(path), name=name, candidates=cfg.candidates, device=cfg.device)
        for name, path in checkpoints.items()
    ]
    still = [baseline("constant_velocity"), baseline("standing_still")]
    braking = [baseline("constant_deceleration", deceleration=value) for value in cfg.decelerations]
    return [*trained, *still, *braking, baseline("human")]


def tell(console: Console, tables: Mapping[str, pd.DataFrame], verdict: Verdict, required_points: float) -> None:
    """One table of at most 80 columns, then the verdict in a sentence."""
    means = summarise(pd.concat(tables.values(), ignore_index=True))
    table = Table(
        title=f"{verdict.metric} x 100 on {verdict.scenes} scenes of {verdict.logs} logs", title_justify="left"
    )
    for title, side in (("planner", "left"), ("mean [95 % by log]", "right"), (f"{SEEING} minus it", "right")):
        table.add_column(title, justify=side)
    for name, columns in means.items():
        difference = verdict.differences.get(name)
        shown = "" if difference is None else (
            f"{difference.mean * 100:+.1f} [{difference.low * 100:+.1f}, {difference.high * 100:+.1f}]"
        )  # fmt: skip
        table.add_row(name, columns[verdict.metric].format(), shown)
    console.print(table)
    if not verdict.enough_scenes:
        console.print(f"{verdict.scenes} scenes are too few for a verdict.")
    margin = verdict.differences[verdict.best_rival]
    word = "beats" if verdict.passed else "does not beat"
    console.print(
        f"The planner {word} its best rival {verdict.best_rival} by {required_points:g} points: "
        f"{margin.mean * 100:+.1f} [{margin.low * 100:+.1f}, {margin.high * 100:+.1f}]."
    )


@job("stage2_experiment")
def main(cfg: DictConfig) -> None:
    """Runs what is left of the experiment and judges it."""
    folders = part_indices(cfg.data, Path(cfg.output_dir) / "index")
    dataset = SceneDataset(folders["test"], cameras=())  # before the training, so that what is missing is said now
    hidden = CachedHiddenStates(cfg.data.hidden_cache_test or cfg.data.hidden_cache)
    cache = MetricCache(cfg.data.metric_cache)
    checkpoints = train_all(cfg, folders)
    tables = {planner.name: scored(cfg, planner, dataset, hidden, cache) for planner in planners(cfg, checkpoints)}
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
