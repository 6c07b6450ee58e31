"""Does perception matter here? ``python -m navsim_ext.synthetic.report data.root=DIR data.split=... metric_cache=...``

Scores the recorded drive and blind drivers (going on, standing still, constant decelerations) on a synthetic data set
by situation. A world is fit for training when the recorded drive reaches TARGET on average and every blind driver
stays MARGIN below it, so that neither going on nor braking is a strategy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from navsim_ext.errors import DataError
from navsim_ext.files import write_json_atomic
from navsim_ext.frames import NUM_FUTURE_POSES
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.pdm import score_pairs
from navsim_ext.planners import ConstantDeceleration, ConstantVelocityAgent, Human, Planner, StandingStill
from navsim_ext.readers import SceneSource, open_configured
from navsim_ext.runtime.config import job
from navsim_ext.scene import Scene, SceneBatch
from navsim_ext.synthetic.manifest import Manifest

log = logging.getLogger(__name__)

TARGET = 0.92  # mean score of the recorded drive
MARGIN = 0.2  # by which every blind driver stays below it
ALL = "all"


@dataclass(frozen=True)
class LookingVerdict:
    """Mean scores by situation (rows) and planner (columns) for each metric, and whether the world is fit."""

    means: Mapping[str, pd.DataFrame]
    scenes: pd.Series  # by situation
    invalid: int

    @property
    def best_blind(self) -> float:
        """Highest mean PDMS of a driver that does not look."""
        return float(self.means["pdms_v1"].loc[ALL].drop("human").max())

    @property
    def human(self) -> float:
        return float(self.means["pdms_v1"].loc[ALL, "human"])

    @property
    def fit(self) -> bool:
        return self.human >= TARGET and self.human - self.best_blind >= MARGIN


def blind_drivers(decelerations: Sequence[float]) -> list[Planner]:
    """The recorded drive first, then those that only know their own speed."""
    return [Human(), ConstantVelocityAgent(), StandingStill(), *(ConstantDeceleration(a) for a in decelerations)]


def judge(
    world: Path, source: SceneSource, metric_cache: Path, decelerations: Sequence[float], metrics: Sequence[str]
) -> LookingVerdict:
    """Scores every scene of the cache; raises DataError when it and ``source`` have no scene of ``world`` in common."""
    kinds = {token: record.kind for record in Manifest(world).records.values() for token in record.tokens}
    cache = MetricCache(metric_cache)
    known = set(cache.tokens)
    planners = blind_drivers(decelerations)
    tables = []
    for log_name, scenes in source.logs():
        scenes = [scene for scene in scenes if scene.token in known and scene.token in kinds]
        if not scenes:
            continue
        batch = batch_of(scenes)
        tokens = batch.token * len(planners)
        names = np.repeat([planner.name for planner in planners], len(scenes))
        trajectories = torch.cat([planner.plan(batch) for planner in planners]).numpy()
        frame = score_pairs(tokens, trajectories, cache, names=names.tolist()).to_frame()
        frame["planner"], frame["log_name"] = names, log_name
        tables.append(frame)
    if not tables:
        raise DataError(f"{metric_cache} holds no scene of this split of {world}: build the metric cache of that split")
    scores = pd.concat(tables)
    scores["kind"] = scores["token"].map(kinds)
    order = [planner.name for planner in planners]
    valid = scores[scores["valid"]]
    means = {}
    for metric in metrics:
        by_kind = valid.pivot_table(index="kind", columns="planner", values=metric, aggfunc="mean")
        by_kind.loc[ALL] = valid.groupby("planner")[metric].mean()
        means[metric] = by_kind[order]
    counts = valid[valid["planner"] == "human"].groupby("kind").size()
    counts[ALL] = counts.sum()
    return LookingVerdict(means, counts, int((~scores["valid"]).sum()))


def batch_of(scenes: Sequence[Scene]) -> SceneBatch:
    """What planners see of scenes, without pictures."""
    to_tensor = lambda rows: torch.from_numpy(np.stack(rows).astype(np.float32))  # noqa: E731
    return SceneBatch(
        token=[scene.token for scene in scenes],
        log_name=[scene.log_name for scene in scenes],
        history=to_tensor([scene.history_poses() for scene in scenes]),
        status=to_tensor([scene.status() for scene in scenes]),
        target=to_tensor([scene.future_poses(NUM_FUTURE_POSES) for scene in scenes]),
    )


def show(verdict: LookingVerdict, console: Console) -> None:
    for metric, means in verdict.means.items():
        table = Table("situation", "scenes", *(str(name) for name in means.columns), title=f"mean {metric}")
        for kind, row in means.iterrows():
            table.add_row(str(kind), str(verdict.scenes[kind]), *(f"{value:.3f}" for value in row))
        console.print(table)
    console.print(
        f"recorded drive {verdict.human:.3f} (wanted {TARGET}), best blind driver {verdict.best_blind:.3f} "
        f"(margin {verdict.human - verdict.best_blind:.3f}, wanted {MARGIN}), {verdict.invalid} rows invalid: "
        f"{'fit' if verdict.fit else 'NOT fit'} for training"
    )


@job("synthetic_report")
def main(cfg: DictConfig) -> None:
    source = open_configured(cfg.data)
    verdict = judge(Path(cfg.data.root), source, Path(cfg.metric_cache), tuple(cfg.decelerations), tuple(cfg.metrics))
    show(verdict, Console(soft_wrap=True, width=200))
    write_json_atomic(
        Path(cfg.output_dir) / "synthetic_report.json",
        {
            "means": {metric: means.to_dict("index") for metric, means in verdict.means.items()},
            "scenes": verdict.scenes.to_dict(),
            "invalid": verdict.invalid,
            "fit": verdict.fit,
        },
    )


if __name__ == "__main__":
    main()
