"""Realism as a reward and as a judge: the sim-agents metric on the rollouts of a group.

    leave_one_out   reward_k = mean_j M(without j) - M(without k)          (RLFTSim)
    alone           reward_k = M(rollout k alone)                          (SMART-R1 takes it against a baseline)

with M the realism meta-metric of a scene. Features are computed once per rollout; only likelihoods are counted again.

Legend: S scenes, R rollouts of each, B = S R worlds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.tracks import from_frame
from navsim_ext.errors import DataError
from navsim_ext.realism.errors import RealismError
from navsim_ext.realism.features import Features, Scenario, log_features, rollout_features
from navsim_ext.realism.likelihood import scenario_metrics
from navsim_ext.realism.rollouts import Rollouts, world_states
from navsim_ext.realism.rules import FUTURE_STEPS, Rules, rules_of
from navsim_ext.realism.scenario import scenario_of
from navsim_ext.traffic.scene import TrafficScene

META = "metametric"


@dataclass(frozen=True)
class RolledScene:
    """A scene and the features of its log and of its R rollouts."""

    scenario: Scenario
    log: Features
    simulated: Features

    def metrics(self, rules: Rules, rollouts: NDArray[np.int64] | None = None) -> dict[str, float]:
        """The challenge's figures of some of the rollouts (None: all)."""
        simulated = self.simulated
        if rollouts is not None:
            simulated = Features(*(getattr(simulated, one.name)[rollouts] for one in fields(Features)))
        return scenario_metrics(self.scenario, self.log, simulated, rules)


def rolled_scenes(state: WorldState, scenes: Sequence[TrafficScene]) -> list[RolledScene | str]:
    """Each scene with its rollouts out of a finished drive, or why the rules do not admit it."""
    now, made = state.scenes.now, []
    for place, scene in enumerate(scenes):
        worlds = slice(place * state.rollouts, (place + 1) * state.rollouts)
        rows = np.flatnonzero(scene.valid[:, scene.now])
        poses = state.poses[worlds, rows, now + 1 : now + 1 + FUTURE_STEPS].double().cpu().numpy()
        local = from_frame(poses, state.scenes.frame[place]).astype(np.float32)
        try:
            scenario = scenario_of(scene)
            states = world_states(scenario, scene, Rollouts(scene.agent_id[rows], local), None)
        except RealismError as error:
            made.append(str(error))
            continue
        made.append(RolledScene(scenario, log_features(scenario), rollout_features(scenario, states)))
    return made


@dataclass(frozen=True)
class RealismTerm:
    """The realism of a whole rollout, credited to all its road users alike.

    ``credit``: by leaving one out, or of each rollout alone. ``year`` of the rules.
    """

    weight: float = 1.0
    credit: Literal["leave_one_out", "alone"] = "leave_one_out"
    year: int = 2025

    def __post_init__(self) -> None:
        if self.credit not in ("leave_one_out", "alone"):
            raise DataError(f"credit={self.credit}: leave_one_out or alone was expected")
        rules_of(self.year)

    def value(
        self, rolled: Sequence[RolledScene | str], rollouts: int
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """[B] rewards of the worlds of all scenes, and where they are known."""
        rules = rules_of(self.year)
        values = np.full((len(rolled), rollouts), np.nan)
        for place, scene in enumerate(rolled):
            if not isinstance(scene, str):
                values[place] = self._of(scene, rollouts, rules)
        known = np.isfinite(values)
        return np.where(known, values, 0.0).reshape(-1), known.reshape(-1)

    def _of(self, scene: RolledScene, rollouts: int, rules: Rules) -> NDArray[np.float64]:
        everyone = np.arange(rollouts)
        if self.credit == "alone":
            return np.array([scene.metrics(rules, everyone[k : k + 1])[META] for k in everyone])
        without = np.array([scene.metrics(rules, np.delete(everyone, k))[META] for k in everyone])
        return without.mean() - without

    def require(self, scenes: Sequence[TrafficScene], group_size: int) -> None:
        """Raises DataError for groups of one with leave-one-out, and for scenes that the rules do not admit."""
        if self.credit == "leave_one_out" and group_size < 2:
            raise DataError(f"realism by leaving one out compares rollouts; algorithm.group_size is {group_size}: "
                            "take 4 or more, or reward.realism.credit=alone")  # fmt: skip
        refused = []
        for scene in scenes:
            try:
                scenario_of(scene)
            except RealismError as error:
                refused.append(str(error))
        if refused:
            raise DataError(
                f"the reward is realism, and {len(refused)} of {len(scenes)} scenes cannot be judged; first: "
                f"{refused[0]}"
            )


def mean_metrics(rolled: Sequence[RolledScene | str], year: int = 2025) -> dict[str, float]:
    """Means over the scenes that the rules admit; empty where there are none."""
    rules = rules_of(year)
    rows = [scene.metrics(rules) for scene in rolled if not isinstance(scene, str)]
    if not rows:
        return {}
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]
            if np.isfinite([row[name] for row in rows]).any()}  # fmt: skip
