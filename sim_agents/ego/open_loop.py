"""A vector planner as a Planner of the suite: asked once for 4 seconds, scored by PDMS like any other.

The scorer's batches name scenes by NAVSIM token and hold no traffic; the vectors come from a store of the same logs:

    python -m navsim_ext.traffic.build data.source=navsim data.root=... data.split=... output_dir=SCENES
    python -m navsim_ext.evaluation.score planner=path planner.policy.checkpoint=CKPT planner.scenes=SCENES ...

A planner sees a log up to the frame of its token and nothing after it: the future is cut off before it looks. There is
no goal (a log's end is the future); the way follows the scene's route.

Legend: B samples, F = 8 poses. Planners speak of the box centre, the suite of the rear axle.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from navsim_ext.closed_loop.score import rear_axle_offset
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.frames import NUM_FUTURE_POSES, NUM_HISTORY_POSES, POSE_INTERVAL_S
from navsim_ext.scene import SceneBatch
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore
from sim_agents.ego.policy import EgoPolicy

if TYPE_CHECKING:
    from navsim_ext.hidden_cache.schema import HiddenBatch

HISTORY_S = (NUM_HISTORY_POSES - 1) * POSE_INTERVAL_S


class OpenLoop:
    """``policy`` must drive without a goal from the recording; ``scenes`` is a store of the logs that are scored."""

    def __init__(self, policy: EgoPolicy, scenes: str | os.PathLike[str]) -> None:
        if policy.goal == "log":
            raise DataError(f"planner {policy.name}: goal=log is the end of the recording, which it must not see")
        self.policy, self.store, self.name = policy, TrafficStore(scenes), policy.name
        self.fingerprint = Fingerprint(
            "open_loop", {"name": policy.name, "goal": policy.goal},
            {"planner": policy.fingerprint, "scenes": self.store.fingerprint},
        )  # fmt: skip

    @cached_property
    def _steps(self) -> dict[str, tuple[str, int]]:
        """Where each NAVSIM token is: (scene, step)."""
        return {
            token: (scene.id, step) for scene in self.store for step, token in enumerate(scene.frame_tokens) if token
        }

    @torch.no_grad()
    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        """[B,8,3]; a plan that is not finite stays so, and the scorer calls it invalid. Raises MissingError for a token
        that the store does not hold."""
        scenes = [self._scene(token) for token in batch.token]
        device = batch.status.device
        world = World(horizon_s=NUM_FUTURE_POSES * POSE_INTERVAL_S, enter="never", events=(), device=device)
        state = world.reset(scenes)
        self.policy.start(state, scenes)
        return rear_axle(self.policy.plan(state), rear_axle_offset(state).to(device)).float()

    def _scene(self, token: str) -> TrafficScene:
        if token not in self._steps:
            raise MissingError(
                f"{self.store.folder} holds no frame with the token {token}: build the traffic store from the logs "
                "that are scored (data.source=navsim)"
            )
        name, step = self._steps[token]
        return until(self.store.load(name), step)


def until(scene: TrafficScene, step: int) -> TrafficScene:
    """The scene as known at a step: the history that planners get before it, nothing after it. Its goal, the state of
    its law and the place of its pictures go."""
    first = max(0, step - round(HISTORY_S / scene.dt))
    span = slice(first, step + 1)
    timed = ("pose", "speed", "valid", "z", "source_heading", "light_state")
    values = {name: getattr(scene, name)[:, span] for name in timed if getattr(scene, name) is not None}
    for name in ("command", "ego_dynamics"):
        if getattr(scene, name) is not None:
            values[name] = getattr(scene, name)[span]
    token = scene.frame_tokens[step] if scene.frame_tokens else str(step)
    return replace(
        scene, id=f"{scene.id}@{token}", now=step - first, goal=None, law={}, images={},
        frame_tokens=scene.frame_tokens[span], **values,
    )  # fmt: skip


def rear_axle(poses: Tensor, offset: Tensor) -> Tensor:
    """Rear-axle poses [B,F,3] in the frame of the present rear axle, of box centres in the frame of the present centre,
    which lies ``offset`` [B] m ahead of it."""
    heading, a = poses[..., 2], offset[:, None]
    x = poses[..., 0] + a - a * torch.cos(heading)
    y = poses[..., 1] - a * torch.sin(heading)
    return torch.stack([x, y, torch.remainder(heading + math.pi, 2 * math.pi) - math.pi], dim=-1)
