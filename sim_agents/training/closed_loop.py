"""Validation by driving: rollouts of a few fixed scenes, scored as they come.

Memory does not grow with the number of scenes or rollouts: a chunk of rollouts is driven, its contacts are counted,
and only its poses are kept until the scene is scored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from navsim_ext.closed_loop.contact import planes
from navsim_ext.closed_loop.events import contacts
from navsim_ext.closed_loop.policy import AgentPolicy
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.realism.metric import realism
from navsim_ext.realism.rollouts import Rollouts
from navsim_ext.realism.rules import PRESENT, STEP_SECONDS, STEPS
from navsim_ext.traffic.codes import Role
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore
from sim_agents.drive import driven, record_of

log = logging.getLogger(__name__)

FIGURES = ("min_ade", "contact", "realism")


@dataclass(frozen=True)
class ClosedLoop:
    """``scenes`` of the validation store, evenly spaced, each driven ``rollouts`` times for 8 s, ``chunk`` at once."""

    scenes: int = 8
    rollouts: int = 8
    chunk: int = 8
    year: int = 2025

    def __post_init__(self) -> None:
        for name in ("scenes", "rollouts", "chunk"):
            if getattr(self, name) < 1:
                raise DataError(f"closed_loop.{name}={getattr(self, name)}: at least 1 is needed")

    def chosen(self, ids: Sequence[str]) -> list[str]:
        """The ids that are driven: the same at every validation."""
        rows = np.linspace(0, len(ids) - 1, min(self.scenes, len(ids))).round().astype(int)
        return [ids[row] for row in np.unique(rows)]

    def measure(
        self, policy_of: Callable[[int], AgentPolicy], store: TrafficStore, ids: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> NDArray[np.float64]:
        """[3, 2] sums and counts of ``FIGURES`` over the scenes ``ids``; see :func:`figures`."""
        total = np.zeros((len(FIGURES), 2))
        for name in ids:
            scene = store.load(name)
            touched: list[NDArray[np.bool_]] = []

            def watched(scene=scene, touched=touched):
                for state in driven(policy_of, scene, rollouts=self.rollouts, chunk=self.chunk, device=device):
                    touched.append(_touched(state, scene))
                    yield state

            record = record_of(watched(), scene)
            for row, value in enumerate(self._of_scene(scene, record, np.concatenate(touched))):
                if np.isfinite(value):
                    total[row] += value, 1.0
        return total

    def _of_scene(
        self, scene: TrafficScene, record: dict[str, NDArray], touched: NDArray[np.bool_]
    ) -> tuple[float, float, float]:
        """Figures of one scene, NaN for what it cannot tell."""
        rows = np.flatnonzero(scene.valid[:, scene.now])
        scored = ((scene.role & (Role.EGO | Role.PREDICT)) > 0)[rows]
        ade = _displacement(scene, rows[scored], record["pose"][:, scored])
        score = float("nan")
        if scene.num_steps == STEPS and scene.now == PRESENT and abs(scene.dt - STEP_SECONDS) < 1e-6:
            rollouts = Rollouts(record["ids"], record["pose"])
            score = realism(scene, rollouts, year=self.year, expected=None).metrics["metametric"]
        return ade, float(touched[:, scored].mean()), score


def _touched(state: WorldState, scene: TrafficScene) -> NDArray[np.bool_]:
    """[R, S] whether a road user touches another one at some step of the drive, by full boxes."""
    ahead = slice(state.scenes.now + 1, None)
    boxes, size = planes(state.poses[:, :, ahead]), state.scenes.size[state.scene]
    event, _ = contacts(boxes, size, state.there[:, :, ahead], 0)
    return event.any()[:, np.flatnonzero(scene.valid[:, scene.now])].cpu().numpy()


def _displacement(scene: TrafficScene, rows: NDArray[np.int64], pose: NDArray[np.float32]) -> float:
    """min ADE, m: the rollout that is nearest to the recording by the mean over steps and scored road users."""
    ratio = round(scene.dt / STEP_SECONDS)
    steps = np.arange(scene.now + 1, min(scene.num_steps, scene.now + 1 + pose.shape[2] // ratio))
    valid = scene.valid[rows][:, steps]
    if not valid.any():
        return float("nan")
    driven_xy = pose[:, :, ratio - 1 :: ratio, :2][:, :, : len(steps)]
    apart = np.linalg.norm(driven_xy - scene.pose[rows][:, steps, :2], axis=-1)
    return float((apart * valid).sum(axis=(1, 2)).min() / valid.sum())


def figures(total: NDArray[np.float64]) -> dict[str, float]:
    """Means over scenes by name; a figure that no scene can tell is left out."""
    return {name: value / count for name, (value, count) in zip(FIGURES, total.tolist(), strict=True) if count}
