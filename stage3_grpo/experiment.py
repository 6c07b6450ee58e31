"""The experiment of stage 3: does reinforcement improve the planner on scenes, and in a town, that it never saw?

    python -m stage3_grpo.experiment output_dir=... init=PLANNER data.root=WORLD data.hidden_cache=... \\
        data.metric_cache=...

Several seeds are trained from one imitation planner. On the test scenes each is compared with it, paired by scene; the
headline is the mean over seeds per scene, with a 95 % interval by bootstrap over whole logs. Passed means: PDMS rises
by the required points with an interval above 0; EPDMS does not fall, neither by more than a tolerance nor, however
little, with an interval below 0; the rate of reversing tails does not rise.
Every step goes on where it was killed: indices, each training, planning, scoring.
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
from navsim_ext.evaluation.paired import TABLE_FILE, align, points, rises, scored, to_json
from navsim_ext.files import write_json_atomic
from navsim_ext.hidden_cache import CachedHiddenStates
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.runtime.config import configured, job
from navsim_ext.runtime.parquet import write_table
from navsim_ext.runtime.run import run
from navsim_ext.runtime.workers import map_items
from stage2_dit import load_trajectory_planner
from stage3_grpo.module import StoppedByAlarm
from stage3_grpo.rewards.kinematics import reverses, stands
from stage3_grpo.rewards.reward import TAIL_INTERVALS

log = logging.getLogger(__name__)

IMITATION = "diffusion_il"
METRICS = (
    "pdms_v1",
    "epdms_v2",
    "v1_nc",
    "v1_dac",
    "v1_ttc",
    "v1_ep",
    "v1_comfort",
    "v2_ec",
    "reverse_tail",
    "standing",
)
RULES = ("required_points", "minimum_scenes", "epdms_tolerance", "reverse_tail_margin")  # of the verdict
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class ReinforcementVerdict:
    """Reinforced minus imitation, per metric: the mean over seeds per scene, and each seed alone."""

    scenes: int
    left_out: int  # scenes that could be scored for some planners only
    logs: int
    means: Mapping[str, Mapping[str, float]]  # planner -> metric -> mean
    differences: Mapping[str, Estimate]
    by_seed: Mapping[str, Mapping[str, Estimate]]
    enough_scenes: bool
    pdms_rises: bool
    epdms_holds: bool
    reverse_tail_holds: bool

    @property
    def passed(self) -> bool:
        return self.enough_scenes and self.pdms_rises and self.epdms_holds and self.reverse_tail_holds

    def to_json(self) -> dict[str, Any]:
        return {
            "scenes": self.scenes, "left_out": self.left_out, "logs": self.logs,
            "means": {name: dict(means) for name, means in self.means.items()},
            "differences": to_json(self.differences),
            "by_seed": {name: to_json(estimates) for name, estimates in self.by_seed.items()},
            "enough_scenes": self.enough_scenes, "pdms_rises": self.pdms_rises, "epdms_holds": self.epdms_holds,
            "reverse_tail_holds": self.reverse_tail_holds, "passed": self.passed,
        }  # fmt: skip


def judge(
    tables: Mapping[str, pd.DataFrame], *, required_points: float, minimum_scenes: int, epdms_tolerance: float,
    reverse_tail_margin: float,
) -> ReinforcementVerdict:  # fmt: skip
    """Compares every table but the imitation planner's with it, on the scenes that are valid for all of them.

    EPDMS falls when its mean falls by more than ``epdms_tolerance`` (x 100) or the interval of its difference lies
    wholly below 0. The reverse-tail rate holds when it rises by no more than the margin. Raises DataError when no
    scene is valid for all planners.
    """
    aligned = align(tables)
    present = aligned.metrics(METRICS)
    changes = {
        name: {metric: aligned.change(name, IMITATION, metric) for metric in present}
        for name in tables
        if name != IMITATION
    }
    pooled = {metric: np.mean([change[metric] for change in changes.values()], axis=0) for metric in present}
    differences = {metric: aligned.estimate(values) for metric, values in pooled.items()}
    by_seed = {
        name: {metric: aligned.estimate(values) for metric, values in change.items()}
        for name, change in changes.items()
    }
    means = {name: {metric: aligned.mean(name, metric) for metric in present} for name in tables}
    pdms, epdms = differences["pdms_v1"], differences["epdms_v2"]
    return ReinforcementVerdict(
        aligned.scenes, aligned.left_out, len(set(aligned.logs)), means, differences, by_seed,
        enough_scenes=aligned.scenes >= minimum_scenes,
        pdms_rises=rises(pdms, required_points),
        epdms_holds=epdms.mean * 100 >= -epdms_tolerance and epdms.high >= 0,
        reverse_tail_holds=differences["reverse_tail"].mean <= reverse_tail_margin,
    )  # fmt: skip


def training(cfg: DictConfig, folders: Mapping[str, Path], seed: int) -> DictConfig:
    """The checked configuration of one seed's training."""
    arguments = [
        *cfg.training, f"seed={seed}", f"output_dir={cfg.output_dir}/seed_{seed}", f"init={cfg.init}",
        f"data.train={folders['train']}", f"data.val={folders['val']}",
        f"data.hidden_cache={cfg.data.hidden_cache}", f"data.metric_cache={cfg.data.metric_cache}",
    ]  # fmt: skip
    return configured("stage3", arguments)


def train(cfg: DictConfig, folders: Mapping[str, Path], seed: int) -> Path:
    """The best checkpoint by held-out score of one seed's finished training."""
    try:
        result = run(training(cfg, folders, seed))
        if result["module"].stopped_by_alarm:
            raise result["module"].stopped("an alarm stopped the run")
    except StoppedByAlarm as stop:  # now or when the experiment was run before
        log.warning("seed %d: %s. Its best checkpoint is judged.", seed, stop)
        return stop.checkpoint
    return Path(result["best"] or result["last"])


def with_motion(table: pd.DataFrame) -> pd.DataFrame:
    """Adds ``reverse_tail`` and ``standing`` of the planned poses."""
    trajectories = np.stack(table["poses"].tolist()).reshape(len(table), -1, 3)
    table["reverse_tail"] = reverses(trajectories, last=TAIL_INTERVALS).astype(float)
    table["standing"] = stands(trajectories).astype(float)
    return table


def tell(console: Console, verdict: ReinforcementVerdict, rules: Mapping[str, float]) -> None:
    """One table of at most 80 columns, then the verdict in a sentence."""
    title = f"x 100 on {verdict.scenes} scenes of {verdict.logs} logs, {len(verdict.by_seed)} seed(s)"
    table = Table(title=title, title_justify="left")
    for name, side in (("metric", "left"), ("imitation", "right"), ("reinforced", "right"), ("difference", "right")):
        table.add_column(name, justify=side)
    reinforced = {
        metric: np.mean([verdict.means[name][metric] for name in verdict.by_seed]) for metric in verdict.differences
    }
    for metric, change in verdict.differences.items():
        means = (verdict.means[IMITATION][metric], reinforced[metric])
        table.add_row(metric, *(f"{mean * 100:.1f}" for mean in means), points(change))
    console.print(table)
    for name, changes in verdict.by_seed.items():
        console.print(f"{name}: PDMS {changes['pdms_v1'].mean * 100:+.1f}, EPDMS {changes['epdms_v2'].mean * 100:+.1f}")
    if verdict.left_out:
        console.print(f"{verdict.left_out} scenes could be scored for some planners only and do not count.")
    if not verdict.enough_scenes:
        console.print(f"{verdict.scenes} scenes are too few for a verdict.")
    marks = {True: "yes", False: "NO"}
    pdms, epdms, reverse = (verdict.differences[name] for name in ("pdms_v1", "epdms_v2", "reverse_tail"))
    for asked, change, holds in (
        (f"PDMS up by {rules['required_points']:g} points, interval above 0", pdms, verdict.pdms_rises),
        (f"EPDMS down by at most {rules['epdms_tolerance']:g}, interval not below 0", epdms, verdict.epdms_holds),
        (f"reverse tails up by at most {100 * rules['reverse_tail_margin']:g}", reverse, verdict.reverse_tail_holds),
    ):
        console.print(f"{asked}: {points(change)}: {marks[holds]}", highlight=False)


@job("stage3_experiment")
def main(cfg: DictConfig) -> None:
    """Runs what is left of the experiment and judges it."""
    for seed in cfg.seeds:  # a wrong option of a training is said now
        training(cfg, {"train": Path("train"), "val": Path("val")}, seed)
    folders = part_indices(cfg.data, Path(cfg.output_dir) / "index")
    dataset = SceneDataset(folders["test"], cameras=())  # before the training, so that what is missing is said now
    hidden = CachedHiddenStates(cfg.data.hidden_cache_test or cfg.data.hidden_cache)
    metric_cache = cfg.data.metric_cache_test or cfg.data.metric_cache
    MetricCache(metric_cache)
    names = [f"reinforced_seed{seed}" for seed in cfg.seeds]
    best = map_items(partial(train, cfg, folders), cfg.seeds, num_workers=cfg.workers)
    checkpoints = dict(zip(names, best, strict=True))
    tables = {}
    for name, path in {IMITATION: Path(cfg.init), **checkpoints}.items():
        planner = load_trajectory_planner(str(path), name=name, candidates=cfg.candidates, device=cfg.device)
        folder = Path(cfg.output_dir) / "scores" / name
        table = scored(planner, dataset, hidden, metric_cache, folder, batch_size=cfg.batch_size, device=cfg.device)
        tables[name] = with_motion(table)
        write_table(folder / TABLE_FILE, tables[name])
    rules = {key: cfg[key] for key in RULES}
    verdict = judge(tables, **rules)
    content = verdict.to_json() | {
        "checkpoints": {name: str(path) for name, path in checkpoints.items()},
        "configuration": OmegaConf.to_container(cfg, resolve=True),
    }
    write_json_atomic(Path(cfg.output_dir) / RESULT_FILE, json.loads(json.dumps(content)))
    tell(Console(stderr=True), verdict, rules)


if __name__ == "__main__":
    main()
