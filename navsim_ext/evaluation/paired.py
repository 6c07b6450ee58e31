"""Planners judged against each other, scene by scene: what the experiments of all stages rest on.

A planner is planned and scored once (:func:`scored`); tables are brought to the scenes that are valid for all planners
(:func:`align`; how many were left out is counted), and differences are paired by scene, with a 95 % interval by
bootstrap over whole logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from navsim_ext.bootstrap import Estimate, bootstrap_mean
from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError
from navsim_ext.evaluation.planning import plan_scenes
from navsim_ext.evaluation.scoring import score_table
from navsim_ext.hidden_cache import CachedHiddenStates
from navsim_ext.planners import Planner

TABLE_FILE = "scores.parquet"


def scored(
    planner: Planner,
    dataset: SceneDataset,
    hidden: CachedHiddenStates | None,
    metric_cache: str | Path,
    folder: Path,
    *,
    batch_size: int,
    device: str,
) -> pd.DataFrame:
    """Plans and scores a planner: token, name, log_name, poses [24], valid, reason, scores.

    Goes on where it was killed.
    """
    planned, _ = plan_scenes(planner, dataset, hidden, folder, batch_size=batch_size, device=device)
    table = score_table(planned, metric_cache)
    poses = planned.set_index("token")["poses"]
    table["poses"] = [poses[token] for token in table["token"]]
    return table


@dataclass(frozen=True)
class AlignedTables:
    """One table per planner, rows in the same order, of the scenes that are valid for all of them.

    ``left_out``: scenes that are valid for some planners only.
    """

    tables: Mapping[str, pd.DataFrame]
    logs: Sequence[str]  # [n] of the rows
    left_out: int

    @property
    def scenes(self) -> int:
        return len(self.logs)

    def metrics(self, wanted: Sequence[str]) -> list[str]:
        """Those of ``wanted`` that every table has."""
        return [metric for metric in wanted if all(metric in table for table in self.tables.values())]

    def change(self, after: str, before: str, metric: str) -> NDArray[np.float64]:
        """[n] ``after`` minus ``before``, by scene."""
        return (self.tables[after][metric] - self.tables[before][metric]).to_numpy(float)

    def estimate(self, values: NDArray[np.float64]) -> Estimate:
        """Mean of values [n] by scene, with its interval over logs."""
        return bootstrap_mean(values, self.logs)

    def mean(self, name: str, metric: str) -> float:
        return float(self.tables[name][metric].mean())


def align(tables: Mapping[str, pd.DataFrame]) -> AlignedTables:
    """Brings tables (one row per token) to the scenes that are valid for all; raises DataError when there is none."""
    valid = {name: set(table["token"][table["valid"]]) for name, table in tables.items()}
    shared = set.intersection(*valid.values())
    if not shared:
        counts = {name: len(tokens) for name, tokens in valid.items()}
        raise DataError(f"no test scene is valid for all planners, of {counts} valid ones: look at their reasons")
    aligned = {
        name: table[table["token"].isin(shared)].sort_values("token").reset_index(drop=True)
        for name, table in tables.items()
    }
    logs = next(iter(aligned.values()))["log_name"].tolist()
    return AlignedTables(aligned, logs, len(set.union(*valid.values())) - len(shared))


def rises(estimate: Estimate, required_points: float) -> bool:
    """Whether a difference is at least ``required_points`` / 100 in the mean, and its interval above 0."""
    return bool(estimate.mean * 100 >= required_points and estimate.low > 0)


def points(estimate: Estimate) -> str:
    """Mean and interval x 100, with sign."""
    return f"{estimate.mean * 100:+.1f} [{estimate.low * 100:+.1f}, {estimate.high * 100:+.1f}]"


def to_json(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Estimates by name as plain JSON."""
    return {name: estimate.to_json() for name, estimate in estimates.items()}
