"""Where everybody is, where everybody has been, and who entered and left when.

Legend: S scenes, R rollouts, B = S R worlds (scene by scene: world b belongs to scene b // R), N road users, C columns
of 0.1 s: ``now`` + 1 of history, then as many as the drive may last. ``step`` counts from now, so column now + step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS
from navsim_ext.closed_loop.scenes import WorldScenes


@dataclass
class WorldState:
    """The state of B worlds. ``World.step`` writes in place: :meth:`fork` before two ways are tried from one state."""

    scenes: WorldScenes
    rollouts: int
    scene: Int64[Tensor, " B"]  # number of the world's scene
    poses: Float32[Tensor, "B N C 3"]  # recorded up to now, driven after it; 0 where not ``there``
    there: Bool[Tensor, "B N C"]  # in the world at that column
    step: int  # steps of 0.1 s since now
    present: Bool[Tensor, "B N"]  # at this step
    speed: Float32[Tensor, "B N"]  # m/s along the heading over the last 0.1 s
    removed_at: Int64[Tensor, "B N"]  # step at which a road user was declared removed, -1: it was not
    entered_at: Int64[Tensor, "B N"]  # step at which it entered, -1: not (yet) entered

    @property
    def column(self) -> int:
        return self.scenes.now + self.step

    @property
    def pose(self) -> Float32[Tensor, "B N 3"]:
        """[B,N,3] present poses."""
        return self.poses[:, :, self.column]

    @property
    def steps_left(self) -> int:
        return self.poses.shape[2] - 1 - self.column

    def displacement(self) -> Float32[Tensor, "B N 2"]:
        """[B,N,2] m over the last token; where the past does not reach back that far, 0.5 s at the present speed."""
        column = self.column
        past = max(column - TOKEN_STEPS, 0)
        moved = self.pose[..., :2] - self.poses[:, :, past, :2]
        heading = self.pose[..., 2].contiguous()
        span = STEP_S * TOKEN_STEPS
        ahead = (self.speed * span)[..., None] * torch.stack((torch.cos(heading), torch.sin(heading)), dim=-1)
        known = self.there[:, :, past] if past == column - TOKEN_STEPS else torch.zeros_like(self.present)
        return torch.where(known[..., None], moved, ahead)

    def velocity(self) -> Float32[Tensor, "B N 2"]:
        """[B,N,2] m/s over the last 0.1 s, 0 where there is no step before."""
        column = self.column
        if column == 0:
            return torch.zeros_like(self.pose[..., :2])
        moved = (self.pose[..., :2] - self.poses[:, :, column - 1, :2]) / STEP_S
        return torch.where((self.there[:, :, column] & self.there[:, :, column - 1])[..., None], moved, 0.0)

    def past(self, steps: int) -> tuple[Float32[Tensor, "B N steps 3"], Bool[Tensor, "B N steps"]]:
        """(poses [B,N,steps,3], there [B,N,steps]) up to and with the present; raises IndexError beyond the record."""
        first = self.column - steps + 1
        if first < 0:
            raise IndexError(f"{steps} steps of past were asked for, there are {self.column + 1}")
        return self.poses[:, :, first : self.column + 1], self.there[:, :, first : self.column + 1]

    def ego_index(self) -> tuple[Int64[Tensor, " B"], Int64[Tensor, " B"]]:
        """(worlds [B], rows [B]) that pick the egos out of [B,N,...]."""
        return torch.arange(len(self.scene), device=self.scene.device), self.scenes.ego[self.scene]

    def fork(self) -> WorldState:
        """A copy that can go another way."""
        copied = ("poses", "there", "present", "speed", "removed_at", "entered_at")
        return replace(self, **{name: getattr(self, name).clone() for name in copied})
