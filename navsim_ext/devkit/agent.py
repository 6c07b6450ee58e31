"""A trained planner as a NAVSIM agent (v1.1 and v2.2). Needs the devkit: import it only in its environment.

NAVSIM's configuration then reads

    _target_: navsim_ext.devkit.agent.TriviumAgent
    planner: {_target_: stage2_dit.inference.load_trajectory_planner, checkpoint: .../best.ckpt}
    encoder: {_target_: stage1_vlm.live.LiveSceneEncoder, model_path: .../stage1, dtype: bfloat16}

(``dtype`` as in the export that the planner was trained on.) NAVSIM hands an agent the last four ego states and decoded
pictures, but no token, so hidden states are computed from the pictures, and initial noise is keyed by the ego states;
a planner that was trained on another VLM's states refuses ``encoder`` by fingerprint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from navsim.agents.abstract_agent import AbstractAgent
from navsim.common.dataclasses import AgentInput, SensorConfig, Trajectory
from nuplan.planning.simulation.trajectory.trajectory_sampling import TrajectorySampling

from navsim_ext.devkit.agent_input import scene_batch
from navsim_ext.frames import NUM_FUTURE_POSES, POSE_INTERVAL_S
from navsim_ext.hidden_cache.source import SceneEncoder
from navsim_ext.planners import Planner


class TriviumAgent(AbstractAgent):
    """Plans with any :class:`navsim_ext.planners.Planner`; ``encoder`` gives hidden states to those that use them."""

    def __init__(
        self,
        planner: Planner,
        encoder: SceneEncoder | None = None,
        cameras: Sequence[str] = ("CAM_F0",),
        trajectory_sampling: TrajectorySampling | None = None,
    ) -> None:
        sampling = trajectory_sampling or TrajectorySampling(
            num_poses=NUM_FUTURE_POSES, interval_length=POSE_INTERVAL_S
        )
        # v2.2's base class takes the sampling, v1.1's does not; both are torch modules.
        try:
            super().__init__(trajectory_sampling=sampling)
        except TypeError:
            super().__init__()
        if encoder is not None and hasattr(planner, "require_hidden"):
            planner.require_hidden(encoder.fingerprint)
        self._trajectory_sampling = sampling
        self._planner, self._encoder, self._cameras = planner, encoder, tuple(cameras)

    def name(self) -> str:
        return f"trivium_{self._planner.name}"

    def initialize(self) -> None:
        """Nothing to do: planner and encoder came with their weights."""

    def get_sensor_config(self) -> SensorConfig:
        """The cameras that the encoder looks at, in the current frame only; no lidar."""
        wanted = self._cameras if self._encoder is not None else ()
        names = ("cam_f0", "cam_l0", "cam_l1", "cam_l2", "cam_r0", "cam_r1", "cam_r2", "cam_b0")
        current: list[int] = [3]
        return SensorConfig(**{n: current if n.upper() in wanted else False for n in names}, lidar_pc=False)

    def compute_trajectory(self, agent_input: AgentInput) -> Trajectory:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            scenes = scene_batch(agent_input, self._cameras if self._encoder is not None else (), Path(folder))
            hidden = None if self._encoder is None else self._encoder(scenes)
            poses = self._planner.plan(scenes, hidden)[0].cpu().numpy().astype(np.float32)
        return Trajectory(poses, self._trajectory_sampling)
