"""The committed golden groups of NAVSIM's two-stage evaluation (tests/golden/two_stage)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from navsim_ext.evaluation.two_stage import Trajectories
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.readers import SceneFilter, SplitConfig
from navsim_ext.readers.split_config import Group

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "two_stage"
PLANNERS = ("slow", "swerve", "dense_10hz", "to_pair")
FLOAT32_PLANNERS = ("slow", "swerve", "dense_10hz")


@cache
def golden_groups() -> tuple[MemoryMetricCache, dict[str, np.ndarray], SplitConfig]:
    """(metric cache, expectations, split) of the golden groups."""
    cache_, extra = MemoryMetricCache.load_npz(FOLDER / "groups.npz")
    return cache_, extra, split_of(json.loads(extra["mapping"].tobytes()))


def split_of(mapping: list) -> SplitConfig:
    groups = tuple(Group(now, prev, tuple((a, b) for a, b in pairs)) for now, prev, pairs in mapping)
    first = [token for group in groups for token in (group.now, group.prev)]
    second = tuple(token for group in groups for pair in group.pairs for token in pair)
    return SplitConfig("golden", "test", SceneFilter(tokens=first, num_future=8), second, groups)


def predictions(extra: dict[str, np.ndarray], name: str) -> Trajectories:
    poses = extra[f"poses/{name}"]
    return Trajectories(extra["tokens"].tolist(), list(poses), [float(extra[f"interval/{name}"])] * len(poses))
